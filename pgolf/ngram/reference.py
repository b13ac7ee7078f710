"""The same counts by dictionaries, token by token: the audit's path. Shares no code with the production path.

Slow: about 10^5 insertions a second. Counts are those before the token that would follow `tokens`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pgolf.eval.order import BOS

Row = dict[int, int]  # token: how often it followed
RowName = Callable[[tuple[int, ...]], object]
BASE, FIBONACCI = 0xD1342543DE82EF95, 0x9E3779B97F4A7C15


class DictCounts:
    """What a program knows that has scored `tokens` in stream order and inserts as the settings say.

    rows(n): the followers of the current context of order n, as {token: count}; None without such a context.
    leader(n): (token, count) of the most frequent follower, of equals the one that got there first; None if none.
    """

    def __init__(
        self, tokens: Sequence[int], orders: Sequence[int], *, within_documents: bool = True, chunk: int = 0,
        continuation: bool = False, row_of: RowName = lambda context: context,
    ):  # fmt: skip
        self.tokens, self.orders, self.within = [int(x) for x in tokens], tuple(orders), within_documents
        self.continuation, self.row_of = continuation, row_of
        self.tables: dict[int, dict[object, Row]] = {n: {} for n in orders}
        self.leaders: dict[int, dict[object, tuple[int, int]]] = {n: {} for n in orders}
        scored = len(self.tokens) - 1
        known = scored // chunk * chunk if chunk else scored
        start = 0
        for t in range(1, known + 1):
            if self.tokens[t - 1] == BOS:
                start = t - 1
            self._insert(t, start)
        for t in range(known + 1, len(self.tokens) + 1):
            if t >= 1 and self.tokens[t - 1] == BOS:
                start = t - 1
        self.start = start

    def _context(self, t: int, n: int, start: int) -> object | None:
        if t - n < (start if self.within else 0):
            return None
        return self.row_of(tuple(self.tokens[t - n : t]))

    def _insert(self, t: int, start: int) -> None:
        x, new_above = self.tokens[t], True
        for n in reversed(self.orders):
            context = self._context(t, n, start)
            if context is None:
                continue
            row = self.tables[n].setdefault(context, {})
            new_here = x not in row
            if new_above or not self.continuation:
                row[x] = row.get(x, 0) + 1
                if row[x] > self.leaders[n].get(context, (-1, 0))[1]:
                    self.leaders[n][context] = (x, row[x])
            new_above = new_here

    def row(self, n: int) -> Row | None:
        context = self._context(len(self.tokens), n, self.start)
        return None if context is None else self.tables[n].get(context, {})

    def leader(self, n: int) -> tuple[int, int] | None:
        context = self._context(len(self.tokens), n, self.start)
        return self.leaders[n].get(context)

    def vector(self, n: int, vocab_size: int) -> Tensor:
        """(V,) fp64 counts of what followed the current context; zeros without one."""
        out = torch.zeros(vocab_size, dtype=torch.float64)
        for token, count in (self.row(n) or {}).items():
            out[token] = count
        return out


def hashed_row(bits: int) -> RowName:
    """Row numbers as `StreamCounts(row_bits=bits)` has them, in Python integers."""

    def name(context: tuple[int, ...]) -> int:
        key = sum((x + 1) * BASE**i for i, x in enumerate(reversed(context))) % 2**64
        key = key - 1 if key == 2**64 - 1 else key  # that key is reserved
        return key * FIBONACCI % 2**64 >> (64 - bits)

    return name
