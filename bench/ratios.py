"""Gates on the ratio of two times measured in one run: absolute times depend on the machine, ratios hardly do.

    gate(benchmark, ("batched", fast), ("one by one", slow), at_most=1.1, check=is_right)

Both run by turns, A B, B A, A B, ..., so that a slow second hits both. The ratio is that of the medians. A ratio above
the bound is measured once more, for twice as long, before it is an AssertionError. `check` sees the candidate's
first result and its last: work that is skipped later on, or inputs that a call destroys, would be fast and wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

# A sample repeats calls that are shorter than this. Far below a scheduler's time slice of some 3 ms, so that on a busy
# machine most samples are not interrupted and the median is one of these
SAMPLE_SECONDS = 0.001
# A clock for tight bounds on work that waits for nothing: what other processes take is not in it. With two of them on
# two cores the wall-clock ratio of two equal calls of 40 ms was 0.86 to 1.13, that of CPU time 1.01
CPU_TIME = time.process_time
# As many as fit into a gate's seconds, within these; but one where a single pair of calls takes longer than that: what
# disturbs a short call is little beside it
ROUNDS = range(3, 52)

Side = tuple[str, Callable[[], Any]]  # name, what is timed
Check = Callable[[Any], Any] | None


@dataclass(frozen=True)
class Ratio:
    """candidate_s / baseline_s, median seconds a call, and the bound that it was held to."""

    what: str
    candidate: str
    baseline: str
    candidate_s: float
    baseline_s: float
    at_most: float

    @property
    def value(self) -> float:
        return self.candidate_s / self.baseline_s

    @property
    def holds(self) -> bool:
        return self.value <= self.at_most

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.candidate} {_in_words(self.candidate_s)}, "
            f"{self.baseline} {_in_words(self.baseline_s)}, ratio {self.value:.3g}, at most {self.at_most:.3g}"
        )


def gate(benchmark: Any, candidate: Side, baseline: Side, *, at_most: float, check: Check = None, **kwargs) -> None:
    """`measure` for pytest-benchmark's fixture: the ratio goes into its `extra_info`.

    With --benchmark-disable nothing is timed: both sides run once, and the candidate's result is checked.
    """
    if benchmark.disabled:
        result = candidate[1]()
        baseline[1]()
        if check:
            check(result)
        return
    ratio = measure(benchmark.name, candidate, baseline, at_most=at_most, check=check, **kwargs)
    print(ratio)  # pytest shows it with -rP
    benchmark.extra_info["ratio"] = asdict(ratio) | {"value": round(ratio.value, 4)}


def rates(benchmark: Any, **per_call: float) -> None:
    """After the benchmark ran: for each tokens=n, bytes=n of a call, how many a second, into its `extra_info`."""
    if benchmark.stats:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info.update({f"{name}_per_s": round(n / seconds) for name, n in per_call.items()})


def measure(
    what: str,
    candidate: Side,
    baseline: Side,
    *,
    at_most: float,
    check: Check = None,
    seconds: float = 1.0,
    clock: Callable[[], float] = time.perf_counter,
) -> Ratio:
    """Measures and returns the ratio; raises AssertionError when it is above `at_most` twice, with all four times.

    check: called with the candidate's first and last result, before and after the timing; raises if one is wrong.
    seconds: what the rounds may take. clock: what is read around each sample, in seconds.
    """
    keep = _keeping(candidate[1])
    keep()
    if check:
        check(keep.result)
    tries = []
    for effort in (1, 2):
        times = interleaved(keep, baseline[1], effort * seconds, clock)
        tries.append(Ratio(what, candidate[0], baseline[0], *times, at_most))
        if check:
            check(keep.result)
        if tries[-1].holds:
            return tries[-1]
    raise AssertionError(f"{tries[1]}\nthe first try: {tries[0]}")


def interleaved(a: Callable, b: Callable, seconds: float, clock: Callable[[], float]) -> tuple[float, float]:
    """Median seconds of a call of `a` and of `b`, run by turns, the first one changing from round to round."""
    sides, (calls, once) = (a, b), zip(*(_calls(fn, clock) for fn in (a, b)), strict=True)
    fit = int(seconds / max(sum(once), 1e-9))
    times: tuple[list, list] = ([], [])
    for i in range(min(max(fit, ROUNDS[0]), ROUNDS[-1]) if fit else 1):
        for which in (0, 1) if i % 2 == 0 else (1, 0):
            times[which].append(_sample(sides[which], calls[which], clock))
    return median(times[0]), median(times[1])


def _calls(fn: Callable, clock: Callable[[], float]) -> tuple[int, float]:
    """(calls a sample, its seconds). Where the first call is short a second one decides: caches may have been cold."""
    once = _sample(fn, 1, clock)
    if once < 10 * SAMPLE_SECONDS:
        once = min(once, _sample(fn, 1, clock))
    calls = max(1, math.ceil(SAMPLE_SECONDS / max(once, 1e-7)))
    return calls, calls * once


def _sample(fn: Callable, calls: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(calls):
        fn()
    return (clock() - began) / calls


class _keeping:
    """`fn`, with its last result."""

    def __init__(self, fn: Callable):
        self.fn, self.result = fn, None

    def __call__(self) -> None:
        self.result = self.fn()


def _in_words(seconds: float) -> str:
    scale, unit = next((pair for pair in ((1, "s"), (1e3, "ms")) if seconds * pair[0] >= 1), (1e6, "us"))
    return f"{seconds * scale:.3g} {unit}"
