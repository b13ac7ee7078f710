"""The closed form, its optimum, hint oracles and the calibration."""

import math
from dataclasses import replace

import pytest
import torch
from ngram_streams import model, production, stats_of, stream

from pgolf.eval.order import BOS
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.scorers import SCORERS
from pgolf.ngram.tilt import MOST_BOOST, calibrated_boost, tilted

LOOSE = NgramConfig(hint_orders=(1, 2, 4), hint_share=(0.4,), hint_count=(1,))


def gathered(base: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return -base.log().T.gather(0, at.clamp(min=0))


@pytest.mark.parametrize("k", [1, 2, 4])
def test_closed_form_equals_explicit_renormalisation(k):
    base, draw = model(50, 7, 3), torch.Generator().manual_seed(k)
    hints = torch.stack([torch.randperm(7, generator=draw)[:k] for _ in range(50)], 1)
    hints[:, ::5] = -1
    targets, boosts = torch.randint(0, 7, (50,), generator=draw), 5 * torch.rand(k, 50, generator=draw)
    got = tilted(gathered(base, targets[None])[0], targets, hints, gathered(base, hints), boosts)
    for i in range(50):
        logits = base[i].log()
        for hint, boost in zip(hints[:, i].tolist(), boosts[:, i].tolist(), strict=True):
            if hint >= 0:
                logits[hint] += boost
        assert abs(got[i] + logits.log_softmax(0)[targets[i]]) < 1e-12


def test_boost_zero_changes_no_bit():
    base, targets = model(50, 7, 3), stream(50, 7, 1)
    nats = gathered(base, targets[None])[0].float()
    hints = stream(50, 7, 2)[None]
    assert torch.equal(tilted(nats, targets, hints, gathered(base, hints), torch.zeros(1, 50)), nats.double())
    assert torch.equal(tilted(nats, targets, hints * 0 - 1, hints * 0.0, torch.full((1, 50), 9.0)), nats.double())


def test_the_same_hint_twice_is_refused():
    hints = torch.tensor([[3, 4, -1], [2, 4, -1]])
    args = torch.zeros(3), torch.zeros(3), hints, torch.ones(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match="the same hint twice"):
        tilted(*args)
    tilted(*args[:2], torch.tensor([[3, 4, -1], [2, 1, -1]]), *args[3:])  # no hint may occur twice


def test_the_best_boost_gives_the_hint_its_rate():
    """p'(h) = pi; and no other boost has a lower expected loss."""
    for p, rate in ((0.1, 0.7), (0.5, 0.9), (0.02, 0.3)):
        boost = calibrated_boost(*torch.tensor([rate, p], dtype=torch.float64)).item()
        loss = lambda b, p=p, rate=rate: math.log1p(p * math.expm1(b)) - rate * b
        z = 1 + p * math.expm1(boost)
        assert abs(p * math.exp(boost) / z - rate) < 1e-12
        assert all(loss(boost) < loss(boost + d) for d in (-0.1, 0.1, 1.0))
    assert calibrated_boost(torch.tensor(0.3), torch.tensor(0.9)) == 0  # never lowers a hint
    assert calibrated_boost(torch.tensor(0.999), torch.tensor(1e-9)) == MOST_BOOST


def test_thresholds_of_the_oracle():
    """After (2, 3) came 5, 5, 6: share 2/3, count 2."""
    tokens = torch.tensor([9, 2, 3, 5, 2, 3, 5, 2, 3, 6, 2, 3, 7])
    fires = {}
    for share in (0.66, 0.67):
        for count in (2, 3):
            cfg = replace(LOOSE, hint_orders=(2,), hint_share=(share,), hint_count=(count,))
            fires[share, count] = SCORERS["tilt"](cfg, 10).prepare(tokens).hints[0, 11].item()
    assert fires == {(0.66, 2): 5, (0.67, 2): -1, (0.66, 3): -1, (0.67, 3): -1}


def test_the_longest_context_comes_first_and_hints_differ():
    #          after 3: 5 5 5; after (4, 3): 6; after (8, 4, 3): 5
    tokens = torch.tensor([3, 5, 3, 5, 9, 4, 3, 6, 9, 4, 3, 6, 8, 4, 3, 5, 7, 8, 4, 3, 2])
    cfg = replace(LOOSE, hint_orders=(1, 2, 3), hints=3)
    prepared = SCORERS["tilt"](cfg, 10).prepare(tokens)
    assert prepared.hints[:, 19].tolist() == [5, 6, -1]
    torch.testing.assert_close(prepared.parts["share"][:, 19], torch.tensor([1.0, 2 / 3, 0.0]))
    one = SCORERS["tilt"](replace(cfg, hints=1), 10).prepare(tokens)
    assert torch.equal(one.hints, prepared.hints[:1])


def test_boosts_follow_share_and_slope():
    tokens, base = stream(200, 4, 6), model(200, 4, 6)
    for by_share, slope in ((True, 0.0), (False, 0.0), (True, 2.0), (False, 1.0)):
        cfg = replace(LOOSE, boost=2.625, boost_by_share=by_share, boost_slope=slope)
        tilt = SCORERS["tilt"](cfg, 4)
        prepared = tilt.prepare(tokens)
        stats = stats_of(tokens, base, prepared.hints)
        share = prepared.parts["share"].double() if by_share else 1.0
        want = 2.625 * share * (1 - (-stats.hint_nats.double()).exp()) ** slope
        at = prepared.hints >= 0
        torch.testing.assert_close(tilt.boosts(prepared, stats)[at], (want * torch.ones_like(stats.hint_nats))[at])


def test_hits_of_the_calibration_are_those_before():
    """One bin: every hint of order 1 has share 1 and the same p. Its tally is a running count, prior included."""
    tokens = torch.tensor([BOS, 5, 5, 5, 5, 5, 5, 5])
    base = torch.full((8, 8), 1 / 8, dtype=torch.float64)
    cfg = replace(LOOSE, hint_orders=(1,), prior_hits=1.0, prior_misses=3.0)
    scorer = SCORERS["calibrated_tilt"](cfg, 8)
    prepared = scorer.prepare(tokens)
    assert prepared.hints[0].tolist() == [-1, -1, 5, 5, 5, 5, 5]
    boosts = scorer.boosts(prepared, stats_of(tokens, base, prepared.hints))[0].tolist()
    # bins by doublings of the context count: targets 2 | 3, 4 | 5, 6 (counts 1 | 2, 3 | 4, 5)
    for i, hits in ((2, 0), (3, 0), (4, 1), (5, 0), (6, 1)):
        rate = (1 + hits) / (4 + hits)
        want = min(max(math.log(rate / (1 - rate)) - math.log(1 / 7), 0), MOST_BOOST)
        assert abs(boosts[i] - want) < 1e-6, i


def test_calibration_beats_a_constant_boost_where_hints_are_bad():
    """On noise a boost costs; the calibrated one learns to stay away."""
    tokens, base = stream(3000, 16, 3), torch.full((3000, 16), 1 / 16, dtype=torch.float64)
    cost = {
        n: production(SCORERS[n](LOOSE, 16), tokens, base)[0].mean() - math.log(16) for n in ("tilt", "calibrated_tilt")
    }
    assert 0 <= cost["calibrated_tilt"] < 0.5 * cost["tilt"]
