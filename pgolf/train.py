"""The training loop: warm-up, step, phases, cap, averaging, then `pgolf.finish` for everything behind the clock."""

from __future__ import annotations

import copy
import math
import time
import uuid
from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pgolf import config, faults, finish, limits, runtime, signals
from pgolf.config import RunConfig, Settings
from pgolf.data.batch import Batch
from pgolf.data.loaders import LOADERS, Prefetcher
from pgolf.data.source import open_data
from pgolf.dist import Clock, Dist, TimeLedger, start
from pgolf.errors import BudgetError, ConfigError, NumericalError, Stopped
from pgolf.eval.base import EvalResult, Evaluator, evaluate
from pgolf.kernels._op import paths
from pgolf.log import RunLog
from pgolf.model import plan
from pgolf.model.gpt import GPT, parameter_count
from pgolf.model.objective import Objective
from pgolf.model.roles import roles_of
from pgolf.optim.average import Averager
from pgolf.optim.groups import build_groups
from pgolf.optim.muon import momentum_at
from pgolf.optim.schedule import Progress, lr_scale
from pgolf.optim.step import Optimizers
from pgolf.phases import Phases
from pgolf.quant.weight_cast import WeightCast
from pgolf.recompiles import Recompiles
from pgolf.signals import Stop


class Trainer:
    """Everything that a run holds while the clock is running. Built by `run`."""

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
        eval_len = cfg.eval.seq_len or cfg.data.seq_len
        self.model = GPT(
            cfg.model,
            train_length=cfg.data.seq_len,
            max_length=eval_len,
            compute_dtype=self.runtime.compute_dtype,
            fold_scales=k.fold_scales,
        )
        self.model.init_weights(t.seed).to(self.device)
        dist.broadcast_params_(list(self.model.parameters()))
        self.infos = roles_of(self.model)
        on = self.runtime.weight_cast.value == "on"
        self.cast = WeightCast(self.model, self.infos, cfg.quant, self.runtime.compute_dtype) if on else None
        layers = (cfg.model.plan.num_layers, cfg.model.plan.n_encoder)
        self.optim = Optimizers(build_groups(self.infos, cfg.optim, layers, cfg.model.embed.tied), cfg.optim.muon)
        self.params = [i.param for i in self.infos if i.param.requires_grad]
        self.objective = Objective(cfg.loss, self.model, self.device)
        self.phases = Phases(self.model, self.infos, cfg.quant, self.cast)
        self.averager = Averager({i.name: i.param for i in self.infos}, cfg.average)
        cap = t.max_wallclock_seconds * 1000 - t.reserve_ms if t.max_wallclock_seconds else None
        self.clock = Clock(dist, cap)
        self.loader = self._new_loader()
        self.compute_loss = self.compiled(self.objective.__call__)
        self.nll = self.compiled(lambda ids, targets: self.model(Batch(ids, targets))[0])
        self.step_number, self.lr_scale, self.tokens, self.last_step_s = 0, 1.0, 0, 0.0
        self.last_val: EvalResult | None = None

    # -- building ------------------------------------------------------------------------------------------------

    def _open_data(self):
        """Rank 0 first: with the embedded corpus it builds what the others then find."""
        args = (self.cfg.data, self.cfg.model.embed.vocab_size, self.device)
        data = open_data(*args, progress=self.log.line) if self.dist.is_main else None
        self.dist.barrier()
        return data or open_data(*args, progress=lambda text: None)

    def _new_loader(self):
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

    def compiled(self, fn: Callable) -> Callable:
        """`fn` through torch.compile if this run compiles."""
        if self.runtime.compile.value != "on":
            return fn
        return torch.compile(fn, fullgraph=self.cfg.train.fullgraph, dynamic=False)

    # -- one step ------------------------------------------------------------------------------------------------

    def step(self, lr_scale: float, step_number: int) -> Tensor:
        """Forward, backward, average over ranks, clip, update. Returns this rank's mean loss, on the device."""
        cfg, accum = self.cfg, self.loader.micro_steps
        total = torch.zeros((), device=self.device)
        if self.cast:
            self.cast.refresh_()
        for _ in range(accum):
            loss, plain = self.compute_loss(self.loader.next_batch())
            (loss / accum).backward()
            if self.cast:
                self.cast.collect_()
            total += plain / accum
        clip = cfg.optim.clip
        if clip and clip.scope == "rank":
            self.optim.clip_(clip)
        self.dist.mean_grads_([p.grad for p in self.params if p.grad is not None])
        if clip and clip.scope == "global":
            self.optim.clip_(clip)
        self.optim.set(lr_scale, momentum_at(step_number, cfg.optim.muon))
        self.optim.step()
        self.optim.zero_grad()
        return total

    def mean_loss(self, loss: Tensor) -> float:
        """Mean over ranks as a Python number; stops the run when it is not finite. A host synchronisation."""
        value = self.dist.all_reduce_sum_(loss.clone()).item() / self.dist.world_size
        if not math.isfinite(value):
            raise NumericalError(
                f"step {self.step_number}: training loss is {value}; expected a finite number\n"
                "The run is stopped and nothing is exported: lower the learning rates or set GRAD_CLIP_NORM."
            )
        return value

    # -- phases of the run ---------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Compiles every graph of the run on real shapes, then restores weights, optimiser and loader."""
        if not self.cfg.train.warmup_steps:
            return
        weights = copy.deepcopy(self.model.state_dict())
        state = copy.deepcopy(self.optim.state_dict())
        for variant in self.phases.variants():
            steps = self.cfg.train.warmup_steps if variant == "start" else min(2, self.cfg.train.warmup_steps)
            for i in range(steps):
                self.step(0.0, 0)
                self.log.progress(f"warm-up ({variant})", i + 1, steps)
                self.safe_point(f"during warm-up, at {i + 1} of {steps} steps ({variant})")
        self.model.load_state_dict(weights)
        self.optim.load_state_dict(state)
        self.loader.close()
        self.loader = self._new_loader()

    def train(self) -> None:
        """Steps until `iterations` or the cap, whichever comes first. A signal ends it after a step, saved."""
        if self.runtime.compile.value == "on":
            self.recompiles = Recompiles()
        try:
            with self.dist.within(self.cfg.train.collective_timeout_s):
                self._steps()
        except Stopped:
            self.save("signal")
            raise

    def save(self, why: str) -> None:
        """Writes a checkpoint. why: as in "signal"."""

    def _steps(self) -> None:
        """The loop; every decision comes from rank 0's clock."""
        cfg, steps = self.cfg, self.cfg.train.iterations
        pace, skipped = Pace(self.device), (0, 0.0)
        self.clock.start()
        while self.step_number < steps and not self.clock.expired:
            if self.step_number == cfg.schedule.skip_steps:
                skipped = (self.step_number, self.clock.elapsed_ms)
            now = Progress(self.step_number, steps, self.clock.elapsed_ms, self.clock.cap_ms, *skipped)
            self.lr_scale = lr_scale(cfg.schedule, now)
            for name, what in self.phases.apply(self.lr_scale):
                self.log.event("phase", name=name, step=self.step_number, lr_scale=self.lr_scale)
                self.log.line(f"{name}:enabled step:{self.step_number} scale:{self.lr_scale:.4f} ({what})")
            self.objective.set_progress(budget_used(now))
            loss = self.step(self.lr_scale, self.step_number)
            self.step_number += 1
            self.tokens += self.loader.tokens_per_step
            self.averager.update(self.step_number, self.lr_scale)
            pace.wait()
            self.clock.tick(self.stop.code)
            self.note_recompiles()
            self._report(loss)
            signals.check(self.clock.stop_code, f"after step {self.step_number}")
        if self.step_number < steps:
            self.log.stopping_early(self.clock.elapsed_ms, self.step_number, steps)
        self.last_step_s = self.clock.last_ms / 1000
        self.clock.pause()
        self.clock.tick()  # with the steps that the GPU still had to do

    def _report(self, loss: Tensor) -> None:
        """Log line and validation where they are due."""
        t, n, ms = self.cfg.train, self.step_number, self.clock.elapsed_ms
        last = n == t.iterations or self.clock.expired
        if last or n <= 10 or (t.train_log_every and n % t.train_log_every == 0):
            left = self.clock.left_ms
            self.log.step(
                n,
                t.iterations,
                self.mean_loss(loss),
                ms,
                lr_scale=self.lr_scale,
                tokens_per_second=1000 * self.tokens / max(ms, 1e-9),
                time_left_s=None if left is None else left / 1000,
            )
        if last or (t.val_loss_every and n % t.val_loss_every == 0):
            with self.clock.paused(), self.ledger.phase("validate"):
                scored = self.validate(finish.plain_windows(self.cfg), limit=self.cfg.eval.max_tokens)
                self.note_recompiles()
            self.log.val(n, t.iterations, scored.val_loss, scored.val_bpb, ms)
            self.last_val = scored

    def validate(self, evaluator: Evaluator, limit: int) -> EvalResult:
        """Scores the val split with the weights as the training forward sees them (fake-quantised once that is on)."""
        self.model.eval()
        if self.cast:
            self.cast.refresh_()
        data, watch = self.data, limits.Watch(self.dist, self.stop, "validation")
        try:
            with self.dist.patient():  # the first one compiles
                return evaluate(
                    evaluator, self.nll, data.val, data.byte_counts, self.dist, watch=watch, limit_tokens=limit
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
    """Keeps the host at most two steps ahead of a GPU, so that host time is training time; without this the clock would
    measure how fast kernels are queued."""

    def __init__(self, device: torch.device):
        self.events: deque = deque()
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        if self.cuda:
            event = torch.cuda.Event()
            event.record()
            self.events.append(event)
            if len(self.events) > 2:
                self.events.popleft().synchronize()


def budget_used(now: Progress) -> float:
    """Share of the run that is over, 0 to 1: by the clock when there is a cap, by steps when not."""
    return now.elapsed_ms / now.cap_ms if now.cap_ms else now.step / now.iterations


def group_lines(optim: Optimizers) -> list[str]:
    """A line per optimiser group, for the log."""
    return [
        f"group {g.name}: {len(g.params)} tensors, {sum(p.numel() for p in g.params):,} numbers, lr {g.lr:g},"
        f" weight decay {g.weight_decay:g}"
        for g in optim.groups
    ]


def run(settings: Settings) -> dict:
    """Trains, exports, reloads and scores one run; returns what is written to result.json."""
    began = time.monotonic()
    dist = start(settings.config.train.device)
    with signals.catching(speak=dist.is_main) as stop:
        try:
            run_dir = make_run_dir(settings, dist)
            with RunLog(run_dir, dist.rank) as log:
                facts = _explained(settings, run_dir, dist, log, stop, began)
        except Exception as err:
            # torchrun ends all when the first one ends, and its signal finds the others on their way out
            stop.leaving = dist.world_size > 1
            if isinstance(err, Stopped):
                dist.close()
                raise
            shown = dist.blame(err)
            dist.abandon()
            if shown is err:
                raise
            raise shown from err
    dist.close()
    return facts


def _explained(settings: Settings, run_dir: Path, dist: Dist, log: RunLog, stop: Stop, began: float) -> dict:
    """The run, with its errors explained and logged."""
    cfg, ledger = settings.config, TimeLedger()
    try:
        return _run(settings, run_dir, dist, log, ledger, stop, began)
    except Stopped as err:
        log.event("stopped", code=err.exit_code, message=str(err))
        log.line(f"stopped: {err}", console=False)
        raise
    except Exception as err:
        told = faults.explain(err, ledger.failed_in, cfg, dist.device)
        log.event("error", error=type(told).__name__, message=str(told), phase=ledger.failed_in)
        if told is err:
            raise
        raise told from err


def _run(
    settings: Settings, run_dir: Path, dist: Dist, log: RunLog, ledger: TimeLedger, stop: Stop, began: float
) -> dict:
    cfg = settings.config
    if dist.is_main:
        config.write(settings, run_dir / "config.json")
    for note in settings.notes:
        log.line(f"note: {note}")
    log.line(f"run: {run_dir}  preset:{cfg.preset} seed:{cfg.train.seed} config digest:{config.digest(cfg)[:16]}")
    dist.report(lambda: (ledger.current or "start", 0), log.line)
    trainer = Trainer(cfg, dist, log, ledger, stop)
    dist.report(lambda: (ledger.current or "start", trainer.step_number), log.line)
    trainer.safe_point("before warm-up")
    for line in [*trainer.runtime.lines(), *trainer.data.lines]:
        log.line(line)
    log.line(f"model_params:{parameter_count(trainer.model)}")
    for line in [*plan.table(trainer.model.plan), *group_lines(trainer.optim)]:
        log.line(line, console=False)
    per_rank = f"{trainer.loader.micro_steps} micro-batches per rank and step"
    log.line(f"world_size:{dist.world_size} tokens per step:{trainer.loader.tokens_per_step} ({per_rank})")
    with paths(**trainer.runtime.paths):
        with log.phase("compile", ledger):
            trainer.warm_up()
        with log.phase("train", ledger):
            trainer.train()
        trainer.loader.close()
        return finish.finish(trainer, run_dir, began)


def make_run_dir(settings: Settings, dist: Dist) -> Path:
    """`out_dir/run_id`, new; rank 0 names it. Raises ConfigError when a run of that name is already there."""
    train = settings.config.train
    name = train.run_id or f"{settings.config.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
    path = Path(dist.broadcast_object(train.out_dir)) / dist.broadcast_object(name)
    taken = dist.max_int(int(dist.is_main and path.exists() and any(path.iterdir())))
    if taken:
        raise ConfigError(f"{path} holds an earlier run, which is left untouched: choose another RUN_ID or remove it")
    return path
