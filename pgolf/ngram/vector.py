"""Scorers whose normaliser runs over the vocabulary: they need the model's whole distribution, inside the neural pass.

    ppm_c      symbols seen after the longest context: c(s,v) / (c + T); else escape with T / (c + T) to the next
               shorter one, where tokens that were seen before are excluded from c and T; at last to the model,
               renormalised over what is left. If every token is seen there is no escape.
    geometric  p0(v)^(1-b) P(v)^b / Z, P the recursive Dirichlet on p0, b = power. Z needs every v.

Memory for n targets at a time: n V 8 bytes an order for counts and a few more of that size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.eval.order import STREAM, Order
from pgolf.eval.stats import TokenStats
from pgolf.ngram.config import spread
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.rows import CountRows
from pgolf.ngram.scorer import Prepared, Scorer


class VectorScorer(Scorer):
    needs = frozenset({"vector"})

    def prepare(self, tokens: Tensor, order: Order = STREAM, counts: StreamCounts | None = None) -> Prepared:
        prepared = super().prepare(tokens, order, counts)
        prepared.parts["rows"] = [CountRows(prepared.counts, n) for n in self.cfg.orders]
        sequence = prepared.counts.sequence
        prepared.parts["scored_at"] = None if sequence is None else torch.argsort(sequence)
        return prepared

    def mixed(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        raise NotImplementedError(f"{self.name} needs the model's whole distribution: vector_nats, in the neural pass")

    def vector_nats(self, prepared: Prepared, index: Tensor, log_probs: Tensor) -> Tensor:
        at, device = prepared.parts["scored_at"], prepared.counts.device
        index, log_probs = index.to(device), log_probs.to(device).double()
        at = index if at is None else at[index]
        rows = [rows.before(at, self.vocab_size) for rows in prepared.parts["rows"]]
        target = prepared.counts.targets[at].to(torch.int64)[:, None]
        known = torch.stack([(counts > 0).any(-1) for counts in rows]).any(0)
        found = self.vector_log_probs(rows, log_probs)
        return -torch.where(known[:, None], found, log_probs).gather(-1, target)[:, 0]

    def vector_log_probs(self, rows: list[Tensor], log_probs: Tensor) -> Tensor:
        """rows: of each order, shortest first, (n, V) fp64 counts. -> (n, V) fp64."""
        raise NotImplementedError


class PpmC(VectorScorer):
    name = "ppm_c"

    def vector_log_probs(self, rows: list[Tensor], log_probs: Tensor) -> Tensor:
        p = torch.zeros_like(log_probs)
        mass = p.new_ones((p.shape[0], 1))
        excluded = torch.zeros_like(p, dtype=torch.bool)
        for row in reversed(rows):
            counts = row.masked_fill(excluded, 0.0)
            seen, total = counts > 0, counts.sum(-1, keepdim=True)
            excluded |= seen
            escapes = seen.sum(-1, keepdim=True) * ~excluded.all(-1, keepdim=True)
            share = torch.where(total > 0, mass / (total + escapes), 0.0)
            p += counts * share
            mass = torch.where(total > 0, escapes * share, mass)
        rest = log_probs.exp().masked_fill(excluded, 0.0)
        left = rest.sum(-1, keepdim=True)
        return (p + mass * rest / torch.where(left > 0, left, 1.0)).log()

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        counts = self.dict_counts(tokens)
        p, mass, seen = [0.0] * self.vocab_size, 1.0, set()
        for n in reversed(self.cfg.orders):
            row = {v: c for v, c in (counts.row(n) or {}).items() if v not in seen}
            if not row:
                continue
            seen |= row.keys()
            escapes = len(row) if len(seen) < self.vocab_size else 0
            total = sum(row.values()) + escapes
            for v, c in row.items():
                p[v] = mass * c / total
            mass *= escapes / total
        left = [v for v in range(self.vocab_size) if v not in seen]
        rest = sum(base[v].item() for v in left)
        for v in left:
            p[v] = mass * base[v].item() / rest
        return torch.tensor(p, dtype=torch.float64)


class Geometric(VectorScorer):
    name = "geometric"

    def vector_log_probs(self, rows: list[Tensor], log_probs: Tensor) -> Tensor:
        power = self.cfg.power
        if power == 0:
            return log_probs
        p = log_probs.exp()
        for row, kappa in zip(rows, spread(self.cfg.concentration, self.cfg.orders), strict=True):
            total = row.sum(-1, keepdim=True)
            p = torch.where(total > 0, (row + kappa * p) / (total + kappa), p)
        bent = p.log() if power == 1 else p.log() * power + log_probs * (1 - power)
        return bent - bent.logsumexp(-1, keepdim=True)

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        counts, power = self.dict_counts(tokens), self.cfg.power
        p = base
        for n, kappa in zip(self.cfg.orders, spread(self.cfg.concentration, self.cfg.orders), strict=True):
            row = counts.row(n) or {}
            total = sum(row.values())
            p = torch.stack([(row.get(v, 0) + kappa * q) / (total + kappa) for v, q in enumerate(p)])
        bent = base ** (1 - power) * p**power
        return bent / bent.sum()
