"""`pgolf doctor`: runs the checks, the benchmark or a comparison, and prints a table or one JSON object."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pgolf
from pgolf import config, node
from pgolf.config import RunConfig
from pgolf.doctor import gpu, host, rows, software
from pgolf.doctor.compare import Difference, compare, remember_rates
from pgolf.doctor.rows import FAIL, OK, WARN, Machine, Row
from pgolf.errors import ConfigError, PgolfError, SetupError

CHECKS = {**software.CHECKS, **gpu.CHECKS, **host.CHECKS}
DIFFERENT = 1  # exit code of --compare


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: 0 when nothing fails, SetupError's otherwise; with --compare 0 when nothing differs, else 1."""
    args = _parser().parse_args(argv)
    if args.compare:
        return print_differences(args.compare, args.settings, environ, args.json)
    if environ.get("RANK", "0") not in ("", "0") and not args.bench:
        return 0  # one rank speaks; with --bench the others take part
    machine = make_machine(args.settings, environ)
    if environ.get("RANK", "0") not in ("", "0"):
        list(bench_rows(machine, {}))
        return 0
    return examine(machine, args.json, args.bench)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf doctor",
        description="Checks this machine: versions, GPUs, memory, folders, limits. Changes nothing, stops nobody.",
        epilog="Exit code 0 when nothing fails, 3 otherwise. --compare: 0 when nothing differs, 1 otherwise. "
        "With several GPUs: torchrun --standalone --nproc_per_node=8 -m pgolf doctor --bench",
    )
    parser.add_argument("settings", nargs="*", metavar="path=value", help="settings of the run, as for train_gpt.py")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--bench", action="store_true", help="measure products, copies, all-reduce: up to a minute")
    parser.add_argument(
        "--compare", nargs="+", metavar="RUN_DIR", help="what differs between two runs' nodes, or a run's and this one"
    )
    return parser


def make_machine(settings: Sequence[str], environ: Mapping[str, str]) -> Machine:
    """This machine, with the settings as a run would have them; faulty variables become a row, arguments an error."""
    torch, torch_error = rows.load_torch()
    machine = Machine(environ, RunConfig(), torch, torch_error)
    has_gpu = lambda: _quiet(lambda: bool(machine.gpus))
    try:
        machine.config = config.load(settings, environ, has_gpu).config
    except ConfigError as err:
        if settings:
            raise
        machine.settings_error = " ".join(str(err).split())
    return machine


def _quiet(ask: Callable[[], bool]) -> bool:
    try:
        return ask()
    except Exception:  # a broken driver: the check of CUDA says so
        return False


def examine(machine: Machine, as_json: bool, with_bench: bool) -> int:
    """Runs all checks and prints what they found, a table row by row, as some take seconds."""
    found: list[Row] = []
    bench: dict[str, Any] = {}
    say = (lambda line: None) if as_json else (lambda line: print(line, flush=True))
    say(f"pgolf {pgolf.__version__} doctor")
    for batch in _batches(machine, with_bench, bench):
        found += batch
        for line in rows.table(batch, pad=PAD):
            say(line)
    here = node.fingerprint(machine.config.data.cache_dir, machine.torch)
    failed = any(row.status == FAIL for row in found)
    if as_json:
        checks = [row._asdict() for row in found]
        out = {"pgolf": pgolf.__version__, "ok": not failed, "checks": checks, "node": here, "bench": bench or None}
        print(json.dumps(out, indent=2))
    say(f"{rows.summary(found)}; node {here['digest'][:16]}")
    return SetupError.exit_code if failed else 0


PAD = 14  # width of the longest name but those of the benchmark


def _batches(machine: Machine, with_bench: bool, bench: dict[str, Any]) -> Iterator[list[Row]]:
    for name, check in CHECKS.items():
        yield list(rows.run({name: check}, machine))
    if with_bench:
        yield list(rows.run({"bench": lambda m: bench_rows(m, bench)}, machine, limit_s=300))


# -- benchmark -------------------------------------------------------------------------------------------------------


def bench_rows(machine: Machine, into: dict[str, Any]) -> Iterator[Row]:
    """Measures; leaves rates and the state under load in `into`, and the rates in the cache for later fingerprints."""
    if machine.torch is None:
        yield Row("bench", FAIL, "no torch", f"pip install 'torch>={node.TORCH}'")
        return
    from pgolf.dist import start
    from pgolf.doctor import bench

    try:
        dist = start(machine.config.train.device)
    except PgolfError as err:
        yield Row("bench", FAIL, str(err).splitlines()[0], str(err).splitlines()[-1])
        return
    try:
        into |= bench.measure(dist, lambda: gpu.under_load(machine))
    finally:
        dist.close()
    for name, rate in into["rates"].items():
        yield rate_row(name, rate, bench.slow_ranks(rate))
    if loaded := into["under_load"]:
        yield load_row(loaded)
    code = node.fingerprint("", machine.torch)["digest"]
    if dist.is_main:
        path = remember_rates(into["rates"], machine.config.data.cache_dir, code)
        yield Row("rates", OK, f"kept in {path} for the fingerprints of later runs")


def rate_row(name: str, rate: Mapping[str, Any], slow: Mapping[int, float]) -> Row:
    """A rate with its spread; a warning where one rank holds up the others."""
    text = f"{rate['median']:g} {rate['unit']} ({rate['low']:g} to {rate['high']:g})"
    if not slow:
        return Row(name, OK, text)
    who = ", ".join(f"rank {i} reaches {100 * share:.0f} %" for i, share in slow.items())
    return Row(name, WARN, f"{text}; {who} of the median", "all ranks wait for the slowest: look at its clocks")


def load_row(state: Mapping[str, Any]) -> Row:
    """Clock and power of the first GPU while it works."""
    text = f"{state.get('clock_mhz')} of {state.get('clock_max_mhz')} MHz, {state.get('power_w')} of "
    text += f"{state.get('power_limit_w')} W, {state.get('temperature_c')} C"
    held = state.get("held_by")
    return Row("clocks under load", OK, text + (f"; held down by: {held}" if held else ""))


# -- comparing -------------------------------------------------------------------------------------------------------


def print_differences(paths: Sequence[str], settings: Sequence[str], environ: Mapping[str, str], as_json: bool) -> int:
    """Prints what differs between the nodes of two runs, or of one run and this machine."""
    if len(paths) > 2:
        raise ConfigError(f"--compare takes one or two run folders, got {len(paths)}")
    found = [read_node(Path(p)) for p in paths]
    if len(found) == 1:
        machine = make_machine(settings, environ)
        found.append(node.fingerprint(machine.config.data.cache_dir, machine.torch))
    names = [*paths, "this machine"][:2]
    differences = compare(*found)
    if as_json:
        print(json.dumps({"same": not differences, "differences": [d._asdict() for d in differences]}, indent=2))
    else:
        for line in difference_lines(names, differences):
            print(line)
    return DIFFERENT if differences else 0


def read_node(path: Path) -> dict[str, Any]:
    """The fingerprint of a run folder, of its node.json, or of what `doctor --json` has written. ConfigError."""
    file = path / "node.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as err:
        raise ConfigError(f"{file}: {err.strerror}; expected a run's folder, which holds node.json") from err
    except (ValueError, RecursionError) as err:
        raise ConfigError(f"{file}: not JSON ({err}); expected the node.json of a run") from err
    if isinstance(found, dict) and isinstance(found.get("node"), dict):
        found = found["node"]
    if not isinstance(found, dict) or not isinstance(found.get("versions"), dict):
        raise ConfigError(f"{file}: not a fingerprint; expected the node.json of a run, or the output of doctor --json")
    return found


def difference_lines(names: Sequence[str], differences: Sequence[Difference]) -> list[str]:
    """A table: fact, its value here and there."""
    if not differences:
        return [rows.ascii_only(f"{names[0]} and {names[1]}: same hardware, driver, versions and commit")]
    text = lambda value: "-" if value is None else str(value)
    cells = [("", *names), *((d.fact, text(d.first), text(d.second)) for d in differences)]
    widths = [max(len(row[i]) for row in cells) for i in range(3)]
    return [rows.ascii_only("  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)).rstrip()) for r in cells]


if __name__ == "__main__":
    sys.exit("use: python -m pgolf doctor")
