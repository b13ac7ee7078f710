"""The one evaluation loop: score a batch of spans, meter it, only then let the evaluator learn from it.

The order is in the loop and not in the evaluators, so score-before-adapt cannot be got wrong; and that each target is
scored exactly once is checked, not trusted. An early sliding window of the challenge scored the last 64 targets 32
times over.

Positions are global: input i is token i of the split, its target is token i+1, so target i is the prediction made at
input i, and n tokens have n-1 targets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.errors import DataError, PgolfError
from pgolf.eval.meter import Meter

if TYPE_CHECKING:
    from pgolf.dist import Dist

# ids (B, T) int64, targets (B, T) int64 -> nats per target (B, T) fp32. Autocast and compilation are its business.
NllFn = Callable[[Tensor, Tensor], Tensor]
# ids, targets of any one shape -> bytes per target, int64, same shape
ByteCounts = Callable[[Tensor, Tensor], Tensor]


class CoverageError(PgolfError, AssertionError):
    """An evaluator left a target out or scored it twice: a defect of the evaluator; its score means nothing."""


class Span(NamedTuple):
    """Inputs [start, end) are fed; the targets of inputs [score_from, end) count. start <= score_from < end."""

    start: int
    end: int
    score_from: int


@dataclass(frozen=True)
class EvalResult:
    """Scores over `targets` targets; the same on every rank."""

    name: str
    val_loss: float  # nats per target
    val_bpb: float  # bits per byte
    targets: int
    bytes: int
    seconds: float
    tokens_forwarded: int  # over all ranks, padding included
    subset: str  # "all 62,021,632 targets of the val split"


@dataclass
class SpanBatch:
    """Consecutive spans as right-padded rows.

    ids, targets: (rows, T) int64, zeros beyond a span's end; rows >= len(spans), so that all batches of a rank have
    one shape and a compiled model compiles once. index: (n,) int64 flat positions of the n scored targets, in order.
    """

    spans: Sequence[Span]
    ids: Tensor
    targets: Tensor
    index: Tensor

    def scored(self, values: Tensor) -> Tensor:
        """The scored entries, (n,), of a (rows, T) tensor."""
        return values.reshape(-1)[self.index]


class Evaluator:
    """Which spans there are and how they are scored. Windows subclass `spans`; adapting evaluators also `adapt`."""

    name = "evaluator"

    def __init__(self, seq_len: int, batch_tokens: int = 524288):
        """seq_len: T of every row. batch_tokens: tokens forwarded at a time, over all ranks together."""
        self.seq_len, self.batch_tokens = seq_len, batch_tokens

    def covered(self, n_targets: int) -> int:
        """How many of the first targets the spans cover: all of them unless a subclass cuts the tail off."""
        return n_targets

    def spans(self, n_targets: int) -> Sequence[Span]:
        """All spans, in stream order; each of the `covered(n_targets)` first targets scored in exactly one."""
        raise NotImplementedError

    def batches(self, spans: Sequence[Span], world_size: int) -> Iterator[Sequence[Span]]:
        """Splits one rank's spans into the fewest batches that fit, of nearly equal size: least padding."""
        rows = -(-len(spans) // max(self.batch_count(len(spans), world_size), 1))
        for first in range(0, len(spans), max(rows, 1)):
            yield spans[first : first + rows]

    def batch_count(self, n_spans: int, world_size: int) -> int:
        """At least as many as the batches that `batches` makes of a rank's n spans."""
        return -(-n_spans // max(self.batch_tokens // (world_size * self.seq_len), 1))

    def score(self, batch: SpanBatch, nll_fn: NllFn) -> Tensor:
        """Nats (n,) fp32 of the batch's scored targets. Sees no state that later targets have touched."""
        return batch.scored(nll_fn(batch.ids, batch.targets))

    def adapt(self, batch: SpanBatch) -> None:
        """Learns from a batch whose scores are final. Runs with gradients as the caller set them."""


def evaluate(
    evaluator: Evaluator,
    nll_fn: NllFn,
    tokens: np.ndarray | Tensor,
    byte_counts: ByteCounts,
    dist: Dist,
    *,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[int, int], None] | None = None,
    limit_tokens: int = 0,
) -> EvalResult:
    """Scores the val split `tokens` (1-D, any integer dtype, on the CPU; a memory map will do).

    byte_counts: `pgolf.data.tokenizer`'s table. limit_tokens: score only the first n targets, 0 = all; the result names
    the subset. progress(done, all): this rank's targets so far, after each batch. watch(done, all): rounds of batches
    of all ranks, the same numbers on each; it may use collectives, and ends the evaluation by raising on all ranks.
    Every rank must call this; each gets a contiguous share of the spans. Raises CoverageError, DataError,
    NumericalError.
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
    meter, seen = Meter(dist.device), torch.zeros(n_targets, dtype=torch.uint8)
    all_spans = evaluator.spans(n_targets)
    spans = _share(all_spans, dist.rank, dist.world_size)
    rounds = evaluator.batch_count(-(-len(all_spans) // dist.world_size), dist.world_size)  # of the largest share
    batches = iter(evaluator.batches(spans, dist.world_size))
    forwarded, rows = 0, 0
    for done in range(1, rounds + 1):
        if part := next(batches, None):
            rows = max(rows, len(part))
            batch = _gather(stream, part, rows, evaluator.seq_len, dist.device)
            with torch.no_grad():  # not inference_mode: its tensors could never be trained on by adapt()
                nll = evaluator.score(batch, nll_fn)
                meter.add(nll, byte_counts(batch.scored(batch.ids), batch.scored(batch.targets)))
            _mark(seen, part)
            evaluator.adapt(batch)
            forwarded += batch.ids.numel()
            if progress:
                progress(part[-1].end - spans[0].score_from, spans[-1].end - spans[0].score_from)
        if watch:
            watch(done, rounds)
    return _result(evaluator.name, meter, seen, forwarded, total, dist, began)


def _result(name: str, meter: Meter, seen: Tensor, forwarded: int, total: int, dist: Dist, began: float) -> EvalResult:
    """Joins the ranks' sums and checks that they are of every target."""
    meter.all_reduce(dist)
    _check_coverage(name, seen, meter.targets, dist)
    forwarded = int(dist.all_reduce_sum_(torch.tensor(forwarded)))
    of = "all" if len(seen) == total else f"first {len(seen):,} of"
    subset = f"{of} {total:,} targets of the val split"
    seconds = time.monotonic() - began
    return EvalResult(name, meter.val_loss, meter.bpb, meter.targets, meter.bytes, seconds, forwarded, subset)


def _share(spans: Sequence[Span], rank: int, world_size: int) -> Sequence[Span]:
    """Contiguous share [W r / R, W (r+1) / R) of W spans."""
    return spans[len(spans) * rank // world_size : len(spans) * (rank + 1) // world_size]


def _gather(stream: np.ndarray, spans: Sequence[Span], rows: int, width: int, device) -> SpanBatch:
    """Cuts the spans out of the stream. Target i is token i+1, so each row needs one token beyond its end."""
    cut = np.zeros((2, rows, width), dtype=np.int64)
    index = []
    for row, (start, end, score_from) in enumerate(spans):
        piece = stream[start : end + 1]
        cut[0, row, : end - start] = piece[:-1]
        cut[1, row, : end - start] = piece[1:]
        index.append(np.arange(row * width + score_from - start, row * width + end - start))
    ids, targets = torch.from_numpy(cut).to(device).unbind()
    return SpanBatch(spans, ids, targets, torch.from_numpy(np.concatenate(index)).to(device))


def _mark(seen: Tensor, spans: Sequence[Span]) -> None:
    counts = seen.numpy()
    for _, end, score_from in spans:
        counts[score_from:end] += 1


def _check_coverage(name: str, seen: Tensor, scored: int, dist: Dist) -> None:
    """Each target once, over all ranks. uint8 counts wrap at 256; the number of scored targets shows that."""
    dist.all_reduce_sum_(seen)
    missed, again = int((seen == 0).sum()), int((seen > 1).sum())
    if missed or again or scored != seen.numel():
        raise CoverageError(
            f"evaluation ({name}): {scored:,} scores for {seen.numel():,} targets; {missed:,} targets were left out and"
            f" {again:,} scored more than once.\nEach must be scored exactly once: the evaluator's spans() are wrong."
        )
