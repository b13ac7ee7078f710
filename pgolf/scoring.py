"""The passes of a final evaluation, one after another: the same for a run and for `pgolf eval`.

    plain -> sliding -> documents -> adapting (ttt) -> n-grams on top of the last of these

Which of them there are follows from the settings alone, never from a score. The last one's is the score.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgolf import limits
from pgolf.clock import TimeLedger
from pgolf.data.source import Data
from pgolf.dist import Dist
from pgolf.errors import DataError
from pgolf.eval.base import CoverageError, EvalResult, Evaluator, Reader, evaluate
from pgolf.eval.documents import DocumentWindows
from pgolf.eval.keep import Keeper
from pgolf.eval.ledger import Ledger
from pgolf.eval.meter import Meter
from pgolf.eval.neural import Neural
from pgolf.eval.order import Order
from pgolf.eval.stats import Collector, TokenStats
from pgolf.eval.windowed import PlainWindows, SlidingWindows
from pgolf.ngram.config import NgramConfig
from pgolf.schema import RunConfig
from pgolf.signals import Stop

CHUNK = 1 << 22  # targets of n-gram nats metered at a time


@dataclass(frozen=True)
class Pass:
    """One evaluation: a label's suffix, what scores, and how many targets (0 = all)."""

    suffix: str
    evaluator: Evaluator
    limit: int


@dataclass(frozen=True)
class Score:
    """A finished pass."""

    suffix: str
    result: EvalResult
    ngram_seconds: float = 0.0  # of it, without the neural part

    def facts(self) -> dict[str, Any]:
        """For result.json."""
        r = self.result
        return {
            "pass": self.suffix or "plain", "name": r.name, "val_loss": r.val_loss, "val_bpb": r.val_bpb,
            "targets": r.targets, "bytes": r.bytes, "seconds": r.seconds, "tokens_forwarded": r.tokens_forwarded,
            "subset": r.subset, "order": r.order, "ledger_digest": r.ledger.digest(),
            "ngram_seconds": self.ngram_seconds,
        }  # fmt: skip


def plain_windows(cfg: RunConfig) -> PlainWindows:
    """The plain evaluator of a run."""
    return PlainWindows(cfg.eval.seq_len or cfg.data.seq_len, cfg.eval.batch_tokens)


def pass_names(cfg: RunConfig) -> list[str]:
    """Suffixes of the neural passes of a run, in order; "" is the plain one."""
    on = {"": True, "sliding": cfg.eval.stride, "documents": cfg.eval.documents, "ttt": cfg.ttt}
    return [name for name, wanted in on.items() if wanted]


def longest(cfg: RunConfig) -> int:
    """The longest row that any pass feeds the model."""
    return max(cfg.eval.seq_len or cfg.data.seq_len, cfg.ttt.seq_len if cfg.ttt else 0)


class Scoring:
    """What all passes of one evaluation share.

    neural: the model. label: what its scores are called, "int6_brotli_roundtrip". folder: where progress is saved; None
    saves nothing. what: names of the artifact and the data, for saves. mixer: weights of an n-gram gate. compiled: what
    wraps the forward and backward of test-time training.
    """

    def __init__(
        self,
        cfg: RunConfig,
        neural: Neural,
        data: Data,
        dist: Dist,
        *,
        label: str,
        stop: Stop | None = None,
        ledger: TimeLedger | None = None,
        folder: Path | None = None,
        what: dict[str, str] | None = None,
        mixer: dict[str, Tensor] | None = None,
        compiled: Callable[[Callable], Callable] = lambda fn: fn,
        say: Callable[[str], None] = lambda text: None,
        progress: Callable[[str, int, int], None] = lambda label, done, total: None,
    ):
        self.cfg, self.neural, self.data, self.dist, self.label = cfg, neural, data, dist, label
        self.stop, self.ledger, self.folder, self.what = stop or Stop(), ledger or TimeLedger(), folder, what or {}
        self.mixer, self.compiled, self.say, self.progress = mixer, compiled, say, progress

    def run(self) -> Iterator[Score]:
        """Every pass of the settings. Raises OutOfTime before a limit is crossed. Collectives."""
        todo = [self.find(name) for name in pass_names(self.cfg)]
        for one in todo[:-1]:
            yield Score(one.suffix, self.score(one))
        if self.cfg.ngram is None:
            yield Score(todo[-1].suffix, self.score(todo[-1]))
        else:
            yield from self.with_ngrams(todo[-1])

    def find(self, suffix: str) -> Pass:
        """The pass of that name."""
        cfg, e = self.cfg, self.cfg.eval
        length, limit = e.seq_len or cfg.data.seq_len, e.sliding_max_tokens
        if not suffix:
            return Pass("", plain_windows(cfg), e.max_tokens)
        if suffix == "sliding":
            return Pass(suffix, SlidingWindows(length, e.stride, e.batch_tokens), limit)
        if suffix == "documents":
            return Pass(suffix, DocumentWindows(length, e.documents.stride, e.batch_tokens), limit)
        return Pass(suffix, self._learner(length), limit)

    def _learner(self, length: int) -> Evaluator:
        from pgolf.ttt.build import Frame, build, order_of  # only where it is asked for

        e, data = self.cfg.eval, self.data
        n = min(e.sliding_max_tokens or len(data.val) - 1, len(data.val) - 1)
        frame = Frame(
            length,
            e.stride or length,
            e.batch_tokens,
            order_of(self.cfg.ttt, data.val[: n + 1]),
            self.dist.world_size,
            data.byte_counts,
            data.val_bytes,
            self.compiled,
        )
        return build(self.cfg.ttt, frame)

    def score(self, one: Pass, readers: Sequence[Reader] = ()) -> EvalResult:
        """One neural pass."""
        name = f"{self.label}_{one.suffix}" if one.suffix else self.label
        limit, reserve = self.cfg.eval.max_seconds, self.cfg.eval.reserve_seconds
        already = self.dist.broadcast_float(limits.spent(self.ledger, "evaluation"))
        how = {"limit": limit, "reserve": reserve, "already": already, "say": self.say}
        return evaluate(
            one.evaluator,
            self.neural,
            self.data.val,
            self.data.byte_counts,
            self.dist,
            val_bytes=self.data.val_bytes,
            readers=readers,
            watch=limits.Watch(self.dist, self.stop, name, **how),
            progress=lambda done, total: self.progress(name, done, total),
            limit_tokens=one.limit,
            keep=self._keeper(name, one),
        )

    def _keeper(self, name: str, one: Pass) -> Keeper | None:
        seconds = self.cfg.eval.save_seconds
        if self.folder is None or not seconds:
            return None
        what = {**self.what, "evaluator": one.evaluator.name, "order": one.evaluator.order.id, "limit": str(one.limit)}
        return Keeper(self.folder, name, what, self.dist, seconds=seconds, say=self.say)

    # -- n-grams -----------------------------------------------------------------------------------------------------

    def with_ngrams(self, one: Pass) -> Iterator[Score]:
        """The last neural pass, and the scorer of the settings on top of it."""
        scorer = self.scorer(self.cfg.ngram)
        tokens = self.tokens(one)
        began = time.monotonic()
        prepared = scorer.prepare(tokens, one.evaluator.order)
        reader = reader_for(scorer, prepared, len(tokens) - 1)
        counting = time.monotonic() - began
        neural = self.score(one, [reader])
        yield Score(one.suffix, neural)
        began = time.monotonic()
        nats = reader.finish(scorer, prepared, self.dist, one.evaluator.order, one.evaluator.name)
        result = self.metered(nats, tokens, neural, f"{scorer.name} on {neural.name}", self.cfg.ngram.chunk)
        seconds = counting + time.monotonic() - began
        yield Score("ngram", replace(result, seconds=neural.seconds + seconds), seconds)

    def scorer(self, cfg: NgramConfig) -> Any:
        """The n-gram scorer of the settings, with the artifact's weights where it has some."""
        from pgolf.ngram.scorers import build_scorer  # heavy, and only where it is asked for

        scorer = build_scorer(cfg, self.neural.vocab_size)
        if self.mixer is not None and cfg.scorer == "mixer":
            scorer.load_state(self.mixer)
        return scorer

    def tokens(self, one: Pass) -> Tensor:
        """(T + 1,) of the targets that a pass scores, on the ranks' device."""
        total = len(self.data.val) - 1
        n = one.evaluator.covered(min(one.limit, total) if one.limit else total)
        return self.data.val[: n + 1].to(self.dist.device)

    def metered(self, nats: Tensor, tokens: Tensor, neural: EvalResult, name: str, chunk: int = 0) -> EvalResult:
        """A result out of the nats (T,) of a scorer on top of a neural pass. The same on every rank."""
        meter, n = Meter(self.dist.device), len(nats)
        for a in range(0, n, CHUNK):
            b = min(a + CHUNK, n)
            if self.data.val_bytes is not None:
                counted = self.data.val_bytes[a + 1 : b + 1].to(nats.device, torch.int64)
            else:
                counted = self.data.byte_counts(tokens[a:b], tokens[a + 1 : b + 1])
            meter.add(nats[a:b], counted)
        ledger = with_counts(neural.ledger, n, chunk)
        if problems := ledger.problems(n):
            raise CoverageError(f"evaluation ({name}): " + "\n".join(problems))
        return replace(neural, name=name, val_loss=meter.val_loss, val_bpb=meter.bpb, ledger=ledger)


def with_counts(neural: Ledger, n_targets: int, chunk: int) -> Ledger:
    """The ledger of a neural pass and of counts that take targets in one by one, or chunk by chunk."""
    out = Ledger.from_rows(neural.rows())
    out.epoch += 1  # the counts' scores come when all of the neural ones are final
    if not chunk:
        out.each("ngram", [(0, n_targets)])
    for start in range(0, n_targets if chunk else 0, chunk or 1):
        part = [(start, min(start + chunk, n_targets))]
        out.score("ngram", part)
        out.update("ngram", part)
    return out


class StatsReader(Collector):
    """Keeps what a scorer needs of each target, then lets it score."""

    def finish(self, scorer, prepared, dist: Dist, order: Order, neural: str) -> Tensor:
        """(T,) fp64 nats of the scorer, on every rank. A collective."""
        return scorer.nats(prepared, self.merged(dist, order, neural))


class VectorReader:
    """Lets a scorer that needs whole distributions score while the neural pass has them."""

    needs_probs = True

    def __init__(self, scorer, prepared, n_targets: int):
        self.scorer, self.prepared = scorer, prepared
        self.nats = torch.zeros(n_targets, dtype=torch.float64)

    def put(self, targets: Tensor, nats: Tensor, log_probs: Tensor | None = None) -> None:
        self.nats[targets] = self.scorer.vector_nats(self.prepared, targets, log_probs).cpu()

    def state(self) -> dict:
        return {"nats": self.nats}

    def load_state(self, state: dict) -> None:
        self.nats = state["nats"]

    def finish(self, scorer, prepared, dist: Dist, order: Order, neural: str) -> Tensor:
        return dist.all_reduce_sum_(self.nats).to(dist.device)


def reader_for(scorer, prepared, n_targets: int) -> StatsReader | VectorReader:
    """What collects the scorer's needs during a neural pass."""
    if "vector" in scorer.needs:
        return VectorReader(scorer, prepared, n_targets)
    hints = prepared.hints.cpu() if "hints" in scorer.needs else None
    return StatsReader(n_targets, entropy="entropy" in scorer.needs, hints=hints)


def stats_of_hints(stats: TokenStats, hints: Tensor | None) -> TokenStats:
    """The same statistics with the hints of one scorer, out of the rows that were collected for several."""
    if hints is None:
        return replace(stats, hints=None, hint_nats=None)
    rows = [_row_of(stats, hint) for hint in hints.cpu()]
    return replace(stats, hints=stats.hints[rows], hint_nats=stats.hint_nats[rows])


def _row_of(stats: TokenStats, hint: Tensor) -> int:
    if stats.hints is not None:
        for i, row in enumerate(stats.hints):
            if torch.equal(row, hint):
                return i
    raise DataError("evaluation: these statistics lack the probabilities of hints that a scorer needs; score again")
