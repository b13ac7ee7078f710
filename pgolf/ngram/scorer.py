"""What an n-gram scorer is, and the two helpers that all share.

    scorer = SCORERS[cfg.scorer](cfg, vocab_size)
    prepared = scorer.prepare(tokens, order)                          counts, hints; from tokens alone
    nats = scorer.nats(prepared, stats)                               (T,) fp64, every target, target-only
    nats = scorer.vector_nats(prepared, index, log_probs)             instead, where "vector" is in scorer.needs
    probs = scorer.distribution(tokens, stats, base)                  (V,) fp64 of the token after `tokens`

The last is the audit's path: whole vectors from dictionaries (`reference.py`), one position at a time, no code shared
with the others but the settings. What a scorer reads of the model is in `needs`: "entropy" and "hints" (p of the tokens
`prepared.hints`) of `TokenStats`, "vector" whole distributions. Where a setting or an empty table leaves nothing to
mix in, nats are those of the model, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pgolf.errors import DataError
from pgolf.eval.order import STREAM, Order, same
from pgolf.eval.stats import TokenStats
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.reference import DictCounts

MOST_NATS = 700.0  # e^700 is within fp64


@dataclass
class Prepared:
    """What tokens alone say. hints: (K, T) int32 tokens whose probability the model is to give, -1 where none."""

    counts: StreamCounts
    hints: Tensor | None = None
    parts: dict[str, Any] = field(default_factory=dict)  # a scorer's own


class Scorer:
    """Base; by itself it is the model alone."""

    name = "neural"
    needs: frozenset[str] = frozenset()
    valid = True  # whether it is a probability distribution, and causal

    def __init__(self, cfg: NgramConfig, vocab_size: int):
        self.cfg, self.vocab_size = cfg, vocab_size

    def stream_counts(self, tokens: Tensor, order: Order) -> StreamCounts:
        return StreamCounts(tokens, order, within_documents=self.cfg.within_documents, chunk=self.cfg.chunk)

    def prepare(self, tokens: Tensor, order: Order = STREAM, counts: StreamCounts | None = None) -> Prepared:
        """tokens: (N,) integers. counts: of the same tokens, order and settings, to share them between scorers."""
        return Prepared(counts or self.stream_counts(tokens, order))

    def nats(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        """(T,) fp64 on the counts' device. Raises DataError, ConfigError where stats do not fit."""
        return self.mixed(prepared, self.checked(prepared, stats))

    def mixed(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        """`nats`, with stats checked and on the counts' device."""
        return stats.nats.double()

    def vector_nats(self, prepared: Prepared, index: Tensor, log_probs: Tensor) -> Tensor:
        """index: (n,) int64 targets. log_probs: (n, V). -> (n,) fp64, inside the neural pass."""
        raise NotImplementedError(f"{self.name} needs no vectors")

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        """tokens: (N,) prefix. stats: of its N - 1 targets. base: (V,) fp64, the model's next. -> (V,) fp64."""
        return base

    def checked(self, prepared: Prepared, stats: TokenStats) -> TokenStats:
        """stats on the counts' device."""
        counts = prepared.counts
        same(counts.order, stats.order)
        if len(stats) != counts.n_targets:
            raise DataError(f"ngram: statistics of {len(stats):,} targets, the stream has {counts.n_targets:,}")
        missing = [n for n in ("entropy", "hints") if n in self.needs and getattr(stats, n) is None]
        if missing:
            raise DataError(
                f"ngram: scorer {self.name} needs {' and '.join(missing)}, which the neural pass did not keep"
            )
        if "hints" in self.needs and not torch.equal(stats.hints.cpu(), prepared.hints.cpu()):
            raise DataError("ngram: statistics are of other hints than these settings give; score with the model again")
        move = lambda x: None if x is None else x.to(counts.device)
        moved = map(move, (stats.nats, stats.entropy, stats.hints, stats.hint_nats))
        return TokenStats(*moved, stats.order, stats.neural)

    def dict_counts(self, tokens: Tensor, orders: tuple[int, ...] | None = None, **kwargs) -> DictCounts:
        """The audit's counts before the token after `tokens`."""
        how = {"within_documents": self.cfg.within_documents, "chunk": self.cfg.chunk} | kwargs
        return DictCounts(tokens.tolist(), self.cfg.orders if orders is None else orders, **how)


def mix(nats: Tensor, q: Tensor, weight: Tensor) -> Tensor:
    """-ln((1 - weight) e^-nats + weight q), exactly `nats` where weight is 0. All fp64, one shape; q in [0, 1]."""
    return -torch.logaddexp(torch.log1p(-weight) - nats, weight.log() + q.log())


def entropy_of(base: Tensor) -> Tensor:
    """Nats, fp32 as `TokenStats` has them, of a (V,) distribution."""
    return -torch.special.xlogy(base, base).sum().float()
