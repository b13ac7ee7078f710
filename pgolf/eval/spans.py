"""Spans of a stream, and batches of them as rows of a model's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.data.batch import Batch
from pgolf.eval.ledger import Interval


class Span(NamedTuple):
    """Inputs [start, end) are fed; the targets of inputs [score_from, end) count. start <= score_from < end."""

    start: int
    end: int
    score_from: int


@dataclass
class SpanBatch:
    """Spans as right-padded rows, one or (packed) several a row.

    batch: (rows, T); zeros beyond a span's end. index: (n,) int64 flat positions of the n scored targets, in order of
    the spans, then padding: positions whose score is dropped. counted: n without the padding. scored: (counted,) int64
    CPU, the scored targets' global positions. All batches of a rank have the same rows, T and, as far as they can, n:
    a compiled model compiles once.
    """

    spans: Sequence[Span]
    batch: Batch
    index: Tensor
    counted: int
    scored: Tensor

    @property
    def intervals(self) -> list[Interval]:
        """The scored targets."""
        return [(span.score_from, span.end) for span in self.spans]

    def of_scored(self, values: Tensor) -> Tensor:
        """The scored entries, (counted,), of a (rows, T) tensor."""
        return values.flatten()[self.index[: self.counted]]


@dataclass
class Widest:
    """The largest sizes of a rank's batches so far; later ones are padded to them, so that shapes do not change."""

    rows: int = 1
    index: int = 1
    segments: int = 1


def gather(
    stream: np.ndarray,
    spans: Sequence[Span],
    width: int,
    device: torch.device,
    *,
    packed: bool,
    widest: Widest,
    places: Sequence[tuple[int, int]] | None = None,
) -> SpanBatch:
    """Cuts the spans out of the stream. Target i is token i+1, so each row needs one token beyond its end.

    places: (row, first column) of each span, rows ascending; None = where `place` puts them.
    """
    places = place(spans, width, packed) if places is None else places
    rows = widest.rows = max(widest.rows, places[-1][0] + 1)
    cut = np.zeros((2, rows, width), dtype=np.int64)
    index, scored = [], []
    for (start, end, score_from), (row, at) in zip(spans, places, strict=True):
        piece = stream[start : end + 1]
        cut[0, row, at : at + end - start] = piece[:-1]
        cut[1, row, at : at + end - start] = piece[1:]
        first = row * width + at - start
        index.append(np.arange(first + score_from, first + end))
        scored.append(np.arange(score_from, end))
    index, scored = np.concatenate(index), np.concatenate(scored)
    # packed, every batch has another number of targets, and all of its positions is the most that there can be
    widest.index = max(widest.index, rows * width if packed else len(index))
    padded = torch.from_numpy(np.pad(index, (0, widest.index - len(index))))
    ids, targets = torch.from_numpy(cut).to(device).unbind()
    starts = segments(spans, places, rows, width, widest).to(device) if packed else None
    return SpanBatch(spans, Batch(ids, targets, None, starts), padded.to(device), len(index), torch.from_numpy(scored))


def place(spans: Sequence[Span], width: int, packed: bool) -> list[tuple[int, int]]:
    """(row, first column) of each span: a row each, or (packed) in the last row while it has room."""
    if not packed:
        return [(row, 0) for row in range(len(spans))]
    out, row, used = [], 0, 0
    for span in spans:
        size = span.end - span.start
        if used + size > width:
            row, used = row + 1, 0
        out.append((row, used))
        used += size
    return out


def segments(spans: Sequence[Span], places: Sequence[tuple[int, int]], rows: int, width: int, widest: Widest) -> Tensor:
    """(n + 1,) int32 starts of the packed spans over the flattened rows; what a row has left is a segment of its own.

    Empty segments at the end pad n to a power of two, the largest so far.
    """
    starts = {row * width for row in range(rows + 1)}
    for span, (row, at) in zip(spans, places, strict=True):
        starts |= {row * width + at, row * width + at + span.end - span.start}
    found = sorted(starts)
    widest.segments = max(widest.segments, 1 << (len(found) - 2).bit_length())
    return torch.tensor(found + [rows * width] * (widest.segments + 1 - len(found)), dtype=torch.int32)
