"""hedge: a Bayesian mixture of scorers, with fixed share.

    p_t = sum_i w_i p_i(x_t);   then   w_i <- (1 - s) w_i p_i(x_t) / p_t + s / K

s = 0: total nats are at most the best expert's + ln K, over the whole stream. s > 0 follows experts that take turns, at
about ln(K T / m) nats for each of m switches. Weights are updated after each target's score, in the order of scoring,
also where counts wait for the end of a chunk. With entropy_bins each bin, a function of the prefix (the longest known
context, the model's entropy), has weights of its own.

As a scan: unnormalised, one step is the matrix M_t = ((1 - s) I + s / K 11^T) diag(p_t), so blocks of 1,024 steps
multiply in parallel, their starts follow one after the other, and a second pass gives the weights inside all blocks at
once: some thousand tensor operations and T / 1,024 small ones. Blocks do not depend on T, so rounding tells nothing of
what comes later. With s = 0 weights are sums of nats, and it is one cumulative sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgolf.eval.order import STREAM, Order
from pgolf.eval.stats import TokenStats
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.gate import EntropyGate
from pgolf.ngram.interpolated import Dirichlet, HashedRows, KneserNey, PitmanYor, WittenBell
from pgolf.ngram.scorer import Prepared, Scorer, entropy_of
from pgolf.ngram.tilt import CalibratedTilt, Tilt

EXPERTS: dict[str, type[Scorer]] = {
    cls.name: cls
    for cls in (
        Scorer, Dirichlet, PitmanYor, KneserNey, WittenBell, HashedRows, EntropyGate, Tilt, CalibratedTilt,
    )
}  # fmt: skip


BLOCK = 1024


def hedge_nats(nats: Tensor, share: float) -> Tensor:
    """nats: (K, T) fp64 of K experts, in the order of scoring -> (T,) of the mixture."""
    if share == 0 or nats.shape[0] == 1:
        past = nats - nats[:1]  # differences alone matter, and stay small
        log_w = past - past.cumsum(1)
        log_w = log_w - log_w.logsumexp(0)
        return -(log_w - nats).logsumexp(0)
    return _scan(nats, share)


def _scan(nats: Tensor, share: float) -> Tensor:
    k, t = nats.shape
    size = max(min(BLOCK, t), 1)
    blocks = -(-t // size)
    best = nats.min(0).values
    p = (best - nats).exp()  # relative to the best expert of the step: 1 at most, and one is 1
    p = torch.cat([p, p.new_ones((k, blocks * size - t))], 1).view(k, blocks, size).permute(2, 1, 0)  # step, block, K
    product = torch.eye(k, dtype=nats.dtype, device=nats.device).repeat(blocks, 1, 1)
    for step in p if blocks > 1 else ():
        product = step[:, :, None] * product
        product = (1 - share) * product + share / k * product.sum(1, keepdim=True)
        product = product / product.amax((1, 2), keepdim=True)
    starts = [product.new_full((k,), 1 / k)]
    for block in product[:-1]:
        w = block @ starts[-1]
        starts.append(w / w.sum())
    w, out = torch.stack(starts), torch.empty_like(p[..., 0])
    for i, step in enumerate(p):
        w = w * step
        total = w.sum(1, keepdim=True)
        out[i] = total[:, 0].log()
        w = (1 - share) * w / total + share / k
    return best - out.T.flatten()[:t]


class Hedge(Scorer):
    name = "hedge"

    def __init__(self, cfg: NgramConfig, vocab_size: int):
        super().__init__(cfg, vocab_size)
        self.experts = [EXPERTS[name](cfg, vocab_size) for name in cfg.expert_names]
        self.needs = frozenset().union(*(e.needs for e in self.experts))
        if cfg.entropy_bins:
            self.needs |= {"entropy"}

    def prepare(self, tokens: Tensor, order: Order = STREAM, counts: StreamCounts | None = None) -> Prepared:
        counts = counts or self.stream_counts(tokens, order)
        parts = [e.prepare(tokens, order, counts) for e in self.experts]
        hints = [p.hints for p in parts if p.hints is not None]
        most = max(hints, key=len, default=None)  # of the one that wants most; another's are its first rows
        return Prepared(counts, most, {"experts": parts})

    def mixed(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        rows = [
            expert.mixed(part, _first_hints(stats, part))
            for expert, part in zip(self.experts, prepared.parts["experts"], strict=True)
        ]
        counts = prepared.counts
        nats, bins = counts.as_scored(torch.stack(rows)), counts.as_scored(self.bins(counts, stats))
        out = torch.empty_like(nats[0])
        for b in bins.unique():
            at = (bins == b).nonzero()[:, 0]
            out[at] = hedge_nats(nats[:, at], self.cfg.share)
        return counts.by_target((out,))[0]

    def bins(self, counts: StreamCounts, stats: TokenStats) -> Tensor:
        """(T,) int64 by target."""
        level = torch.zeros(counts.n_targets, dtype=torch.int64, device=counts.device)
        if not self.cfg.entropy_bins:
            return level
        for k, n in enumerate(self.cfg.orders):
            level = torch.where(counts.of(n).context_count > 0, k + 1, level)
        return level * self.cfg.entropy_bins + stats.entropy.long().clamp(0, self.cfg.entropy_bins - 1)

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        """Weights in a plain loop. Nats of the prefix are the experts' own production path."""
        prepared = self.prepare(tokens)
        rows = [
            expert.nats(part, _first_hints(stats, part)).tolist()
            for expert, part in zip(self.experts, prepared.parts["experts"], strict=True)
        ]
        k, share = len(rows), self.cfg.share
        weights: dict[tuple[int, int], list[float]] = {}
        for i in range(tokens.numel() - 1):
            h = 0.0 if stats.entropy is None else stats.entropy[i].item()
            w = weights.setdefault(self.audit_bin(tokens[: i + 1], h), [1 / k] * k)
            lowest = min(row[i] for row in rows)
            scores = [a * math.exp(lowest - row[i]) for a, row in zip(w, rows, strict=True)]
            w[:] = [(1 - share) * s / sum(scores) + share / k for s in scores]
        w = weights.get(self.audit_bin(tokens, float(entropy_of(base))), [1 / k] * k)
        return sum(a * e.distribution(tokens, stats, base) for a, e in zip(w, self.experts, strict=True))

    def audit_bin(self, tokens: Tensor, entropy: float) -> tuple[int, int]:
        if not self.cfg.entropy_bins:
            return 0, 0
        counts = self.dict_counts(tokens)
        known = [k + 1 for k, n in enumerate(self.cfg.orders) if counts.row(n)]
        return max(known, default=0), min(int(entropy), self.cfg.entropy_bins - 1)


def _first_hints(stats: TokenStats, part: Prepared) -> TokenStats:
    """stats with as many hints as an expert has asked for."""
    if part.hints is None:
        return stats
    k = part.hints.shape[0]
    return TokenStats(stats.nats, stats.entropy, stats.hints[:k], stats.hint_nats[:k], stats.order, stats.neural)
