"""One GPU's share of a training step: the trainer's own step on random tokens, checked and timed.

    found = Bench(PRESETS["rat_rod_green"](), ["eager", "compile+kernels"], "cuda").run(rounds=10)
    found["compile+kernels", True].timing.median        milliseconds, with the optimiser

`Trainer.step` does the work: weight cast, forward, backward, clipping, Muon and AdamW; then the averages. The loader
and the all-reduce over GPUs are not in it. Learning rates are 0, so that weights stay and every step does the same. All
variants of a preset take turns. Before and after the timing each must give the right loss, gradients and update
(bench/step_check.py), and nothing may be compiled once the trainer's own warm-up is over.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pgolf import runtime
from pgolf.clock import TimeLedger
from pgolf.config import RunConfig
from pgolf.data.batch import Batch
from pgolf.dist import Dist, Rank
from pgolf.kernels._op import paths
from pgolf.kernels._triton import triton
from pgolf.model.gpt import GPT
from pgolf.optim.muon import momentum_at
from pgolf.presets import PRESETS
from pgolf.train import Trainer

from .gpus import GPUS
from .ledger import ledger
from .providers import Failure
from .step_check import CHECKED, PROGRESS, Truth, check_update
from .timing import HostClock, Timing, roof_ms, time_interleaved
from .trace import share_rows
from .variants import VARIANTS
from .weights import look_trained_

WARM_UP = 3  # steps that the trainer's warm-up takes: the first compiles, the others show that one was enough
BATCHES = 4


def share(cfg: RunConfig, variant: str, world_size: int = 8) -> RunConfig:
    """`cfg` as one of `world_size` GPUs sees it, alone, run as VARIANTS says."""
    data = replace(cfg.data, batch_tokens=share_rows(cfg, world_size) * cfg.data.seq_len, micro_batches=1)
    cfg = replace(cfg, data=data, train=replace(cfg.train, warmup_steps=WARM_UP))
    return VARIANTS[variant].of(cfg)


# -- a trainer without data ------------------------------------------------------------------------------------------


class RandomBatches:
    """In the loader's place: random batches that lie on the device already, over and over.

    The n-th token is drawn with probability 1 / n, as in text: uniform ones would spare the gradients of tables the
    rows that thousands of tokens share.
    """

    micro_steps = 1

    def __init__(self, cfg: RunConfig, device: torch.device):
        length, vocab = cfg.data.seq_len, cfg.model.embed.vocab_size
        rows = cfg.data.batch_tokens // length
        gen, at_rank = torch.Generator().manual_seed(0), 1 / torch.arange(1, vocab + 1)
        drawn = torch.multinomial(at_rank, BATCHES * rows * (length + 1), replacement=True, generator=gen)
        windows = drawn.view(BATCHES, rows, length + 1)
        pairs = torch.stack((windows[..., :-1], windows[..., 1:]), 1)
        self.batches = [Batch(*pair.unbind()) for pair in pairs.to(device)]
        self.tokens_per_step, self.at = rows * length, 0

    def next_batch(self) -> Batch:
        self.at += 1
        return self.batches[(self.at - 1) % BATCHES]

    def close(self) -> None:
        pass


class Quiet:
    """A run's log that says nothing."""

    def phase(self, name: str, ledger: Any = None) -> AbstractContextManager:
        return nullcontext()

    def progress(self, label: str, done: int, total: int) -> None:
        pass


class NoUpdates:
    """In the optimisers' place: gradients come and go, weights stay."""

    def __init__(self, zero_grad: Callable[[], None] = lambda: None):
        self.zero_grad = zero_grad

    def set(self, lr_scale: float, momentum: float) -> None:
        pass

    def reduce_(self, loss: Tensor, step: int) -> Tensor:
        return loss

    def step(self) -> None:
        pass


class StepTrainer(Trainer):
    """The trainer, without a data set."""

    def _open_data(self) -> None:
        return None

    def new_loader(self) -> RandomBatches:
        return RandomBatches(self.cfg, self.device)


def weights_of(cfg: RunConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """A state dict on the CPU, as after training: nothing is zero, so that every gradient is there."""
    model = GPT(cfg.model, train_length=cfg.data.seq_len, compute_dtype=dtype).init_weights(cfg.train.seed)
    return look_trained_(model).state_dict()


# -- a step, ready to be called --------------------------------------------------------------------------------------


class Stepper:
    """A variant's trainer. `warm_up` first; `call` is what is timed."""

    def __init__(
        self,
        cfg: RunConfig,
        device: torch.device,
        weights: dict[str, Tensor] | None = None,
        truth: Truth | None = None,
    ):
        self.trainer = t = StepTrainer(cfg, Dist(Rank(device=device)), Quiet(), TimeLedger())
        if weights is not None:
            t.model.load_state_dict(weights)
        t.objective.set_progress(PROGRESS)
        self.updating, self.idle = t.optim, NoUpdates(t.optim.zero_grad)
        self.truth, self.count, self.warm_up_s, self.held = truth, 0, 0.0, 0

    def warm_up(self) -> None:
        """The trainer's: every graph of a run is compiled, weights and optimiser are restored."""
        began = time.perf_counter()
        with paths(**self.trainer.runtime.paths):
            self.trainer.warm_up()
        self.trainer.dist.synchronize()
        self.warm_up_s = time.perf_counter() - began

    @property
    def warm_up_steps(self) -> int:
        """How many steps `warm_up` took: WARM_UP, and 2 for each phase."""
        return WARM_UP + 2 * len(self.trainer.phases.phases)

    def call(self, optimizer: bool = True, lr_scale: float = 0.0) -> Tensor:
        """One step; without the optimiser: to the gradients, which are dropped. Returns the loss, on the device."""
        t = self.trainer
        t.optim = self.updating if optimizer else self.idle
        with paths(**t.runtime.paths):
            loss = t.step(lr_scale, self.count)
            if optimizer:
                self.count += 1
                t.averager.update(self.count, lr_scale)
        t.optim = self.updating
        return loss

    def gradients(self, batch: int) -> tuple[float, dict[str, Tensor]]:
        """(loss, gradients by name) of a batch, by the way that `call` goes."""
        t = self.trainer
        t.optim, t.loader.at = NoUpdates(), batch
        with paths(**t.runtime.paths):
            loss = t.step(0.0, 0).item()
        grads = {info.name: info.param.grad.clone() for info in t.infos if info.param.grad is not None}
        t.optim = self.updating
        t.optim.zero_grad()
        return loss, grads

    def check(self) -> None:
        """AssertionError unless losses, gradients and the optimiser's first step are right."""
        t = self.trainer
        for at in range(CHECKED):
            loss, grads = self.gradients(at)
            self.truth.check(at, loss, grads)
        before, state = copy.deepcopy(t.model.state_dict()), copy.deepcopy(t.optim.tensors())
        t.optim.reset_()
        self.count, t.loader.at = 0, at
        self.call(lr_scale=1.0)
        way = {i.name: i.param.detach().double() - before[i.name].double() for i in t.infos}
        t.model.load_state_dict(before)
        t.optim.load_tensors_(state)
        muon, clip = t.cfg.optim.muon, t.cfg.optim.clip
        check_update(
            before, way, grads, t.optim.groups, muon.ns_steps, momentum_at(0, muon), clip.norm if clip else None
        )

    def end_of_run(self) -> None:
        """Steps as late in a run: scheduled losses, all phases on. Leaves everything as it was."""
        t = self.trainer
        t.objective.set_progress(1.0)
        with paths(**t.runtime.paths):  # its probe runs the compiled forward
            t.phases.apply(0.0)
        for optimizer in (True, False):
            self.call(optimizer)
        t.phases.undo()
        t.objective.set_progress(PROGRESS)


class Compilations:
    """What is compiled while it is entered. `total` counts torch.compile's graphs and Triton's kernels; a further graph
    of a compiled function is a RecompileError at once, which names the guard that failed."""

    def __enter__(self) -> Compilations:
        self.kernels: list[str] = []
        self.before = _graphs()
        self.settings = torch._dynamo.config.patch(error_on_recompile=True)
        self.settings.__enter__()
        if triton is not None:
            events = triton.knobs.runtime
            self.hook, events.jit_post_compile_hook = events.jit_post_compile_hook, self._saw
        return self

    def __exit__(self, *error) -> None:
        self.settings.__exit__(*error)
        if triton is not None:
            triton.knobs.runtime.jit_post_compile_hook = self.hook

    def _saw(self, **what: Any) -> None:
        self.kernels.append(what["repr"])

    @property
    def total(self) -> int:
        return _graphs() - self.before + len(self.kernels)


def _graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@cache
def model_flops(preset: str, world_size: int) -> int:
    """Forward and backward of one GPU's share; the same on every path and GPU."""
    return ledger(PRESETS[preset](), GPUS["h100"], "reference", world_size).model_flops


def least_ms(flops: float, roofs: Mapping[str, float]) -> float:
    """What no step of that many FLOPs is faster than, by the best product that was measured here."""
    return roof_ms(0, flops, {**roofs, "gemm": max(roofs["gemm"], roofs["gemm_large"])})


# -- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What is known of a variant's step, with or without the optimiser."""

    timing: Timing
    tokens: int
    peak_bytes: int | None  # of device memory, without what other variants hold; None on a CPU
    compile_s: float  # of the warm-up, without its steps themselves
    choices: dict[str, str]  # dtype, compile, and for each op kernel, reference or library

    def facts(self, flops: float, peak_flops: float | None) -> dict[str, Any]:
        """What a report keeps beside the times. flops: the model's, of a step. peak_flops: the device's a second."""
        per_s = 1e3 / self.timing.median
        mfu = {"mfu": float(f"{flops * per_s / peak_flops:.4g}")} if peak_flops else {}
        memory = {"peak_bytes": self.peak_bytes} if self.peak_bytes is not None else {}
        found = {"tokens": self.tokens, "tokens_per_s": round(self.tokens * per_s), **mfu, **memory}
        return found | {"compile_s": round(self.compile_s, 1), "recompiles": 0, "choices": self.choices}


def in_words(facts: dict[str, Any]) -> str:
    """`Measured.facts` as a line."""
    parts = [f"{facts['tokens_per_s']:,} tokens/s"]
    parts += [f"MFU {100 * facts['mfu']:.1f} %"] if "mfu" in facts else []
    parts += [f"peak {facts['peak_bytes'] / 1e9:.1f} GB"] if "peak_bytes" in facts else []
    return ", ".join([*parts, f"compiled in {facts['compile_s']:.0f} s"])


Found = dict[tuple[str, bool], Measured | Failure]  # (variant, with the optimiser)


class Bench:
    """The variants of a preset's step, side by side. `run` measures; a variant that fails does not stop the others.

    variants: names in VARIANTS. world_size: GPUs that a step is shared by.
    """

    def __init__(self, cfg: RunConfig, variants: Sequence[str], device: str | torch.device, world_size: int = 8):
        torch._dynamo.reset()  # trainers share the compiled functions; Dynamo gives up after 8 compilations of one
        self.device = torch.device(device)
        one = share(cfg, "eager", world_size)
        dtype = runtime.choose(self.device, dtype=one.train.dtype).compute_dtype
        weights = weights_of(one, dtype)
        truth = Truth(one, weights, RandomBatches(one, self.device).batches, self.device, dtype)
        self.steppers: dict[str, Stepper] = {}
        self.failures: dict[str, Failure] = {}
        self.compiled: Compilations | None = None  # from the end of the warm-ups on
        self.last: tuple[str, bool] | None = None
        for name in variants:
            self._try(name, lambda name=name: self._build(share(cfg, name, world_size), name, weights, truth))

    def _build(self, cfg: RunConfig, name: str, weights: dict[str, Tensor], truth: Truth) -> None:
        before = self.allocated()
        stepper = Stepper(cfg, self.device, weights, truth)
        stepper.warm_up()
        stepper.held = self.allocated() - before
        self.steppers[name] = stepper

    def run(self, rounds: int, min_ms: float = 400.0, clock: HostClock | None = None) -> Found:
        """Checks, measures memory, times, and checks again.

        min_ms: what a round spends on each variant, with and without the optimiser. clock: another than the device's.
        """
        with Compilations() as self.compiled:
            for name, s in self.steppers.items():
                self._try(name, s.check)
            peaks = {key: self._try(key[0], partial(self._peak, *key)) for key in self._keys()}
            calls = {key: partial(self._call, *key) for key in self._keys()}
            times = time_interleaved(
                calls, device=self.device, rounds=rounds, min_ms=min_ms, prepare=self._settle, clock=clock
            )
            for name, s in self.steppers.items():
                self._try(name, s.end_of_run)
                self._try(name, s.check)
        found: Found = {(name, with_): failure for name, failure in self.failures.items() for with_ in (True, False)}
        return found | {key: self._measured(key[0], times, times[key], peaks[key]) for key in self._keys()}

    def _keys(self) -> list[tuple[str, bool]]:
        """What has not failed so far."""
        return [(name, with_) for name in self.steppers if name not in self.failures for with_ in (True, False)]

    def _try(self, name: str, fn: Callable[[], Any]) -> Any:
        """fn(), unless the variant has failed already; what it raises, or compiles once all is warm, fails it."""
        if name in self.failures:
            return None
        before = self.compiled.total if self.compiled else 0
        try:
            out = fn()
            if self.compiled and self.compiled.total > before:
                kernels = self.compiled.kernels
                raise RuntimeError(f"compiled after warm-up, expected nothing: {kernels or 'a graph'}")
            return out
        except Exception as error:
            self.failures[name] = Failure.of(error)
            return None

    def _call(self, name: str, optimizer: bool) -> None:
        self._try(name, partial(self.steppers[name].call, optimizer))

    def _settle(self, key: tuple[str, bool]) -> None:
        """Before a call of another variant than the last: one step untimed, in memory that is cut as it needs it."""
        if key != self.last:
            self.last = key
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._call(*key)

    def allocated(self) -> int:
        """Bytes of device memory that tensors hold; 0 on a CPU."""
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _peak(self, name: str, optimizer: bool) -> int | None:
        """Most bytes that a step holds at once, without other variants'."""
        if self.device.type != "cuda":
            return None
        others = self.allocated() - self.steppers[name].held
        torch.cuda.reset_peak_memory_stats(self.device)
        self.steppers[name].call(optimizer)
        return torch.cuda.max_memory_allocated(self.device) - others

    def _measured(self, name: str, times: dict, timing: Timing, peak: int | None) -> Measured:
        s = self.steppers[name]
        chosen, t = s.trainer.runtime, s.trainer
        choices = {"dtype": chosen.dtype, "compile": chosen.compile, "weight_cast": chosen.weight_cast}
        choices = {what: choice.value for what, choice in (choices | chosen.kernels).items()}
        compiling = max(0.0, s.warm_up_s - s.warm_up_steps * times[name, True].median / 1e3)
        return Measured(timing, t.loader.tokens_per_step, peak, compiling, choices)


def measure(
    cfg: RunConfig,
    variants: Sequence[str],
    device: str | torch.device,
    *,
    world_size: int = 8,
    rounds: int = 10,
    min_ms: float = 400.0,
) -> Found:
    """`Bench(...).run(...)`; what fails for all variants, such as a model that does not fit, is a failure of each."""
    try:
        return Bench(cfg, variants, device, world_size).run(rounds, min_ms)
    except Exception as error:
        return {(name, with_): Failure.of(error) for name in variants for with_ in (True, False)}


def check(cfg: RunConfig, variant: str, device: str | torch.device, world_size: int = 8) -> None:
    """AssertionError unless a variant's step is right; nothing is timed."""
    bench = Bench(cfg, [variant], device, world_size)
    for stepper in bench.steppers.values():
        stepper.check()
    assert not bench.failures, bench.failures[variant].trace
