"""`python -m pgolf eval`: scores an artifact or a checkpoint with any evaluator, and grids of settings."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pgolf import config, extras, runtime, signals, tree
from pgolf.config import RunConfig
from pgolf.data.shards import read_shard
from pgolf.data.sidecar import stream_bytes
from pgolf.data.source import Data, open_data
from pgolf.data.tokenizer import load_tokenizer
from pgolf.dist import Dist, start
from pgolf.errors import ConfigError, PgolfError
from pgolf.eval.neural import Neural
from pgolf.kernels._op import paths
from pgolf.ngram.config import SCORER_NAMES
from pgolf.rescore import grid, report
from pgolf.rescore.run import Line, run_group
from pgolf.rescore.subject import Subject, locate, open_subject, settings_of
from pgolf.result import write_file
from pgolf.scoring import Scoring, longest
from pgolf.signals import Stop

# What may differ from the run's settings: how it is scored, on which data, on what machine
FREE = ("eval", "ngram", "ttt", "data.path", "data.tokenizer_path", "data.cache_dir", "train.device", "train.dtype",
        "train.compile", "kernels", "preset")  # fmt: skip


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: 0; an error's by its class."""
    args = _parser().parse_intermixed_args(argv)
    found = locate(Path(args.path))
    cfg = settings_for(found, args, environ)
    suffixes = _list(args.passes)
    scorers = list(SCORER_NAMES) if args.ngrams == "all" else _list(args.ngrams)
    if unknown := [s for s in scorers if s not in (*SCORER_NAMES, grid.NONE)]:
        close = tree.did_you_mean(unknown[0], SCORER_NAMES)
        raise ConfigError(f"--ngrams {unknown[0]}: there are {', '.join(SCORER_NAMES)}, none, all{close}")
    if scorers and grid.NONE not in scorers:
        scorers.insert(0, grid.NONE)  # the row that gains are measured from
    rows = grid.rows_of(cfg, suffixes, scorers, grid.parse_axes(args.grid))
    dist = start(cfg.train.device)
    with signals.catching(speak=dist.is_main) as stop:
        try:
            return _run(args, found, cfg, rows, dist, stop)
        except PgolfError as err:
            shown = dist.blame(err)
            dist.abandon()
            raise shown from err


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pgolf eval",
        description="Scores what a run has left with any evaluator. Rows of a grid that differ in their n-grams share "
        "one neural pass, whose per-token statistics are kept: the next sweep takes seconds. Works under torchrun.",
        epilog="A setting that is chosen by a table of the validation split is tuned on it, which a submission must "
        "not be: --split train scores training text instead.",
    )
    parser.add_argument("path", metavar="PATH", help="an artifact (model.pgolf), a run's folder, or a checkpoint")
    parser.add_argument(
        "settings", nargs="*", metavar="path=value", help="settings, as for train_gpt.py: eval.stride=64"
    )
    parser.add_argument("--passes", metavar="A,B", default="", help="plain, sliding, documents, ttt; default: the last "
                        "that the settings have")  # fmt: skip
    parser.add_argument("--ngrams", metavar="A,B", default="", help=f"n-gram scorers to compare, or all: "
                        f"{', '.join(SCORER_NAMES)}")  # fmt: skip
    parser.add_argument("--grid", nargs="+", action="append", default=[], metavar="path=value value",
                        help="values of one setting; several --grid make every combination")  # fmt: skip
    parser.add_argument("--max-tokens", type=int, metavar="N", help="score only the first N targets")
    parser.add_argument("--split", choices=("val", "train"), default="val", help="train: the first N targets (default "
                        "262,144) of the last training shard")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="where table, JSON, plot and kept statistics go; default: eval/ "
                        "beside the model")  # fmt: skip
    parser.add_argument("--fresh", action="store_true", help="do not use kept statistics")
    parser.add_argument("--json", action="store_true", help="print the JSON object instead of the table")
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def settings_for(found: Path, args: argparse.Namespace, environ: Mapping[str, str]) -> RunConfig:
    """The run's settings with what the command line changes. Raises ConfigError for what is trained in already."""
    base = settings_of(found)
    cfg = config.load(args.settings, environ, base=base).config
    if base is not None:
        changed = [path for path in tree.diff(base, cfg) if not path.startswith(FREE)]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: the model is trained with another value; only settings of eval, ttt, ngram,"
                " data paths, device and kernels can be chosen here"
            )
    if args.max_tokens is not None:
        if args.max_tokens < 1:
            raise ConfigError(f"--max-tokens {args.max_tokens}: expected at least 1")
        limits = {"max_tokens": args.max_tokens, "sliding_max_tokens": args.max_tokens}
        cfg = replace(cfg, eval=replace(cfg.eval, **limits))
    return cfg


def _run(args: argparse.Namespace, found: Path, cfg: RunConfig, rows: list[grid.Row], dist: Dist, stop: Stop) -> int:
    say = (lambda text: print(text, file=sys.stderr, flush=True)) if dist.is_main else (lambda text: None)
    chosen = runtime.choose(
        dist.device, dtype=cfg.train.dtype, compile=cfg.train.compile, default_path=cfg.kernels.default,
        ops=cfg.kernels.ops(), weight_cast="off",
    )  # fmt: skip
    subject = open_subject(found, cfg, dist.device, chosen.compute_dtype)
    data = _data(args, cfg, subject, dist, say)
    say(f"{subject.name}\n{data.name}: {len(data.val) - 1:,} targets, {chosen.lines()[0]}")
    out = Path(args.out) if args.out else (found if found.is_file() else found.parent).parent / "eval"
    lines: list[Line] = []
    compiled = (lambda fn: torch.compile(fn, dynamic=False)) if chosen.compile.value == "on" else (lambda fn: fn)
    with paths(**chosen.paths):
        for group in grid.groups_of(rows):
            subject.fit_length(longest(group.cfg))
            scoring = Scoring(
                group.cfg,
                Neural(subject.model, extras.temperature_of(subject.extras), compiled),
                data,
                dist,
                label="eval",
                stop=stop,
                folder=out / "progress",
                what={"model": subject.sha256, "data": data.val_sha256(), "dtype": chosen.dtype.value},
                mixer=extras.mixer_of(subject.extras),
                compiled=compiled,
                say=say,
                progress=_progress(say),
            )
            lines += run_group(scoring, group, None if args.fresh else out / "cache")
    if dist.is_main:
        _tell(args, subject, data, lines, out)
    dist.close()
    return 0


def _data(args: argparse.Namespace, cfg: RunConfig, subject: Subject, dist: Dist, say) -> Data:
    """The split to score. Raises ConfigError when the tokenizer is not the one that the model was trained with."""
    opened = lambda: open_data(cfg.data, subject.model.cfg.embed.vocab_size, dist.device, progress=say)
    data = opened() if dist.is_main else None
    dist.barrier()  # with the embedded corpus rank 0 builds what the others find
    data = data or opened()
    if subject.tokenizer and subject.tokenizer != data.tokenizer_sha256:
        raise ConfigError(
            f"the model was trained with another tokenizer (sha256 {subject.tokenizer[:12]}..., these data have"
            f" {data.tokenizer_sha256[:12]}...): its tokens mean something else here\n"
            "fix: DATA_PATH and TOKENIZER_PATH of the run"
        )
    if args.split == "val":
        return data
    n = args.max_tokens or 262_144
    ids = read_shard(data.train_files[-1])[: n + 1]
    counts = None
    if data.val_bytes is not None:  # the training shards have no sidecar
        counts = torch.from_numpy(stream_bytes(load_tokenizer(cfg.data.tokenizer_path, None), ids))
    name = f"{data.name}, training text of {data.train_files[-1].name}"
    return replace(data, name=name, val=torch.from_numpy(ids.astype("int64")), val_bytes=counts)


def _progress(say):
    """A line every tenth of a pass."""
    said = [0]

    def progress(label: str, done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth != said[0] and total >= 20:
            said[0] = tenth
            say(f"{label}: {done:,} of {total:,} batches")

    return progress


def _tell(args: argparse.Namespace, subject: Subject, data: Data, lines: list[Line], out: Path) -> None:
    """Prints and writes table, JSON and plot."""
    head: dict[str, Any] = {
        "model": subject.name, "sha256": subject.sha256, "data": data.name, "split": args.split,
        "val_sha256": data.val_sha256(), "torch": torch.__version__,
    }  # fmt: skip
    text = json.dumps(report.facts(lines, head), indent=2, allow_nan=False)
    table = report.table(lines)
    print(text if args.json else table)
    write_file(out / "eval.json", (text + "\n").encode())
    write_file(out / "eval.md", (table + "\n").encode())
    drawn = report.plot(lines, out / "eval.png", f"{subject.name}\n{data.name}, {lines[0].result.subset}")
    made = ["eval.json", "eval.md", *(["eval.png"] if drawn else [])]
    print(f"{out}: {', '.join(made)}" + ("" if drawn else " (no plot: pip install matplotlib)"), file=sys.stderr)
