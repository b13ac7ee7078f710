"""Settings of optimisers, schedule and weight averaging. No torch here (see pgolf/model/config.py)."""

from __future__ import annotations

from dataclasses import dataclass, field

SCHEDULE_NAMES = (
    "linear", "cosine", "golden", "tidal", "breathing", "whale", "circadian", "cosmo", "d2z", "constant",
)  # fmt: skip


@dataclass(frozen=True)
class MuonConfig:
    lr: float = 0.04  # MATRIX_LR
    lr_late: float | None = None  # blocks >= num_layers // 2; None = lr
    momentum: float = 0.95  # after its warm-up
    momentum_start: float = 0.85  # at step 0
    momentum_warmup_steps: int = 500  # steps from momentum_start to momentum, linear
    ns_steps: int = 5  # Newton-Schulz iterations
    weight_decay: float = 0.0  # decoupled, times the scheduled lr, before the update
    # Over several ranks: "shard" orthogonalises a share of the matrices on each and gathers the results (Parallel
    # Muon), "replicate" averages all gradients and does everything on every rank, as DistributedDataParallel would
    parallel: str = "shard"
    exchange_dtype: str = "fp32"  # of gradients and updates between ranks, and of the momentum: fp32 or bf16

    def problems(self) -> list[str]:
        out = [] if self.lr >= 0 and self.ns_steps >= 1 else [f"lr={self.lr} >= 0 and ns_steps={self.ns_steps} >= 1"]
        if not 0 <= self.momentum < 1 or not 0 <= self.momentum_start < 1:
            out.append(f"momentum={self.momentum} and momentum_start={self.momentum_start} must be in [0, 1)")
        if self.parallel not in ("shard", "replicate"):
            out.append(f"parallel={self.parallel!r} must be shard or replicate")
        if self.exchange_dtype not in ("fp32", "bf16"):
            out.append(f"exchange_dtype={self.exchange_dtype!r} must be fp32 or bf16")
        return out


@dataclass(frozen=True)
class AdamWConfig:
    embed_lr: float = 0.6  # tables when the head is untied
    tied_embed_lr: float = 0.05  # tables when the head is tied
    head_lr: float = 0.008  # untied head
    scalar_lr: float = 0.04  # gains, scales, mixes, gates
    scalar_lr_late: float | None = None  # vectors of blocks >= num_layers // 2; None = scalar_lr
    resid_lambda_mult: float = 5.0  # learning rate of the residual lambdas = this * scalar_lr
    beta1: float = 0.9  # first moment
    beta2: float = 0.95  # second moment
    eps: float = 1e-8  # added to the root of the second moment
    weight_decay: float = 0.0  # not on the head, not on residual lambdas

    def problems(self) -> list[str]:
        ok = 0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0
        return [] if ok else [f"beta1={self.beta1}, beta2={self.beta2} must be in [0, 1), eps={self.eps} above 0"]


@dataclass(frozen=True)
class ClipConfig:
    norm: float = 0.3  # largest L2 norm of the whole gradient
    scope: str = "global"  # "global": norm of the averaged gradient; "rank": each rank clips its own before averaging

    def problems(self) -> list[str]:
        out = [] if self.norm > 0 else [f"norm={self.norm} must be positive (or set the section to none)"]
        return out if self.scope in ("global", "rank") else [*out, f"scope={self.scope!r} must be global or rank"]


@dataclass(frozen=True)
class OptimConfig:
    muon: MuonConfig = field(default_factory=MuonConfig)
    adamw: AdamWConfig = field(default_factory=AdamWConfig)
    side_matrix: str = "muon"  # who trains bigram / value-embedding projections: "muon" or "adamw" (scalar group)
    decoder_lr_mult: float = 1.0  # on Muon and scalar lr of decoder blocks
    clip: ClipConfig | None = None

    def problems(self) -> list[str]:
        ok = self.side_matrix in ("muon", "adamw")
        return [] if ok else [f"side_matrix={self.side_matrix!r} must be muon or adamw"]


@dataclass(frozen=True)
class ScheduleConfig:
    """The factor on every learning rate. "linear" warms down by wall clock, "d2z" too; the others follow `by`."""

    kind: str = "linear"  # linear, cosine, golden, tidal, breathing, whale, circadian, cosmo, d2z or constant
    by: str = "step"  # progress of the shapes: "step" = step / iterations, "time" = elapsed / wall-clock cap
    warmdown_iters: int = 1200  # steps of the linear fall to 0
    # "linear" guesses the steps left from the mean step time; slow first steps would switch the warmdown on at once. So
    # these run at factor 1, unless half of the cap passes, and their first half is left out of the mean; 0 = baseline
    ignore_first_steps: int = 10
    cosine_cycles: int = 1  # restarts of the cosine
    d2z_warmup_steps: int = 200  # steps of the linear rise before the fall to 0

    @property
    def skip_steps(self) -> int:
        """First steps that the mean step time leaves out; the other ignored ones make its first estimate."""
        return self.ignore_first_steps // 2

    def problems(self) -> list[str]:
        ok = self.kind in SCHEDULE_NAMES
        out = [] if ok else [f"kind={self.kind!r} must be one of {', '.join(SCHEDULE_NAMES)}"]
        if self.by not in ("step", "time"):
            out.append(f"by={self.by!r} must be step or time")
        return out if self.cosine_cycles >= 1 else [*out, f"cosine_cycles={self.cosine_cycles} must be at least 1"]


@dataclass(frozen=True)
class EmaConfig:
    decay: float = 0.997  # weight of the old average at each step

    def problems(self) -> list[str]:
        return [] if 0 <= self.decay < 1 else [f"decay={self.decay} must be in [0, 1)"]


@dataclass(frozen=True)
class SwaConfig:
    """Mean of snapshots taken every `every` steps while the lr scale is below `threshold`."""

    every: int = 50  # steps between snapshots
    threshold: float = 0.2  # lr scale below which snapshots are taken
    source: str = "ema"  # what a snapshot copies: "ema" or "raw" weights

    def problems(self) -> list[str]:
        out = [] if self.every >= 1 else [f"every={self.every} must be at least 1"]
        return out if self.source in ("ema", "raw") else [*out, f"source={self.source!r} must be ema or raw"]


@dataclass(frozen=True)
class AverageConfig:
    """Which weights are exported: SWA if on and it has two snapshots, else EMA if on, else the last ones."""

    ema: EmaConfig | None = None
    swa: SwaConfig | None = None

    def problems(self) -> list[str]:
        if self.swa and self.swa.source == "ema" and not self.ema:
            return ["swa.source=ema needs the ema section: set EMA_ENABLED=1 or swa.source=raw"]
        return []
