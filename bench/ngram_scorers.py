"""What every n-gram scorer gives on real text, over a trained model.

    python -m bench.ngram_scorers RUN_DIR [--out docs/measured] [--targets 65536] [--train-targets 65536]

Scores the first targets of the val split with the last checkpoint of a run, plain windows, once; all scorers are then
functions of what was kept, but for those that need whole distributions, which listen during the pass. The mixer's gate
is trained on the train split. Settings are the defaults, and for Dirichlet and Pitman-Yor some others, chosen by nobody
on these data: no row is tuned. Writes ngram_scorers.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pgolf import finish
from pgolf.data.shards import read_shard
from pgolf.errors import PgolfError
from pgolf.eval.base import evaluate
from pgolf.eval.neural import Neural
from pgolf.eval.stats import Collector, TokenStats
from pgolf.ngram.config import SCORER_NAMES, NgramConfig
from pgolf.ngram.scorer import Scorer
from pgolf.ngram.scorers import SCORERS, build_scorer

from .quant_frontier import Bench, load
from .report import table
from .timing import device_card

BASE = NgramConfig()
DIRICHLET = replace(BASE, scorer="dirichlet")
FIVE = "neural,dirichlet,pitman_yor,kneser_ney,calibrated_tilt"
VARIANTS: dict[str, NgramConfig] = {
    **{name: replace(BASE, scorer=name) for name in SCORER_NAMES},
    "dirichlet, across documents": replace(DIRICHLET, within_documents=False),
    "dirichlet, chunks of 16,384": replace(DIRICHLET, chunk=16384),
    "dirichlet, orders 4 and up": replace(DIRICHLET, orders=(4, 6, 8, 12, 16), concentration=(8.0, 4.0, 2.0, 1.0)),
    "dirichlet, concentrations x 5": replace(DIRICHLET, concentration=tuple(5 * x for x in BASE.concentration)),
    "pitman_yor, discount 0.95": replace(BASE, scorer="pitman_yor", discount=(0.95,)),
    "tilt, order 15 alone (PR #2135)": replace(
        BASE, scorer="tilt", hint_orders=(15,), hint_share=(0.8,), hint_count=(1,), boost=2.625, boost_by_share=False
    ),
    "calibrated_tilt, orders 2 to 16": replace(
        BASE, scorer="calibrated_tilt", hint_orders=(2, 3, 4, 6, 8, 12, 16), hint_share=(0.3,), hint_count=(1,)
    ),
    "hedge of five": replace(BASE, scorer="hedge", experts=FIVE),
    "hedge of five, one set of weights": replace(BASE, scorer="hedge", experts=FIVE, entropy_bins=0),
}


class Listener:
    """A reader that scores with whole distributions, as they come."""

    needs_probs = True

    def __init__(self, scorers: dict[str, Scorer], tokens: Tensor):
        self.scorers = scorers
        self.prepared = {name: scorer.prepare(tokens) for name, scorer in scorers.items()}
        self.nats = {name: torch.zeros(tokens.numel() - 1, dtype=torch.float64) for name in scorers}
        self.seconds = dict.fromkeys(scorers, 0.0)

    def put(self, targets: Tensor, nats: Tensor, log_probs: Tensor | None = None) -> None:
        for name, scorer in self.scorers.items():
            began = time.process_time()
            for at, rows in zip(targets.split(1024), log_probs.split(1024), strict=True):
                self.nats[name][at] = scorer.vector_nats(self.prepared[name], at, rows)
            self.seconds[name] += time.process_time() - began

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        """Nothing is saved."""


def scored(bench: Bench, tokens: Tensor, hints: Tensor | None, listeners: tuple = ()) -> tuple[TokenStats, float]:
    """(what the model says of all targets of `tokens`, bytes a target)."""
    trainer = bench.trainer
    trainer.model.eval()
    collector = Collector(tokens.numel() - 1, entropy=True, hints=hints)
    windows = finish.plain_windows(trainer.cfg)
    readers = (collector, *listeners)
    got = evaluate(windows, Neural(trainer.model), tokens, trainer.data.byte_counts, trainer.dist, readers=readers)
    return collector.merged(trainer.dist, windows.order, windows.name), got.bytes / got.targets


def all_hints(scorers: dict[str, Scorer], tokens: Tensor) -> tuple[dict, Tensor]:
    """(what each scorer prepared, (K, T) the hints of all, one below the other)."""
    prepared = {name: s.prepare(tokens) for name, s in scorers.items() if "vector" not in s.needs}
    return prepared, torch.cat([p.hints for p in prepared.values() if p.hints is not None])


def rows(bench: Bench, targets: int, train_targets: int) -> Iterator[dict]:
    """A row a scorer: nats a target, BPB over the model, CPU seconds."""
    vocab = bench.trainer.cfg.model.embed.vocab_size
    tokens = bench.trainer.data.val[: targets + 1]
    scorers = {name: build_scorer(cfg, vocab) for name, cfg in VARIANTS.items()}
    prepared, hints = all_hints(scorers, tokens)
    listener = Listener({n: s for n, s in scorers.items() if "vector" in s.needs}, tokens)
    stats, bytes_each = scored(bench, tokens, hints, (listener,))
    mixer = SCORERS["mixer"](BASE, vocab)
    train = train_tokens(bench, train_targets)
    mixer.fit(train, scored(bench, train, None)[0])
    scorers["mixer, trained"], prepared["mixer, trained"] = mixer, mixer.prepare(tokens)
    first = 0
    base = stats.nats.double().mean().item()
    for name, scorer in scorers.items():
        began = time.process_time()
        if name in listener.nats:
            nats, spent = listener.nats[name], listener.seconds[name]
        else:
            own = prepared[name].hints
            k = 0 if own is None else own.shape[0]
            mine = replace(stats, hints=hints[first : first + k], hint_nats=stats.hint_nats[first : first + k])
            nats, first = scorer.nats(prepared[name], mine), first + k
            spent = time.process_time() - began
        gain = (nats.mean().item() - base) / math.log(2) / bytes_each
        yield {"scorer": name, "nats": nats.mean().item(), "bpb_over_model": gain, "cpu_seconds": spent}


def train_tokens(bench: Bench, n: int) -> Tensor:
    """The first n + 1 tokens of the train split."""
    return torch.from_numpy(read_shard(bench.trainer.data.train_files[0])[: n + 1].astype("int64"))


def measure(run_dir: Path, targets: int, train_targets: int) -> dict:
    card = device_card("cpu")  # with the commit as it is now
    with tempfile.TemporaryDirectory() as scratch:
        bench = load(run_dir, Path(scratch), targets)
        try:
            trainer = bench.trainer
            targets = min(targets or len(trainer.data.val) - 1, len(trainer.data.val) - 1)
            found = []
            for row in rows(bench, targets, train_targets):
                print(row, file=sys.stderr, flush=True)
                found.append(row)
            return {
                "schema": 1,
                "command": "python -m bench.ngram_scorers " + " ".join(sys.argv[1:]),
                "card": card, "targets": targets, "val_targets": len(trainer.data.val) - 1,
                "run": {"preset": trainer.cfg.preset, "seed": trainer.cfg.train.seed, "steps": trainer.step_number,
                        "train_seconds": trainer.clock.elapsed_ms / 1000, "data": trainer.data.name},
                "rows": found,
            }  # fmt: skip
        finally:
            bench.trainer.loader.close()


def page(found: dict) -> str:
    """The Markdown page."""
    run, card = found["run"], found["card"]
    machine = f"{card.get('name')}, torch {card.get('torch')}, commit {card.get('commit')}, {card.get('date')}"
    cells = [
        [r["scorer"], f"{r['nats']:.4f}", f"{1000 * r['bpb_over_model']:+.2f}", f"{r['cpu_seconds']:.2f}"]
        for r in found["rows"]
    ]
    trained = f"{run['steps']} steps in {run['train_seconds']:.0f} s of training, data {run['data']}"
    text = f"""# n-gram scorers on text

Written by `python -m bench.ngram_scorers`; numbers in ngram_scorers.json.

Model: preset `{run["preset"]}`, seed {run["seed"]}, {trained}.
{found["targets"]:,} of {found["val_targets"]:,} val targets, plain windows, default settings but as named. The model is
small and short of training: counts know much that it does not. Over a strong model gains are below 3 thousandths.

Command `{found["command"].strip()}`. Machine: {machine}.

"""
    return text + table(["scorer", "nats a target", "mBPB over the model", "CPU seconds"], cells)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ngram_scorers", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/measured"), help="where the page goes")
    parser.add_argument("--targets", type=int, default=65536, help="val targets to score; 0 = all")
    parser.add_argument("--train-targets", type=int, default=65536, help="of the train split, for the mixer's gate")
    args = parser.parse_args(argv)
    try:
        found = measure(args.run_dir, args.targets, args.train_targets)
    except PgolfError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ngram_scorers.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "ngram_scorers.md").write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
