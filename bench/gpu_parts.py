"""The jobs of `bench/gpu_report.py`, which starts each in a process of its own.

    python -m bench.gpu_parts PART JOB --out DIR [--device cuda] [--size production] [--seconds 600]

A job appends messages to DIR/messages.jsonl as it goes: {"row": ...} for the part's table, {"facts": ...} about itself.
It exits with 3 where it does not apply, and with 1 and a last line that says why when something in it is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from .variants import DEFAULT, ON_CPU, SMALL, TIMED, VARIANTS, WORLD

ROOT = Path(__file__).resolve().parent.parent
OPS = (
    "residual",
    "mlp",
    "attention",
    "cross_entropy",
    "qk_prep",
    "bigram",
    "newton_schulz",
    "flat_update",
    "int6",
    "ngram_hash",
)
NO_GPU = 3
ROUNDS = {"production": 10, "small": 2}
STEP_ROUNDS = {"production": 5, "small": 2}
HEAD_64 = "attention-xsa_bound"
Emit = Callable[..., None]  # emit(row={...}) or emit(facts={...})


class Wrong(Exception):
    """Something that was measured is not as it must be."""


def jobs_of(part: str, size: str) -> list[str]:
    """The jobs of a part, most valuable first."""
    small = size == "small"
    if part == "tests":
        if importlib.util.find_spec("pytest") is None or not (ROOT / "tests").exists():
            return ["checks"]
        files = sorted(ROOT.glob("tests/kernels/test_*.py"), key=lambda p: (p.stem != "test_cases", p.stem))
        names = [*(str(p.relative_to(ROOT)) for p in files), "tests/test_kernels_in_model.py"]
        return ["tests/kernels/test_op.py"] if small else names
    if part == "steps":
        return list(SMALL if small else TIMED)
    if part in ("kernels", "tune"):
        return list(OPS[:1] if small else OPS)
    return [part]


# -- what the device is ----------------------------------------------------------------------------------------------


def card(job: str, args: argparse.Namespace, emit: Emit) -> None:
    import torch
    import torch.nn.functional as F

    from .guards import guard_timer
    from .timing import clock_of

    _measure_roofs(args, emit)
    if torch.device(args.device).type == "cuda":
        big = torch.randn(2, 8192, 8192, device=args.device, dtype=torch.bfloat16)
        wait = lambda: torch.cuda.synchronize(args.device)
        guard_timer(clock_of(args.device), lambda: F.linear(*big), wait)
        emit(facts={"timer": "agrees with the host's clock"})


def _measure_roofs(args: argparse.Namespace, emit: Emit) -> dict[str, float]:
    from .timing import roofs

    quick = {"rounds": 2, "min_ms": 0.0} if args.size == "small" else {}
    found = roofs(args.device, **quick)
    emit(facts={"roofs": found})
    return found


# -- is it right -----------------------------------------------------------------------------------------------------


def tests(job: str, args: argparse.Namespace, emit: Emit) -> None:
    if job == "checks":
        return _checks(args, emit)
    with tempfile.TemporaryDirectory() as folder:
        xml = Path(folder) / "junit.xml"
        options = ["-q", "-m", "gpu or not slow", "-p", "no:cacheprovider", f"--junitxml={xml}"]
        done = subprocess.run([sys.executable, "-m", "pytest", job, *options], cwd=ROOT)
        if not xml.exists():
            raise Wrong(f"pytest ended with {done.returncode} and no result")
        row = {"file": job, **junit(xml.read_text())}
    emit(row=row)
    if row["failures"]:
        raise Wrong(f"{len(row['failures'])} of {row['tests']} failed, first {row['failures'][0]['test']}")
    if done.returncode not in (0, 5):  # 5: nothing was selected
        raise Wrong(f"pytest ended with {done.returncode}")


def junit(text: str) -> dict[str, Any]:
    """tests, passed, skipped, seconds, and failures (test, message), errors among them, of pytest's JUnit file."""
    suites = list(ElementTree.fromstring(text).iter("testsuite"))
    cases = [case for suite in suites for case in suite.iter("testcase")]
    bad = [(case, found) for case in cases for found in [*case.findall("failure"), *case.findall("error")]]
    failures = [
        {"test": f"{c.get('classname')}.{c.get('name')}", "message": (found.get("message") or "")[:500]}
        for c, found in bad
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len({id(case) for case, _ in bad})
    seconds = sum(float(suite.get("time") or 0) for suite in suites)
    return {"tests": len(cases), "passed": passed, "skipped": skipped, "seconds": seconds, "failures": failures}


def _checks(args: argparse.Namespace, emit: Emit) -> None:
    """Where pytest is missing: every case's values and gradients, at all its small sizes and dtypes."""
    from .cases import CASES
    from .cases.case import PRODUCTION
    from .check import check
    from .guards import poisoned

    emit(facts={"note": "pytest is not installed: bench.check of every case in its place"})
    wrong = []
    for case in CASES if args.size == "production" else CASES[:2]:
        done, failures = 0, []
        for size, dtype in ((s, d) for s in case.sizes if s != PRODUCTION for d in case.dtypes):
            try:
                with poisoned():
                    check(case, size, args.device, dtype)
            except Exception as error:
                failures.append({"test": f"{case.id} {size} {dtype}", "message": f"{error}"[:500]})
            done += 1
        emit(row={"file": case.id, "tests": done, "passed": done - len(failures), "skipped": 0, "failures": failures})
        wrong += failures
    if wrong:
        raise Wrong(f"{len(wrong)} checks failed, first {wrong[0]['test']}: {wrong[0]['message']}")


# -- how fast is it --------------------------------------------------------------------------------------------------


def attention(job: str, args: argparse.Namespace, emit: Emit) -> None:
    """The production case, which has XSA, and the same without, by every back end."""
    from . import providers
    from .cases import CASES
    from .cases.case import PRODUCTION

    roofs, wrong = _measure_roofs(args, emit), []
    by_id = {case.id: case for case in CASES}
    case, plain = by_id[HEAD_64], by_id["attention-plain"]
    plain = replace(plain, sizes=plain.sizes | {PRODUCTION: case.sizes[PRODUCTION]})
    names = providers.available(case, args.device)
    ours = [name for name in names if name not in providers.PEERS.get(case.id, ())]
    wrong += _time(case, names, roofs, args, emit)
    wrong += _time(plain, ours, roofs, args, emit)
    _raise(wrong)


def kernels(job: str, args: argparse.Namespace, emit: Emit) -> None:
    from . import providers
    from .cases import CASES
    from .cases.case import PRODUCTION

    roofs, wrong = _measure_roofs(args, emit), []
    for case in CASES:
        if case.op == job and PRODUCTION in case.sizes and case.id != HEAD_64:  # that is a part of its own
            wrong += _time(case, providers.available(case, args.device), roofs, args, emit)
    _raise(wrong)


def _time(case: Any, names: list[str], roofs: dict, args: argparse.Namespace, emit: Emit) -> list[str]:
    """Emits a row a mode and provider; returns what is wrong with pgolf's own."""
    from . import providers
    from .cases.case import PRODUCTION

    small = args.size == "small"
    size = providers.smallest(case) if small else PRODUCTION
    options = {"device": args.device, "rounds": ROUNDS[args.size], "min_ms": 0.0 if small else 20.0}
    found = providers.measure(case, names, size, **options)
    rows = [timed_row(case, size, mode, name, what, roofs) for (mode, name), what in found.items()]
    for row in rows:
        emit(row=row)
    return [f"{r['case']} {r['mode']}: {r['failed']}" for r in rows if "failed" in r and r["provider"] == "pgolf"]


def timed_row(case: Any, size: str, mode: str, name: str, found: Any, roofs: dict) -> dict[str, Any]:
    """A time and what it means, or why there is none. A time that the roofs do not allow is none."""
    from . import providers, timing
    from .cases.case import PRODUCTION
    from .guards import guard_speed

    what = {"case": case.id, "mode": mode, "provider": name}
    if isinstance(found, providers.Failure):
        print(f"{case.id} {mode} {name}:\n{found.trace}")
        return what | {"failed": found.reason[:500]}
    nbytes, flops = providers.amounts(case, size, mode)
    product = "attention" if case.op == "attention" else "gemm"
    if size == PRODUCTION:
        try:
            guard_speed(f"{case.id} {mode} {name}", found.median, timing.roof_ms(nbytes, flops, roofs, product))
        except AssertionError as error:
            return what | {"failed": str(error)}
    what |= {"size": dict(case.sizes[size]), "dtype": str(case.dtypes[-1])[6:], "bytes": nbytes, "flops": flops}
    return what | spread(found) | timing.rates(found.median, nbytes, flops, roofs, product)


def spread(t: Any) -> dict[str, float]:
    """The numbers of a `Timing`."""
    times = {"ms": t.median, "p20": t.p20, "p80": t.p80, "host_ms": t.host}
    return {key: float(f"{value:.5g}") for key, value in times.items()} | {"rounds": t.rounds, "repeats": t.repeats}


def _raise(wrong: list[str]) -> None:
    if wrong:
        raise Wrong(f"{len(wrong)} of pgolf's own failed, first {wrong[0]}"[:300])


def steps(job: str, args: argparse.Namespace, emit: Emit) -> None:
    """A preset's step in every variant, with and without the optimiser; its default variant must not fail."""
    import torch

    from pgolf.presets import PRESETS

    from . import budget, timing
    from .gpus import key_of
    from .step import least_ms, measure, model_flops

    kind, small = torch.device(args.device).type, args.size == "small"
    roofs = _measure_roofs(args, emit)
    cfg, world, default = PRESETS[job](), WORLD[args.size], DEFAULT[kind]
    names = list(VARIANTS) if kind == "cuda" else list(ON_CPU[:1] if small else ON_CPU)
    how = {"world_size": world, "rounds": STEP_ROUNDS[args.size], "min_ms": 0.0 if small else 400.0}
    found = measure(cfg, names, args.device, **how)
    flops = model_flops(job, world)
    device = key_of(timing.device_card(args.device)["name"]) if kind == "cuda" else "cpu"
    allowed = 0.0 if small else least_ms(flops, roofs)
    rows = []
    for (variant, optimizer), m in found.items():
        row = {"preset": job, "variant": variant, "optimizer": optimizer, **step_row(m, flops, device, allowed)}
        if variant == default and optimizer and "ms" in row:
            row["budget"] = budget.verdict(budget.read().get(job, budget.Budget()), device, row["ms"])[1]
        rows.append(row)
        emit(row=row)
    wrong = [f"{r['variant']}: {r['failed']}" for r in rows if "failed" in r and r["variant"] == default]
    if wrong:
        raise Wrong(f"{job} {wrong[0]}"[:300])


def step_row(found: Any, flops: float, device: str | None, allowed: float) -> dict[str, Any]:
    """A step's time and what it means, or why there is none. flops: the model's; allowed: ms at the measured roofs."""
    from .gpus import GPUS
    from .guards import guard_speed

    if not hasattr(found, "timing"):
        print(found.trace)
        return {"failed": found.reason[:500]}
    try:
        guard_speed("step", found.timing.median, allowed)
    except AssertionError as error:
        return {"failed": str(error)}
    return spread(found.timing) | found.facts(flops, GPUS[device].tensor if device in GPUS else None)


def tune(job: str, args: argparse.Namespace, emit: Emit) -> None:
    """Tunes the rows of an op; what wins is added to DIR/_tuned.py."""
    from . import launch_table
    from . import tune as tuning
    from .cases import CASES
    from .cases.case import PRODUCTION
    from .timing import device_card

    if why := tuning.unusable(args.device):
        print(why)
        sys.exit(NO_GPU)
    cases = [case for case in CASES if case.op == job and PRODUCTION in case.sizes]
    proposal, won = args.out / launch_table.PATH.name, []
    before = (proposal if proposal.exists() else launch_table.PATH).read_text()
    for outcome in tuning.run(cases, args.device, args.seconds / 60):
        emit(row=outcome.to_dict())
        if outcome.won:
            won.append(outcome)
            launch_table.save(tuning.changed_rows(won, device_card(args.device)), proposal, before)


PARTS = {"card": card, "tests": tests, "attention": attention, "steps": steps, "kernels": kernels, "tune": tune}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_parts", description=__doc__.split("\n")[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("job", help="a test file, a preset, an op, or the part's name")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="production", choices=("production", "small"))
    parser.add_argument("--seconds", type=float, default=600.0, help="what tuning may take")
    args = parser.parse_args(argv)
    file = args.out / "messages.jsonl"

    def emit(**message: Any) -> None:
        with file.open("a") as out:
            out.write(json.dumps(message) + "\n")

    from .timing import device_card

    try:
        emit(facts={"card": device_card(args.device)})
        PARTS[args.part](args.job, args, emit)
    except Wrong as error:
        print(error)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}".splitlines()[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
