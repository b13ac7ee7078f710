"""Interpolated back-off: P_k = direct_k(x) + backoff_k P_(k-1), shortest context first, P_0 the model.

With c(s, v) the count of v after context s of order k, c(s) = sum_v c(s, v), T(s) the number of different v:

    dirichlet    (c(s,v) + K_k P(v)) / (c(s) + K_k)
    pitman_yor   (max(c(s,v) - d_k, 0) + (t_k + d_k T(s)) P(v)) / (c(s) + t_k)
    kneser_ney   the same with counts of continuations below the longest order
    witten_bell  (c(s,v) + T(s) P(v)) / (c(s) + T(s))
    hashed_rows  dirichlet on rows that are addressed by a hash of the context alone

and P unchanged where c(s) = 0. Each sums to one because c(s) is the sum of c(s, v), so one entry of the vector may be
read alone (docs/ngram.md). Computed as the ratio R_k = P_k(x) / P_0(x), which starts at 1: without counts nats do not
change by a bit. Model nats above 700 count as 700 in 1 / P_0, which fp64 could not hold: p is then too small.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pgolf.eval.order import STREAM, Order
from pgolf.eval.stats import TokenStats
from pgolf.ngram.config import spread
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.reference import hashed_row
from pgolf.ngram.scorer import MOST_NATS, Prepared, Scorer


class Interpolated(Scorer):
    """Subclasses give `weights`; the walk over orders and the audit's vector are here."""

    def orders(self, counts: StreamCounts) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        """(index of the order, (context_count, pair_count, distinct)), shortest first."""
        for k, n in enumerate(self.cfg.orders):
            of = counts.of(n)
            yield k, (of.context_count, of.pair_count, of.distinct)

    def weights(self, k: int, c: Tensor, pair: Tensor, distinct: Tensor) -> tuple[Tensor, Tensor]:
        """(direct, backoff) of the k-th order where c > 0; all fp64."""
        raise NotImplementedError

    def mixed(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        nats = stats.nats.double()
        inverse = nats.clamp(max=MOST_NATS).exp()  # 1 / P_0
        ratio = torch.ones_like(nats)
        for k, found in self.orders(prepared.counts):
            c, pair, distinct = (x.double() for x in found)
            direct, backoff = self.weights(k, c, pair, distinct)
            ratio = torch.where(c > 0, direct * inverse + backoff * ratio, ratio)
        return nats - ratio.log()

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        counts = self.audit_counts(tokens)
        p = base
        for k, n in enumerate(self.cfg.orders):
            row = counts.row(n)
            if row:
                p = self.audit_step(k, row, p)
        return p

    def audit_counts(self, tokens: Tensor):
        return self.dict_counts(tokens)

    def audit_step(self, k: int, row: dict[int, int], lower: Tensor) -> Tensor:
        """One order's (V,) vector from its followers and the lower order's vector."""
        raise NotImplementedError


class Dirichlet(Interpolated):
    name = "dirichlet"

    def weights(self, k: int, c: Tensor, pair: Tensor, distinct: Tensor) -> tuple[Tensor, Tensor]:
        kappa = spread(self.cfg.concentration, self.cfg.orders)[k]
        return pair / (c + kappa), kappa / (c + kappa)

    def audit_step(self, k: int, row: dict[int, int], lower: Tensor) -> Tensor:
        kappa = spread(self.cfg.concentration, self.cfg.orders)[k]
        total = sum(row.values())
        return torch.stack([(row.get(v, 0) + kappa * p) / (total + kappa) for v, p in enumerate(lower)])


class HashedRows(Dirichlet):
    name = "hashed_rows"

    def stream_counts(self, tokens: Tensor, order: Order) -> StreamCounts:
        cfg = self.cfg
        how = {"within_documents": cfg.within_documents, "chunk": cfg.chunk, "row_bits": cfg.row_bits}
        return StreamCounts(tokens, order, **how)

    def prepare(self, tokens: Tensor, order: Order = STREAM, counts: StreamCounts | None = None) -> Prepared:
        """Its counts are its own: others' are of exact contexts."""
        shares = counts is not None and counts.row_bits == self.cfg.row_bits
        return Prepared(counts if shares else self.stream_counts(tokens, order))

    def audit_counts(self, tokens: Tensor):
        return self.dict_counts(tokens, row_of=hashed_row(self.cfg.row_bits))


class PitmanYor(Interpolated):
    name = "pitman_yor"

    def parameters(self, k: int) -> tuple[float, float]:
        cfg = self.cfg
        return spread(cfg.discount, cfg.orders)[k], spread(cfg.strength, cfg.orders)[k]

    def weights(self, k: int, c: Tensor, pair: Tensor, distinct: Tensor) -> tuple[Tensor, Tensor]:
        d, theta = self.parameters(k)
        return (pair - d).clamp(min=0) / (c + theta), (theta + d * distinct) / (c + theta)

    def audit_step(self, k: int, row: dict[int, int], lower: Tensor) -> Tensor:
        d, theta = self.parameters(k)
        total, backoff = sum(row.values()) + theta, theta + d * len(row)
        return torch.stack([(max(row.get(v, 0) - d, 0) + backoff * p) / total for v, p in enumerate(lower)])


class KneserNey(PitmanYor):
    name = "kneser_ney"

    def orders(self, counts: StreamCounts) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor]]]:
        longer = (*self.cfg.orders[1:], None)
        for k, (n, above) in enumerate(zip(self.cfg.orders, longer, strict=True)):
            of = counts.continuation(n, above)
            yield k, (of.context_count, of.pair_count, of.distinct)

    def audit_counts(self, tokens: Tensor):
        return self.dict_counts(tokens, continuation=True)


class WittenBell(Interpolated):
    name = "witten_bell"

    def weights(self, k: int, c: Tensor, pair: Tensor, distinct: Tensor) -> tuple[Tensor, Tensor]:
        return pair / (c + distinct), distinct / (c + distinct)

    def audit_step(self, k: int, row: dict[int, int], lower: Tensor) -> Tensor:
        total, kinds = sum(row.values()), len(row)
        return torch.stack([(row.get(v, 0) + kinds * p) / (total + kinds) for v, p in enumerate(lower)])
