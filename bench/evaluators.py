"""Every evaluator and n-gram scorer on a trained model: bits per byte, seconds, and what the audit says of it.

`python -m bench.evaluators RUN_DIR [--targets N] [--out DIR]` writes docs/measured/evaluators.{md,json}. Scores are of
the validation split with default settings but as named, so nothing here was chosen by its score; verdicts are of
`pgolf audit NAME` at its default size, over its toy model. The unsafe hashed scorer is scored too, to show what it
would claim: its number is no code length, which is what its verdict says.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf import config, extras
from pgolf.audit import production, suite
from pgolf.audit.controls import CONTROLS
from pgolf.audit.result import FAILED, Sizes
from pgolf.data.shards import read_shard
from pgolf.data.source import Data, open_data
from pgolf.dist import Dist
from pgolf.eval.neural import Neural
from pgolf.eval.order import STREAM
from pgolf.eval.stats import Collector
from pgolf.ngram.config import SCORER_NAMES, NgramConfig
from pgolf.ngram.legacy import LegacyHashed, LegacySettings
from pgolf.rescore.grid import Row, groups_of
from pgolf.rescore.run import Line, run_group
from pgolf.rescore.subject import Subject, locate, open_subject, settings_of
from pgolf.schema import RunConfig
from pgolf.scoring import Scoring

from .report import table
from .timing import device_card

OUT = Path(__file__).resolve().parents[1] / "docs" / "measured"
# name of the row: (overrides, pass, its name in `pgolf audit`)
EVALUATORS: dict[str, tuple[tuple[str, ...], str, str]] = {
    "plain": ((), "plain", "plain"),
    "sliding": ((), "sliding", "sliding"),
    "documents": (("eval.documents=on",), "documents", "documents"),
    "documents, stride 64": (("eval.documents=on", "eval.documents.stride=64"), "documents", "documents"),
    "ttt, SGD on chunks": (("ttt=on",), "ttt", "ttt_sgd"),
    "ttt, SGD on chunks of 4,096": (("ttt=on", "ttt.sgd.chunk=4096"), "ttt", "ttt_sgd"),
    "ttt, AdamW on chunks of 4,096": (
        ("ttt=on", "ttt.sgd.chunk=4096", "ttt.sgd.optimizer=adamw", "ttt.sgd.lr=0.0001"), "ttt", "ttt_sgd",
    ),
    "ttt, LoRA of the first generation": (
        ("ttt=on", "ttt.kind=lora", "ttt.lora.targets=q,v,head", "ttt.lora.rank=8", "ttt.lora.alpha=8",
         "ttt.lora.chunk=64", "ttt.lora.lr=0.01", "ttt.lora.beta1=0.9", "ttt.lora.beta2=0.95",
         "ttt.lora.weight_decay=0", "ttt.lora.slots=8", "ttt.lora.keep_a=false"), "ttt", "ttt_lora",
    ),
    "ttt, LoRA of the second generation": (
        ("ttt=on", "ttt.kind=lora", "ttt.lora.rank=32", "ttt.lora.alpha=36", "ttt.lora.slots=8"), "ttt", "ttt_lora",
    ),
    "ttt, the same in phases": (
        ("ttt=on", "ttt.kind=phased", "ttt.lora.rank=32", "ttt.lora.alpha=36", "ttt.lora.slots=8",
         "ttt.phases.documents=30", "ttt.phases.chunk=4096"), "ttt", "ttt_phased",
    ),
}  # fmt: skip
_FIVE = "ngram.experts=neural,dirichlet,pitman_yor,kneser_ney,calibrated_tilt"
# n-gram scorers over sliding windows; name of the row: (scorer, other settings)
NGRAMS: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: (name, ()) for name in SCORER_NAMES if name not in ("neural", "mixer")},
    "mixer, not trained": ("mixer", ()),
    "dirichlet, across documents": ("dirichlet", ("ngram.within_documents=false",)),
    "dirichlet, chunks of 16,384": ("dirichlet", ("ngram.chunk=16384",)),
    "dirichlet, orders 4 and up": ("dirichlet", ("ngram.orders=4,6,8,12,16", "ngram.concentration=8,4,2,1")),
    "tilt, order 15 alone (PR #2135)": (
        "tilt", ("ngram.hint_orders=15", "ngram.hint_share=0.8", "ngram.hint_count=1", "ngram.boost=2.625",
                 "ngram.boost_by_share=false"),
    ),
    "calibrated_tilt, orders 2 to 16": (
        "calibrated_tilt", ("ngram.hint_orders=2,3,4,6,8,12,16", "ngram.hint_share=0.3", "ngram.hint_count=1"),
    ),
    "hedge of five": ("hedge", (_FIVE,)),
    "hedge of five, one set of weights": ("hedge", (_FIVE, "ngram.entropy_bins=0")),
}  # fmt: skip
BASE = {"train.device": "cpu", "ngram": "none", "ttt": "none"}  # settings of every row
MIXER_TARGETS = 65536  # of training text
UNSAFE = "legacy_hashed_unsafe"
OFFICIAL_TARGETS = 62_021_632  # of the record's evaluation
FILE = "evaluators.json"


@dataclass
class Found:
    """A row of the table."""

    name: str
    val_bpb: float
    seconds: float
    targets: int
    audit: str  # its name in `pgolf audit`
    on: str = ""  # the pass below an n-gram scorer


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    card, out = device_card("cpu"), Path(args.out) / FILE
    found = locate(Path(args.run_dir))
    rows = list(scored(found, args.targets, set(_list(args.only))))
    before = json.loads(out.read_text()) if args.only and out.is_file() else {}
    command = "python -m bench.evaluators " + shlex.join(argv if argv is not None else sys.argv[1:])
    new = {row.name for row in rows}
    this = {"command": command, "threads": torch.get_num_threads(), "machine": card, "rows": sorted(new)}
    rows = [*(Found(**row) for row in before.get("rows", ()) if row["name"] not in new), *rows]
    runs = [*before.get("runs", ()), *([this] if new else [])]
    data = {"runs": runs, "model": model_facts(found), "rows": [asdict(row) for row in rows], "audits": {}}
    data["audits"] = before.get("audits", {})
    out.parent.mkdir(parents=True, exist_ok=True)
    save(out, data)
    torch.set_num_threads(1)  # an audit is a hundred thousand tiny forwards
    for name in dict.fromkeys(row.audit for row in rows):
        if name not in data["audits"]:
            data["audits"][name] = verdict(name)
            print(f"audit of {name}: {data['audits'][name]['text']}", flush=True)
            save(out, data)
    print(out.with_suffix(".md").read_text())
    return 0


def save(out: Path, data: dict[str, Any]) -> None:
    """The numbers, and the page beside them."""
    out.write_text(json.dumps(data, indent=1) + "\n")
    out.with_suffix(".md").write_text(page(data))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench.evaluators", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN_DIR", help="a finished run of train_gpt.py, or its artifact")
    parser.add_argument("--targets", type=int, default=0, help="score only the first N targets; 0 = all")
    parser.add_argument("--only", default="", help="rows by , separated by semicolons, or ngrams; other rows stay as "
                        "stay as they are in DIR")  # fmt: skip
    parser.add_argument("--out", default=str(OUT), metavar="DIR")
    return parser


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(";") if part.strip()]


def settings(found: Path, overrides: Sequence[str], targets: int) -> RunConfig:
    """The run's settings with those of a row."""
    words = [*(f"{path}={text}" for path, text in BASE.items()), *overrides]
    cfg = config.load(words, {}, base=settings_of(found)).config
    limits = {"max_tokens": targets, "sliding_max_tokens": targets, "max_seconds": 0.0}
    return replace(cfg, eval=replace(cfg.eval, **limits))


def scored(found: Path, targets: int, only: set[str]) -> Iterator[Found]:
    """The rows that are asked for."""
    if only == {"none"}:
        return
    cfg = settings(found, (), targets)
    subject = open_subject(found, cfg, torch.device("cpu"), torch.float32)
    data = open_data(cfg.data, subject.model.cfg.embed.vocab_size, torch.device("cpu"), lambda text: None)
    for name, (overrides, suffix, audit) in EVALUATORS.items():
        if only and name not in only:
            continue
        own = settings(found, overrides, targets)
        (line,) = lines([Row("" if suffix == "plain" else suffix, own)], subject, data)
        result = line.result
        yield told(Found(name, result.val_bpb, line.neural_seconds, result.targets, audit))
    if not only or UNSAFE in only:
        yield told(unsafe(cfg, subject, data))
    if only and "ngrams" not in only:
        return
    rows = []
    for name, (scorer, overrides) in NGRAMS.items():
        own = settings(found, ("ngram=on", f"ngram.scorer={scorer}", *overrides), targets)
        rows.append(Row("sliding", own, {"name": name}))
    found_lines = lines(rows, subject, data)
    own = settings(found, ("ngram=on", "ngram.scorer=mixer"), targets)
    found_lines += lines([Row("sliding", own, {"name": "mixer, trained"})], subject, data, fitted(own, subject, data))
    for line in found_lines:
        result, seconds = line.result, line.neural_seconds + line.ngram_seconds
        name = line.row.at["name"]
        yield told(Found(name, result.val_bpb, seconds, result.targets, line.scorer, "sliding"))


def told(row: Found) -> Found:
    print(f"{row.name}: {row.val_bpb:.4f} bits per byte, {row.seconds:.1f} s", flush=True)
    return row


def scoring_of(cfg: RunConfig, subject: Subject, data: Data, mixer: dict[str, Tensor] | None = None) -> Scoring:
    neural = Neural(subject.model, extras.temperature_of(subject.extras))
    return Scoring(cfg, neural, data, Dist(), label="bench", mixer=mixer)


def lines(rows: list[Row], subject: Subject, data: Data, mixer: dict[str, Tensor] | None = None) -> list[Line]:
    out = []
    for group in groups_of(rows):
        out += run_group(scoring_of(group.cfg, subject, data, mixer), group, None)
    return out


def fitted(cfg: RunConfig, subject: Subject, data: Data) -> dict[str, Tensor]:
    """The mixer's weights, trained on training text."""
    text = torch.from_numpy(read_shard(data.train_files[-1])[: MIXER_TARGETS + 1].astype("int64"))
    train = replace(data, val=text, val_bytes=None)
    scoring = scoring_of(replace(cfg, ngram=None, eval=replace(cfg.eval, max_tokens=0)), subject, train)
    collector = Collector(len(text) - 1, entropy=True)
    scoring.score(scoring.find(""), [collector])
    scorer = scoring.scorer(cfg.ngram)
    scorer.fit(text, collector.merged(Dist(), STREAM, "plain"))
    return scorer.state()


def unsafe(cfg: RunConfig, subject: Subject, data: Data) -> Found:
    """What the hashed scorer claims on top of sliding windows, with the settings of its record; buckets and chunk are
    scaled from the challenge's split to these targets, so that the load of the tables is the record's."""
    scoring = scoring_of(cfg, subject, data)
    one = scoring.find("sliding")
    tokens = scoring.tokens(one)
    scale, record = (len(tokens) - 1) / OFFICIAL_TARGETS, LegacySettings()
    own = replace(
        record, buckets=1 << round(math.log2(record.buckets * scale)), chunk=max(round(record.chunk * scale), 1)
    )
    scorer = LegacyHashed(NgramConfig(), subject.model.cfg.embed.vocab_size, own)
    collector = Collector(len(tokens) - 1, entropy=True)
    neural = scoring.score(one, [collector])
    began = time.monotonic()
    stats = collector.merged(Dist(), one.evaluator.order, neural.name)
    nats = scorer.nats(scorer.prepare(tokens), stats)
    result = scoring.metered(nats, tokens, neural, UNSAFE)
    seconds = neural.seconds + time.monotonic() - began
    return Found(UNSAFE, result.val_bpb, seconds, result.targets, UNSAFE, "sliding")


def verdict(name: str) -> dict[str, Any]:
    """{"text", "tests": {test: status}, "seconds"} of an audit at its default size."""
    make: Callable[[], Any] = (
        (lambda: CONTROLS[name].make(suite.CONTROL_VOCAB))
        if name in CONTROLS
        else (lambda: production.PRODUCTION[name](production.toy()))
    )
    began = time.monotonic()
    results = suite.run_tests(make(), Sizes())
    failed = [test for test, result in results.items() if result.status == FAILED]
    passed = sum(result.status == "passed" for result in results.values())
    text = f"**fails** {', '.join(failed)}" if failed else f"passes {passed} tests"
    return {
        "text": text, "tests": {t: r.status for t, r in results.items()}, "seconds": time.monotonic() - began,
    }  # fmt: skip


def model_facts(found: Path) -> dict[str, Any]:
    path = found.parent / "result.json"
    told = json.loads(path.read_text()) if path.is_file() else {}
    return {k: told.get(k) for k in ("preset", "seed", "steps", "train_seconds", "data", "parameters", "val_bpb")}


def page(data: dict[str, Any]) -> str:
    """The page for docs/measured."""
    rows = [Found(**row) for row in data["rows"]]
    base = next((row.val_bpb for row in rows if row.name == "sliding"), rows[0].val_bpb)
    head = ["evaluator", "on top of", "BPB", "mBPB against sliding", "seconds", "audit"]
    cells = [
        [
            row.name,
            row.on,
            f"{row.val_bpb:.4f}",
            f"{1000 * (row.val_bpb - base):+.1f}",
            f"{row.seconds:.1f}",
            data["audits"].get(row.audit, {"text": "not made"})["text"],
        ]
        for row in rows
    ]
    model = data["model"]
    about = (
        f"Model: preset `{model['preset']}`, seed {model['seed']}, {model['steps']} steps, data {model['data']}, from"
        f" its artifact. {rows[0].targets:,} validation targets, default settings but as named: nothing was chosen by"
        " its score. The model is small and short of training, so counts and adaptation know much that it does not."
        " Over the challenge's best models valid n-grams gain less than 3 mBPB and test-time training 2 to 4"
        " ([n-grams](../ngram.md), [test-time training](../test_time_training.md) name the sources). Seconds of an"
        " n-gram scorer hold those of the pass below it. The SGD rows' cosine is as long as the stream, which the"
        " audit flags as test 3, future; the verdict is of `ttt.sgd.max_chunks`, which fixes its length."
    )
    how = [provenance(run, last=i > 0) for i, run in enumerate(data["runs"])]
    intro = ["# Evaluators", "Written by `python -m bench.evaluators`; numbers in evaluators.json."]
    return "\n\n".join([*intro, textwrap.fill(about, 118, break_on_hyphens=False), *how, table(head, cells)])


def provenance(run: dict[str, Any], last: bool) -> str:
    """Where the rows of one command come from. last: they have taken the place of others, so they are named."""
    machine, which = run["machine"], f" Rows: {', '.join(run['rows'])}." if last else ""
    text = (
        f"Command `{run['command']}`, {run['threads']} threads. Machine: {machine.get('name', 'CPU')}, torch"
        f" {machine['torch']}, commit {machine.get('commit')}, {machine['date']}.{which}"
    )
    return textwrap.fill(text, 118, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    sys.exit(main())
