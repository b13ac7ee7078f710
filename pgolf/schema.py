"""The whole tree of settings: each component's section, and the run's own. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field

from pgolf.data.config import DataConfig
from pgolf.eval.config import EvalConfig
from pgolf.model.config import LossConfig, ModelConfig
from pgolf.optim.config import AverageConfig, OptimConfig, ScheduleConfig
from pgolf.quant.config import QuantConfig

CHOICES = {
    "compile": ("auto", "on", "off"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "fp32", "bf16"),
    "kernels": ("auto", "triton", "reference"),
}


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, how often it reports, on what it runs."""

    seed: int = 1337  # of every generator: weights, data order where the loader uses one
    iterations: int = 20000  # upper bound; the wall clock usually ends the run first
    max_wallclock_seconds: float = 600.0  # training time without validation; 0 = no cap
    reserve_ms: int = 0  # taken off the cap for calibration and export
    warmup_steps: int = 20  # compile and prime, then everything is put back; outside the clock
    val_loss_every: int = 1000  # steps between validations; 0 = only at the end
    train_log_every: int = 200  # steps between log lines; 0 = none
    compile: str = "auto"  # torch.compile: auto (on with a GPU), on, off
    fullgraph: bool = True  # a graph break is an error
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # activations: auto (bf16 with a GPU), fp32, bf16
    kernels: str = "auto"  # auto (Triton with a GPU), triton, reference
    out_dir: str = "runs"  # folder of run folders
    run_id: str = ""  # name of this run's folder; empty = random

    def problems(self) -> list[str]:
        low = {"seed": 0, "iterations": 1, "max_wallclock_seconds": 0, "reserve_ms": 0, "warmup_steps": 0}
        low |= {"val_loss_every": 0, "train_log_every": 0}
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.max_wallclock_seconds and self.reserve_ms >= 1000 * self.max_wallclock_seconds:
            cap = f"max_wallclock_seconds={self.max_wallclock_seconds}"
            out.append(f"reserve_ms={self.reserve_ms} must be below the cap of {cap}, or no step is left")
        if self.run_id in (".", "..") or set(self.run_id) & set("/\\:"):
            out.append(f"run_id={self.run_id!r} must be a plain folder name")
        return out


@dataclass(frozen=True)
class RunConfig:
    """One run, completely. `pgolf.config.digest` identifies it."""

    preset: str = ""  # the system that the run starts from
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def problems(self) -> list[str]:
        """What only several sections together can tell."""
        out = []
        length = self.eval.seq_len or self.data.seq_len
        if self.eval.stride > length:
            out.append(f"eval.stride={self.eval.stride} must be at most the evaluated length {length}: gaps otherwise")
        if self.quant.late_qat and self.quant.matrix != "int6":
            fix = "set quant.matrix=int6 or LATE_QAT_THRESHOLD=0"
            out.append(f"quant.late_qat rounds to the int6 grid, but quant.matrix={self.quant.matrix!r}: {fix}")
        return out
