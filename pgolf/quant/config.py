"""Settings of quantisation and packing. No torch here (see pgolf/model/config.py)."""

from __future__ import annotations

from dataclasses import dataclass

QUANT_KINDS = ("int6", "int8", "fp16", "float")
CODEC_NAMES = ("brotli", "zstd", "lzma", "zlib")
GPTQ_VARIANTS = ("full", "v7")
CLIP_ERRORS = ("hessian", "rows", "matrix")


@dataclass(frozen=True)
class GeneratedConfig:
    """Calibration on text that the model writes itself, one token after the other: no data is needed (PR #1019)."""

    sequences: int = 64  # of data.seq_len tokens, over all ranks together
    rows: int = 8  # sequences that a rank writes at a time
    temperature: float = 0.8

    def problems(self) -> list[str]:
        low = {"sequences": 1, "rows": 1}
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        return out if self.temperature > 0 else [*out, f"temperature={self.temperature} must be above 0"]


@dataclass(frozen=True)
class GptqConfig:
    """Rounds the columns of linear layers one after the other, each making good the errors before it (GPTQ)."""

    batches: int = 256  # training micro-batches of all ranks together that the Hessians are made of; fewer if time ends
    # Added to the Hessian's diagonal, times its mean. PR #1130 adds 0.01 twice, which is 0.0201 once
    damp: float = 0.0201
    block: int = 128  # columns between two corrections of all that follow; changes the time, not the result
    variant: str = "full"  # full, or v7: rising diagonal and H^-1 unconditioned, as PR #401 v7 has it
    # Error that chooses each row's clip: hessian (e^T H e), rows (squares; PR #401 v7), matrix (squares, one choice for
    # all rows; PR #1130)
    clip_by: str = "hessian"
    skip_mlp: bool = False  # MLP matrices are rounded plainly
    generated: GeneratedConfig | None = None  # in place of the training stream

    def problems(self) -> list[str]:
        low = {"batches": 1, "block": 1}
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        if not 0 < self.damp <= 1:
            out.append(f"damp={self.damp} must be in (0, 1]: a Hessian of few tokens cannot be inverted without")
        for name, allowed in {"variant": GPTQ_VARIANTS, "clip_by": CLIP_ERRORS}.items():
            if getattr(self, name) not in allowed:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        return out


@dataclass(frozen=True)
class EggrollConfig:
    """Tries changes by one step to random entries of quantised tensors, and keeps what lowers the training loss."""

    seconds: float = 10.0  # of training time
    probes: int = 0  # at most so many pairs of trials; 0 = until the time is over
    indices: int = 1024  # entries of one tensor that a trial changes
    sequences: int = 8  # that a trial is scored on, over all ranks together; at least one a rank

    def problems(self) -> list[str]:
        low = {"probes": 0, "indices": 1, "sequences": 1}
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        return out if self.seconds > 0 else [*out, f"seconds={self.seconds} must be above 0"]


@dataclass(frozen=True)
class LateQatConfig:
    """Fake-quantises the matrices in the forward pass from the first step whose lr scale is below `threshold`."""

    threshold: float = 0.15  # above 1: from the first step


@dataclass(frozen=True)
class QuantConfig:
    """How weights become bytes. `matrix` and `embed` name what the roles of those names are stored as."""

    matrix: str = "int6"  # attention, MLP and side projections
    embed: str = "int8"  # token, bigram and value tables, untied head
    keep_numel: int = 65536  # float tensors of at most this many elements are stored as fp16
    # Floor on a row's step: step >= floor / qmax. The challenge's scripts all have 1.0, which puts every row with
    # max |w| < 1 on a fixed grid and so acts as a rate control; 0 is the plain relative grid.
    scale_floor: float = 0.0
    int8_clip: float = 0.9999984  # quantile of |w| per row that int8 keeps
    codec: str = "brotli"  # brotli, zstd, lzma or zlib
    level: int = -1  # -1: the codec's strongest level
    gptq: GptqConfig | None = None
    eggroll: EggrollConfig | None = None
    late_qat: LateQatConfig | None = None

    def problems(self) -> list[str]:
        out = []
        for name in ("matrix", "embed"):
            if getattr(self, name) not in QUANT_KINDS:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(QUANT_KINDS)}")
        if self.codec not in CODEC_NAMES:
            out.append(f"codec={self.codec!r} must be one of {', '.join(CODEC_NAMES)}")
        if not 0 < self.int8_clip <= 1:
            out.append(f"int8_clip={self.int8_clip} must be in (0, 1]")
        if self.gptq and self.matrix in ("fp16", "float"):
            out.append(f"gptq rounds matrices to integers, but matrix={self.matrix!r}: gptq=none or an integer kind")
        if self.eggroll and {self.matrix, self.embed} <= {"fp16", "float"}:
            out.append(f"eggroll changes integers, but matrix={self.matrix!r}, embed={self.embed!r}: set eggroll=none")
        if self.scale_floor < 0:
            out.append(f"scale_floor={self.scale_floor} must not be negative")
        return out
