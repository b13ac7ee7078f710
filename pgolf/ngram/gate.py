"""entropy_gate: the longest context that occurred often enough, mixed in by how unsure the model is.

    p = (1 - a) p_model + a c(s, .) / c(s)          s: the longest context with c(s) >= min_count; a = 0 without one
    a = clip(m_n (a_min + (a_max - a_min) sigmoid(slope (H - h_n))), 0, 0.95),   h_n = gate_entropy - 0.25 (n - 1)

for a context of n tokens; H the model's entropy in nats, m_n the order's multiplier. The weight looks at the context's
count and the model only, and c(s, .) / c(s) sums to one. Gate and numbers are those of the challenge's PR #659, whose
counts, of two hashed tables, gave no distribution (`legacy.py`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgolf.eval.stats import TokenStats
from pgolf.ngram.config import NgramConfig, spread
from pgolf.ngram.scorer import Prepared, Scorer, entropy_of, mix

MOST = 0.95


def gate_weight(cfg: NgramConfig, n: int, multiplier: float, entropy: Tensor) -> Tensor:
    """The weight of an order; entropy fp64 nats, any shape."""
    middle = cfg.gate_entropy - 0.25 * (n - 1)
    rise = torch.sigmoid(cfg.gate_slope * (entropy - middle))
    return (multiplier * (cfg.alpha_min + (cfg.alpha_max - cfg.alpha_min) * rise)).clamp(0, MOST)


class EntropyGate(Scorer):
    name = "entropy_gate"
    needs = frozenset({"entropy"})

    def mixed(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        nats, entropy = stats.nats.double(), stats.entropy.double()
        q, weight = torch.zeros_like(nats), torch.zeros_like(nats)
        for n, m in zip(self.cfg.orders, spread(self.cfg.multipliers, self.cfg.orders), strict=True):
            counts = prepared.counts.of(n)
            known = counts.context_count >= self.cfg.min_count
            q = torch.where(known, counts.pair_count.double() / counts.context_count, q)
            weight = torch.where(known, gate_weight(self.cfg, n, m, entropy), weight)
        return mix(nats, q, weight)

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        cfg, counts, h = self.cfg, self.dict_counts(tokens), float(entropy_of(base))
        for n, m in reversed(list(zip(cfg.orders, spread(cfg.multipliers, cfg.orders), strict=True))):
            row = counts.row(n) or {}
            total = sum(row.values())
            if total >= cfg.min_count:
                rise = 1 / (1 + math.exp(-cfg.gate_slope * (h - cfg.gate_entropy + 0.25 * (n - 1))))
                a = min(max(m * (cfg.alpha_min + (cfg.alpha_max - cfg.alpha_min) * rise), 0.0), MOST)
                return (1 - a) * base + a * counts.vector(n, self.vocab_size) / total
        return base
