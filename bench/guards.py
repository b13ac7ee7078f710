"""What a time needs before it may be believed. Each guard raises AssertionError with what it saw.

`guard` runs a candidate before it is timed: a wrong result, work that is skipped, a result that is remembered from an
earlier call, inputs that are written to. `guard_timer` catches a timer that does not wait for the device, and
`guard_speed` a time that the device cannot reach.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .cases import Case
from .cases.case import Inputs
from .check import Named, evaluate, judge
from .timing import HostClock, time_interleaved

TOO_FAST = 2.0  # times a measured roof; caches may help a little, and `traffic` is a count of the ideal kernel's bytes


def guard(
    case: Case,
    candidate: Callable[..., Any],
    size: str,
    *,
    device: str | torch.device,
    dtype: torch.dtype,
    writes: tuple[str, ...] = (),
    poison: bool = True,
) -> None:
    """Runs candidate(**inputs) twice on the same tensors, the second time with new values in them.

    Both results, gradients included, must be right by `bench.check`, the first one in memory that was full of NaN; and
    inputs must be left as they were, but for those named in `writes`.
    poison: off for torch.compile, which would compile anew for it and whose buffers it does not reach.
    """
    inputs, before = case.make(size, str(device), dtype, seed=0), case.make(size, str(device), dtype, seed=0)
    with poisoned() if poison else nullcontext():
        got = evaluate(case, candidate, inputs)
    judge(case, got, before, dtype)
    for name in inputs.keys() - set(writes):
        assert same(inputs[name], before[name]), f"{case.id}: the call changed its input {name}"
    fresh = case.make(size, str(device), dtype, seed=1)
    if not alike(inputs, fresh):  # a table whose size is by chance
        fresh = before
    spoil(got)  # an output that is handed out again, or is an input, is seen
    refill(inputs, fresh)
    try:
        judge(case, evaluate(case, candidate, inputs), fresh, dtype)
    except (AssertionError, RuntimeError) as error:  # autograd's, when a graph is gone through twice
        raise AssertionError(
            f"the same tensors with new values in them, the result of an earlier call? {error}"
        ) from None


def guard_timer(
    clock: HostClock,
    work: Callable[[], Any],
    wait: Callable[[], None],
    *,
    calls: int = 20,
    now: Callable[[], float] = time.perf_counter,
) -> None:
    """A clock's time for `work`, of a millisecond or more, must be the host's for a burst of calls, within a half.

    wait: returns when the device is idle, by other means than the clock. now: the host's clock, seconds.
    """
    timed = time_interleaved({"work": work}, rounds=3, min_ms=0.0, clock=clock)["work"].median
    wait()
    began = now()
    for _ in range(calls):
        work()
    wait()
    real = 1e3 * (now() - began) / calls
    assert abs(timed - real) <= real / 2, f"the timer says {timed:.4g} ms, the host {real:.4g} ms a call: does it wait?"


def guard_speed(what: str, ms: float, roof_ms: float) -> None:
    """`ms` must not be shorter than half of what the measured roofs allow."""
    assert ms * TOO_FAST >= roof_ms, (
        f"{what}: {ms:.4g} ms, where the measured roofs allow {roof_ms:.4g} ms: work is skipped, or counted twice"
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty is full of NaN, integers of the largest value: an output that is not written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ops that are not deterministic: beside the point here
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def leaves(tree: Any) -> list:
    """What a nested structure holds, the fields of dataclasses too."""
    found = [leaves(vars(x)) if is_dataclass(x) else [x] for x in pytree.tree_leaves(tree)]
    return [x for part in found for x in part]


def tensors(tree: Any) -> list[Tensor]:
    """All tensors of a nested structure."""
    return [x for x in leaves(tree) if isinstance(x, Tensor)]


def alike(a: Inputs, b: Inputs) -> bool:
    """Whether b's tensors fit into a's, and what else there is is equal."""
    brief = lambda tree: [(x.shape, x.dtype) if isinstance(x, Tensor) else x for x in leaves(tree)]
    return brief(a) == brief(b)


def same(a: Any, b: Any) -> bool:
    """Whether two inputs are equal, bit for bit."""
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


@torch.no_grad()
def refill(inputs: Inputs, values: Inputs) -> None:
    """Writes `values` into the tensors of `inputs`."""
    for t, v in zip(tensors(inputs), tensors(values), strict=True):
        t.copy_(v)


@torch.no_grad()
def spoil(found: Named) -> None:
    """Overwrites results, but for expanded ones."""
    for t in found.values():
        if t.numel() and 0 not in t.stride():
            t.fill_(float("nan") if t.is_floating_point() else 77)


def touch(inputs: Inputs) -> None:
    """Tells autograd's version counters that inputs have changed, as a new step's do: whoever remembers results by
    tensor and version, and `guard` has caught those who look at the tensor alone, must compute again."""
    for t in tensors(inputs):
        torch.autograd.graph.increment_version(t)
