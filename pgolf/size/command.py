"""`python -m pgolf size`: an estimate from settings, or the bytes of an artifact, a run or a submission."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pgolf import config
from pgolf.artifact.budget import LIMIT, SizeReport, account, account_folder, largest
from pgolf.artifact.bundle import bundle
from pgolf.artifact.codecs import name_of, packages
from pgolf.artifact.pack import contents
from pgolf.errors import BudgetError, ConfigError
from pgolf.size.estimate import Estimate, Range, estimate
from pgolf.size.savings import Saving, cheapest, settings_of

TIGHT = 10_000  # bytes of headroom that another seed can use up


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: 0 when it fits or may fit, BudgetError's when it is over."""
    args = _parser().parse_args(argv)
    paths = [w for w in args.what if "=" not in w]
    settings = [w for w in args.what if "=" in w]
    if paths and (settings or len(paths) > 1):
        raise ConfigError("size takes settings, or one file or folder to measure")
    return measured(Path(paths[0]), args.json) if paths else estimated(settings, environ, args.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf size",
        description="Bytes of artifact and code against the limit of 16,000,000. With settings, or nothing: what a run "
        "of them will weigh. With a path: what is there.",
        epilog="Exit code 0 when it fits or may fit, 5 when it is over.",
    )
    parser.add_argument(
        "what", nargs="*", metavar="PATH | NAME=value | path=value",
        help="an artifact, a run's or submission's folder; or variables and settings as for train_gpt.py",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    return parser


# -- before training -----------------------------------------------------------------------------------------------


def estimated(words: Sequence[str], environ: Mapping[str, str], as_json: bool) -> int:
    """Prints what a run of these settings will weigh, and if that may be too much how to save the bytes."""
    variables = dict(w.split("=", 1) for w in words if w.partition("=")[0].isupper())
    overrides = [w for w in words if not w.partition("=")[0].isupper()]
    cfg = config.load(overrides, {**environ, **variables}).config
    found = estimate(cfg, len(bundle()))
    over = found.total.high - LIMIT
    ways = cheapest(cfg, over) if over > 0 else []
    if as_json:
        facts = {"groups": {g: asdict(r) for g, r in found.groups.items()}, "total": asdict(found.total)}
        facts |= {"roles": {g: asdict(r) for g, r in found.by_role().items()}, "code": found.code}
        _print_json("estimate", found.total.low <= LIMIT, ways, facts | {"parameters": found.parameters})
    else:
        _print_lines([*estimate_lines(cfg.preset, found), *saving_lines(over, ways, "to be sure, ")])
    return 0 if found.total.low <= LIMIT else BudgetError.exit_code


def estimate_lines(preset: str, found: Estimate) -> list[str]:
    """The table of an estimate, largest first."""
    rows = sorted(found.groups.items(), key=lambda row: (-row[1].high, row[0]))
    rows += [("code", Range(found.code, found.code)), ("total", found.total)]
    width = max(len(name) for name, _ in rows)
    return [
        f"{preset}: {found.parameters:,} parameters; bytes as estimated before training",
        *(f"  {name:<{width}} {r.low:>12,} to {r.high:>12,} B" for name, r in rows),
        found.verdict(),
    ]


# -- after training ------------------------------------------------------------------------------------------------


def measured(path: Path, as_json: bool) -> int:
    """Prints every byte of what is at `path`, and if these are too many how to save them."""
    files, artifact = {}, None
    if path.is_dir():
        report, files = account_folder(path)
        artifact = next((p.read_bytes() for p in path.glob("*.pgolf")), None)
    else:
        artifact = _read(path)
        report = account(artifact, bundle())
    over = -report.headroom
    ways = cheapest(settings_of(artifact), over, len(artifact)) if over > 0 and artifact else []
    _, tensors, streams = contents(artifact) if artifact else ({}, [], [])
    needs = packages(s.codec for s in streams)
    if as_json:
        facts = report.to_dict() | {"roles": report.by_role(), "needs": needs}
        facts["files"] = {name: {"bytes": size, "counts": counts} for name, (size, counts) in files.items()}
        facts["streams"] = [[s.group, name_of(s.codec), s.layout, s.size, len(s.items)] for s in streams]
        _print_json("measure", over <= 0, ways, facts)
    else:
        held = f"{len(tensors)} tensors in {len(streams)} streams; to be read it needs "
        print(f"{path}: " + (held + (", ".join(needs) or "the standard library only") if artifact else "a submission"))
        _print_lines([*measured_lines(report, files), *saving_lines(over, ways)])
    return BudgetError.exit_code if over > 0 else 0


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(
            f"{path}: {err.strerror}; size takes an artifact, a folder, or settings as path=value"
        ) from err


def measured_lines(report: SizeReport, files: Mapping[str, tuple[int, bool]]) -> list[str]:
    """Tables by file, by role and by group, the last with total and limit."""
    out = []
    if files:
        width = max(map(len, files))
        rows = sorted(files.items(), key=lambda row: (not row[1][1], -row[1][0], row[0]))
        out += ["by file", *(f"  {n:<{width}} {size:>12,} B{'' if c else '  not counted'}" for n, (size, c) in rows)]
    else:
        out += ["code: the bundle of this version"]
    out += ["by role", *(f"  {name:<20} {size:>12,} B" for name, size in largest(report.by_role()))]
    out += ["by group", *report.lines()]
    if 0 <= report.headroom < TIGHT:
        out += [f"tight: another seed can be larger by more than {report.headroom:,} B"]
    return out


def saving_lines(over: int, ways: Sequence[Saving], when: str = "") -> list[str]:
    """What to change; nothing when nothing has to be saved."""
    if over <= 0:
        return []
    if not ways:
        return [f"{when}{over:,} B must go"]
    width = max(len(w.settings) for w in ways)
    rows = [f"  {w.settings:<{width}}  about {w.saves:>10,} B  {w.why}" for w in ways]
    return [f"{when}{over:,} B must go. The cheapest first, each alone in a new run saves:", *rows]


def _print_json(mode: str, fits: bool, ways: Sequence[Saving], facts: Mapping[str, Any]) -> None:
    ends = {"savings": [asdict(way) for way in ways]}
    print(json.dumps({"mode": mode, "limit": LIMIT, "fits": fits, **facts, **ends}, indent=2))


def _print_lines(lines: Sequence[str]) -> None:
    print("\n".join(lines))
