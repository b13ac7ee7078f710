"""`pgolf check DIR`: every rule on a submission's folder, as a table or as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pgolf
from pgolf.doctor import rows
from pgolf.errors import ArtifactError, BudgetError
from pgolf.submit import rules, rules_files, rules_record, rules_runs, running
from pgolf.submit.folder import Folder, open_folder
from pgolf.submit.rules import FAIL, OK, Result, Rule

RULES: dict[str, Rule] = dict(sorted({**rules_files.RULES, **rules_runs.RULES, **rules_record.RULES}.items()))


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: 0 when nothing fails, BudgetError's when only budgets do, else ArtifactError's."""
    parser = argparse.ArgumentParser(
        prog="pgolf check",
        description="Checks a submission's folder, pgolf's or any other: files, sizes, times, scores, logs. "
        "Reads it and runs nothing, unless --run is given. What cannot be checked is said.",
        epilog="Exit code 0 when nothing fails, 5 when nothing but a budget does, 9 otherwise. docs/submission.md has "
        "all rules.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--run", action="store_true", help="also run the script: alone, without network, a minute")
    parser.add_argument("-q", "--quiet", action="store_true", help="only what is not ok")
    args = parser.parse_args(argv)
    folder = open_folder(args.folder)
    results = examine(folder, running.RULES if args.run else {})
    report(folder, results, as_json=args.json, quiet=args.quiet)
    return exit_code(results)


def examine(folder: Folder, more: Mapping[str, Rule] | None = None) -> list[Result]:
    """Every rule's finding; `more` takes the place of rules of the same id."""
    return rules.run(dict(sorted({**RULES, **(more or {})}.items())), folder)


def exit_code(results: Sequence[Result]) -> int:
    """Of the process, for these findings."""
    failed = [r for r in results if r.status == FAIL]
    if not failed:
        return 0
    return BudgetError.exit_code if all(r.budget for r in failed) else ArtifactError.exit_code


def report(folder: Folder, results: Sequence[Result], *, as_json: bool = False, quiet: bool = False) -> None:
    """Prints the findings."""
    track = "record" if folder.is_record else "non-record"
    if as_json:
        shown = [{k: v for k, v in r._asdict().items() if k != "budget"} for r in results]
        code = exit_code(results)
        out = {"pgolf": pgolf.__version__, "folder": str(folder.path), "track": track, "ok": code == 0,
               "exit_code": code, "rules": shown}  # fmt: skip
        print(json.dumps(out, indent=2))
        return
    print(rows.ascii_only(f"pgolf {pgolf.__version__} check {folder.path} ({track} track)"))
    table = [rows.Row(f"{r.id} {r.title}", r.status, r.what, r.fix) for r in results if not quiet or r.status != OK]
    for line in rows.table(table, pad=14) if table else []:
        print(line)
    print(rules.summary(results))
