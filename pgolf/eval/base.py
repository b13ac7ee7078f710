"""The one evaluation loop: score a batch of spans, meter it, only then let the evaluator learn from it.

    for block in evaluator.blocks(n_targets):       ranks meet between blocks, and learn together: adapt_block
        for spans in evaluator.batches(block):      this rank's share; what it learns here is its own: adapt
            score -> meter -> readers -> adapt

The order is in the loop and not in the evaluators, so score-before-adapt cannot be got wrong; and that each target is
scored exactly once is checked, not trusted: by marks, and by the ledger of what happened when. An early sliding window
of the challenge scored the last 64 targets 32 times over.

Positions are global: input i is token i of the split, its target is token i+1, so target i is the prediction made at
input i, and n tokens have n-1 targets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pgolf.data.batch import Batch
from pgolf.errors import DataError, PgolfError
from pgolf.eval.ledger import Interval, Ledger
from pgolf.eval.meter import Meter
from pgolf.eval.order import STREAM, Order
from pgolf.eval.spans import Span, SpanBatch, Widest, gather

if TYPE_CHECKING:
    from pgolf.dist import Dist
    from pgolf.eval.keep import Keeper

# ids, targets of any one shape -> bytes per target, int64, same shape
ByteCounts = Callable[[Tensor, Tensor], Tensor]


class CoverageError(PgolfError, AssertionError):
    """An evaluator left a target out, scored it twice or learned from it early: a defect; its score means nothing."""


class Scores(Protocol):
    """What gives probabilities: `pgolf.eval.neural.Neural`."""

    def nats(self, batch: Batch, index: Tensor) -> Tensor: ...

    def log_probs(self, batch: Batch, index: Tensor) -> Tensor: ...


class Reader(Protocol):
    """What is told of every score: `pgolf.eval.stats.Collector`."""

    needs_probs: bool

    def put(self, targets: Tensor, nats: Tensor, log_probs: Tensor | None = None) -> None: ...

    def state(self) -> dict: ...

    def load_state(self, state: dict) -> None: ...


@dataclass(frozen=True)
class EvalResult:
    """Scores over `targets` targets; the same on every rank."""

    name: str
    val_loss: float  # nats per target
    val_bpb: float  # bits per byte
    targets: int
    bytes: int
    seconds: float
    tokens_forwarded: int  # over all ranks, padding included; without what adapting forwards
    subset: str  # "all 62,021,632 targets of the val split"
    order: str = "stream"
    ledger: Ledger | None = None  # of all ranks


class Evaluator:
    """Which spans there are and how they are scored. Windows subclass `spans`; adapting evaluators also the rest."""

    name = "evaluator"
    component = "neural"  # its name in ledgers
    packed = False  # several spans a row, kept apart by cu_seqlens
    learns_together = False  # adapt_block does something
    least_rows = 1  # of every batch; `start` may set it

    def __init__(self, seq_len: int, batch_tokens: int = 524288, order: Order = STREAM):
        """seq_len: T of every row. batch_tokens: tokens forwarded at a time, over all ranks together."""
        self.seq_len, self.batch_tokens, self.order = seq_len, batch_tokens, order

    def start(self, tokens: Tensor, n_targets: int, neural: Scores, dist: Dist) -> None:
        """Before the first block of an evaluation. tokens: (n_targets + 1,) int64 on the CPU."""

    def finish(self) -> None:
        """After the last block, or a failure: takes back what `start` has changed in the model."""

    def covered(self, n_targets: int) -> int:
        """How many of the first targets the spans cover: all of them unless a subclass cuts the tail off."""
        return n_targets

    def spans(self, n_targets: int) -> Sequence[Span]:
        """All spans, in stream order; each of the `covered(n_targets)` first targets scored in exactly one."""
        raise NotImplementedError

    def blocks(self, n_targets: int) -> Sequence[Sequence[Span]]:
        """All spans, cut where ranks meet to learn."""
        return (self.spans(n_targets),)

    def batches(self, block: Sequence[Span], rank: int, world_size: int) -> Sequence[Sequence[Span]]:
        """A rank's share of a block as batches: contiguous, the fewest that fit, of nearly equal size."""
        share = block[len(block) * rank // world_size : len(block) * (rank + 1) // world_size]
        most = max(self.batch_tokens // (world_size * self.seq_len), 1)
        rows = max(-(-len(share) // max(-(-len(share) // most), 1)), 1)
        return [share[first : first + rows] for first in range(0, len(share), rows)]

    def places(self, spans: Sequence[Span]) -> Sequence[tuple[int, int]] | None:
        """(row, first column) of each span of a batch, rows ascending; None = one after the other."""
        return None

    def score(self, batch: SpanBatch, neural: Scores) -> Tensor:
        """Nats fp32 of the batch's index, padding included. Sees no state that later targets have touched."""
        return neural.nats(batch.batch, batch.index)

    def log_probs(self, batch: SpanBatch, neural: Scores) -> Tensor:
        """The same distributions in full: (n, V) fp32."""
        return neural.log_probs(batch.batch, batch.index)

    def adapt(self, batch: SpanBatch, neural: Scores) -> Sequence[Interval]:
        """Learns, on this rank alone, from a batch whose scores are final. Returns the targets it has learned from."""
        return ()

    def adapt_block(self, number: int, neural: Scores) -> Sequence[Interval]:
        """Learns, with all ranks, from block `number`, whose scores are final. Returns as `adapt` does."""
        return ()

    def state(self) -> dict[str, Any]:
        """What `adapt` and `adapt_block` have changed so far, as tensors and plain values; for a saved evaluation."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """The inverse of `state`, after `start`."""


def evaluate(
    evaluator: Evaluator,
    neural: Scores,
    tokens: np.ndarray | Tensor,
    byte_counts: ByteCounts,
    dist: Dist,
    *,
    val_bytes: Tensor | None = None,
    readers: Sequence[Reader] = (),
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[int, int], None] | None = None,
    limit_tokens: int = 0,
    keep: Keeper | None = None,
) -> EvalResult:
    """Scores the val split `tokens` (1-D, any integer dtype, on the CPU; a memory map will do).

    byte_counts: `pgolf.data.tokenizer`'s table. val_bytes: (N,) bytes of each token where a sidecar gives them; they
    win. readers: are told of every score. limit_tokens: score only the first n targets, 0 = all; the result names the
    subset. progress(done, all): rounds of batches of this rank, after each. watch(done, all): the same on all ranks; it
    may use collectives, and ends the evaluation by raising on all ranks. keep: saves what is done, and goes on from it.
    Every rank must call this. Raises CoverageError, DataError, NumericalError.
    """
    began = time.monotonic()
    stream = tokens.cpu().numpy() if isinstance(tokens, Tensor) else np.asarray(tokens)
    total = len(stream) - 1
    n_targets = evaluator.covered(min(limit_tokens, total) if limit_tokens else total)
    if n_targets < 1:
        raise DataError(
            f"evaluation ({evaluator.name}): {len(stream)} tokens leave no target to score, expected at least 2 tokens"
            " (and one whole window in truncated mode): use a longer val split or a smaller eval.seq_len"
        )
    run = _Run(evaluator, neural, stream[: n_targets + 1], byte_counts, dist, val_bytes, readers)
    try:
        evaluator.start(torch.from_numpy(run.stream.astype(np.int64)), n_targets, neural, dist)
        run.go(progress, watch, keep)
    finally:
        evaluator.finish()
    result = run.result(total, began)
    if keep:
        keep.done()
    return result


@dataclass
class _Run:
    """An evaluation under way."""

    evaluator: Evaluator
    neural: Scores
    stream: np.ndarray  # n targets + 1 tokens
    byte_counts: ByteCounts
    dist: Dist
    val_bytes: Tensor | None
    readers: Sequence[Reader]
    forwarded: int = 0
    seconds_before: float = 0.0  # of earlier processes
    widest: Widest = field(default_factory=Widest)

    def __post_init__(self):
        self.n_targets = len(self.stream) - 1
        self.meter = Meter(self.dist.device)
        self.seen = torch.zeros(self.n_targets, dtype=torch.uint8)
        self.ledger = Ledger(self.dist.rank, self.evaluator.order)

    def go(self, progress: Callable | None, watch: Callable | None, keep: Keeper | None) -> None:
        """All blocks, or what is left of them."""
        ev, world = self.evaluator, self.dist.world_size
        blocks = ev.blocks(self.n_targets)
        rounds = [max(len(ev.batches(block, rank, world)) for rank in range(world)) for block in blocks]
        done_before = self.load_state(keep.load()) if keep else 0
        done, all_rounds = 0, sum(rounds)
        for number, (block, count) in enumerate(zip(blocks, rounds, strict=True)):
            if done + count <= done_before:
                done += count  # was saved with all that it has taught
                continue
            batches = ev.batches(block, self.dist.rank, world)
            for i in range(count):
                done += 1
                if done <= done_before:
                    continue
                if i < len(batches):
                    self.one(batches[i])
                if i + 1 == count and ev.learns_together:
                    self.learn(number)
                if progress:
                    progress(done, all_rounds)
                if watch:
                    watch(done, all_rounds)
                if keep and done < all_rounds:
                    keep.maybe(done, self.state)

    def one(self, spans: Sequence[Span]) -> None:
        """Score -> meter -> readers -> adapt."""
        ev = self.evaluator
        self.widest.rows = max(self.widest.rows, ev.least_rows)
        part = gather(
            self.stream, spans, ev.seq_len, self.dist.device,
            packed=ev.packed, widest=self.widest, places=ev.places(spans),
        )  # fmt: skip
        probs = None
        with torch.no_grad():  # not inference_mode: its tensors could never be trained on by adapt()
            if any(r.needs_probs for r in self.readers):
                probs = ev.log_probs(part, self.neural)[: part.counted]
                nats = -probs.gather(-1, part.of_scored(part.batch.targets)[:, None])[:, 0]
            else:
                nats = ev.score(part, self.neural)[: part.counted]
            self.meter.add(nats, self._bytes(part))
            for reader in self.readers:
                reader.put(part.scored, nats, probs)
        marks = self.seen.numpy()
        for start, end in part.intervals:
            marks[start:end] += 1
        self.ledger.score(ev.component, part.intervals)
        self.ledger.update(ev.component, ev.adapt(part, self.neural))
        self.forwarded += part.batch.ids.numel()

    def learn(self, number: int) -> None:
        """All ranks have scored the block; now they learn from it."""
        self.dist.barrier()
        self.ledger.barrier()
        self.ledger.update(self.evaluator.component, self.evaluator.adapt_block(number, self.neural))

    def _bytes(self, part: SpanBatch) -> Tensor:
        if self.val_bytes is not None:
            return self.val_bytes[part.scored + 1].to(self.dist.device, torch.int64)
        return self.byte_counts(part.of_scored(part.batch.ids), part.of_scored(part.batch.targets))

    def state(self) -> dict[str, Any]:
        """All that a process needs to go on behind the last round."""
        return {
            "meter": self.meter.state(), "seen": self.seen, "ledger": self.ledger.rows(), "epoch": self.ledger.epoch,
            "forwarded": self.forwarded, "widest": asdict(self.widest), "evaluator": self.evaluator.state(),
            "readers": [reader.state() for reader in self.readers],
        }  # fmt: skip

    def load_state(self, saved: tuple[int, float, dict[str, Any]] | None) -> int:
        """Takes over what `state` has saved; returns the rounds that are done."""
        if saved is None:
            return 0
        done, self.seconds_before, state = saved
        self.meter.load_state(state["meter"])
        self.seen, self.forwarded, self.widest = state["seen"], state["forwarded"], Widest(**state["widest"])
        self.ledger = Ledger.from_rows(state["ledger"], self.dist.rank)
        self.ledger.order, self.ledger.epoch = self.evaluator.order.id, state["epoch"]
        self.evaluator.load_state(state["evaluator"])
        for reader, own in zip(self.readers, state["readers"], strict=True):
            reader.load_state(own)
        return done

    def result(self, total: int, began: float) -> EvalResult:
        """Joins the ranks' sums and checks that they are of every target."""
        name, dist, n = self.evaluator.name, self.dist, self.n_targets
        self.meter.all_reduce(dist)
        _check_coverage(name, self.seen, self.meter.targets, dist)
        ledger = self.ledger.merged(dist)
        if problems := ledger.problems(n):
            raise CoverageError(f"evaluation ({name}): " + "\n".join(problems))
        forwarded = int(dist.all_reduce_sum_(torch.tensor(self.forwarded)))
        of = "all" if n == total else f"first {n:,} of"
        return EvalResult(
            name, self.meter.val_loss, self.meter.bpb, self.meter.targets, self.meter.bytes,
            time.monotonic() - began + self.seconds_before, forwarded, f"{of} {total:,} targets of the val split",
            self.evaluator.order.id, ledger,
        )  # fmt: skip


def _check_coverage(name: str, seen: Tensor, scored: int, dist: Dist) -> None:
    """Each target once, over all ranks. uint8 counts wrap at 256; the number of scored targets shows that."""
    dist.all_reduce_sum_(seen)
    missed, again = int((seen == 0).sum()), int((seen > 1).sum())
    if missed or again or scored != seen.numel():
        raise CoverageError(
            f"evaluation ({name}): {scored:,} scores for {seen.numel():,} targets; {missed:,} targets were left out and"
            f" {again:,} scored more than once.\nEach must be scored exactly once: the evaluator's spans() are wrong."
        )
