"""Options and fixtures of the benchmarks. `pytest bench --benchmark-only` runs them; plain `pytest bench` skips all."""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as pgolf/cli.py does; read when torch loads

from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import timing

ROWS = pytest.StashKey[list]()  # lines of the summary
NOTES = pytest.StashKey[list]()  # text below it
COLUMNS = {  # of the summary: what of a benchmark's extra_info
    "ms": "ms", "p20": "p20", "p80": "p80", "host": "host_ms",
    "GB/s": "gb_per_s", "TFLOP/s": "tflop_per_s", "% roof": "percent_of_roof",
}  # fmt: skip
NEEDS = "benchmarks run with --benchmark-only (or, checked but not timed, with --benchmark-disable)"


def pytest_addoption(parser):
    group = parser.getgroup("pgolf benchmarks")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--bench-device", default=default, help="cpu, cuda or cuda:1 (default here: %(default)s)")
    group.addoption("--bench-rounds", type=int, default=10, help="rounds of each measurement (default %(default)s)")
    group.addoption(
        "--bench-size",
        default="production",
        choices=("production", "small"),
        help="small: kernels and steps on their smallest inputs, on a CPU with the references (default %(default)s)",
    )
    group.addoption("--bench-budget", help="a step budget in place of bench/budget.toml")


def pytest_configure(config):
    config.stash[ROWS], config.stash[NOTES] = [], []
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError('pytest-benchmark is not installed: pip install -e ".[bench]"')
    rounds, device = config.getoption("bench_rounds"), config.getoption("bench_device")
    if rounds < 1:
        raise pytest.UsageError(f"--bench-rounds: got {rounds}, expected at least 1")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise pytest.UsageError(f"--bench-device: got {device!r}, expected cpu, cuda or cuda:<number>")
    if kind == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--bench-device: got {device!r}, but torch.cuda.is_available() is False here")


def pytest_collection_modifyitems(config, items):
    here = str(config.rootpath / "bench")
    asked = config.getoption("benchmark_only", False) or config.getoption("benchmark_disable", False)
    for item in items:
        if str(item.path).startswith(here) and not asked:
            item.add_marker(pytest.mark.skip(reason=NEEDS))


def pytest_report_header(config) -> list[str]:
    from .providers import installed

    missing = [name for name, there in installed().items() if not there]
    return [f"peers not installed: {', '.join(missing)}"] if missing else []


@pytest.fixture(scope="session")
def bench_device(request) -> torch.device:
    """The device of --bench-device."""
    device = torch.device(request.config.getoption("bench_device"))
    if device.index is not None:
        torch.cuda.set_device(device)  # where libraries launch
    return device


@pytest.fixture(scope="session")
def bench_rounds(request) -> int:
    """--bench-rounds."""
    return request.config.getoption("bench_rounds")


@pytest.fixture(scope="session")
def bench_size(request) -> str:
    """--bench-size."""
    return request.config.getoption("bench_size")


@pytest.fixture(scope="session")
def card(bench_device) -> dict[str, Any]:
    """What the device is; see `timing.device_card`."""
    return timing.device_card(bench_device)


@pytest.fixture(scope="session")
def roofs(bench_device, bench_rounds) -> dict[str, float]:
    """What the device can do, measured in this process; see `timing.roofs`."""
    return timing.roofs(bench_device, rounds=min(5, bench_rounds))


class Replay:
    """A timer for pytest-benchmark that tells times which were measured elsewhere: each pair of calls one of them."""

    def __init__(self):
        self.now, self.left = 0.0, []

    def __call__(self) -> float:
        self.now += self.left.pop(0)
        return self.now

    def load(self, seconds: tuple[float, ...]) -> None:
        self.left = [step for s in seconds for step in (0.0, s)]


REPLAY = Replay()  # for @pytest.mark.benchmark(timer=REPLAY)


@pytest.fixture
def report(benchmark, request, card, roofs) -> Callable[..., None]:
    """report(timing, nbytes=, flops=, product=, **info): a `Timing` becomes the benchmark's rounds, and what it means
    its `extra_info`: ms, p20, p80, host_ms, gb_per_s, tflop_per_s, percent_of_roof, info, card and roofs.

    The test is marked with `@pytest.mark.benchmark(timer=REPLAY)`. product: the roof of the FLOPs.
    """

    def enter(t: timing.Timing, nbytes: float = 0, flops: float = 0, product: str = "gemm", **info: Any) -> None:
        REPLAY.load(tuple(ms / 1e3 for ms in t.samples))
        benchmark.pedantic(lambda: None, rounds=len(t.samples))
        what = {"ms": t.median, "p20": t.p20, "p80": t.p80, "host_ms": t.host}
        what |= timing.rates(t.median, nbytes, flops, roofs, product)
        benchmark.extra_info.update(what, repeats=t.repeats, card=card, roofs=roofs, **info)
        request.config.stash[ROWS].append((request.node.name, what))

    return enter


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    width = max(len(name) for name, _ in rows)
    terminalreporter.section("times on the device, ms")
    terminalreporter.line(f"{'':{width}s} " + " ".join(f"{title:>9s}" for title in COLUMNS))
    for name, what in rows:
        cells = (f"{what[key]:9.4g}" if key in what else f"{'-':>9s}" for key in COLUMNS.values())
        terminalreporter.line(f"{name:{width}s} " + " ".join(cells))
    for note in config.stash[NOTES]:
        terminalreporter.line(note)
