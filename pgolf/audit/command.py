"""`python -m pgolf audit`: one scorer, or the negative controls, through all tests; a table, and a report as JSON."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pgolf import tree
from pgolf.audit import production, suite
from pgolf.audit.controls import CONTROLS
from pgolf.audit.interface import offers
from pgolf.audit.result import FAILED, PASSED, Result, Sizes
from pgolf.audit.valid import VALID
from pgolf.data.shards import read_shard
from pgolf.errors import AuditError, ConfigError
from pgolf.result import write_file

WIDTH = 14  # of the longest name of a test or control


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: 0 when everything passes, AuditError's when something fails."""
    args = _parser().parse_args(argv)
    sizes = _sizes(args)
    if args.what == "controls":
        return examine_controls(sizes, args.json)
    scorer = find(args.what, args.model, args.seed)
    if sizes.text is not None and int(sizes.text.max()) >= scorer.vocab_size:
        raise ConfigError(
            f"--text {args.text}: token {int(sizes.text.max())}, {scorer.name} has {scorer.vocab_size} ids"
        )
    results: dict[str, Result] = {}
    print(f"{scorer.name}, {scorer.vocab_size} ids, seed {sizes.seed}", flush=True)
    for name in suite.TESTS:
        results |= suite.run_tests(scorer, sizes, (name,))
        print("\n".join(lines(name, results[name])), flush=True)
    if not args.no_controls:
        results["controls"] = suite.negative_controls(sizes)
        print("\n".join(lines("controls", results["controls"])), flush=True)
    report = suite.report(scorer, sizes, results)
    if args.json:
        _write(args.json, report)
    failed = [name for name, result in results.items() if result.status == FAILED]
    left = f", not made: {', '.join(report['skipped'])}" if report["skipped"] else ""
    print(f"failed: {', '.join(failed)}" if failed else f"passed{left}")
    return AuditError.exit_code if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf audit",
        description="Whether a scorer's numbers are code lengths: normalised, causal, scored before learned from, in "
        "one pass. docs/audit.md says what each test does and what none can show.",
        epilog=f"Exit code 0 when all tests pass, {AuditError.exit_code} when one fails, 2 without such a scorer.",
    )
    parser.add_argument(
        "what", metavar="NAME | module:object | file.py:object | controls",
        help=f"one of pgolf's own ({', '.join(production.PRODUCTION)}), an example ({', '.join(VALID)}), any scorer or "
        "function that makes one, or the negative controls, each of which must be flagged",
    )  # fmt: skip
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the report there, for `pgolf submit --audit`")
    parser.add_argument("--seed", type=int, default=0, help="of streams and places (default 0)")
    parser.add_argument("--model", metavar="FILE", type=Path, help="an artifact to score with instead of the toy model")
    parser.add_argument("--text", metavar="SHARD", type=Path, help="a .bin shard of tokens instead of synthetic text")
    parser.add_argument("--no-controls", action="store_true", help="leave out test 13, ten seconds")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="fewer places and tokens")
    size.add_argument("--full", action="store_true", help="131,072 tokens of noise, 12 places, 400 coded tokens")
    parser.add_argument("--noise-tokens", type=int, metavar="N", help="tokens of the noise test")
    return parser


def _sizes(args: argparse.Namespace) -> Sizes:
    """The sizes that the flags ask for."""
    out = Sizes.full(args.seed) if args.full else Sizes(args.seed)
    if args.quick:
        out = replace(out, length=128, positions=3, substitutions=64, noise_tokens=2048, round_trip=48)
    if args.noise_tokens is not None:
        if args.noise_tokens < 2:
            raise ConfigError(f"--noise-tokens {args.noise_tokens}: expected at least 2")
        out = replace(out, noise_tokens=args.noise_tokens)
    if args.text:
        needed = max(out.noise_tokens, out.length)
        tokens = np.asarray(read_shard(args.text)[:needed]).astype(np.int64)
        if len(tokens) < needed:
            raise ConfigError(
                f"--text {args.text}: {len(tokens):,} tokens, the tests need {needed:,}: --noise-tokens N"
            )
        out = replace(out, text=torch.from_numpy(tokens))
    return out


# -- which scorer ------------------------------------------------------------------------------------------------------


def find(what: str, model: Path | None = None, seed: int = 0) -> Any:
    """The scorer of a name, or of module:object. Raises ConfigError when there is none."""
    if what in production.PRODUCTION:
        source = production.from_artifact(model) if model else production.toy(seed)
        return production.PRODUCTION[what](source)
    if model:
        raise ConfigError(f"--model goes with {', '.join(production.PRODUCTION)}, not with {what}")
    if what in VALID:
        return VALID[what]()
    if what in CONTROLS:
        return CONTROLS[what].make(suite.CONTROL_VOCAB)
    if ":" in what:
        return load(what)
    names = [*production.PRODUCTION, *VALID, "controls", *CONTROLS]
    raise ConfigError(
        f"{what} is no scorer{tree.did_you_mean(what, names)}\nThere are: {', '.join(names)}; and module:object"
    )


def load(what: str) -> Any:
    """`module:object` or `file.py:object`; a class or function is called without arguments."""
    place, _, name = what.rpartition(":")
    try:
        module = _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        found = getattr(module, name)
        scorer = found() if callable(found) and (isinstance(found, type) or not offers(found, "nats")) else found
    except Exception as err:  # anybody's code
        raise ConfigError(f"{what} cannot be loaded: {type(err).__name__}: {err}") from err
    suite.check(scorer)
    return scorer


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


# -- what is printed ---------------------------------------------------------------------------------------------------


def lines(name: str, result: Result) -> Iterable[str]:
    """A row of the table, and the warning below it."""
    number = "" if result.worst is None else f"{result.worst:.3g} (at most {result.threshold:g})"
    yield f"{name:<{WIDTH}} {result.status:<8} {number:<28} {result.detail}"
    if result.warning:
        yield f"{'':<{WIDTH}} {'warning':<8} {'':<28} {result.warning}"


def examine_controls(sizes: Sizes, path: Path | None) -> int:
    """Every control through every test: which flag it, which must. And the valid examples, which none may flag."""
    report: dict[str, Any] = {"seed": sizes.seed, "controls": {}, "valid": {}}
    for name, control in CONTROLS.items():
        results = suite.run_tests(control.make(suite.CONTROL_VOCAB), sizes)
        flagged = [test for test, result in results.items() if result.status == FAILED]
        missed = [test for test in control.must if test not in flagged]
        told = {t: r.to_dict() for t, r in results.items()}
        report["controls"][name] = {"flagged_by": flagged, "must": list(control.must), "missed": missed, "tests": told}
        print(f"{name:<24} {'MISSED by ' + ', '.join(missed) if missed else 'flagged by ' + ', '.join(flagged)}")
    for name, make in VALID.items():
        results = suite.run_tests(make(suite.CONTROL_VOCAB), sizes)
        wrong = [test for test, result in results.items() if result.status == FAILED]
        report["valid"][name] = {"failed": wrong}
        print(f"{name:<24} {'FALSE ALARM of ' + ', '.join(wrong) if wrong else PASSED}")
    bad = any(c["missed"] for c in report["controls"].values()) or any(v["failed"] for v in report["valid"].values())
    report["passed"] = not bad
    if path:
        _write(path, report)
    print("the audit cannot be trusted here" if bad else f"all {len(CONTROLS)} controls are flagged, no false alarm")
    return AuditError.exit_code if bad else 0


def _write(path: Path, report: Mapping[str, Any]) -> None:
    """As strict JSON: what is infinite or NaN becomes text."""
    write_file(path, (json.dumps(_finite(report), indent=2, allow_nan=False) + "\n").encode())


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and (value != value or abs(value) == float("inf")) else value
