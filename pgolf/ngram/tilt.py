"""Tilts: contexts that occurred before propose a hint token h, whose logit is raised by b.

    p'(v) = p(v) e^(b [v = h]) / Z,  Z = 1 + p(h) (e^b - 1)
    several hints, all different: Z = 1 + sum_h p(h) (e^b_h - 1)
    nats' = nats - b [x = h] + ln Z

Exact, and only p(h) is needed besides p(x). The hint is a function of the prefix: the leader of the longest context
whose leader has share >= hint_share and count >= hint_count (PR #1514; PR #2135 has order 15, share 0.8, count 1 and a
fixed boost of 2.625). A gate that asks for the class of the *target* would tell a bit about it: PR #1420.

    tilt             b = boost x share of the leader x (1 - p(h))^boost_slope
    calibrated_tilt  b = logit(pi) - logit(p(h)), clipped to [0, 8], so that p'(h) = pi, the rate of hits so far among
                     hints of the same order, context count, share and decile of p(h), with prior_hits and prior_misses
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgolf.eval.order import STREAM, Order
from pgolf.eval.stats import TokenStats
from pgolf.kernels.ngram_hash import NO_CONTEXT, count_before
from pgolf.ngram.config import spread
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.reference import DictCounts
from pgolf.ngram.scorer import Prepared, Scorer

MOST_BOOST = 8.0  # of calibrated tilts: 2,981 times the odds
COUNT_BINS, SHARE_BINS, P_BINS = 6, 5, 10


def tilted(nats: Tensor, targets: Tensor, hints: Tensor, hint_nats: Tensor, boosts: Tensor) -> Tensor:
    """The formula. nats, targets: (T,). hints: (K, T) tokens, -1 = none. hint_nats, boosts: (K, T). -> (T,) fp64.

    Raises ValueError when a target has a hint twice: Z would count it twice, once with each boost.
    """
    for k in range(1, hints.shape[0]):
        if bool(((hints[:k] == hints[k]) & (hints[k] >= 0)).any()):
            raise ValueError("tilt: a target has the same hint twice, expected different hints")
    boosts = torch.where(hints >= 0, boosts.double(), 0.0)
    added = ((-hint_nats.double()).exp() * torch.expm1(boosts)).sum(0)
    return nats.double() - (boosts * (hints == targets)).sum(0) + torch.log1p(added)


def calibrated_boost(rate: Tensor, p: Tensor) -> Tensor:
    """The boost that makes p(h) = p into `rate`, within [0, MOST_BOOST]."""
    return (torch.logit(rate) - torch.logit(p)).clamp(0, MOST_BOOST)


class Tilt(Scorer):
    name = "tilt"
    needs = frozenset({"hints"})

    @property
    def most_hints(self) -> int:
        return self.cfg.hints

    def prepare(self, tokens: Tensor, order: Order = STREAM, counts: StreamCounts | None = None) -> Prepared:
        """parts: "share" (K, T) fp32, of the leaders; "level" (its order's index) and "count" of the first hint."""
        counts = counts or self.stream_counts(tokens, order)
        cfg, size = self.cfg, (self.most_hints, counts.n_targets)
        hints = torch.full(size, -1, dtype=torch.int32, device=counts.device)
        shares = torch.zeros(size, device=counts.device)
        level, total = torch.full_like(hints[0], -1), torch.zeros_like(hints[0])
        least = zip(spread(cfg.hint_share, cfg.hint_orders), spread(cfg.hint_count, cfg.hint_orders), strict=True)
        for k, (n, (least_share, least_count)) in enumerate(zip(cfg.hint_orders, least, strict=True)):
            of = counts.of(n)
            # in fp64, as a Python program divides: a share that equals its threshold must not depend on rounding
            share = of.leader_count.double() / of.context_count.clamp(min=1)
            fires = (of.leader_count >= least_count) & (share >= least_share)
            _push(hints, shares, of.leader, share.float(), fires)
            level = torch.where(fires, k, level)
            total = torch.where(fires, of.context_count, total)
        return Prepared(counts, hints, {"share": shares, "level": level, "count": total})

    def mixed(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        boosts = self.boosts(prepared, stats)
        return tilted(stats.nats, prepared.counts.next_tokens(), prepared.hints, stats.hint_nats, boosts)

    def boosts(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        """(K, T) fp64."""
        cfg = self.cfg
        boosts = torch.full_like(stats.hint_nats, cfg.boost, dtype=torch.float64)
        if cfg.boost_by_share:
            boosts = boosts * prepared.parts["share"].double()
        if cfg.boost_slope:
            boosts = boosts * (-torch.expm1(-stats.hint_nats.double())).clamp(min=0) ** cfg.boost_slope
        return boosts

    # -- audit -------------------------------------------------------------------------------------------------------

    def found(self, counts: DictCounts) -> list[tuple[int, int, int, int]]:
        """(token, index of its order, context count, leader count) of the hints, longest context first."""
        cfg, out = self.cfg, []
        shares, least = (spread(x, cfg.hint_orders) for x in (cfg.hint_share, cfg.hint_count))
        for k in reversed(range(len(cfg.hint_orders))):
            leader = counts.leader(cfg.hint_orders[k])
            if leader is None:
                continue
            (token, count), total = leader, sum(counts.row(cfg.hint_orders[k]).values())
            if count >= least[k] and count / total >= shares[k] and all(token != hint[0] for hint in out):
                out.append((token, k, total, count))
        return out[: self.most_hints]

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        logits = base.log()
        for token, _, total, count in self.found(self.dict_counts(tokens, self.cfg.hint_orders)):
            boost = self.cfg.boost * (count / total if self.cfg.boost_by_share else 1.0)
            logits[token] += boost * (1 - base[token].item()) ** self.cfg.boost_slope
        return logits.softmax(0)


def _push(hints: Tensor, shares: Tensor, token: Tensor, share: Tensor, fires: Tensor) -> None:
    """Puts a longer context's hint first, in place; the others move back up to where the same token stood."""
    moving, moving_share, active = token.clone(), share.clone(), fires.clone()
    for k in range(hints.shape[0]):
        old, old_share = hints[k].clone(), shares[k].clone()
        hints[k] = torch.where(active, moving, old)
        shares[k] = torch.where(active, moving_share, old_share)
        active = active & (old != token)
        moving, moving_share = old, old_share


class CalibratedTilt(Tilt):
    name = "calibrated_tilt"

    @property
    def most_hints(self) -> int:
        return 1

    def boosts(self, prepared: Prepared, stats: TokenStats) -> Tensor:
        """Hits of earlier hints of a bin are counts too: of the context "bin" and the followers hit and miss."""
        counts, hints = prepared.counts, prepared.hints[0]
        p = (-stats.hint_nats[0].double()).exp()
        bins = bin_of(prepared.parts["level"], prepared.parts["count"], prepared.parts["share"][0].double(), p)
        bins = torch.where(hints >= 0, bins, NO_CONTEXT)
        hit = (hints == counts.next_tokens()).to(torch.int32)
        of = count_before(counts.as_scored(bins), counts.as_scored(hit), chunk=counts.chunk)
        trials, same = counts.by_target((of.context_count, of.pair_count))
        hits = torch.where(hit > 0, same, trials - same)  # the same number whichever token follows
        rate = (hits + self.cfg.prior_hits) / (trials + self.cfg.prior_hits + self.cfg.prior_misses).double()
        return torch.where(hints >= 0, calibrated_boost(rate, p), 0.0)[None]

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        cfg, n = self.cfg, tokens.numel() - 1
        tally: dict[tuple, list[int]] = {}
        known = n // cfg.chunk * cfg.chunk if cfg.chunk else n
        for i in range(known):
            if found := self.found(self.dict_counts(tokens[: i + 1], cfg.hint_orders)):
                where = _bin(found[0], math.exp(-stats.hint_nats[0, i].item()))
                seen = tally.setdefault(where, [0, 0])
                seen[0] += 1
                seen[1] += int(found[0][0] == tokens[i + 1].item())
        found = self.found(self.dict_counts(tokens, cfg.hint_orders))
        if not found:
            return base
        token, p = found[0][0], base[found[0][0]].item()
        trials, hits = tally.get(_bin(found[0], p), [0, 0])
        rate = (hits + cfg.prior_hits) / (trials + cfg.prior_hits + cfg.prior_misses)
        room = math.log(rate / (1 - rate)) - math.log(p / (1 - p)) if p < 1 else 0.0
        boost = min(max(room, 0.0), MOST_BOOST)
        weights = base.clone()
        weights[token] *= math.exp(boost)
        return weights / weights.sum()


def bin_of(level: Tensor, count: Tensor, share: Tensor, p: Tensor) -> Tensor:
    """(T,) int64: order, log2 of the context count (1 to 6), fifths of the leader's share, tenths of p(h)."""
    doublings = count.clamp(1, 2**COUNT_BINS - 1).double().log2().floor().long()
    fifths = (share * SHARE_BINS).floor().long().clamp(max=SHARE_BINS - 1)
    tenths = (p * P_BINS).floor().long().clamp(max=P_BINS - 1)
    return ((level.long() * COUNT_BINS + doublings) * SHARE_BINS + fifths) * P_BINS + tenths


def _bin(found: tuple[int, int, int, int], p: float) -> tuple[int, int, int, int]:
    _, level, total, count = found
    doublings = min(total, 2**COUNT_BINS - 1).bit_length() - 1
    share = torch.tensor(count / total, dtype=torch.float32).item()  # as the production path keeps it
    return level, doublings, min(int(share * SHARE_BINS), SHARE_BINS - 1), min(int(p * P_BINS), P_BINS - 1)
