"""Where a training step's time goes, measured: phases, kernels, and ranges for Nsight.

    python -m bench.profile_step --preset rat_rod_green [--path compile+kernels] [--steps 5] [--warmup 3] [--top 30]
                                 [--trace FILE] [--json FILE] [--nsight]

Runs the trainer's own step at one GPU's share (bench/step.py). First the phases, by the device's clock and without a
profiler: weight cast, forward, backward, reduction over ranks with clipping, optimiser, averages. Then, with
torch.profiler, the kernels (on a CPU the operators) that take longest. `--nsight` leaves the second part to nsys or
ncu: NVTX ranges for phases and for each op of kernels/, between cudaProfilerStart and cudaProfilerStop;
docs/profiling.md has the command lines. Without a GPU the default is the smoke preset, eager.
Exit codes: 0, 2 bad arguments.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from pgolf.presets import PRESETS

from .variants import DEFAULT, ON_CPU, VARIANTS

PHASES = ("cast", "forward", "backward", "reduce", "optimizer", "averaging")
REST = "rest"  # between phases


# -- phases: marked where the trainer calls its parts ----------------------------------------------------------------


class Phases:
    """`switch(name)` ends a phase and begins the next, `end` the last one of a step.

    begin(name) -> whatever `finish` takes; both are called at the boundaries.
    """

    def __init__(self, begin: Callable[[str], Any], finish: Callable[[Any], None]):
        self.begin, self.finish = begin, finish
        self.open: Any = None
        self.name = ""

    def switch(self, name: str) -> None:
        if name != self.name:
            self.end()
            self.name, self.open = name, self.begin(name)

    def end(self) -> None:
        if self.name:
            self.finish(self.open)
        self.name = ""


@contextmanager
def marking(trainer: Any, phases: Phases) -> Iterator[None]:
    """Inside, the trainer's steps tell `phases` where they are: its parts are wrapped at the calls that it makes."""
    parts = [  # owner, attribute, phase from its call on, phase from its return on
        (trainer.cast, "refresh_", "cast", None),
        (trainer, "compute_loss", "forward", "backward"),
        (trainer.cast, "collect_", "cast", None),
        (trainer.optim, "reduce_", "reduce", None),
        (trainer.optim, "step", "optimizer", None),
        (trainer.averager, "update", "averaging", None),
    ]
    with ExitStack() as undo:
        for owner, attribute, before, after in parts:
            if owner is not None:
                undo.enter_context(_wrapped(owner, attribute, phases, before, after))
        yield


@contextmanager
def _wrapped(owner: Any, attribute: str, phases: Phases, before: str, after: str | None) -> Iterator[None]:
    inner, own = getattr(owner, attribute), attribute in vars(owner)

    def call(*args: Any, **kwargs: Any) -> Any:
        phases.switch(before)
        out = inner(*args, **kwargs)
        if after:
            phases.switch(after)
        return out

    setattr(owner, attribute, call)
    try:
        yield
    finally:
        if own:
            setattr(owner, attribute, inner)
        else:
            delattr(owner, attribute)


def phase_times(stepper: Any, steps: int, clock: Any) -> dict[str, float]:
    """Milliseconds of each phase, the median over steps, and of what lies between them."""
    marks: list[tuple[str, Any, Any]] = []
    phases = Phases(lambda name: (name, clock.mark()), lambda opened: marks.append((*opened, clock.mark())))
    whole, seen = [], []
    with marking(stepper.trainer, phases):
        for _ in range(steps):
            begin = clock.mark()
            stepper.call()
            phases.end()
            whole.append((begin, clock.mark()))
            seen.append(marks[:])
            marks.clear()
    clock.wait()
    sums = [
        {name: sum(clock.ms(b, e) for n, b, e in step if n == name) for name in PHASES}
        | {REST: clock.ms(*outer) - sum(clock.ms(b, e) for _, b, e in step)}
        for step, outer in zip(seen, whole, strict=True)
    ]
    return {name: median(step[name] for step in sums) for name in (*PHASES, REST)}


# -- profilers -------------------------------------------------------------------------------------------------------


@contextmanager
def ranged(name: str, nvtx: bool) -> Iterator[None]:
    """A range of torch.profiler and, where there is a GPU, of NVTX."""
    import torch

    with torch.profiler.record_function(name):
        if nvtx:
            torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            if nvtx:
                torch.cuda.nvtx.range_pop()


def run_ranged(stepper: Any, steps: int, cuda: bool) -> None:
    """Steps in ranges: "step", in it the phases, in these the ops of kernels/ that run, compiled or not."""
    from pgolf.kernels._op import watching

    def begin(name: str) -> Any:
        entered = ranged(name, cuda)
        entered.__enter__()
        return entered

    phases = Phases(begin, lambda entered: entered.__exit__(None, None, None))
    # torch.profiler knows custom ops by itself
    ops = watching(lambda op: ranged(f"op {op}", nvtx=True)) if cuda else nullcontext()
    with ops, marking(stepper.trainer, phases):
        for _ in range(steps):
            with ranged("step", cuda):
                stepper.call()
                phases.end()


def nsight(stepper: Any, steps: int) -> None:
    """The steps, for a profiler that waits for cudaProfilerStart."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStart()
    run_ranged(stepper, steps, cuda=True)
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()


@dataclass(frozen=True)
class Row:
    """A kernel, or on a CPU an operator: in a step. ms: its own time, without what it calls."""

    name: str
    calls: float
    ms: float
    share: float


def profiled(stepper: Any, steps: int, cuda: bool, trace: Path | None = None) -> list[Row]:
    """What takes time in a step, by torch.profiler, longest first. trace: a Chrome trace is written there."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]
    with profile(activities=activities) as seen:
        run_ranged(stepper, steps, cuda)
        stepper.trainer.dist.synchronize()
    if trace:
        seen.export_chrome_trace(str(trace))
    return rows_of(seen.key_averages(), steps, cuda)


def rows_of(events: Sequence[Any], steps: int, cuda: bool) -> list[Row]:
    """Rows of torch.profiler's averages: on a GPU kernels and copies, on a CPU operators; ranges are no work."""
    names = {"step", *PHASES}
    work = [
        (e.key, e.count, (e.self_device_time_total if cuda else e.self_cpu_time_total) / 1e3)
        for e in events
        if on_device(e) == cuda and e.key not in names and not getattr(e, "is_user_annotation", False)
    ]
    total = sum(ms for *_, ms in work) or 1.0
    rows = [Row(name, calls / steps, ms / steps, ms / total) for name, calls, ms in work if ms > 0]
    return sorted(rows, key=lambda row: -row.ms)


def on_device(event: Any) -> bool:
    """Whether an event is the GPU's own."""
    return "CUDA" in str(event.device_type)


# -- command line ----------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(prog="python -m bench.profile_step", description=__doc__.split("\n")[0])
    out.add_argument("--preset", choices=list(PRESETS), help="default: rat_rod_green, without a GPU smoke")
    out.add_argument("--path", choices=list(VARIANTS), help="how the step runs; default: as a run on this machine does")
    out.add_argument("--steps", type=int, default=5, help="profiled steps (default %(default)s)")
    out.add_argument("--warmup", type=int, default=3, help="steps before, which compile (default %(default)s)")
    out.add_argument("--top", type=int, default=30, help="rows of the table (default %(default)s)")
    out.add_argument("--world-size", type=int, default=8, help="GPUs that share a step (default %(default)s)")
    out.add_argument("--trace", type=Path, help="write a Chrome trace here, for chrome://tracing or ui.perfetto.dev")
    out.add_argument("--json", type=Path, help="write phases and kernels here")
    out.add_argument("--nsight", action="store_true", help="ranges and cudaProfilerStart only: run under nsys or ncu")
    return out


def main(argv: list[str] | None = None) -> int:
    ask = parser()
    args = ask.parse_args(argv)
    low = {"--steps": (args.steps, 1), "--warmup": (args.warmup, 1), "--top": (args.top, 0)}
    for name, (got, least) in (low | {"--world-size": (args.world_size, 1)}).items():
        if got < least:
            ask.error(f"{name}: got {got}, expected at least {least}")
    for name, path in (("--trace", args.trace), ("--json", args.json)):
        if path and not path.parent.is_dir():
            ask.error(f"{name}: got {path}, expected a file in a folder that exists")
    if args.nsight and (args.trace or args.json):
        ask.error("--nsight: got --trace or --json too, expected it alone: nsys and ncu write their own reports")
    import torch

    cuda = torch.cuda.is_available()
    if args.nsight and not cuda:
        ask.error("--nsight: got a machine without a CUDA device, expected one")
    args.preset = args.preset or ("rat_rod_green" if cuda else "smoke")
    args.path = args.path or DEFAULT["cuda" if cuda else "cpu"]
    if not cuda and args.path not in ON_CPU:
        ask.error(f"--path: got {args.path} without a CUDA device, expected {' or '.join(ON_CPU)}")
    return run(args, torch.device("cuda" if cuda else "cpu"))


def run(args: argparse.Namespace, device: Any) -> int:
    from dataclasses import replace

    from .step import Stepper, share
    from .timing import clock_of, device_card

    cfg = share(PRESETS[args.preset](), args.path, args.world_size)
    cfg = replace(cfg, train=replace(cfg.train, warmup_steps=args.warmup))
    stepper, cuda = Stepper(cfg, device), device.type == "cuda"
    stepper.warm_up()
    tokens = stepper.trainer.loader.tokens_per_step
    print(f"{args.preset}, {args.path}: {tokens:,} tokens a step on {device_card(device)['name']}")
    for line in stepper.trainer.runtime.lines():
        print(f"  {line}")
    if args.nsight:
        nsight(stepper, args.steps)
        return 0
    phases = phase_times(stepper, args.steps, clock_of(device))
    print_phases(phases, args.steps, stepper.trainer)
    rows = profiled(stepper, args.steps, cuda, args.trace)
    print_rows(rows[: args.top], cuda)
    if args.json:
        head = {"preset": args.preset, "path": args.path, "tokens": tokens, "steps": args.steps}
        found = {"phases": phases, "rows": [asdict(row) for row in rows], "card": device_card(device)}
        args.json.write_text(json.dumps(head | found, indent=1) + "\n")
    return 0


def print_phases(phases: dict[str, float], steps: int, trainer: Any) -> None:
    """The phases of a step and their sum."""
    whole = sum(phases.values())
    print(f"\n{'phase':12s}{'ms':>10s}{'share':>8s}   median of {steps} steps, no profiler")
    for name, ms in phases.items():
        print(f"{name:12s}{ms:10.3f}{100 * ms / whole:7.1f}%")
    print(f"{'= step':12s}{whole:10.3f}")
    if trainer.cast is None:
        print("cast is 0: weights are cast in forward, see kernels.weight_cast")


def print_rows(rows: list[Row], cuda: bool) -> None:
    """The table of kernels, or of operators."""
    what = "kernel" if cuda else "operator, own time"
    print(f"\n{'ms':>10s}{'share':>8s}{'calls':>8s}  {what}, of a step, with torch.profiler")
    for row in rows:
        print(f"{row.ms:10.3f}{100 * row.share:7.1f}%{row.calls:8g}  {row.name[:100]}")


if __name__ == "__main__":
    sys.exit(main())
