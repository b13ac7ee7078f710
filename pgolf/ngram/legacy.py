"""UNSAFE, a negative control: the hashed n-gram scorer of earlier submissions. Its "probabilities" are none.

    order n = 2 .. 9 (n - 1 tokens and the target), the highest with C >= 2 wins: q = min(F, C) / max(C, 1)
    a_n = a_min + (a_max - a_min) sigmoid(2 (H - 3.0 + 0.25 (n - 2))),  a = clip(a_n m_n, 0, 0.95)
    p = max((1 - a) p_model + a q, 1e-12)

C and F are counters of hashed contexts and of hashed (context, target) pairs (kernels/_ngram_legacy.py), which collide
independently: what a pair is credited with is taken from no other token, so the numbers of one context sum to hundreds,
and -ln p is the length of no code. Fewer buckets look better. With 8,388,608 it reported 0.4489
bits per byte where the model alone has 1.1129; on uniform noise, which nothing compresses, it reports a fraction of the
true entropy (`python -m bench.hashed_noise`). The challenge disallowed it (PR #779).

It is here so that audits have something to fail. It is no entry of SCORERS, and `NgramConfig` refuses its name.
Chunks of 1,048,576 targets: all of one are scored, then the n-grams that lie wholly within its tokens are inserted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.eval.order import STREAM, Order
from pgolf.eval.stats import TokenStats
from pgolf.kernels._ngram_legacy import ORDERS, legacy_lookup, legacy_tables, legacy_update
from pgolf.ngram.config import UNSAFE, NgramConfig
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.scorer import Prepared, Scorer


@dataclass(frozen=True)
class LegacySettings:
    """The record's."""

    buckets: int = 8_388_608
    chunk: int = 1_048_576
    min_count: int = 2
    alpha_min: float = 0.05
    alpha_max: float = 0.60
    entropy: float = 3.0
    slope: float = 2.0
    multipliers: tuple[float, ...] = (0.3, 0.3, 0.97, 2.0, 2.0, 2.0, 2.0, 2.0)  # n = 2 .. 9
    floor: float = 1e-12
    longest: int = 9  # n of the longest n-grams


class LegacyHashed(Scorer):
    name = UNSAFE
    needs = frozenset({"entropy"})
    valid = False

    def __init__(self, cfg: NgramConfig, vocab_size: int, settings: LegacySettings | None = None):
        """Of cfg it reads nothing."""
        super().__init__(cfg, vocab_size)
        self.settings = settings or LegacySettings()

    def prepare(self, tokens: Tensor, order: Order = STREAM, counts: StreamCounts | None = None) -> Prepared:
        if order.documents is not None:
            raise ConfigError(f"ngram: {self.name} scores in stream order only, got {order.id}")
        return Prepared(counts or StreamCounts(tokens, order, keep=False))

    def mixed(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        s, stream = self.settings, prepared.counts.stream
        tables = legacy_tables(s.buckets, stream.device)
        out = []
        for start in range(0, len(stats), s.chunk):
            end = min(start + s.chunk, len(stats))
            found = legacy_lookup(tables, stream, start + 1, end + 1)
            out.append(self.chunk_nats(*found, stats.nats[start:end].double(), stats.entropy[start:end].double()))
            legacy_update(tables, stream, start, end + 1)
        return torch.cat(out)

    def chunk_nats(self, contexts: Tensor, pairs: Tensor, nats: Tensor, entropy: Tensor) -> Tensor:
        """contexts, pairs: (8, n) counters. -> (n,) fp64 of what it claims to be nats."""
        s = self.settings
        q, alpha = torch.zeros_like(nats), torch.zeros_like(nats)
        for n, m, c, f in zip(ORDERS, s.multipliers, contexts, pairs, strict=True):
            if n > s.longest:
                break
            rise = torch.sigmoid(s.slope * (entropy - s.entropy + 0.25 * (n - 2)))
            weight = ((s.alpha_min + (s.alpha_max - s.alpha_min) * rise) * m).clamp(0, 0.95)
            known = c >= s.min_count
            q = torch.where(known, torch.minimum(f, c).double() / c.clamp(min=1), q)
            alpha = torch.where(known, weight, alpha)
        return -((1 - alpha) * (-nats).exp() + alpha * q).clamp(min=s.floor).log()

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        """(V,) of what it reports for each token after `tokens`; does not sum to one."""
        s, n = self.settings, tokens.numel() - 1
        known = n // s.chunk * s.chunk
        tables = legacy_tables(s.buckets)
        for start in range(0, known, s.chunk):
            legacy_update(tables, tokens, start, start + s.chunk + 1)
        entropy = -torch.special.xlogy(base, base).sum()
        out = torch.empty_like(base)
        for v in range(self.vocab_size):
            stream = torch.cat([tokens[-(len(ORDERS)) :], tokens.new_tensor([v])])
            at = stream.numel() - 1
            found = legacy_lookup(tables, stream, at, at + 1)
            out[v] = self.chunk_nats(*found, -base[v : v + 1].log(), entropy[None])[0].neg().exp()
        return out
