"""Times of one training step of every preset at one GPU's share, against the step budget.

    pytest bench/bench_step.py --benchmark-only [-k "rat_rod_green and kernels"] [--bench-rounds 20]

A test is one preset, variant (eager, compile, kernels, compile+kernels, the same with folded scales), and "step" or,
without the optimiser, "gradients"; all of a preset are measured by turns, when the first of them runs (bench/step.py).
The step of a run's default variant fails above its ceiling in bench/budget.toml (--bench-budget FILE: another). A
variant that does not fit into the memory is skipped, unless a ceiling waits for it. Without a GPU:
`--bench-size small`, the smoke preset, eager and compiled.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from pgolf.presets import PRESETS

from . import budget, variants
from .bench_kernels import trusted_timer  # noqa: F401
from .conftest import NOTES, REPLAY
from .gpus import GPUS, key_of
from .guards import guard_speed
from .step import check, in_words, least_ms, measure, model_flops
from .variants import WORLD

NO_GPU = "needs a CUDA device: steps at one GPU's share; --bench-size small runs the smoke preset on this CPU"
MIN_MS = {"production": 400.0, "small": 50.0}  # of a round, for each variant


def pytest_generate_tests(metafunc):
    small = metafunc.config.getoption("bench_size") == "small"
    on_cpu = metafunc.config.getoption("bench_device").startswith("cpu")
    rows = []
    for preset in variants.SMALL if small else variants.TIMED:
        for variant in variants.ON_CPU if small and on_cpu else variants.VARIANTS:
            for optimizer in (True, False):
                what = "step" if optimizer else "gradients"
                marks = [pytest.mark.benchmark(timer=REPLAY, group=f"{preset} {what}")]
                marks += [pytest.mark.slow] * ("compile" in variant)
                rows.append(pytest.param(preset, variant, optimizer, id=f"{preset}-{variant}-{what}", marks=marks))
    metafunc.parametrize("preset, variant, optimizer", rows)


@pytest.fixture(scope="session")
def steps(request, bench_device, bench_rounds, bench_size, trusted_timer):  # noqa: F811
    """steps(preset): what `bench.step` found for the selected variants of a preset; measured once."""
    selected, seen = defaultdict(list), {}
    for item in request.session.items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if params and params.keys() >= {"preset", "variant"} and params["variant"] not in selected[params["preset"]]:
            selected[params["preset"]].append(params["variant"])

    def of(preset: str) -> dict:
        if preset not in seen:
            how = {"world_size": WORLD[bench_size], "rounds": bench_rounds, "min_ms": MIN_MS[bench_size]}
            seen[preset] = measure(PRESETS[preset](), selected[preset], bench_device, **how)
        return seen[preset]

    return of


@pytest.fixture(scope="session")
def budgets(request) -> dict[str, budget.Budget]:
    """The step budgets."""
    path = request.config.getoption("bench_budget")
    try:
        return budget.read(path or budget.COMMITTED)
    except ValueError as error:
        raise pytest.UsageError(f"--bench-budget: {error}") from None


def ceiling_of(
    budgets: dict[str, budget.Budget], preset: str, variant: str, optimizer: bool, kind: str
) -> budget.Budget | None:
    """The budget that a measurement is held to: a run's default variant, optimiser included."""
    return budgets.get(preset, budget.Budget()) if optimizer and variant == variants.DEFAULT[kind] else None


def test_step(request, benchmark, preset, variant, optimizer, bench_device, bench_size, budgets):
    if bench_device.type == "cpu" and bench_size == "production":
        pytest.skip(NO_GPU)
    if benchmark.disabled:  # --benchmark-disable: right or not, without times
        benchmark(check, PRESETS[preset](), variant, bench_device, WORLD[bench_size])
        return
    found, card = request.getfixturevalue("steps")(preset)[variant, optimizer], request.getfixturevalue("card")
    device = key_of(card["name"]) if bench_device.type == "cuda" else "cpu"
    held_to = ceiling_of(budgets, preset, variant, optimizer, bench_device.type)
    if not hasattr(found, "timing"):
        if found.reason.startswith("OutOfMemoryError") and not (held_to and device in held_to.ceiling):
            pytest.skip(f"{variant}: {found.reason}")
        pytest.fail(found.trace, pytrace=False)
    report_step(request, benchmark, found, {"preset": preset, "variant": variant, "optimizer": optimizer}, device)
    if held_to is not None:
        kept, said = budget.verdict(held_to, device, found.timing.median)
        request.config.stash[NOTES].append(f"{preset} budget: {said}")
        assert kept, f"{preset}, {variant}: {said}"


def report_step(request, benchmark, found, what: dict, device: str | None) -> None:
    """The benchmark's figures and a line of the summary. Fails for a time that no work can take."""
    flops = model_flops(what["preset"], WORLD[request.getfixturevalue("bench_size")])
    if device != "cpu":
        roofs = request.getfixturevalue("roofs")
        guard_speed(benchmark.name, found.timing.median, least_ms(flops, roofs))
    facts = found.facts(flops, GPUS[device].tensor if device in GPUS else None)
    request.getfixturevalue("report")(found.timing, flops=flops, **what, **facts)
    request.config.stash[NOTES].append(f"{benchmark.name}: {in_words(facts)}")
