"""Times of every kernel at its production size, against the reference compiled and eager, and libraries with the op.

    pytest bench/bench_kernels.py --benchmark-only [-k residual] [--bench-rounds 20] [--benchmark-json FILE]

A test is one case, mode and provider; all of a case are measured at once, by turns, when the first of them runs. A
provider is timed only after `bench.guards` let it through. pgolf failing there fails the test; another provider that
is not right, or does not fit, is skipped with the reason. Without a GPU: `--bench-size small`, the references only.
"""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F

from . import providers, timing
from .cases import CASES, Case
from .cases.case import PRODUCTION
from .conftest import REPLAY
from .guards import guard_speed, guard_timer

NO_GPU = "needs a CUDA device: production sizes; --bench-size small runs the references on this CPU"


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("bench_device")
    mark = lambda case, mode: pytest.mark.benchmark(timer=REPLAY, group=f"{case.id} {mode}")
    rows = [
        pytest.param(case, name, mode, id=f"{case.id}-{mode}-{name}", marks=mark(case, mode))
        for case in CASES
        if PRODUCTION in case.sizes
        for mode in providers.modes(case, device)
        for name in providers.available(case, device)
    ]
    metafunc.parametrize("case, name, mode", rows)


@pytest.fixture(scope="session")
def trusted_timer(bench_device) -> None:
    """The timer of a GPU agrees with the host's clock."""
    if bench_device.type == "cuda":
        big = torch.randn(2, 8192, 8192, device=bench_device, dtype=torch.bfloat16)
        clock = timing.clock_of(bench_device)
        guard_timer(clock, lambda: F.linear(*big), lambda: torch.cuda.synchronize(bench_device))


@pytest.fixture(scope="session")
def measured(request, bench_device, bench_rounds, bench_size, trusted_timer):
    """measured(case): times of the case's selected providers, in every mode; measured once."""
    selected, seen = defaultdict(list), {}
    for item in request.session.items:
        params = getattr(item, "callspec", None) and item.callspec.params
        if params and params.keys() >= {"case", "name", "mode"} and params["name"] not in selected[params["case"].id]:
            selected[params["case"].id].append(params["name"])

    def of(case: Case) -> providers.Found:
        if case.id not in seen:
            size = size_of(case, bench_size)
            min_ms = 20.0 if bench_size == PRODUCTION else 0.0
            names = selected[case.id]
            seen[case.id] = providers.measure(
                case, names, size, device=bench_device, rounds=bench_rounds, min_ms=min_ms
            )
        return seen[case.id]

    return of


def size_of(case: Case, bench_size: str) -> str:
    return PRODUCTION if bench_size == PRODUCTION else providers.smallest(case)


def test_kernel(request, benchmark, case, name, mode, bench_device, bench_size):
    if bench_device.type == "cpu" and bench_size == PRODUCTION:
        pytest.skip(NO_GPU)
    size, dtype = size_of(case, bench_size), case.dtypes[-1]
    if benchmark.disabled:  # --benchmark-disable: right or not, without times
        benchmark(providers.guarded, name, case, size, bench_device, dtype)
        return
    found = request.getfixturevalue("measured")(case)[mode, name]
    if isinstance(found, providers.Failure):
        if name.startswith("pgolf") or bench_device.type == "cpu":
            pytest.fail(found.trace, pytrace=False)
        pytest.skip(f"{name}: {found.reason}")
    nbytes, flops = providers.amounts(case, size, mode)
    product = "attention" if case.op == "attention" else "gemm"
    if bench_device.type == "cuda" and bench_size == PRODUCTION:
        allowed = timing.roof_ms(nbytes, flops, request.getfixturevalue("roofs"), product)
        guard_speed(f"{case.id} {mode} {name}", found.median, allowed)
    what = {"case": case.id, "mode": mode, "provider": name, "size": dict(case.sizes[size]), "dtype": str(dtype)[6:]}
    request.getfixturevalue("report")(found, nbytes=nbytes, flops=flops, product=product, **what)
