"""Settings of quantisation and packing, and the small texts in them. No torch here (see pgolf/model/config.py)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

GRID_KINDS = ("int8", "int7", "int6", "int5", "int4", "ternary")
QUANT_KINDS = (*GRID_KINDS, "fp16", "float")
CODEC_NAMES = ("brotli", "zstd", "lzma", "zlib", "auto")
FACTORS = ("asym", "int4", "int8", "fp16")
SEARCHES = ("best", "best-row")
# What "auto" is: the rule that the public scripts have for the kind, and BitNet's for ternary.
AUTO_CLIPS = {"int8": "0.9999984", "ternary": "mean"}
GPTQ_VARIANTS = ("full", "v7")
CLIP_ERRORS = ("hessian", "rows", "matrix")


class Clip(NamedTuple):
    """Which magnitude a row's outermost integer stands for.

    rule: "max" of |w|; "quantile" of |w|; "sd", `value` standard deviations; "mean" of |w|; or a search for the least
    squared error among five of the former, "best" with one winner a matrix, "best-row" with one a row.
    """

    rule: str
    value: float = 0.0


def parse_clip(text: str, kind: str = "") -> Clip:
    """`text` as a rule; "auto" is the one of `kind`. ValueError says what would be right."""
    if text == "auto":
        text = AUTO_CLIPS.get(kind, "max")
    if text in ("max", "mean", *SEARCHES):
        return Clip(text)
    rule, number = ("sd", text[:-2]) if text.endswith("sd") else ("quantile", text)
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not (0 < value < 1e6 if rule == "sd" else 0 < value <= 1):
        raise ValueError("must be auto, max, mean, best, best-row, a quantile in (0, 1] or standard deviations as 12sd")
    return Clip(rule, value)


class Override(NamedTuple):
    """Parameters whose name fits `pattern` are stored as `kind` and clipped by `clip`; "" leaves what the role says."""

    pattern: str
    kind: str
    clip: str


def parse_overrides(text: str) -> list[Override]:
    """`PATTERN=KIND`, `PATTERN=KIND:CLIP` or `PATTERN=:CLIP`, comma-separated. ValueError names the bad one."""
    out = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        pattern, equals, what = part.partition("=")
        kind, colon, clip = what.partition(":")
        if not (pattern and equals and what) or (colon and not clip):
            raise ValueError(f"has {part!r}, expected PATTERN=KIND, PATTERN=KIND:CLIP or PATTERN=:CLIP")
        if kind and kind not in QUANT_KINDS:
            raise ValueError(f"has {part!r}: {kind} must be one of {', '.join(QUANT_KINDS)}")
        if clip:
            try:
                parse_clip(clip)
            except ValueError as err:
                raise ValueError(f"has {part!r}: {clip} {err}") from None
        out.append(Override(pattern, kind, clip))
    return out


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
class CrownQConfig:
    """CROWN-Q: a penalty coef / 12 * sum (w * step)^2 on the matrices, for the noise that rounding will make."""

    coef: float = 0.01
    threshold: float = 0.15  # from the first step whose lr scale is below

    def problems(self) -> list[str]:
        return [] if self.coef > 0 else [f"coef={self.coef} must be above 0; quant.crown_q=none turns it off"]


@dataclass(frozen=True)
class LowRankConfig:
    """LQER: the matrices that rounding hurts most get a low-rank correction of what it left over."""

    rank: int = 4
    top_k: int = 3  # how many matrices
    select: str = "error"  # the largest error, or gain: the largest part of it that the factors take away
    factors: str = "asym"  # how they are stored: asym (2 and 4 bits, as PR #1797), int4, int8 or fp16
    group: int = 64  # values of the right factor that share a scale, of asym
    scope: str = "*"  # names that may be chosen, as a pattern

    def problems(self) -> list[str]:
        out = [f"{n}={getattr(self, n)} must be at least 1" for n in ("rank", "top_k", "group") if getattr(self, n) < 1]
        for name, known in (("select", ("error", "gain")), ("factors", FACTORS)):
            if getattr(self, name) not in known:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        return out


@dataclass(frozen=True)
class PruneConfig:
    """Zeroes as many integers of 1 and -1, the smallest first, as bring code and weights to a size."""

    target_mb: float = 15.9  # in 1,000,000 bytes

    def problems(self) -> list[str]:
        return [] if self.target_mb > 0 else [f"target_mb={self.target_mb} must be above 0"]


@dataclass(frozen=True)
class QuantConfig:
    """How weights become bytes. `matrix` and `embed` name what the roles of those names are stored as."""

    matrix: str = "int6"  # attention, MLP and side projections
    embed: str = "int8"  # token, bigram and value tables, untied head
    # What a row's outermost integer stands for: auto (int8 0.9999984, ternary mean, else max), max, a quantile of |w|
    # such as 0.9995, standard deviations such as 12sd, mean, best or best-row (least squared error of five).
    matrix_clip: str = "auto"
    embed_clip: str = "auto"  # the same for what `embed` names
    # By name, among what is not fp16 anyway: PATTERN=KIND, PATTERN=KIND:CLIP or PATTERN=:CLIP, comma-separated, as in
    # blocks.0.*=int8,*.mlp.*=int5:12sd; the last that fits counts.
    overrides: str = ""
    keep_numel: int = 65536  # float tensors of at most this many elements are stored as fp16
    # Floor on a row's step: step >= floor / qmax. The challenge's scripts all have 1.0, which puts every row with
    # max |w| < 1 on a fixed grid and so acts as a rate control; 0 is the plain relative grid.
    scale_floor: float = 0.0
    codec: str = "brotli"  # brotli, zstd, lzma, zlib, or auto: the smallest in each stream
    level: int = -1  # -1: the codec's strongest level
    gptq: GptqConfig | None = None
    eggroll: EggrollConfig | None = None
    late_qat: LateQatConfig | None = None
    crown_q: CrownQConfig | None = None
    optrot: bool = False  # matrices with a power of two as number of rows are rounded in a Hadamard basis
    low_rank: LowRankConfig | None = None
    prune: PruneConfig | None = None

    def problems(self) -> list[str]:
        out = []
        for name in ("matrix", "embed"):
            if getattr(self, name) not in QUANT_KINDS:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(QUANT_KINDS)}")
        for name, parse in (("matrix_clip", parse_clip), ("embed_clip", parse_clip), ("overrides", parse_overrides)):
            try:
                parse(getattr(self, name))
            except ValueError as err:
                out.append(f"{name}={getattr(self, name)!r} {err}")
        if self.codec not in CODEC_NAMES:
            out.append(f"codec={self.codec!r} must be one of {', '.join(CODEC_NAMES)}")
        if self.gptq and self.matrix in ("fp16", "float"):
            out.append(f"gptq rounds matrices to integers, but matrix={self.matrix!r}: gptq=none or an integer kind")
        if self.eggroll and {self.matrix, self.embed} <= {"fp16", "float"}:
            out.append(f"eggroll changes integers, but matrix={self.matrix!r}, embed={self.embed!r}: set eggroll=none")
        if self.scale_floor < 0:
            out.append(f"scale_floor={self.scale_floor} must not be negative")
        return out or self._late_qat_problems()

    def _late_qat_problems(self) -> list[str]:
        """What keeps training from rounding as the export does."""
        if not self.late_qat:
            return []
        off = "or LATE_QAT_THRESHOLD=0"
        if self.matrix not in GRID_KINDS:
            return [f"late_qat rounds to a grid, but matrix={self.matrix!r} has none: set it to int6 {off}"]
        clip = parse_clip(self.matrix_clip, self.matrix)
        if self.optrot:
            return [f"late_qat rounds what optrot=true would rotate first: set optrot=false {off}"]
        if clip.rule in ("sd", "mean"):
            return [f"late_qat can follow max and quantiles, not matrix_clip={self.matrix_clip!r}: change it {off}"]
        return []
