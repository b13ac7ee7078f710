"""A run's result: `result.json`, its text, and its curves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pgolf.clock import ledger_lines
from pgolf.errors import NumericalError, PgolfError, SetupError

LIMIT = 16_000_000  # bytes, decimal; repeats pgolf.artifact.budget.LIMIT, which a leaf may not import

# A value may be None where a run has none (val_bpb_sliding without a sliding pass); the key may not be missing.
REQUIRED = (
    "preset", "seed", "world_size", "device", "parameters", "steps", "tokens", "train_seconds", "total_seconds",
    "val_loss", "val_bpb", "val_bpb_artifact", "val_bpb_sliding", "artifact_bytes", "code_bytes", "total_bytes",
    "tokens_per_second",
)  # fmt: skip


def write_result(run_dir: str | Path, result: Mapping[str, Any]) -> Path:
    """Writes `run_dir`/result.json, see `write_file`.

    Raises PgolfError when a required key is missing, NumericalError on a non-finite number (JSON has none) and
    SetupError when the folder cannot be written.
    """
    missing = [key for key in REQUIRED if key not in result]
    if missing:
        raise PgolfError(f"result: keys missing: {', '.join(missing)}; each of {len(REQUIRED)} must be given")
    try:
        text = json.dumps(dict(result), indent=2, allow_nan=False) + "\n"
    except ValueError as err:
        raise NumericalError(
            f"result: a number is not finite ({err}); the run diverged, its result means nothing"
        ) from err
    return write_file(Path(run_dir) / "result.json", text.encode())


def write_file(path: Path, data: bytes, fix: str = "free some space or set train.out_dir") -> Path:
    """Writes a file of a run in one piece: a reader sees the old one or the new one, never half of one.

    Raises SetupError, which ends in `fix`, when it cannot be written.
    """
    temp = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except OSError as err:
        with suppress(OSError):
            temp.unlink()
        raise SetupError(
            f"{path} cannot be written ({err.strerror}): it needs {len(data):,} bytes{_free(path)}\nfix: {fix}"
        ) from err
    return path


def _free(path: Path) -> str:
    with suppress(OSError):
        return f", {shutil.disk_usage(path.parent).free:,} are free"
    return ""


def print_result(result: Mapping[str, Any], write: Callable[[str], None] = print) -> None:
    """Writes the lines of `result_lines` one by one, for example to `RunLog.line`."""
    for line in result_lines(result):
        write(line)


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """Text of a result: what ran, scores, bytes, time.

    Beyond the required keys it knows: subset, subset_sliding (what was scored), bytes_by_group {name: bytes of the
    artifact}, ledger (`TimeLedger.to_dict()`), time_limits {"training", "evaluation": seconds, 0 = none}.
    """
    ranks = f"{result['world_size']} rank{'s' if result['world_size'] != 1 else ''}"
    lines = [
        f"Result: {result['preset']}, seed {result['seed']}, {ranks} on {result['device']}",
        f"  {result['parameters']:,} parameters, {result['steps']:,} steps, {result['tokens']:,} tokens,"
        f" {result['tokens_per_second']:,.0f} tokens/s",
        f"  trained for {result['train_seconds']:.1f} s of {result['total_seconds']:.1f} s in all",
    ]
    lines += ["Bits per byte", *_score_lines(result), "Bytes", *_byte_lines(result)]
    if result.get("ledger"):
        lines += ["Time", *("  " + line for line in ledger_lines(result["ledger"], result.get("time_limits")))]
    return lines


def _score_lines(result: Mapping[str, Any]) -> list[str]:
    plain, packed, sliding = (result[k] for k in ("val_bpb", "val_bpb_artifact", "val_bpb_sliding"))
    lines = [_score("trained weights, plain", plain), _score("reloaded artifact, plain", packed)]
    if plain is not None and packed is not None:
        lines.append(f"  {'quantisation gap':<28} {packed - plain:+.4f}")
    lines.append(_score("reloaded artifact, sliding", sliding))
    for score in result.get("scores", ()):
        if score["pass"] not in ("plain", "sliding"):
            lines.append(_score(f"reloaded artifact, {score['pass']}", score["val_bpb"]))
    for key, label in (("subset", "plain"), ("subset_sliding", "sliding")):
        if result.get(key):
            lines.append(f"  {label}: {result[key]}")
    return lines


def _score(label: str, bpb: float | None) -> str:
    return f"  {label:<28} " + ("not run" if bpb is None else f"{bpb:.4f}")


def _byte_lines(result: Mapping[str, Any]) -> list[str]:
    artifact, code, total = (result[k] for k in ("artifact_bytes", "code_bytes", "total_bytes"))
    if total is None:
        return ["  no artifact was written"]
    rows = [("artifact", artifact)]
    rows += [(f"  {name}", size) for name, size in result.get("bytes_by_group", {}).items()]
    rows += [("code", code), ("total", total), ("limit", LIMIT)]
    rows.append(("left", LIMIT - total) if total <= LIMIT else ("OVER the limit by", total - LIMIT))
    width = max(len(name) for name, _ in rows)
    return [f"  {name:<{width}} {size:>12,}" for name, size in rows]


def plot_curves(events: str | Path, png: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """Draws losses and learning-rate scale over steps from `events`.jsonl into `png`; None (and a line) if it cannot.

    Lines that are not whole, as a killed run leaves, or lack a number are skipped.
    """
    try:
        steps, vals = _read_curves(Path(events))
        if not steps and not vals:
            say(f"no curves: {events} has no steps")
            return None
        _draw(steps, vals, Path(png))
    except ImportError:
        say("no curves: matplotlib is missing; install it with: pip install matplotlib")
        return None
    except OSError as err:
        say(f"no curves: {err}")
        return None
    return Path(png)


CURVES = {"step": ("train_loss", "lr_scale"), "val": ("val_loss", "val_bpb")}  # kind of event: what is drawn


def _read_curves(events: Path) -> tuple[list[dict], list[dict]]:
    """Steps and validations as numbers; NaN and infinity were logged as strings."""
    found: dict[str, list[dict]] = {kind: [] for kind in CURVES}
    for line in events.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
            event = json.loads(line)
            kind, step = event["kind"], float(event["step"])
            if kind == "resume":  # what came after its checkpoint was lost, and is done again
                found = {k: [e for e in seen if e["step"] <= step] for k, seen in found.items()}
            else:
                found[kind].append({"step": step, **{key: float(event[key]) for key in CURVES[kind]}})
    return found["step"], found["val"]


def _draw(steps: list[dict], vals: list[dict], png: Path) -> None:
    # Not pyplot: its global state and its choice of a display have no place in a training run.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, lr = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    loss.plot(*_curve(steps, "train_loss"), color="tab:blue", linewidth=1, alpha=0.8, label="train")
    loss.plot(*_curve(vals, "val_loss"), color="tab:orange", marker="o", markersize=4, label="val")
    if vals:
        last = vals[-1]
        scores = f"val {last['val_loss']:.4f} nats/token, {last['val_bpb']:.4f} bits/byte"
        loss.set_title(f"{scores} at step {last['step']:.0f}")
    loss.set_ylabel("loss (nats per token)")
    loss.legend()
    lr.plot(*_curve(steps, "lr_scale"), color="tab:green")
    lr.set(xlabel="step", ylabel="learning-rate scale")
    lr.set_ylim(bottom=0)
    for axes in (loss, lr):
        axes.grid(alpha=0.3)
    figure.savefig(png, dpi=120)


def _curve(events: list[dict], key: str) -> tuple[list, list]:
    """Steps and values; a non-finite value leaves a gap."""
    return [e["step"] for e in events], [e[key] for e in events]
