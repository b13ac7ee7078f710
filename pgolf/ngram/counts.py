"""Exact counts before each target of a stream, an order at a time: what all n-gram scorers are made of.

Target i is token i + 1. Its context of order n is the n tokens before it, and it has one if the document *of its last
token* reaches back that far. The target takes no part in that: would its own document count, a target that is BOS
would have no context where any other has one, and which formula applies would tell what the target is.

Counts see the targets that are scored before i: all of them, or with chunk = C those of earlier chunks of C targets. In
an `Order` that moves documents, contexts, chunks and "before" are those of the moved stream (`Order.permuted`).

Memory, bytes a target: 4 the stream, 4 the targets (20 more with moved documents); 8 keys, about 150 while an order is
counted (`kernels/_ngram_count.py`), 20 for its five counts. With keep=True the counts of every order asked for stay:
8 orders of 62 M targets are 9.9 GB; without, 1.2 GB, and asking again counts again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.eval.order import BOS, STREAM, Order
from pgolf.kernels._ngram_count import run_starts
from pgolf.kernels.ngram_hash import NO_CONTEXT, Counts, count_before, document_starts, ngram_hash

KEEP_BYTES = 2**32  # counts are kept between calls up to here
ROW_MULTIPLIER = 0x9E3779B97F4A7C15 - 2**64  # Fibonacci hashing, of the context's key to a row


class Continuation(NamedTuple):
    """Counts of Kneser and Ney's lower orders, (T,) int32 each; the fields that interpolation reads."""

    context_count: Tensor
    pair_count: Tensor
    distinct: Tensor


class StreamCounts:
    """Counts of one stream in one order of scoring; `of(n)` gives those of order n, by target.

    sequence: (T,) int64, the target that is scored k-th; None in stream order.
    """

    def __init__(
        self,
        tokens: Tensor,
        order: Order = STREAM,
        *,
        within_documents: bool = True,
        chunk: int = 0,
        row_bits: int = 0,
        keep: bool | None = None,
    ):
        """tokens: (N,) integers, any device, ids below 2^31. row_bits: contexts share 2^row_bits rows; 0 = exact.

        keep: whether counts stay in memory; None = as long as all together are below 4.3 GB.
        """
        stream, where = order.permuted(tokens)
        self.order, self.chunk, self.row_bits, self.keep = order, chunk, row_bits, keep
        self.n_targets, self.device = where.numel(), tokens.device
        self.stream = stream.to(torch.int32)
        self.doc_start = None
        if within_documents:
            starts = document_starts(self.stream, BOS)
            self.doc_start = torch.cat([starts[:1], starts[:-1]])  # of the last token of the context
        self.sequence = self._at = None
        if order.documents is not None:
            self._at, self.sequence = torch.sort(where)
        self.targets = self.stream[1:] if self._at is None else self.stream[self._at]  # as they are scored
        self._kept: dict[int, Counts] = {}

    def keys(self, n: int) -> Tensor:
        """(T,) int64 names of the contexts of order n, as targets are scored; NO_CONTEXT where there is none."""
        keys = ngram_hash(self.stream, n, doc_start=self.doc_start)
        keys = keys[1:] if self._at is None else keys[self._at]
        if self.row_bits:
            row = (keys * ROW_MULTIPLIER >> (64 - self.row_bits)) & (2**self.row_bits - 1)
            keys = torch.where(keys == NO_CONTEXT, NO_CONTEXT, row)
        return keys

    def of(self, n: int) -> Counts:
        """Counts of order n before each target, (T,) int32 each, by target."""
        if n not in self._kept:
            counts = self.by_target(count_before(self.keys(n), self.targets, chunk=self.chunk))
            keep = 20 * self.n_targets * (len(self._kept) + 1) <= KEEP_BYTES if self.keep is None else self.keep
            if not keep:
                return counts
            self._kept[n] = counts
        return self._kept[n]

    def continuation(self, n: int, longer: int | None) -> Counts | Continuation:
        """The same with Kneser and Ney's counts: order n takes in a target that is new after its context of `longer`.

        Or that has no such context. longer: the next order in use; None for the longest, whose counts are plain.
        The first time a pair occurs it is new after any longer context too, so `distinct` is that of plain counts.
        """
        if longer is None:
            return self.of(n)
        first = count_before(self.keys(longer), self.targets).pair_count == 0
        found = weighted_before(self.keys(n), self.targets, first, self.chunk)
        return Continuation(*self.by_target(found), self.of(n).distinct)

    def by_target(self, counts):
        """A tuple of (T,) tensors as targets are scored -> the same by target, contiguous."""
        if self.sequence is None:
            moved = [c.contiguous() for c in counts]
        else:
            moved = [torch.empty_like(c).scatter_(0, self.sequence, c) for c in counts]
        return type(counts)(*moved) if hasattr(counts, "_fields") else tuple(moved)

    def as_scored(self, values: Tensor) -> Tensor:
        """(..., T) by target -> as targets are scored."""
        return values if self.sequence is None else values[..., self.sequence]

    def next_tokens(self) -> Tensor:
        """(T,) int32 targets, by target."""
        return self.by_target((self.targets,))[0]


def weighted_before(keys: Tensor, targets: Tensor, inserted: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """(context_count, pair_count) int32 as `count_before`, but only positions with `inserted` are ever counted."""
    here = torch.arange(keys.numel(), device=keys.device)
    sorted_keys, order = torch.sort(keys, stable=True)
    start, weight = run_starts(sorted_keys), inserted[order].to(torch.int64)
    pairs, pair_order = torch.sort((start << 31) + targets[order], stable=True)
    out = []
    runs = ((start, order, weight, sorted_keys), (run_starts(pairs), order[pair_order], weight[pair_order], None))
    for begin, time, w, _ in runs:
        before = w.cumsum(0) - w
        now = here if not chunk else run_starts(begin * (keys.numel() // chunk + 1) + time // chunk)
        count = (before[now] - before[begin]).to(torch.int32)
        out.append(torch.empty_like(count).scatter_(0, time, count).masked_fill_(keys == NO_CONTEXT, 0))
    return out[0], out[1]
