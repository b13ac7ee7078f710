"""The training loop: warm-up, step, phases, cap, averaging. `pgolf.finish` does everything behind the clock."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pgolf import limits, probe, runtime, scoring, signals
from pgolf.calibrate import Calibration
from pgolf.clock import Clock, TimeLedger
from pgolf.config import RunConfig
from pgolf.data.loaders import LOADERS, Prefetcher
from pgolf.data.source import open_data
from pgolf.dist import Dist
from pgolf.errors import BudgetError, NumericalError, Stopped
from pgolf.eval.base import EvalResult, Evaluator, evaluate
from pgolf.eval.neural import Neural
from pgolf.log import RunLog
from pgolf.model.gpt import GPT
from pgolf.model.objective import Objective
from pgolf.model.roles import roles_of
from pgolf.optim.average import Averager
from pgolf.optim.groups import build_groups
from pgolf.optim.health import LAG, Divergence, Health
from pgolf.optim.muon import momentum_at
from pgolf.optim.schedule import Progress, lr_scale
from pgolf.optim.step import Optimizers
from pgolf.phases import Phases
from pgolf.quant.crown_q import CrownQ
from pgolf.quant.weight_cast import WeightCast, bank_weights
from pgolf.recompiles import Recompiles
from pgolf.signals import Stop
from pgolf.snapshot import Saver


class Trainer:
    """Everything that a run holds while the clock is running. Built by `pgolf.run`."""

    def __init__(self, cfg: RunConfig, dist: Dist, log: RunLog, ledger: TimeLedger, stop: Stop | None = None):
        self.cfg, self.dist, self.log, self.ledger = cfg, dist, log, ledger
        self.stop, self.recompiles = stop or Stop(), None
        self.device = dist.device
        t = cfg.train
        k = cfg.kernels
        self.runtime = runtime.choose(
            self.device,
            dtype=t.dtype,
            compile=t.compile,
            default_path=k.default,
            ops=k.ops(),
            weight_cast=k.weight_cast,
        )
        with log.phase("data", ledger):
            self.data = self._open_data()
        self.model = GPT(
            cfg.model,
            train_length=cfg.data.seq_len,
            max_length=scoring.longest(cfg),
            compute_dtype=self.runtime.compute_dtype,
            fold_scales=k.fold_scales,
        )
        self.model.init_weights(t.seed).to(self.device)
        dist.broadcast_params_(list(self.model.parameters()))
        self.infos = roles_of(self.model)
        layers = (cfg.model.plan.num_layers, cfg.model.plan.n_encoder)
        groups = build_groups(self.infos, cfg.optim, layers, cfg.model.embed.tied)
        banks = bank_weights(self.model, self.infos, cfg.quant, [g.infos for g in groups if g.kind == "muon"])
        on, dtype = self.runtime.weight_cast.value == "on", self.runtime.compute_dtype
        self.cast = WeightCast(self.model, self.infos, cfg.quant, dtype, banks) if on else None
        self.optim = Optimizers(groups, cfg.optim, dist, banks)
        self.objective = Objective(cfg.loss, self.model, self.device)
        self.penalty = CrownQ(banks, self.infos, cfg.quant) if cfg.quant.crown_q else None
        self.phases = Phases(self.model, self.infos, cfg.quant, self.cast, self.penalty, partial(probe.losses, self))
        self.averager = Averager({i.name: i.param for i in self.infos}, cfg.average)
        self.clock = Clock(dist)
        self.keep_reserve(t.reserve_ms)
        self.loader = self.new_loader()
        self.compute_loss = self.compiled(self.objective.__call__)
        self.neural = Neural(self.model, compiled=self.compiled)
        self.step_number, self.lr_scale, self.tokens, self.last_step_s = 0, 1.0, 0, 0.0
        self.skipped = (0, 0.0)  # first steps that the mean step time leaves out, and their milliseconds
        self.last_val: EvalResult | None = None
        self.recent: deque = deque(maxlen=(LAG + 2) * self.loader.micro_steps)  # (step, batch), for `not_finite`
        self.losses: deque = deque(maxlen=20)  # (step, loss) that were read
        self.divergence = Divergence()
        self.saver: Saver | None = None  # None writes no checkpoints
        self.resumes = 0  # processes before this one that this state went through
        self.node: str | None = None  # digest of this machine's fingerprint, on rank 0
        self.calibration = Calibration(self)

    # -- building ------------------------------------------------------------------------------------------------

    def _open_data(self):
        """Rank 0 first: with the embedded corpus it builds what the others then find."""
        args = (self.cfg.data, self.cfg.model.embed.vocab_size, self.device)
        data = open_data(*args, progress=self.log.line) if self.dist.is_main else None
        self.dist.barrier()
        return data or open_data(*args, progress=lambda text: None)

    def new_loader(self) -> Prefetcher:
        """This rank's training stream, from its beginning."""
        cfg = self.cfg
        make = LOADERS[cfg.data.loader]
        loader = make(
            self.data.train_files,
            cfg.data,
            rank=self.dist.rank,
            world_size=self.dist.world_size,
            seed=cfg.train.seed,
            device=self.device,
        )
        return Prefetcher(loader)

    def keep_reserve(self, ms: float) -> None:
        """Training ends `ms` before its limit; what is kept is for calibration and export."""
        limit = 1000 * self.cfg.train.max_wallclock_seconds
        self.reserve_ms, self.clock.cap_ms = ms, limit - ms if limit else None

    def compiled(self, fn: Callable) -> Callable:
        """`fn` through torch.compile if this run compiles."""
        if self.runtime.compile.value != "on":
            return fn
        return torch.compile(fn, fullgraph=self.cfg.train.fullgraph, dynamic=False)

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, lr_scale: float, step_number: int) -> Tensor:
        """Forward, backward, average over ranks, clip, update. Returns the mean loss over ranks, on the device."""
        accum = self.loader.micro_steps
        total = torch.zeros((), device=self.device)
        if self.cast:
            self.cast.refresh_()
        for _ in range(accum):
            batch = self.loader.next_batch()
            self.recent.append((step_number, batch))
            loss, plain = self.compute_loss(batch)
            (loss / accum).backward()
            if self.cast:
                self.cast.collect_()
            total += plain / accum
        if self.penalty and self.penalty.active:
            self.penalty.add_grads_()
        self.optim.set(lr_scale, momentum_at(step_number, self.cfg.optim.muon))
        total = self.optim.reduce_(total, step_number)
        self.optim.step()
        self.optim.zero_grad()
        return total

    def read_loss(self, loss: Tensor) -> float:
        """A step's mean loss as a Python number, kept for messages; warns when losses diverge. A host sync."""
        value = loss.item()
        self.losses.append((self.step_number, value))
        if said := self.divergence.note(value):
            self.log.event("warning", text=said, step=self.step_number)
            self.log.line(f"warning: step {self.step_number}: {said}")
        return value

    def check_finite(self) -> None:
        """Raises NumericalError if any step so far was not finite. A host sync."""
        self.optim.health.post()
        self.dist.synchronize()
        bad_step = self.optim.health.read()
        if bad_step is not None:
            raise self.not_finite(bad_step)

    def not_finite(self, step: int) -> NumericalError:
        """The error of a step (from 0) whose loss or gradient was inf or NaN. A collective."""
        from pgolf.diagnose import first_bad

        found = first_bad(self, [batch for at, batch in self.recent if at == step])
        where = [f"rank {rank}: {text}" for rank, text in enumerate(self.dist.gather_objects(found)) if text]
        kept = f"step {self.saver.saved_step}" if self.saver and self.saver.saved_step > 0 else "none"
        last = ", ".join(f"{at}: {value:.4f}" for at, value in list(self.losses)[-8:]) or "none"
        return NumericalError(
            f"step {step + 1}: training loss or gradient is not finite; first seen in "
            f"{where[0] if where else 'nothing that can be found again in an eager forward and backward'}\n"
            f"Last losses (step: loss): {last}. Nothing is exported; last good checkpoint: {kept}.\n"
            "Lower the learning rates or set GRAD_CLIP_NORM."
        )

    # -- phases of the run ---------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compiles every graph of the run on real shapes, sees that its switches work, then restores weights, optimiser
        and loader. Raises NumericalError on a switch without effect."""
        if not self.cfg.train.warmup_steps:
            return
        weights = copy.deepcopy(self.model.state_dict())
        for variant in self.phases.variants():
            steps = self.cfg.train.warmup_steps if variant == "start" else min(2, self.cfg.train.warmup_steps)
            for i in range(steps):
                self.step(0.0, 0)
                self.log.progress(f"warm-up ({variant})", i + 1, steps)
                self.safe_point(f"during warm-up, at {i + 1} of {steps} steps ({variant})")
        self.phases.verify()
        self.model.load_state_dict(weights)
        self.optim.reset_()
        self.loader.close()
        self.loader = self.new_loader()

    def train(self) -> None:
        """Steps until `iterations` or the cap, whichever comes first. A signal ends it after a step, saved."""
        if self.runtime.compile.value == "on":
            self.recompiles = Recompiles()
        try:
            with self.dist.within(self.cfg.train.collective_timeout_s):
                self._steps()
        except Stopped:  # on all ranks
            if self.saver:
                self.saver.save()
            raise

    def _steps(self) -> None:
        """The loop; every decision comes from rank 0's clock."""
        cfg, steps = self.cfg, self.cfg.train.iterations
        pace = Pace(self.device, self.optim.health)
        self.clock.start(self.clock.elapsed_ms)
        if self.step_number:  # resumed: the checkpoint was written before the validation of its step
            self._validate_where_due()
        while not self.is_last:
            if self.step_number == cfg.schedule.skip_steps:
                self.skipped = (self.step_number, self.clock.elapsed_ms)
            now = Progress(self.step_number, steps, self.clock.elapsed_ms, self.clock.cap_ms, *self.skipped)
            self.lr_scale = lr_scale(cfg.schedule, now)
            for name, what in self.phases.apply(self.lr_scale):
                self.log.event("phase", name=name, step=self.step_number, lr_scale=self.lr_scale)
                self.log.line(f"{name}:enabled step:{self.step_number} scale:{self.lr_scale:.4f} ({what})")
            self.objective.set_progress(budget_used(now))
            loss = self.step(self.lr_scale, self.step_number)
            self.step_number += 1
            self.tokens += self.loader.tokens_per_step
            self.averager.update(self.step_number, self.lr_scale)
            bad_step = pace.wait()
            if bad_step is not None:
                raise self.not_finite(bad_step)
            self.clock.tick(self.stop.code)
            if self.is_last:
                self.last_step_s = self.clock.last_ms / 1000
                self.clock.pause()
                self.clock.tick(self.stop.code)  # with the steps that the GPU still had to do
            self.note_recompiles()
            self._report(loss)
            if self.saver and self.saver.due:
                self.saver.save()
            signals.check(self.clock.stop_code, f"after step {self.step_number}")
            self._validate_where_due()
        self.check_finite()
        if self.step_number < steps:
            self.log.stopping_early(self.clock.elapsed_ms, self.step_number, steps)
        self.clock.pause()

    @property
    def is_last(self) -> bool:
        """Whether no step comes behind the one that was done."""
        return self.step_number >= self.cfg.train.iterations or self.clock.expired

    def _report(self, loss: Tensor) -> None:
        """Log line where it is due."""
        t, n, ms = self.cfg.train, self.step_number, self.clock.elapsed_ms
        if self.is_last or n <= 10 or (t.train_log_every and n % t.train_log_every == 0):
            left, value = self.clock.left_ms, self.read_loss(loss)
            self.log.step(
                n,
                t.iterations,
                value,
                ms,
                lr_scale=self.lr_scale,
                tokens_per_second=1000 * self.tokens / max(ms, 1e-9),
                time_left_s=None if left is None else left / 1000,
            )

    def _validate_where_due(self) -> None:
        t, n, ms = self.cfg.train, self.step_number, self.clock.elapsed_ms
        if self.is_last or (t.val_loss_every and n % t.val_loss_every == 0):
            with self.clock.paused(), self.ledger.phase("validate"):
                scored = self.validate(scoring.plain_windows(self.cfg), limit=self.cfg.eval.max_tokens)
                self.note_recompiles()
            self.log.val(n, t.iterations, scored.val_loss, scored.val_bpb, ms)
            self.last_val = scored

    def validate(self, evaluator: Evaluator, limit: int) -> EvalResult:
        """Scores the val split with the weights as the training forward sees them (fake-quantised once that is on)."""
        self.model.eval()
        if self.cast:
            self.cast.refresh_()
        data, watch = self.data, limits.Watch(self.dist, self.stop, "validation", say=self.log.line)
        try:
            with self.dist.patient():  # the first one compiles
                return evaluate(
                    evaluator,
                    self.neural,
                    data.val,
                    data.byte_counts,
                    self.dist,
                    val_bytes=data.val_bytes,
                    watch=watch,
                    limit_tokens=limit,
                )
        finally:
            self.model.train()

    # -- what may end a run early ----------------------------------------------------------------------------------

    def safe_point(self, where: str) -> None:
        """Raises Stopped on all ranks when a signal has reached one of them. A collective."""
        signals.check(self.dist.max_int(self.stop.code), where)

    def note_recompiles(self) -> None:
        """Tells of what was compiled again since the last call; raises BudgetError if the run must not."""
        if self.recompiles is None:
            return
        phase = self.ledger.current
        warned = phase in self.recompiles.by_phase()
        for one in self.recompiles.new(phase):
            self.log.event("recompile", step=self.step_number, phase=phase, function=one.function, guard=one.guard)
            if not warned:  # outside of steps it costs no training time, and a graph of its own may be by design
                kind = "warning" if phase == "train" else "note"
                self.log.line(f"{kind}: compiled again in phase {phase}, step {self.step_number}: {one}")
            if self.cfg.train.fail_on_recompile and phase == "train":
                raise BudgetError(
                    f"step {self.step_number} compiled again, which training time pays for: {one}\n"
                    "What the guard names must be a tensor or stay the same; train.fail_on_recompile=false goes on."
                )
            warned = True


class Pace:
    """Keeps the host at most two steps ahead of a GPU, so that host time is training time; else the clock would
    measure how fast kernels are queued. What `health` found is read when a step is known to be done: no other wait."""

    def __init__(self, device: torch.device, health: Health):
        self.events: deque = deque()
        self.cuda, self.health = device.type == "cuda", health

    def wait(self) -> int | None:
        """After each step. Returns the first step that was not finite, None so far; on a GPU at most 2 steps late."""
        self.health.post()
        if not self.cuda:
            return self.health.read()
        event = torch.cuda.Event()
        event.record()
        self.events.append(event)
        if len(self.events) > LAG:
            self.events.popleft().synchronize()
        return self.health.read(late=LAG)


def budget_used(now: Progress) -> float:
    """Share of the run that is over, 0 to 1: by the clock when there is a cap, by steps when not."""
    return now.elapsed_ms / now.cap_ms if now.cap_ms else now.step / now.iterations
