"""Each document on its own: windows that never reach across a BOS, packed into rows.

A document is what a BOS begins, up to the next BOS, which is its last target: BOS targets cost nats like any other. The
model keeps packed documents apart by `cu_seqlens`: attention, hashed n-grams and the smear gate all stop at a start.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.eval.base import Evaluator
from pgolf.eval.order import BOS, document_bounds
from pgolf.eval.spans import Span
from pgolf.eval.windowed import Windows


class DocumentWindows(Evaluator):
    """Windows of up to `seq_len` every `stride` within each document, as many as fit packed into a row.

    The first window of a document scores all its targets, each later one its last `stride`, so that with stride =
    seq_len (the default) no token is forwarded twice.
    """

    packed = True

    def __init__(self, seq_len: int, stride: int = 0, batch_tokens: int = 524288, bos: int = BOS):
        super().__init__(seq_len, batch_tokens)
        self.stride, self.bos = stride or seq_len, bos
        if not 1 <= self.stride <= seq_len:
            raise ConfigError(f"documents: seq_len={seq_len}, stride={stride}: need 1 <= stride <= seq_len, or 0")
        self.name = f"documents in windows of {seq_len}, stride {self.stride}"
        self.bounds: list[int] = []

    def start(self, tokens: Tensor, n_targets: int, neural, dist) -> None:
        self.bounds = document_bounds(tokens, self.bos).tolist()

    def spans(self, n_targets: int) -> Sequence[Span]:
        out = []
        for start, end in zip(self.bounds, self.bounds[1:], strict=False):
            size = min(end, n_targets) - start  # the last token is no input
            if size > 0:
                windows = Windows(size, self.seq_len, self.stride)
                out += [Span(start + a, start + b, start + c) for a, b, c in windows]
        return out

    def batches(self, block: Sequence[Span], rank: int, world_size: int) -> Sequence[Sequence[Span]]:
        """A contiguous share, cut where the rows are full."""
        share = block[len(block) * rank // world_size : len(block) * (rank + 1) // world_size]
        rows = max(self.batch_tokens // (world_size * self.seq_len), 1)
        out, first, row, used = [], 0, 0, 0
        for i, span in enumerate(share):
            size = span.end - span.start
            if used + size > self.seq_len:
                row, used = row + 1, 0
                if row == rows:
                    out.append(share[first:i])
                    first, row = i, 0
            used += size
        return [*out, share[first:]] if share else []
