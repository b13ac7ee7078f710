"""Learning-rate schedules: pure functions of the run's progress that give the factor on every base rate.

The same factor switches on late QAT and weight averaging, so all ranks must pass the same `Progress`: take the times
from rank 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pgolf.errors import ConfigError
from pgolf.optim.config import ScheduleConfig


@dataclass(frozen=True)
class Progress:
    """Where a run stands before step `step`.

    step: steps done; iterations: their upper bound; elapsed_ms: training time so far, without validation; cap_ms: the
    time allowed, None = only `iterations` ends the run. skipped_steps, skipped_ms: slow first steps that the mean step
    time leaves out, and the time they took: note (step, elapsed_ms) at step == ScheduleConfig.skip_steps, pass it from
    then on and keep it in checkpoints. Without them the mean is over all steps, as in the baseline.
    """

    step: int
    iterations: int
    elapsed_ms: float
    cap_ms: float | None
    skipped_steps: int = 0
    skipped_ms: float = 0.0

    @property
    def mean_step_ms(self) -> float:
        """Mean time of a step after the skipped ones; of all steps until there is one."""
        settled = self.step - self.skipped_steps
        if settled > 0:
            return (self.elapsed_ms - self.skipped_ms) / settled
        return self.elapsed_ms / max(self.step, 1)


def lr_scale(cfg: ScheduleConfig, at: Progress) -> float:
    """The factor on every base learning rate for the coming step, >= 0."""
    return SCHEDULES[cfg.kind](cfg, at)


def fraction(cfg: ScheduleConfig, at: Progress) -> float:
    """Progress p in [0, 1]: step / iterations, or elapsed / cap with by="time".

    Raises ConfigError for by="time" without a cap.
    """
    if cfg.by == "step":
        return min(at.step / at.iterations, 1.0)
    if at.cap_ms is None:
        raise ConfigError("schedule.by=time needs a time cap, got none: set MAX_WALLCLOCK_SECONDS or schedule.by=step")
    return min(at.elapsed_ms / at.cap_ms, 1.0)


def linear(cfg: ScheduleConfig, at: Progress) -> float:
    """1, then a straight line to 0 over the last `warmdown_iters` steps. The challenge's default; no warm-up.

    With a cap the steps left are guessed as (time left) / (mean step time), and `iterations` plays no part. A run
    with fewer than warmdown_iters steps is therefore in its warmdown from the start: 276 steps at 1200 begin at 0.23.
    For the first `ignore_first_steps` steps the scale is 1, because slow first steps inflate the mean (PR #401 met a
    full warmdown at step 2), unless half of the cap has passed: such a run is really short.
    """
    if cfg.warmdown_iters <= 0:
        return 1.0
    if at.cap_ms is None:
        return min(max(at.iterations - at.step, 0) / cfg.warmdown_iters, 1.0)
    if at.step < cfg.ignore_first_steps and at.elapsed_ms < at.cap_ms / 2:
        return 1.0
    left_ms, warmdown_ms = max(at.cap_ms - at.elapsed_ms, 0.0), cfg.warmdown_iters * at.mean_step_ms
    return left_ms / warmdown_ms if left_ms <= warmdown_ms else 1.0


def _falling(p: float, floor: float = 0.1) -> float:
    """Half a cosine from 1 at p = 0 to `floor` at p = 1."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * p))


def cosine(cfg: ScheduleConfig, at: Progress) -> float:
    """0.1 + 0.45 (1 + cos pi p), restarted `cosine_cycles` times. 2 cycles cost 0.13 BPB in PR #1380's log."""
    p = fraction(cfg, at)
    return _falling(cfg.cosine_cycles * p % 1.0 if p < 1.0 else 1.0)


def golden(cfg: ScheduleConfig, at: Progress) -> float:
    """Half a cosine to 0.382 instead of 0.1."""
    return _falling(fraction(cfg, at), floor=0.382)


def tidal(cfg: ScheduleConfig, at: Progress) -> float:
    """Line from 0.1 up to 1 at p = 0.382, then half a cosine to 0.1."""
    p = fraction(cfg, at)
    return 0.1 + 0.9 * p / 0.382 if p < 0.382 else _falling((p - 0.382) / 0.618)


def breathing(cfg: ScheduleConfig, at: Progress) -> float:
    """Line from 0.1 up to 1 at p = 4/19, 1 until 11/19, then half a cosine to 0.1."""
    p = fraction(cfg, at)
    if p < 4 / 19:
        return 0.1 + 0.9 * p / (4 / 19)
    return 1.0 if p < 11 / 19 else _falling((p - 11 / 19) / (8 / 19))


def whale(cfg: ScheduleConfig, at: Progress) -> float:
    """Three dives: each rises in a tenth of its third to 0.05 + 0.95 (1 - 0.3 p) and falls by half a cosine to 0.05.

    The last tenth of the run is also multiplied by (1 - p) / 0.1; never below 0.05.
    """
    p = fraction(cfg, at)
    f, peak = 3.0 * p % 1.0, 0.95 * (1.0 - 0.3 * p)
    scale = 0.05 + peak * (f / 0.1 if f < 0.1 else 0.5 * (1.0 + math.cos(math.pi * (f - 0.1) / 0.9)))
    return max(scale * (1.0 - p) / 0.1 if p > 0.9 else scale, 0.05)


def circadian(cfg: ScheduleConfig, at: Progress) -> float:
    """Half a cosine plus 0.15 (1 - p) sin(2 pi step / 50), never below 0.1. The wave is by step whatever `by` says."""
    p = fraction(cfg, at)
    return max(_falling(p) + 0.15 * (1.0 - p) * math.sin(2.0 * math.pi * at.step / 50.0), 0.1)


def cosmo(cfg: ScheduleConfig, at: Progress) -> float:
    """Line from 0.05 to 1 at p = 0.05, then 1 / sqrt(1 + 20 p), never below 0.05. It jumps to 0.71 at p = 0.05."""
    p = fraction(cfg, at)
    return 0.05 + 0.95 * p / 0.05 if p < 0.05 else max(0.05, 1.0 / math.sqrt(1.0 + 20.0 * p))


def d2z(cfg: ScheduleConfig, at: Progress) -> float:
    """step / d2z_warmup_steps (0 at step 0), then 1 minus the spent part of the cap, or of `iterations` without one."""
    if at.step < cfg.d2z_warmup_steps:
        return at.step / cfg.d2z_warmup_steps
    spent = at.step / at.iterations if at.cap_ms is None else at.elapsed_ms / at.cap_ms
    return max(1.0 - spent, 0.0)


def constant(cfg: ScheduleConfig, at: Progress) -> float:
    """1."""
    return 1.0


SCHEDULES: dict[str, Callable[[ScheduleConfig, Progress], float]] = {
    "linear": linear,
    "cosine": cosine,
    "golden": golden,
    "tidal": tidal,
    "breathing": breathing,
    "whale": whale,
    "circadian": circadian,
    "cosmo": cosmo,
    "d2z": d2z,
    "constant": constant,
}
