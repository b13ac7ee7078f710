"""A run from its folder to its result: what surrounds the training loop, and how its errors are told."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import torch

from pgolf import config, evidence, extras, faults, finish, neighbours, node, resume, signals
from pgolf.clock import TimeLedger
from pgolf.config import Settings
from pgolf.dist import Dist, start
from pgolf.errors import ConfigError, Stopped
from pgolf.kernels._op import paths
from pgolf.log import RunLog
from pgolf.model import plan
from pgolf.model.gpt import parameter_count
from pgolf.optim.step import Optimizers
from pgolf.signals import Stop
from pgolf.snapshot import FOLDER, Saver
from pgolf.train import Trainer


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
            with RunLog(run_dir, dist.rank) as log, resume.claimed(run_dir, dist):
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
    here = node.record(run_dir, cfg.data.cache_dir) if dist.is_main else {}
    log.event("node", **here)
    for note in [*settings.notes, *not_alone(dist)]:
        log.line(f"note: {note}")
    log.line(f"run: {run_dir}  preset:{cfg.preset} seed:{cfg.train.seed} config digest:{config.digest(cfg)[:16]}")
    for line in evidence.setting_lines(settings):
        log.line(line, console=False)
    finish.check_ready(cfg)
    saved = resume.load(settings, run_dir, dist, log)
    dist.report(lambda: (ledger.current or "start", 0), log.line)
    trainer = Trainer(cfg, dist, log, ledger, stop)
    if saved:
        resume.check_data(trainer, saved, settings)
    trainer.node = here.get("digest")
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
            trainer.calibration.keep_reserve()
            extras.keep_reserve(trainer)
        if saved:
            resume.restore(trainer, saved)
        if cfg.train.keep_checkpoints:
            trainer.saver = Saver(trainer, run_dir / FOLDER)
        with log.phase("train", ledger):
            trainer.train()
        trainer.loader.close()
        return finish.finish(trainer, run_dir, began)


def not_alone(dist: Dist) -> list[str]:
    """A note for each rank that shares its GPU with another process. A collective, before any memory is allocated."""
    said = ""
    if dist.device.type == "cuda":
        uuid = node.gpu_uuid(torch.cuda.get_device_properties(dist.device))
        there = neighbours.others(dist.world_size)
        said = neighbours.note(uuid, *torch.cuda.mem_get_info(dist.device), there)
    return [f"rank {rank}: {text}" for rank, text in enumerate(dist.gather_objects(said)) if text]


def make_run_dir(settings: Settings, dist: Dist) -> Path:
    """`out_dir/run_id`, new; rank 0 names it. Raises ConfigError when a run of that name is already there.

    For a resumed run the folder that it goes on in.
    """
    train = settings.config.train

    def choose() -> Path:
        if train.resume:
            return resume.run_folder(settings)
        name = train.run_id or f"{settings.config.preset}-{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"
        path = Path(train.out_dir) / name
        if path.exists() and any(path.iterdir()):
            raise ConfigError(
                f"{path} holds an earlier run, which is left untouched: choose another RUN_ID, remove it,"
                " or go on with it (RESUME=auto)"
            )
        return path

    return dist.on_main(choose)
