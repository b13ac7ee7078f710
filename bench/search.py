"""The search of `bench/tune.py`: which rows there are to tune, how else they could launch, and which of that wins.

A row is judged on every case that launches by it. A candidate is compiled ahead of time (`Compiler`), its results are
checked, and only then is it timed, by turns with the committed launch.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import permutations
from multiprocessing import get_context
from typing import Any

import torch

from pgolf.kernels._op import INTERPRETER, recording
from pgolf.kernels._tuned import Launch

from . import providers, static
from .cases import CASES, Case, Make
from .cases.case import PRODUCTION
from .check import evaluate
from .launch_table import Key, force, forced, resolve, rows_with
from .timing import HostClock, Timing, time_interleaved

MARGIN = 0.02  # a challenger's median must be this much shorter: more than two runs of one launch differ by
OURS = "pgolf:triton"  # the provider that runs our own kernels, attention's too where a library would be chosen
MAX_WARPS, MAX_STAGES = 16, 6
AT_LEAST = {("mlp_up", "BLOCK_N"): 128, ("mlp_du", "BLOCK_N"): 128}  # what kernels ask beyond powers of two
ROUGH = {"copy": 3e12, "gemm": 6e14}  # bytes/s and FLOP/s, to order cases by size

# -- what there is to tune -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A row of the launch table. of: the cases launched by it and the mode it is timed in, the largest first."""

    kernel: str
    key: Key  # (arch, shape class); the committed launch may come from an earlier arch or from class "*"
    launch: Launch
    of: tuple[tuple[Case, str], ...]

    @property
    def name(self) -> str:
        return f"{self.kernel} sm_{self.key[0]} {self.key[1]}"


def targets(cases: Iterable[Case], arch: int, device: str = "cuda", size: str = PRODUCTION) -> list[Target]:
    """The rows that the cases' `size` is launched by on sm_<arch>, those of the largest work first."""
    found: dict[tuple[str, str], list[tuple[float, Case, str]]] = {}
    for case in cases:
        if size not in case.sizes:
            continue
        forward = asked(replace(case, grads=()), case.sizes[size], arch)
        ahead = providers.modes(replace(case, grads=()), device)[-1]  # a replayed graph where there is one
        reduced = asked(case, providers.guarded_size(case), arch) if size == PRODUCTION else None
        for row in asked(case, case.sizes[size], arch):
            if reduced is not None and row not in reduced:
                continue  # could not be checked
            mode = ahead if row in forward else "backward"
            found.setdefault(row, []).append((_ideal_ms(case, size, mode), case, mode))
    order = sorted(found, key=lambda row: -sum(ms for ms, _, _ in found[row]))
    by_work = lambda row: tuple((case, mode) for _, case, mode in sorted(found[row], key=lambda one: -one[0]))
    return [Target(kernel, (arch, c), resolve(kernel, arch, c), by_work((kernel, c))) for kernel, c in order]


def asked(case: Case, size: Mapping[str, int], arch: int) -> list[tuple[str, str]]:
    """(kernel, shape class) of the look-ups in the launch table that the case makes, each once."""
    with recording(arch) as seen:
        evaluate(case, case.fn, case.inputs(Make("meta", case.dtypes[-1]), **size))
    return list(dict.fromkeys(seen.asked))


def _ideal_ms(case: Case, size: str, mode: str) -> float:
    nbytes, flops = providers.amounts(case, size, mode)
    return 1e3 * max(nbytes / ROUGH["copy"], flops / ROUGH["gemm"])


# -- candidates ------------------------------------------------------------------------------------------------------


def neighbours(kernel: str, how: Launch) -> list[Launch]:
    """Launches one step away: warps or a block doubled or halved, a stage more or less; then two at once: a block and
    the warps the same way, two blocks in opposite ways. Stages move only where the launch has more than one."""
    blocks = list(how.blocks)
    steps: list[dict[str, float]] = [{axis: by} for axis in ("num_warps", *blocks) for by in (2, 0.5)]
    steps += [{"num_stages": by} for by in (1, -1) if how.num_stages > 1]
    steps += [{"num_warps": by, block: by} for block in blocks for by in (2, 0.5)]
    steps += [{a: 2, b: 0.5} for a, b in permutations(blocks, 2)]
    return [moved for step in steps if (moved := _moved(kernel, how, step))]


def _moved(kernel: str, how: Launch, step: dict[str, float]) -> Launch | None:
    warps = int(how.num_warps * step.get("num_warps", 1))
    stages = how.num_stages + int(step.get("num_stages", 0))
    blocks = {name: int(size * step.get(name, 1)) for name, size in how.blocks.items()}
    fits = 1 <= warps <= MAX_WARPS and 1 <= stages <= MAX_STAGES
    fits = fits and all(size >= AT_LEAST.get((kernel, name), 1) for name, size in blocks.items())
    return Launch(warps, stages, blocks) if fits else None


def brief(how: Launch) -> str:
    """A launch without its note: "w8 s3 BLOCK_M=128"."""
    return " ".join([f"w{how.num_warps} s{how.num_stages}", *(f"{k}={v}" for k, v in how.blocks.items())])


class Compiler:
    """Compiles candidates ahead of time, in processes that never use a GPU. `with Compiler() as fits: fits(...)`"""

    def __init__(self, workers: int | None = None):
        self.workers = workers or os.cpu_count()

    def __enter__(self) -> Compiler:
        self.environ = static._no_interpreter()
        self.environ.__enter__()
        self.pool = ProcessPoolExecutor(self.workers, get_context("spawn"))
        return self

    def __exit__(self, *error) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.environ.__exit__(*error)

    def __call__(self, target: Target, launches: list[Launch]) -> list[tuple[str, str]]:
        """(why a launch is out, "" where it is not; its registers and shared memory) of each."""
        job = (target.of[0][0].id, target.kernel, target.key)
        return list(self.pool.map(partial(examine, job), launches))


def examine(job: tuple[str, str, Key], launch: Launch) -> tuple[str, str]:
    """What `bench.static` says of a candidate: job is (case, kernel, key)."""
    case_id, kernel, key = job
    case = next(c for c in CASES if c.id == case_id)
    committed = {static.launch_key(one) for one in _recorded(case, key[0])}
    try:
        with forced(kernel, rows_with(kernel, key, launch)):
            launches = {static.launch_key(one): one for one in _recorded(case, key[0])}
        new = [one for name, one in launches.items() if name not in committed]
        rows = [static.figures(one, key[0], case_id) for one in new]
    except Exception as error:
        said = str(error).strip().splitlines()
        return f"does not compile: {type(error).__name__}: {said[-1] if said else ''}"[:200], ""
    what = ", ".join(f"{r.registers} registers, {r.shared} bytes shared" for r in rows)
    if not rows:
        return "launches as the committed row does", what
    return "; ".join(fault for r in rows for fault in r.faults(case.atomics)), what


def _recorded(case: Case, arch: int) -> list:
    with recording(arch) as seen:
        evaluate(case, case.fn, case.make(PRODUCTION, "meta", case.dtypes[-1]))
    return seen.launches


# -- the search ------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a row. ms: of all its cases together, committed and best; tried: launch -> what came of it."""

    target: Target
    best: Launch
    ms: tuple[float, float] | None = None
    tried: dict[str, str] = field(default_factory=dict)

    @property
    def won(self) -> bool:
        return self.best is not self.target.launch

    def to_dict(self) -> dict[str, Any]:
        t = self.target
        head = {"kernel": t.kernel, "arch": t.key[0], "class": t.key[1], "cases": [case.id for case, _ in t.of]}
        head |= {"committed": brief(t.launch), "best": brief(self.best), "won": self.won}
        return head | {"ms": self.ms and list(self.ms), "tried": self.tried}


@dataclass
class Tuner:
    """fits: see `Compiler`. deadline: of `now`, seconds; nothing new is begun after it."""

    device: str
    fits: Callable[[Target, list[Launch]], list[tuple[str, str]]]
    size: str = PRODUCTION
    rounds: int = 10
    min_ms: float = 20.0
    deadline: float = float("inf")
    now: Callable[[], float] = time.monotonic
    clock: HostClock | None = None  # another than the device's

    def tune(self, target: Target) -> Outcome:
        """Climbs from the committed launch to the fastest right neighbour until none is faster, or time is out."""
        out = Outcome(target, target.launch, tried={brief(target.launch): "committed"})
        while not self.late():
            contender = self._screen(out)
            if contender is None:
                break
            before, after = self._confirm(out, contender)
            if after is None or not wins(after, before):
                why = "wrong in another case" if after is None else f"not confirmed: {_against(after, before)}"
                out.tried[brief(contender)] = why
                break
            out.tried[brief(contender)] = f"faster: {_against(after, before)}"
            out.best, out.ms = contender, (sum(t.median for t in before), sum(t.median for t in after))
        return out

    def late(self) -> bool:
        return self.now() >= self.deadline

    def _screen(self, out: Outcome) -> Launch | None:
        """The fastest neighbour of the best so far, on the largest case; None if none wins. Fills `out.tried`."""
        target, (case, mode) = out.target, out.target.of[0]
        fresh = [c for c in neighbours(target.kernel, out.best) if brief(c) not in out.tried]
        right = {}
        for launch, (fault, _) in zip(fresh, self.fits(target, fresh), strict=True):
            if self.late():
                return None
            if why := fault or self.fault(target, launch, case):
                out.tried[brief(launch)] = why
            else:
                right[brief(launch)] = launch
        if not right or self.late():
            return None
        times = self.times(target, case, mode, {"best": out.best, **right})
        base = times.pop("best")
        out.tried |= {name: f"slower: {_against([t], [base])}" for name, t in times.items() if not wins([t], [base])}
        winners = [name for name, t in times.items() if wins([t], [base])]
        out.tried |= {name: f"not the fastest: {_against([times[name]], [base])}" for name in winners}
        return right[min(winners, key=lambda name: times[name].median)] if winners else None

    def _confirm(self, out: Outcome, launch: Launch) -> tuple[list[Timing], list[Timing] | None]:
        """Times of (the committed launch, this one) on all cases, measured anew; None where it is wrong."""
        before, after = [], []
        for i, (case, mode) in enumerate(out.target.of):
            if i and self.fault(out.target, launch, case):
                return before, None
            times = self.times(out.target, case, mode, {"committed": out.target.launch, "new": launch})
            before.append(times["committed"])
            after.append(times["new"])
        return before, after

    def fault(self, target: Target, launch: Launch, case: Case) -> str:
        """What is wrong with the case's results when it is launched so, at a size that fits the check; "" for nothing.

        The checks are those of the benchmark, `bench.guards`: values and gradients, twice, in poisoned memory."""
        with forced(target.kernel, rows_with(target.kernel, target.key, launch)):
            try:
                providers.guarded(OURS, case, self.size, torch.device(self.device), case.dtypes[-1])
            except Exception as error:
                said = str(error).strip().splitlines()
                return f"wrong: {type(error).__name__}: {said[0] if said else ''}"[:300]
        return ""

    def times(self, target: Target, case: Case, mode: str, launches: Mapping[str, Launch]) -> dict[str, Timing]:
        """The case's time in `mode` under each launch, by turns."""
        rows = {name: rows_with(target.kernel, target.key, launch) for name, launch in launches.items()}
        on_gpu = torch.device(self.device).type == "cuda"
        make = providers.OnDevice if on_gpu and self.size == PRODUCTION else Make
        inputs = case.inputs(make(self.device, case.dtypes[-1]), **case.sizes[self.size])
        provider = providers.build(OURS, case)
        runs = {name: providers.Run(case, provider, inputs) for name in launches}

        def prepare(name: str) -> None:
            force(target.kernel, rows[name])
            runs[name].prepare(mode)

        calls = {name: partial(run.call, mode) for name, run in runs.items()}
        settings = {"device": self.device, "rounds": self.rounds, "min_ms": self.min_ms, "clock": self.clock}
        with forced(target.kernel, rows[next(iter(rows))]):
            return time_interleaved(calls, prepare=prepare, **settings)


def wins(new: list[Timing], old: list[Timing]) -> bool:
    """Whether the sum of medians is shorter by MARGIN, the sums' spreads (20 % to 80 %) do not meet, and no case loses
    by MARGIN."""
    total = lambda times, what: sum(getattr(t, what) for t in times)
    shorter = total(new, "median") <= (1 - MARGIN) * total(old, "median")
    apart = total(new, "p80") < total(old, "p20")
    return shorter and apart and all(n.median < (1 + MARGIN) * o.median for n, o in zip(new, old, strict=True))


def _against(new: list[Timing], old: list[Timing]) -> str:
    return f"{sum(t.median for t in new):.4g} ms against {sum(t.median for t in old):.4g} ms"


def arch_of_device(device: str) -> int:
    """Compute capability as the launch table counts it."""
    if torch.device(device).type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
