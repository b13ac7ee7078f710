"""Runs a grid: one neural pass a group, or none where its statistics are kept, then every scorer on top."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf import tree
from pgolf.errors import DataError
from pgolf.eval.base import EvalResult
from pgolf.eval.ledger import Ledger
from pgolf.eval.stats import Collector, TokenStats
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.scorer import Prepared, Scorer
from pgolf.rescore.grid import Group, Row
from pgolf.scoring import Pass, Scoring, VectorReader, stats_of_hints


@dataclass
class Line:
    """A finished row. neural_seconds: of the pass that it shares, 0 where it was kept; gain: bits per byte that the
    n-grams take off."""

    row: Row
    result: EvalResult
    scorer: str
    gain: float
    neural_seconds: float
    ngram_seconds: float

    def facts(self) -> dict[str, Any]:
        r = self.result
        return {
            "pass": self.row.suffix or "plain", "evaluator": r.name, "scorer": self.scorer, "at": self.row.at,
            "val_loss": r.val_loss, "val_bpb": r.val_bpb, "gain_bpb": self.gain, "targets": r.targets, "bytes": r.bytes,
            "subset": r.subset, "neural_seconds": self.neural_seconds, "ngram_seconds": self.ngram_seconds,
            "tokens_forwarded": r.tokens_forwarded, "order": r.order, "ledger_digest": r.ledger.digest(),
        }  # fmt: skip


@dataclass
class Plan:
    """What a group's scorers need of the neural pass."""

    one: Pass
    tokens: Tensor
    scorers: list[tuple[Row, Scorer | None, Prepared | None]] = field(default_factory=list)
    hints: Tensor | None = None
    counting: dict[int, float] = field(default_factory=dict)  # seconds, by number of the row

    @property
    def vectors(self) -> list[tuple[int, Scorer, Prepared]]:
        found = enumerate(self.scorers)
        return [(i, s, p) for i, (_, s, p) in found if s is not None and "vector" in s.needs]


def run_group(scoring: Scoring, group: Group, cache: Path | None) -> list[Line]:
    """Every row of a group. scoring: with the group's settings. cache: folder of kept statistics. Collectives."""
    one = scoring.find(group.suffix)
    plan = plan_of(scoring, group, one)
    path, what = None, {}
    if cache is not None:
        what = kept_as(scoring, group, one)
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]
        path = cache / f"stats-{key}.pt"
    kept = scoring.dist.on_main(lambda: find(path, what, plan, scoring.say))
    if kept is None:
        neural, stats, vectors = neural_pass(scoring, plan)
        if path is not None:
            scoring.dist.on_main(lambda: keep(path, what, neural, stats))
        spent = neural.seconds
    else:
        (neural, stats), vectors, spent = kept, {}, 0.0
    return [finished(scoring, plan, i, neural, stats, vectors.get(i), spent) for i in range(len(plan.scorers))]


def plan_of(scoring: Scoring, group: Group, one: Pass) -> Plan:
    """Counts of all scorers, shared where settings agree, and the hints of all of them."""
    plan = Plan(one, scoring.tokens(one))
    shared: dict[Any, StreamCounts] = {}
    rows: list[Tensor] = []
    for i, row in enumerate(group.rows):
        if row.ngram is None:
            plan.scorers.append((row, None, None))
            continue
        began = time.monotonic()
        scorer = scoring.scorer(row.ngram)
        key = (row.ngram.within_documents, row.ngram.chunk)
        own = type(scorer).stream_counts is not Scorer.stream_counts  # counts of its own kind
        if not own and key not in shared:
            shared[key] = scorer.stream_counts(plan.tokens, one.evaluator.order)
        prepared = scorer.prepare(plan.tokens, one.evaluator.order, None if own else shared[key])
        plan.scorers.append((row, scorer, prepared))
        plan.counting[i] = time.monotonic() - began
        if "hints" in scorer.needs:
            rows += [h for h in prepared.hints.cpu() if not any(torch.equal(h, r) for r in rows)]
    plan.hints = torch.stack(rows) if rows else None
    return plan


def neural_pass(scoring: Scoring, plan: Plan) -> tuple[EvalResult, TokenStats, dict[int, Tensor]]:
    """One pass, read by all: (result, statistics, nats by row of the scorers that need whole distributions)."""
    n = len(plan.tokens) - 1
    collector = Collector(n, entropy=True, hints=plan.hints)
    readers = {i: VectorReader(scorer, prepared, n) for i, scorer, prepared in plan.vectors}
    result = scoring.score(plan.one, [collector, *readers.values()])
    stats = collector.merged(scoring.dist, plan.one.evaluator.order, result.name)
    nats = {i: scoring.dist.all_reduce_sum_(r.nats).to(scoring.dist.device) for i, r in readers.items()}
    return result, stats, nats


def finished(
    scoring: Scoring, plan: Plan, i: int, neural: EvalResult, stats: TokenStats, vectors: Tensor | None, spent: float
) -> Line:
    """One row out of the group's statistics."""
    row, scorer, prepared = plan.scorers[i]
    if scorer is None:
        return Line(row, neural, "none", 0.0, spent, 0.0)
    began = time.monotonic()
    hints = prepared.hints if "hints" in scorer.needs else None
    nats = scorer.nats(prepared, stats_of_hints(stats, hints)) if vectors is None else vectors
    result = scoring.metered(nats, plan.tokens, neural, f"{scorer.name} on {neural.name}", row.ngram.chunk)
    seconds = plan.counting[i] + time.monotonic() - began
    result = replace(result, seconds=spent + seconds)
    return Line(row, result, scorer.name, neural.val_bpb - result.val_bpb, spent, seconds)


# -- kept statistics -------------------------------------------------------------------------------------------------


def kept_as(scoring: Scoring, group: Group, one: Pass) -> dict[str, str]:
    """What statistics belong to: the model, the data, and every setting that the pass depends on."""
    settings = {p: v for p, v in tree.flatten(group.cfg).items() if p.startswith(("eval.", "ttt", "data.seq_len"))}
    for path in ("eval.max_seconds", "eval.reserve_seconds", "eval.save_seconds"):
        settings.pop(path, None)
    return {
        **scoring.what,
        "evaluator": one.evaluator.name,
        "limit": str(one.limit),
        "settings": json.dumps(settings, sort_keys=True, default=str),
        "temperature": str(scoring.neural.temperature),
    }


def keep(path: Path, what: dict[str, str], neural: EvalResult, stats: TokenStats) -> None:
    """The statistics, and beside them the result of the pass."""
    stats.save(path, what)
    facts = {k: v for k, v in vars(neural).items() if k != "ledger"}
    path.with_suffix(".json").write_text(json.dumps(facts | {"ledger": neural.ledger.rows()}) + "\n")


def find(path: Path | None, what: dict[str, str], plan: Plan, say) -> tuple[EvalResult, TokenStats] | None:
    """Kept statistics that have all that the plan's scorers need; None, and a line why, where they do not."""
    if path is None or not path.is_file():
        return None
    if plan.vectors:
        say(f"{plan.vectors[0][1].name} needs whole distributions, which are not kept: the neural pass runs again")
        return None
    try:
        stats = TokenStats.load(path, what)
        if plan.hints is not None:
            stats_of_hints(stats, plan.hints)
        facts = json.loads(path.with_suffix(".json").read_text())
        return EvalResult(**facts | {"ledger": Ledger.from_rows(facts["ledger"])}), stats
    except (DataError, OSError, ValueError, KeyError, TypeError) as err:
        say(f"kept statistics are not used, the neural pass runs again: {err}")
        return None
