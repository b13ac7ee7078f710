"""`pgolf submit RUN...`: the records folder out of several seeds' runs, checked before anybody sees it."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from pgolf.artifact import script
from pgolf.artifact.script import Script
from pgolf.errors import ArtifactError, ConfigError, PgolfError
from pgolf.result import write_file
from pgolf.submit import bundling, check, readme, record, runs, stats
from pgolf.submit.folder import AUDIT, NON_RECORD, README, open_folder
from pgolf.submit.rules_record import SEEDS, TUNED_ON
from pgolf.submit.runs import Run
from pgolf.submit.stats import Comparison

TRACKS = {"10min_16mb": True, f"{NON_RECORD}_16mb": False}  # name: whether it is the record track


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: that of the check of the folder that was written."""
    args = _parser().parse_args(argv)
    is_record, out = TRACKS[args.track], Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not empty; choose a new folder")
    if not record.is_date(args.date):
        raise ConfigError(f"--date {args.date}: expected YYYY-MM-DD")
    found = [runs.load(Path(name)) for name in args.runs]
    found.sort(key=lambda run: run.seed)
    runs.refuse(*runs.unfit(found, SEEDS if is_record else 1, is_record))
    compared = compare(found, args.baseline) if args.baseline else None
    told = describe(found, args, compared)
    work = out.with_name(f".{out.name}.part")  # the folder appears whole or not at all
    shutil.rmtree(work, ignore_errors=True)
    try:
        write(work, found, told, compared, Path(args.audit) if args.audit else None)
        if out.exists():
            out.rmdir()
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    results = check.examine(folder := open_folder(out))
    check.report(folder, results, quiet=True)
    print(f"wrote {out}: {', '.join(folder.files)}")
    return check.exit_code(results)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf submit",
        description="Makes a records folder out of finished runs of one configuration with different seeds: README, "
        "submission.json, a log a seed, the script that counts with its readable twin and manifest. Then checks it.",
        epilog="Exit code 0 when the folder passes `pgolf check`, 5 over a budget, 9 when the runs or the folder are "
        "unfit. docs/submission.md shows the way from three runs to a folder.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, one a seed")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; must be new or empty")
    parser.add_argument("--name", required=True, help="what it is called")
    parser.add_argument("--author", required=True)
    parser.add_argument("--github-id", required=True)
    parser.add_argument("--blurb", required=True, help="one paragraph: what is new")
    parser.add_argument("--tuned-on", required=True, choices=TUNED_ON, help="what hyper-parameters were chosen by")
    parser.add_argument("--track", choices=TRACKS, default=next(iter(TRACKS)))
    parser.add_argument("--date", default=datetime.now(timezone.utc).date().isoformat(), help="default: today")
    parser.add_argument(
        "--baseline",
        metavar="WHAT",
        help="a submission's folder, its submission.json, or NAME=BPB[,BPB...], one a seed: what to compare with",
    )
    parser.add_argument("--audit", metavar="FILE", help="an audit report of the scorer, as JSON; goes into the folder")
    return parser


# -- the baseline ----------------------------------------------------------------------------------------------------


def compare(found: Sequence[Run], what: str) -> Comparison:
    """Welch's test of the runs against a baseline. Raises ConfigError when there is none, or there are too few runs."""
    name, scores = baseline(what)
    try:
        factor = fmean(run.loss for run in found) / fmean(run.score for run in found)
        return stats.compare([run.score for run in found], scores, name, factor)
    except ValueError as err:
        raise ConfigError(f"--baseline: {err}") from err


def baseline(what: str) -> tuple[str, list[float]]:
    """(name, bits per byte, one a seed or only the mean) of --baseline."""
    path = Path(what)
    if not path.exists():
        name, equals, numbers = what.partition("=")
        parts = numbers.split(",")
        if not equals or not all(re.fullmatch(r"\d{1,3}(\.\d{1,17})?", n) and float(n) > 0 for n in parts):
            raise ConfigError(f"--baseline {what}: neither a file or folder, nor NAME=BPB[,BPB...]")
        return name, list(map(float, parts))
    file = path / record.NAME if path.is_dir() else path
    try:
        known = record.parse(file.read_bytes())
    except (OSError, ArtifactError) as err:
        raise ConfigError(f"--baseline {file}: {err}") from err
    scores = [s.val_bpb for s in known.seed_results.values() if s.val_bpb] or [known.val_bpb] * bool(known.val_bpb)
    if not scores:
        raise ConfigError(f"--baseline {file}: it has no val_bpb")
    return known.name or path.name, scores


# -- submission.json -------------------------------------------------------------------------------------------------


def describe(found: Sequence[Run], args: argparse.Namespace, compared: Comparison | None) -> dict[str, Any]:
    """submission.json."""
    first = found[0].facts
    scores, losses = [run.score for run in found], [run.loss for run in found]
    largest = max(found, key=lambda run: run.facts["total_bytes"]).facts
    out = {
        "author": args.author, "github_id": args.github_id, "name": args.name, "date": args.date, "track": args.track,
        "blurb": args.blurb, "val_loss": round(fmean(losses), 8), "val_bpb": round(fmean(scores), 8),
        "pre_quant_val_loss": fmean(run.facts["val_loss"] for run in found),
        "pre_quant_val_bpb": fmean(run.facts["val_bpb"] for run in found),
        "bytes_total": largest["total_bytes"], "bytes_code": largest["code_bytes"],
        "bytes_model": largest["artifact_bytes"], "seeds": [run.seed for run in found],
        "seed_results": {str(run.seed): seed_entry(run) for run in found},
        "hardware": first["hardware"], "pytorch_version": first["versions"]["torch"],
        "cuda_version": first["versions"]["cuda"], "hyperparameters_tuned_on": args.tuned_on,
        "calibration": calibrated(found),
    }  # fmt: skip
    if len(found) > 1:
        out |= {"val_bpb_std": stdev(scores), "val_loss_std": stdev(losses)}
    if compared:
        out["comparison"] = comparison_entry(compared, baseline(args.baseline)[1])
    out["pgolf"] = {name: first[name] for name in (*runs.SHARED, "preset")}
    out["compliance"] = compliance(found)
    return out


def compliance(found: Sequence[Run]) -> dict[str, bool]:
    """What others ask of an entry, as far as runs know it."""
    passes = {score["pass"] for run in found for score in run.facts["scores"]}
    train, evaluation = ([run.seconds(budget) for run in found] for budget in ("training", "evaluation"))
    out = {
        "train_under_600s": max(train) <= runs.SECONDS + 1, "eval_under_600s": max(evaluation) <= runs.SECONDS,
        "artifact_under_16mb": all(run.facts["total_bytes"] <= runs.LIMIT for run in found),
        "no_slot": True, "no_pre_quant_ttt": True, "no_etlb": True, "no_ngram_cache": "ngram" not in passes,
        "score_first_ttt": True, "three_seeds": len(found) >= 3,
    }  # fmt: skip
    return out | ({"ngram_normalised": True} if "ngram" in passes else {})


def calibrated(found: Sequence[Run]) -> str:
    """What calibration read: what the runs say, else by the ledger. pgolf never calibrates on validation data."""
    told = [run.facts.get("calibration") for run in found]
    sources = {str(t["source"]) for t in told if isinstance(t, dict) and t.get("source")}
    if not sources:
        sources = {"train" if "calibrate" in run.facts["ledger"] else "none" for run in found}
    return ", ".join(sorted(sources))


def seed_entry(run: Run) -> dict[str, Any]:
    """One seed's numbers."""
    return {
        "val_loss": run.loss, "val_bpb": run.score, "artifact_bytes": run.facts["total_bytes"],
        "bytes_model": run.facts["artifact_bytes"], "steps": run.facts["steps"],
        "step_avg_ms": 1000 * run.facts["train_seconds"] / max(run.facts["steps"], 1),
        "train_wallclock_ms": 1000 * run.seconds("training"), "eval_time_s": run.seconds("evaluation"),
        "val_tokens": run.facts["val_tokens"], "target_tokens": run.facts["targets"],
        "target_bytes": run.facts["target_bytes"], "pre_quant_val_bpb": run.facts["val_bpb"],
        "quantized_val_bpb": run.facts["val_bpb_artifact"], "ledger_digest": run.facts["ledger_digest"],
        "scores": {score["pass"]: score["val_bpb"] for score in run.facts["scores"]},
        "ledger": {name: round(row["seconds"], 3) for name, row in run.facts["ledger"].items()},
    }  # fmt: skip


def comparison_entry(compared: Comparison, scores: Sequence[float]) -> dict[str, Any]:
    """The test, with what it takes to do it again."""
    bar = compared.tests[1]
    return {
        **compared.to_dict(), "baseline_val_bpb": list(scores),
        "nats_per_token_of_bpb": stats.NATS / bar.margin_bpb, "p_value": bar.p, "welch_df": bar.df,
    }  # fmt: skip


# -- the folder ------------------------------------------------------------------------------------------------------


def write(
    out: Path, found: Sequence[Run], told: dict[str, Any], compared: Comparison | None, audit: Path | None
) -> None:
    """Writes every file of the folder."""
    for run in found:
        write_file(out / f"train_seed{run.seed}.log", run.log)
    made = script_of(found[0])
    bundling.write(made, out)
    if audit:
        write_file(out / AUDIT, read_audit(audit))
    write_file(out / record.NAME, (json.dumps(told, indent=2, allow_nan=False) + "\n").encode())
    text = readme.text(found, told, compared, with_comments=bool(made.sources), audited=bool(audit))
    write_file(out / README, text.encode())


def script_of(run: Run) -> Script:
    """The run's script; with its sources where this checkout still is what made it."""
    try:
        made = script.make()
    except PgolfError:
        made = None
    return made if made and made.data == run.script else script.read(run.script)


def read_audit(path: Path) -> bytes:
    """An audit's report. Raises ConfigError when it is no JSON object."""
    try:
        data = path.read_bytes()
        fine = isinstance(json.loads(data), dict)
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(f"--audit {path}: {err}") from err
    if not fine:
        raise ConfigError(f"--audit {path}: expected a JSON object")
    return data
