"""Schedules at points worked out by hand."""

import itertools
import math

import pytest

from pgolf.errors import ConfigError
from pgolf.optim.config import SCHEDULE_NAMES, ScheduleConfig
from pgolf.optim.schedule import SCHEDULES, Progress, lr_scale


def at(p: float, kind: str, **knobs) -> float:
    """Factor at p = step / iterations of a run of 19,000 steps (p * 19000 whole for the points below)."""
    return lr_scale(ScheduleConfig(kind=kind, **knobs), Progress(round(p * 19000), 19000, 0.0, None))


def test_table_is_the_settings_list():
    assert tuple(SCHEDULES) == SCHEDULE_NAMES


POINTS = [
    ("constant", 0.7, 1.0),
    ("cosine", 0.0, 1.0),
    ("cosine", 0.5, 0.55),
    ("cosine", 1.0, 0.1),
    ("golden", 0.0, 1.0),
    ("golden", 0.5, 0.691),
    ("golden", 1.0, 0.382),
    ("tidal", 0.0, 0.1),
    ("tidal", 0.191, 0.55),
    ("tidal", 0.382, 1.0),
    ("tidal", 0.691, 0.55),
    ("tidal", 1.0, 0.1),
    ("breathing", 0.0, 0.1),
    ("breathing", 2 / 19, 0.55),
    ("breathing", 4 / 19, 1.0),
    ("breathing", 8 / 19, 1.0),
    ("breathing", 11 / 19, 1.0),
    ("breathing", 15 / 19, 0.55),
    ("breathing", 1.0, 0.1),
    ("whale", 0.0, 0.05),
    ("whale", 0.1, 0.05 + 0.95 * 0.97 * 0.5 * (1 + math.cos(math.pi * 0.2 / 0.9))),  # f = 0.3
    ("whale", 0.02, 0.05 + 0.95 * 0.994 * 0.6),  # f = 0.06
    ("whale", 0.35, 0.05 + 0.95 * 0.895 * 0.5),  # second dive, f = 0.05
    ("whale", 0.95, 0.05),  # f = 0.85: (0.05 + 0.0459) * 0.5 is below the floor
    ("whale", 1.0, 0.05),
    ("circadian", 0.0, 1.0),
    ("cosmo", 0.0, 0.05),
    ("cosmo", 0.025, 0.525),
    ("cosmo", 0.05, 1 / math.sqrt(2)),
    ("cosmo", 0.4, 1 / 3),
    ("cosmo", 0.75, 0.25),
]


@pytest.mark.parametrize(("kind", "p", "expected"), POINTS)
def test_shapes(kind, p, expected):
    assert at(p, kind) == pytest.approx(expected, abs=1e-9)


def test_published_ends_of_stopped_runs():
    """Runs planned for 400 steps that the clock stopped at 276 and 240: final tidal factors 0.55 and 0.75."""
    tidal = [lr_scale(ScheduleConfig(kind="tidal"), Progress(k, 400, 0.0, None)) for k in (276, 240)]
    assert tidal == pytest.approx([0.55, 0.75], abs=0.02)


def test_whale_peaks_shrink():
    peaks = [at(p, "whale") for p in (1.0 / 30, 1.0 / 3 + 1.0 / 30, 2.0 / 3 + 1.0 / 30)]
    assert peaks == pytest.approx([0.05 + 0.95 * (1 - 0.3 * p) for p in (1 / 30, 11 / 30, 21 / 30)], abs=2e-3)


def test_cosine_cycles_restart():
    two = [at(p, "cosine", cosine_cycles=2) for p in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert two == pytest.approx([1.0, 0.55, 1.0, 0.55, 0.1])


def test_circadian_wave():
    cfg = ScheduleConfig(kind="circadian")
    day = 0.1 + 0.45 * (1 + math.cos(math.pi * 0.03125)) + 0.15 * (1 - 0.03125)  # step 12.5 of 400
    assert lr_scale(cfg, Progress(12, 400, 0.0, None)) == pytest.approx(day, abs=3e-3)
    assert lr_scale(cfg, Progress(390, 400, 0.0, None)) == 0.1  # floor: night


def test_by_time_reads_the_clock_and_needs_a_cap():
    cfg = ScheduleConfig(kind="cosine", by="time")
    assert lr_scale(cfg, Progress(7, 10**6, 300.0, 600.0)) == pytest.approx(0.55)
    assert lr_scale(cfg, Progress(7, 10**6, 900.0, 600.0)) == pytest.approx(0.1)  # the last step may overshoot
    with pytest.raises(ConfigError, match="MAX_WALLCLOCK_SECONDS"):
        lr_scale(cfg, Progress(7, 100, 300.0, None))
    assert ScheduleConfig(by="day").problems()


def test_linear_by_steps():
    cfg = ScheduleConfig(warmdown_iters=100)
    got = [lr_scale(cfg, Progress(k, 1000, 1.0, None)) for k in (0, 899, 900, 950, 999, 1000)]
    assert got == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.01, 0.0])
    assert lr_scale(ScheduleConfig(warmdown_iters=0), Progress(999, 1000, 1.0, 1.0)) == 1.0


def test_linear_by_clock_is_the_baselines_rule():
    cfg = ScheduleConfig(warmdown_iters=3500, ignore_first_steps=0)
    scale = lambda k, ms: lr_scale(cfg, Progress(k, 9000, ms, 600e3))
    assert scale(0, 0.0) == 1.0
    assert scale(3000, 3000 * 87.2) == 1.0  # 338 s left, 305 s of warmdown
    assert scale(5000, 5000 * 87.2) == pytest.approx((600e3 - 436e3) / (3500 * 87.2))
    assert scale(6882, 600.1e3) == 0.0
    # fewer steps than the warmdown: the factor is below 1 from the first measured step on
    short = ScheduleConfig(warmdown_iters=1200, ignore_first_steps=0)
    assert lr_scale(short, Progress(1, 400, 2174.0, 600e3)) == pytest.approx(0.229, abs=1e-3)


def simulate(cfg: ScheduleConfig, step_ms: list[float], cap_ms: float) -> list[float]:
    """Factors that a trainer following Progress's contract would see."""
    elapsed, skipped, scales = 0.0, (0, 0.0), []
    for k, ms in enumerate(step_ms):
        if k == cfg.skip_steps:
            skipped = (k, elapsed)
        scales.append(lr_scale(cfg, Progress(k, 10**6, elapsed, cap_ms, *skipped)))
        elapsed += ms
        if elapsed >= cap_ms:
            break
    return scales


def test_slow_first_steps_do_not_switch_the_warmdown_on():
    times = [30e3, 10e3] + [100.0] * 10000  # two steps that compiled
    naive = simulate(ScheduleConfig(warmdown_iters=1000, ignore_first_steps=0), times, 600e3)
    assert min(naive[1:20]) < 0.05  # what the rule guards against
    scales = simulate(ScheduleConfig(warmdown_iters=1000), times, 600e3)
    assert scales[:4500] == [1.0] * 4500 and scales[-1] < 0.002
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(scales))
    stall = [100.0] * 10 + [2000.0] + [100.0] * 10000  # one 20-fold stall right when the mean is first believed
    assert min(simulate(ScheduleConfig(warmdown_iters=1000), stall, 600e3)[:100]) == 1.0


def test_a_run_shorter_than_the_ignored_steps_still_warms_down():
    long = simulate(ScheduleConfig(warmdown_iters=200), [100.0] * 100, 10e3)  # in its warmdown from the start
    assert long[:10] == [1.0] * 10 and long[10] == pytest.approx(90 / 200)
    scales = simulate(ScheduleConfig(warmdown_iters=4), [100.0] * 8, 800.0)
    assert scales == pytest.approx([1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_d2z():
    cfg = ScheduleConfig(kind="d2z", d2z_warmup_steps=200)
    steps = [lr_scale(cfg, Progress(k, 1000, 0.0, None)) for k in (0, 100, 200, 600, 1000)]
    assert steps == pytest.approx([0.0, 0.5, 0.8, 0.4, 0.0])
    assert lr_scale(cfg, Progress(300, 1000, 450.0, 600.0)) == pytest.approx(0.25)
    assert lr_scale(cfg, Progress(300, 1000, 601.0, 600.0)) == 0.0
