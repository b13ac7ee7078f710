"""Renders reports of `bench/gpu_report.py` as a page with tables and plots.

    python -m bench.report [FILES or folders] [--out docs/measured] [--format md]

Without arguments: all of `bench/results`. A report that is damaged is an error (exit code 2) and nothing is written.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gpu_report import PARTS, SCHEMA

RESULTS = Path(__file__).with_name("results")
ROOT = Path(__file__).resolve().parent.parent
NEEDED = {  # table: what each of its rows must have; a row that failed has no numbers
    "tests": {"file": str, "tests": int, "passed": int, "skipped": int, "failures": list},
    "attention": {"case": str, "mode": str, "provider": str},
    "steps": {"preset": str, "variant": str, "optimizer": bool},
    "kernels": {"case": str, "mode": str, "provider": str},
    "tune": {"kernel": str, "class": str, "committed": str, "best": str, "won": bool},
}
TIMED = {"ms": (int, float), "p20": (int, float), "p80": (int, float)}
NUMBERS = ("gb_per_s", "tflop_per_s", "percent_of_roof", "tokens_per_s", "mfu", "peak_bytes", "compile_s")  # optional
MODES = ("forward", "backward", "both", "graph")


# -- reading ---------------------------------------------------------------------------------------------------------


class Damaged(ValueError):
    """A file that is no report, with what is wrong."""


@dataclass(frozen=True)
class Result:
    """A report and the file it came from."""

    path: Path
    data: dict[str, Any]

    @property
    def card(self) -> dict[str, Any]:
        return self.data.get("card", {})

    @property
    def title(self) -> str:
        """The device and the commit."""
        what = f"{self.card.get('name', 'unknown device')}, commit {self.card.get('commit', 'unknown')}"
        return what + ", small sizes: a trial, no measurement" * (self.data["size"] != "production")


def load(paths: Iterable[Path]) -> list[Result]:
    """The reports of files and of folders (*.json), by name. Damaged for the first that is none."""
    files = []
    for path in paths:
        if not path.exists():
            raise Damaged(f"{path}: no such file or folder, expected reports of bench.gpu_report")
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    return [Result(path, _read(path)) for path in files]


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
        _check(data)
    except (ValueError, OSError) as error:
        raise Damaged(f"{path}: {error}; expected a report of bench.gpu_report") from None
    return data


def _check(data: Any) -> None:
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        got = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise Damaged(f"got schema {got!r}, expected {SCHEMA}")
    for key, kind in (("device", str), ("size", str), ("parts", dict)):
        _has(data, {key: kind}, "the report")
    for what in ("card", "roofs"):
        if not isinstance(data.get(what, {}), dict):
            raise Damaged(f"{what} is {type(data[what]).__name__}, expected an object")
    for name, entry in data["parts"].items():
        _has(entry, {"status": str, "reason": str}, f"part {name}")
    for table, needed in NEEDED.items():
        rows = data.get(table, [])
        if not isinstance(rows, list):
            raise Damaged(f"{table} is {type(rows).__name__}, expected a list of rows")
        timed = table in ("attention", "steps", "kernels")
        for i, row in enumerate(rows):
            _has(row, {}, f"{table}[{i}]")
            where, kinds = f"{table}[{i}]", needed | (TIMED if timed and "failed" not in row else {})
            _has(row, kinds | {key: (int, float) for key in NUMBERS if row.get(key) is not None}, where)
            if row.get("mode", MODES[0]) not in MODES:
                raise Damaged(f"{where}: mode is {row['mode']!r}, expected one of {', '.join(MODES)}")
            if row.get("won") and not (isinstance(row.get("ms"), list) and len(row["ms"]) == 2):
                raise Damaged(f"{where}: ms is {row.get('ms')!r}, expected two numbers")


def _has(row: Any, needed: dict[str, Any], where: str) -> None:
    if not isinstance(row, dict):
        raise Damaged(f"{where} is {type(row).__name__}, expected an object")
    for key, kind in needed.items():
        if not isinstance(row.get(key), kind) or (isinstance(row.get(key), bool) and kind is not bool):
            raise Damaged(f"{where}: {key} is {row.get(key)!r}, expected {getattr(kind, '__name__', 'a number')}")


# -- tables ----------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def number(row: dict | None, key: str, form: str = ".3g", scale: float = 1.0) -> str:
    """A row's number as text, "-" where there is none, "failed" where the row has failed."""
    if row is None or (row.get(key) is None and "failed" not in row):
        return "-"
    return "failed" if "failed" in row else f"{scale * row[key]:{form}}"


def kernel_table(rows: list[dict]) -> str:
    """A line a case and mode: ms (p20 to p80) of each provider, and what pgolf's time means."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    found = {(row["case"], row["mode"], row["provider"]): row for row in rows}
    keys = sorted({(r["case"], r["mode"]) for r in rows}, key=lambda key: (key[0], MODES.index(key[1])))
    lines = []
    for case, mode in keys:
        of = {name: found.get((case, mode, name)) for name in names}
        main = of.get("pgolf") or of[next(name for name in names if of[name])]
        rates = [
            number(main, "gb_per_s", ".0f"),
            number(main, "tflop_per_s", ".1f"),
            number(main, "percent_of_roof", ".0f"),
        ]
        lines.append([f"{case} {mode}", *(_spread(of[name]) for name in names), *rates])
    return table(["case", *(f"{name}, ms" for name in names), "GB/s", "TFLOP/s", "% of roof"], lines)


def _spread(row: dict | None) -> str:
    return number(row, "ms") + (f" ({row['p20']:.3g} to {row['p80']:.3g})" if row and "ms" in row else "")


def step_table(rows: list[dict]) -> str:
    """A line a preset and variant."""
    found = {(r["preset"], r["variant"], r["optimizer"]): r for r in rows}
    lines = []
    for preset, variant in dict.fromkeys((r["preset"], r["variant"]) for r in rows):
        step, gradients = found.get((preset, variant, True)), found.get((preset, variant, False))
        facts = [
            number(step, "tokens_per_s", ",.0f"),
            number(step, "mfu", ".1f", 100),
            number(step, "peak_bytes", ".1f", 1e-9),
        ]
        times = [_spread(step), _spread(gradients)]
        lines.append([f"{preset} {variant}", *times, *facts, number(step, "compile_s", ".0f")])
    head = ["preset and variant", "step, ms", "without optimiser, ms", "tokens/s", "MFU, %", "peak, GB", "compiling, s"]
    return table(head, lines)


def test_table(rows: list[dict]) -> str:
    return table(
        ["tests", "passed", "skipped", "failed"],
        ([r["file"], str(r["passed"]), str(r["skipped"]), str(len(r["failures"]))] for r in rows),
    )


def tune_table(rows: list[dict]) -> str:
    """The rows whose launch another one beat."""
    won = [r for r in rows if r["won"]]
    lines = ([f"{r['kernel']} {r['class']}", r["committed"], r["best"], *(f"{ms:.4g}" for ms in r["ms"])] for r in won)
    head = ["kernel and class", "committed", "best", "committed, ms", "best, ms"]
    return f"{len(won)} of {len(rows)} rows of the launch table were beaten.\n\n" + (table(head, lines) if won else "")


TABLES: dict[str, tuple[str, Callable[[list[dict]], str]]] = {
    "tests": ("Are the kernels right", test_table),
    "attention": ("Attention at head width 64", kernel_table),
    "steps": ("One training step", step_table),
    "kernels": ("Kernels", kernel_table),
    "tune": ("Launches", tune_table),
}


# -- the page --------------------------------------------------------------------------------------------------------

HEAD = """# Measured

Written by `python -m bench.report` from `bench/results`. How these numbers are made: [benchmarks](../benchmarks.md).
Times are medians of the device's own clock, with the 20th and 80th percentile; roofs were measured in the same process.
"""


def page(results: list[Result], pictures: dict[Path, list[str]]) -> str:
    """The whole page. pictures: names of a result's plots, beside the page."""
    if not results:
        return f"{HEAD}\nNot measured yet.\n"
    return "\n".join([HEAD, *(_section(result, pictures.get(result.path, [])) for result in results)])


def _section(result: Result, pictures: list[str]) -> str:
    data, card = result.data, result.card
    facts = [f"{key} {card[key]}" for key in ("date", "torch", "triton", "cuda", "driver") if key in card]
    facts += [f"{card['clock_max_mhz']:.0f} MHz at most"] if "clock_max_mhz" in card else []
    facts += [f"power limit {card['power_limit_w']:.0f} W"] if "power_limit_w" in card else []
    out = [f"## {result.title}\n", ", ".join(facts) + f". File: {result.path.name}.\n"]
    missing = [f"- {part}: {e['status']}, {e['reason']}" for part, e in data["parts"].items() if e["status"] != "done"]
    if missing:
        out.append("Not everything was measured:\n\n" + "\n".join(missing) + "\n")
    if roofs := data.get("roofs"):
        form = lambda name, rate: f"{rate / 1e9:.0f} GB/s" if name == "copy" else f"{rate / 1e12:.3g} TFLOP/s"
        out.append("Roofs: " + ", ".join(f"{name} {form(name, rate)}" for name, rate in roofs.items()) + ".\n")
    for part in PARTS:
        if data.get(part) and part in TABLES:
            title, render = TABLES[part]
            out.append(f"### {title}\n\n{render(data[part])}")
    out += [f"![{name}]({name})\n" for name in pictures]
    return "\n".join(out)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="*", type=Path, default=[RESULTS], help="files or folders (bench/results)")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/measured", help="folder of the page (docs/measured)")
    parser.add_argument("--format", default="md", choices=("md",), help="of the page (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        results = load(args.results)
    except Damaged as error:
        parser.error(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = {}
    if results:
        from .plots import draw

        pictures = {result.path: draw(result, args.out) for result in results}
    (args.out / "README.md").write_text(page(results, pictures))
    drawn = sum(map(len, pictures.values()))
    print(f"{args.out / 'README.md'}: {len(results)} results, {drawn} plots" + "; not measured yet" * (not results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
