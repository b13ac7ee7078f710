"""Settings of quantisation and packing. No torch here (see pgolf/model/config.py)."""

from __future__ import annotations

from dataclasses import dataclass

QUANT_KINDS = ("int6", "int8", "fp16", "float")
CODEC_NAMES = ("brotli", "zstd", "lzma", "zlib", "auto")


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
    codec: str = "brotli"  # brotli, zstd, lzma, zlib, or auto: the smallest in each stream
    level: int = -1  # -1: the codec's strongest level
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
        if self.scale_floor < 0:
            out.append(f"scale_floor={self.scale_floor} must not be negative")
        return out
