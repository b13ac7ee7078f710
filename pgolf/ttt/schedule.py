"""Which document is where at which time: continuous batching of documents in a fixed number of slots.

A slot that has finished its document admits the next one of the order. So a document's slot follows from the documents
before it, and the whole schedule is the same for any number of ranks: each rank owns some of the slots.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from torch import Tensor

from pgolf.eval.order import BOS, Order, document_bounds
from pgolf.eval.spans import Span
from pgolf.ttt.config import LoraConfig


class Document(NamedTuple):
    """`size` targets from `start` on, in chunks of `chunk`. Its last target is the next document's BOS."""

    start: int
    size: int
    chunk: int

    @property
    def chunks(self) -> int:
        return -(-self.size // self.chunk)


def documents(tokens: Tensor, order: Order, cfg: LoraConfig, bos: int = BOS) -> list[Document]:
    """The documents of (N,) tokens that have a target, in order. ValueError if the order is of another stream."""
    bounds = document_bounds(tokens, bos).tolist()
    numbers = range(len(bounds) - 1) if order.documents is None else order.documents.tolist()
    if len(numbers) != len(bounds) - 1:
        raise ValueError(f"order {order.name}: {len(numbers)} documents, the stream has {len(bounds) - 1}")
    last = len(tokens) - 1  # the last token is no input
    sizes = [min(end, last) - start for start, end in pairwise(bounds)]
    return [Document(bounds[d], sizes[d], cfg.chunk_of(sizes[d])) for d in numbers if sizes[d] > 0]


def admit(chunks: Sequence[int], slots: int) -> list[tuple[int, int]]:
    """(slot, first round) of each document, by how many chunks it has: the first free one, of two the lower."""
    free = [(0, slot) for slot in range(slots)]
    out = []
    for count in chunks:
        begin, slot = heapq.heappop(free)
        out.append((slot, begin))
        heapq.heappush(free, (begin + count, slot))
    return out


@dataclass(frozen=True)
class Round(Sequence):
    """The chunks that a rank scores at one time, as spans; slots ascending.

    rows: their slots, counted from the rank's first. fresh: whether the chunk is its document's first. last: whether it
    is the last, which is known when its BOS has been scored.
    """

    spans: tuple[Span, ...]
    rows: tuple[int, ...]
    fresh: tuple[bool, ...]
    last: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, i):
        return self.spans[i]


class Schedule(Sequence):
    """The rounds of the rank that owns `own`, a range of `slots` slots.

    strict: a window ends where its chunk would end if the document went on, so that no score depends on where the next
    BOS is. Otherwise as records have it: the window of a document's last chunk ends with the document, and so begins
    earlier. Rounds are made when asked for: 40 million targets in chunks of 48 are 845,000 spans.
    """

    def __init__(self, docs: Sequence[Document], slots: int, own: range, seq_len: int, strict: bool):
        self.own, self.seq_len, self.strict = own, seq_len, strict
        self.docs: list[list[Document]] = [[] for _ in own]
        self.begins: list[list[int]] = [[] for _ in own]
        self.rounds = 0
        for doc, (slot, begin) in zip(docs, admit([d.chunks for d in docs], slots), strict=True):
            if slot in own:
                self.docs[slot - own.start].append(doc)
                self.begins[slot - own.start].append(begin)
                self.rounds = max(self.rounds, begin + doc.chunks)

    def __len__(self) -> int:
        return self.rounds

    def __getitem__(self, number: int) -> Round:
        if not 0 <= number < self.rounds:
            raise IndexError(f"round {number} of {self.rounds}")
        return Round(*zip(*self._active(number), strict=True))

    def _active(self, number: int) -> Iterator[tuple[Span, int, bool, bool]]:
        for row, (docs, begins) in enumerate(zip(self.docs, self.begins, strict=True)):
            k = bisect_right(begins, number) - 1
            if k >= 0 and (i := number - begins[k]) < docs[k].chunks:
                yield self.span(docs[k], i), row, i == 0, i + 1 == docs[k].chunks

    def span(self, doc: Document, i: int) -> Span:
        """Chunk i of a document in its window."""
        whole = (i + 1) * doc.chunk
        end = min(whole, doc.size)
        start = max(0, (whole if self.strict else end) - self.seq_len)
        return Span(doc.start + start, doc.start + end, doc.start + i * doc.chunk)
