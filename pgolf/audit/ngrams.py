"""An n-gram scorer over an evaluator as an object under audit: counts, hints and statistics by the production path.

Its vectors are `Scorer.distribution`'s, which are made from dictionaries and share no code with what scores.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pgolf import tree
from pgolf.audit.evaluators import EvaluatorScorer
from pgolf.eval.ledger import Ledger
from pgolf.eval.stats import Collector, TokenStats
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.scorer import Prepared
from pgolf.ngram.scorers import SCORERS
from pgolf.scoring import VectorReader, with_counts

# settings with which a scorer must be the model alone, to the bit
NEUTRAL: dict[str, dict[str, Any]] = {
    "entropy_gate": {"alpha_min": 0.0, "alpha_max": 0.0},
    "tilt": {"boost": 0.0},
    "geometric": {"power": 0.0},
    "hedge": {"experts": "neural"},
    "mixer": {"mixer_floor": 1.0},
}


class NgramScorer:
    """One of `pgolf.ngram.scorers.SCORERS` on top of an evaluator's statistics."""

    def __init__(self, neural: EvaluatorScorer, cfg: NgramConfig):
        """neural: with or without whole distributions; this asks for what the scorer needs."""
        self.neural, self.cfg = neural, cfg
        self.vocab_size = neural.vocab_size
        self.scorer = SCORERS[cfg.scorer](cfg, self.vocab_size)
        self.name = f"{cfg.scorer} over {neural.name}"
        told = f"{neural.config_digest} {sorted(tree.to_dict(cfg).items())}"
        self.config_digest = hashlib.sha256(told.encode()).hexdigest()
        if cfg.scorer in NEUTRAL:
            self.neutral = self._neutral

    def nats(self, tokens: Tensor) -> Tensor:
        prepared = self.scorer.prepare(tokens)
        if "vector" in self.scorer.needs:
            parts = self.neural.run(tokens, lambda: VectorReader(self.scorer, prepared, tokens.numel() - 1))[1]
            return sum(part.nats for part in parts)
        return self.scorer.nats(prepared, self.stats(tokens, prepared)).cpu()

    def stats(self, tokens: Tensor, prepared: Prepared) -> TokenStats:
        """What the neural part says of every target, with what the scorer needs."""
        hints = None if prepared.hints is None else prepared.hints.cpu()
        return self.neural.run(tokens, lambda: Collector(tokens.numel() - 1, entropy=True, hints=hints))[2]

    def distribution(self, tokens: Tensor) -> Tensor:
        base = self.neural.distribution(tokens)
        if tokens.numel() < 2:
            empty = torch.zeros((self.cfg.hints, 0))
            stats = TokenStats(empty[0], empty[0], empty.int(), empty)
        else:
            stats = self.stats(tokens, self.scorer.prepare(tokens))
        return self.scorer.distribution(tokens, stats, base)

    def ledger(self, tokens: Tensor) -> Ledger:
        """The evaluation's, and of the counts: they take in each target after its score, or a chunk of them."""
        return with_counts(self.neural.ledger(tokens), tokens.numel() - 1, self.cfg.chunk)

    def _neutral(self) -> tuple[NgramScorer, EvaluatorScorer]:
        quiet = replace(self.cfg, **NEUTRAL[self.cfg.scorer])
        return NgramScorer(self.neural, quiet), self.neural.with_vectors()

    def ranks(self, n: int) -> NgramScorer:
        return NgramScorer(self.neural.ranks(n), self.cfg)

    def warm_up(self) -> None:
        gen = torch.Generator().manual_seed(1)
        self.nats(torch.randint(0, self.vocab_size, (4 * self.neural.source.seq_len + 1,), generator=gen))

    def state_digest(self) -> str:
        return self.neural.state_digest()
