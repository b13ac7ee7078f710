"""Searches launches on this GPU, and writes those that win to the launch table, `kernels/_tuned.py`.

    python -m bench.tune [--op mlp] [--minutes 20] [--write [FILE]] [--json FILE]
    python -m bench.tune --dry-run [--arch 90] [--op mlp] [--compiles 12]          needs no GPU

For each row that a production case launches by: neighbours of the committed launch (warps, stages and blocks by powers
of two) that the ahead-of-time compiler passes without spills and within shared memory, and whose results are right, are
timed by turns with the committed launch. One that is at least 2 % faster, beyond the spread, and again when measured
anew on all cases of the row, takes its place; then its neighbours follow, until none wins. Nothing is written without
--write. Training never comes here: it launches by the committed table. Exits with 3 where a GPU is needed and missing.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from .static import ARCHS

NO_GPU = 3  # exit code


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    if args.minutes <= 0 or args.compiles < 1:
        _parser().error(f"--minutes {args.minutes:g} and --compiles {args.compiles} must be positive")
    if args.arch is not None and args.arch not in ARCHS:
        _parser().error(f"--arch {args.arch}: known are {', '.join(map(str, ARCHS))}")
    if args.arch is not None and not args.dry_run:
        _parser().error("--arch: only with --dry-run; a GPU is tuned as what it is")
    return _dry_run(args) if args.dry_run else _tune(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--op", default="", help="only cases whose id contains this")
    parser.add_argument("--minutes", type=float, default=20.0, help="time limit (default %(default)g)")
    parser.add_argument("--device", default="cuda", help="the GPU, e.g. cuda:1 (default %(default)s)")
    parser.add_argument("--write", nargs="?", type=Path, const=True, metavar="FILE", help="write the table, or FILE")
    parser.add_argument("--json", type=Path, help="write what was tried here")
    parser.add_argument("--dry-run", action="store_true", help="list the candidates that compile well; no GPU needed")
    parser.add_argument("--arch", type=int, help="with --dry-run: compute capability (default 90)")
    parser.add_argument("--compiles", type=int, default=12, help="with --dry-run: candidates to compile (default 12)")
    return parser


def _selected(only: str) -> list:
    from .cases import CASES
    from .cases.case import PRODUCTION

    found = [case for case in CASES if PRODUCTION in case.sizes and only in case.id]
    if not found:
        _parser().error(f"--op {only!r}: no case of that name has a production size")
    return found


# -- on a GPU --------------------------------------------------------------------------------------------------------


def _tune(args: argparse.Namespace) -> int:
    cases = _selected(args.op)
    if why := unusable(args.device):
        print(f"bench.tune: {why}; --dry-run lists the candidates without one", file=sys.stderr)
        return NO_GPU
    outcomes, code = [], 0
    try:
        for outcome in run(cases, args.device, args.minutes):
            outcomes.append(outcome)
            print_outcome(outcome)
    except (
        RuntimeError,
        KeyboardInterrupt,
    ) as error:  # a launch may take the device down; what was found before counts
        print(f"bench.tune: stopped by {type(error).__name__}: {error}", file=sys.stderr)
        code = 1
    won = [o for o in outcomes if o.won]
    print(f"{len(outcomes)} rows, {len(won)} faster")
    _keep(args, [o.to_dict() for o in outcomes])
    if args.write and won:
        write(won, args.device, None if args.write is True else args.write)
    return code


def _keep(args: argparse.Namespace, rows: list[dict]) -> None:
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def unusable(device: str) -> str:
    """Why the device cannot be tuned; "" if it can."""
    import torch

    from .search import arch_of_device

    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind != "cuda":
        return f"got device {device!r}, but needs a GPU (cuda)"
    if not torch.cuda.is_available():
        return "needs a GPU; torch.cuda.is_available() is False here"
    arch = arch_of_device(device)
    return "" if arch in ARCHS else f"got sm_{arch}, whose limits bench/static.py does not know; known are {ARCHS}"


def run(cases: list, device: str, minutes: float) -> Iterator:
    """Outcomes of the rows that time allows, each as it is there."""
    import torch

    from .search import Compiler, Tuner, arch_of_device, targets

    if torch.device(device).index is not None:
        torch.cuda.set_device(device)
    deadline = time.monotonic() + 60 * minutes
    with Compiler() as fits:
        tuner = Tuner(device, fits, deadline=deadline)
        for target in targets(cases, arch_of_device(device), device):
            if tuner.late():
                print(f"out of time: {target.name} and what follows is as it was")
                return
            yield tuner.tune(target)


def print_outcome(outcome) -> None:
    """What was tried for a row."""
    print(f"{outcome.target.name}: {', '.join(case.id for case, _ in outcome.target.of)}")
    for name, what in outcome.tried.items():
        print(f"    {name:46s} {what}")
    sys.stdout.flush()


def write(won: list, device: str, path: Path | None = None) -> None:
    """Writes the launches that won, with what they rest on, to the launch table or to `path`."""
    from .launch_table import PATH, save
    from .timing import device_card

    changes = changed_rows(won, device_card(device))
    save(changes, path or PATH)
    print(f"wrote {path or PATH}; then: python -m bench.static --update, and commit both")


def changed_rows(won: list, card: dict) -> dict[str, dict]:
    """kernel -> {(arch, class): launch} of everything that must be written for the outcomes that won."""
    from contextlib import ExitStack
    from dataclasses import replace

    from pgolf.kernels._tuned import TABLE

    from .launch_table import forced, rows_with

    before, after = {}, {}
    with ExitStack() as stack:  # one kernel may have several rows
        for o in won:
            kernel = o.target.kernel
            note = f"{card['name'].removeprefix('NVIDIA ')}, {card.get('commit', 'no commit')}"
            launch = replace(o.best, note=f"{note}, {o.ms[0]:.4g} -> {o.ms[1]:.4g} ms")
            before.setdefault(kernel, dict(TABLE[kernel]))
            after[kernel] = rows_with(kernel, o.target.key, launch)
            stack.enter_context(forced(kernel, after[kernel]))
    new = lambda kernel: {k: row for k, row in after[kernel].items() if before[kernel].get(k) != row}
    return {kernel: new(kernel) for kernel in after}


# -- without one -----------------------------------------------------------------------------------------------------


def _dry_run(args: argparse.Namespace) -> int:
    from .search import Compiler, brief, neighbours, targets

    arch, left, rows = args.arch or 90, args.compiles, []
    deadline = time.monotonic() + 60 * args.minutes
    with Compiler(workers=min(2, args.compiles)) as fits:
        for target in targets(_selected(args.op), arch):
            found = neighbours(target.kernel, target.launch)
            print(f"{target.name}: committed {brief(target.launch)}, {len(found)} candidates")
            found = found[:left] if time.monotonic() < deadline else []
            left -= len(found)
            tried = {}
            for launch, (fault, what) in zip(found, fits(target, found), strict=True):
                tried[brief(launch)] = f"out: {fault}" if fault else what
                print(f"    {brief(launch):46s} {tried[brief(launch)]}")
            rows.append({"kernel": target.kernel, "arch": arch, "class": target.key[1], "candidates": tried})
    if left <= 0:
        print(f"stopped after {args.compiles} compilations: --compiles, --op")
    _keep(args, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
