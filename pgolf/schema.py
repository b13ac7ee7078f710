"""The whole tree of settings: each component's section, and the run's own. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from pgolf.data.config import DataConfig
from pgolf.eval.config import EvalConfig
from pgolf.model.config import LossConfig, ModelConfig
from pgolf.ngram.config import NgramConfig
from pgolf.optim.config import AverageConfig, OptimConfig, ScheduleConfig
from pgolf.quant.config import QuantConfig
from pgolf.ttt.config import TttConfig

CHOICES = {
    "compile": ("auto", "on", "off"),
    "device": ("auto", "cpu", "cuda"),
    "dtype": ("auto", "fp32", "bf16"),
}
PATHS = ("auto", "triton", "reference")


@dataclass(frozen=True)
class TrainConfig:
    """The run: how long, how often it reports, on what it runs."""

    seed: int = 1337  # of every generator: weights, data order where the loader uses one
    iterations: int = 20000  # upper bound; the wall clock usually ends the run first
    max_wallclock_seconds: float = 600.0  # training time without validation; 0 = no cap
    reserve_ms: int = 0  # taken off the cap for calibration; 0 = what it took in a trial (nothing without calibration)
    warmup_steps: int = 20  # compile and prime, then everything is put back; outside the clock
    val_loss_every: int = 1000  # steps between validations; 0 = only at the end
    train_log_every: int = 200  # steps between log lines; 0 = none
    compile: str = "auto"  # torch.compile: auto (on with a GPU), on, off
    fullgraph: bool = True  # a graph break is an error
    fail_on_recompile: bool = False  # a step that compiles again after warm-up ends the run; else one warning
    collective_timeout_s: float = 120.0  # in steps of training, how long a rank may keep the others waiting
    device: str = "auto"  # auto, cpu, cuda
    dtype: str = "auto"  # activations: auto (bf16 with a GPU), fp32, bf16
    out_dir: str = "runs"  # folder of run folders
    run_id: str = ""  # name of this run's folder; empty = random
    checkpoint_every: int = 0  # steps between checkpoints; 0 = not by steps. There is always one after the last step
    checkpoint_seconds: float = 120.0  # training seconds between checkpoints; 0 = not by time
    keep_checkpoints: int = 2  # the newest that stay on the disk; 0 = none is written, not even after the last step
    resume: str = ""  # "auto" = the newest checkpoint of out_dir/run_id, if any; or a run's folder or checkpoint

    def problems(self) -> list[str]:
        low = {"seed": 0, "iterations": 1, "max_wallclock_seconds": 0, "reserve_ms": 0, "warmup_steps": 0}
        low |= {"val_loss_every": 0, "train_log_every": 0, "collective_timeout_s": 1}
        low |= {"checkpoint_every": 0, "checkpoint_seconds": 0, "keep_checkpoints": 0}
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.max_wallclock_seconds and self.reserve_ms >= 1000 * self.max_wallclock_seconds:
            cap = f"max_wallclock_seconds={self.max_wallclock_seconds}"
            out.append(f"reserve_ms={self.reserve_ms} must be below the cap of {cap}, or no step is left")
        if self.run_id in (".", "..") or set(self.run_id) & set("/\\:"):
            out.append(f"run_id={self.run_id!r} must be a plain folder name")
        if self.resume == "auto" and not self.run_id:
            out.append("resume=auto needs to know of which run: set run_id (RUN_ID), the same at every start")
        return out


@dataclass(frozen=True)
class KernelsConfig:
    """Which ops run their Triton kernels, and how weights reach them. An op's `auto` is what `default` says."""

    default: str = "auto"  # of every op: auto (Triton with a GPU), triton, reference (plain torch)
    attention: str = "auto"  # also a library's kernel: fa3, cudnn
    bigram: str = "auto"  # front of the network: embeddings, hashed n-grams, norm, smear
    cross_entropy: str = "auto"  # softcapped loss
    flat_update: str = "auto"  # Muon's update of the weights
    int6: str = "auto"  # fake quantisation and the weight cast
    mlp: str = "auto"  # up projection with its activation, and its derivative
    newton_schulz: str = "auto"  # Muon's orthogonalisation
    qk_prep: str = "auto"  # qk-norm, rotary embedding, gain
    residual: str = "auto"  # sums of streams and RMS norms
    # Casts matrices to the activations' dtype once a step, outside the compiled graph, where late QAT is an argument
    # of the cast and no second graph: auto (with a GPU), on, off
    weight_cast: str = "auto"
    # Multiplies attention and MLP output scales into the rows of the output projections: the same product, without
    # the column sums over activations in backward. Rounds the scaled weight to bf16 and not the scaled activation
    fold_scales: bool = False

    def ops(self) -> dict[str, str]:
        """What was asked for, by op."""
        skip = ("default", "weight_cast", "fold_scales")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}

    def problems(self) -> list[str]:
        out = []
        for name, value in {"default": self.default, **self.ops()}.items():
            allowed = (*PATHS, "fa3", "cudnn") if name == "attention" else PATHS
            if value not in allowed:
                out.append(f"{name}={value!r} must be one of {', '.join(allowed)}")
        if self.weight_cast not in ("auto", "on", "off"):
            out.append(f"weight_cast={self.weight_cast!r} must be one of auto, on, off")
        return out


@dataclass(frozen=True)
class RunConfig:
    """One run, completely. `pgolf.config.digest` identifies it."""

    preset: str = ""  # the system that the run starts from
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    quant: QuantConfig = field(default_factory=QuantConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    ttt: TttConfig | None = None
    ngram: NgramConfig | None = None

    def problems(self) -> list[str]:
        """What only several sections together can tell."""
        out = []
        length = self.eval.seq_len or self.data.seq_len
        if self.eval.stride > length:
            out.append(f"eval.stride={self.eval.stride} must be at most the evaluated length {length}: gaps otherwise")
        if self.ttt and self.ttt.kind != "sgd" and self.ttt.lora.widest_chunk > (self.ttt.seq_len or length):
            chunk = self.ttt.lora.widest_chunk
            out.append(
                f"ttt.lora.chunk={chunk} must be at most the window of {self.ttt.seq_len or length} (ttt.seq_len)"
            )
        if self.eval.documents and self.eval.documents.stride > length:
            out.append(f"eval.documents.stride={self.eval.documents.stride} must be at most {length}: gaps otherwise")
        cap, eggroll = self.train.max_wallclock_seconds, self.quant.eggroll
        if cap and eggroll and eggroll.seconds >= cap / 2:
            out.append(f"quant.eggroll.seconds={eggroll.seconds} must be below half of the training time of {cap} s")
        if self.kernels.fold_scales and self.model.wiring.sandwich_norm:
            out.append("kernels.fold_scales with model.wiring.sandwich_norm: the norm would undo it; set one to false")
        return out
