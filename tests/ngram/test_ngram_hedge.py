"""Regret bounds, and the scan against the loop."""

import math
from dataclasses import replace

import pytest
import torch
from ngram_streams import model, production, stream

from pgolf.ngram.config import NgramConfig
from pgolf.ngram.hedge import BLOCK, hedge_nats
from pgolf.ngram.scorers import SCORERS


def loop(nats: torch.Tensor, share: float) -> list[float]:
    k = nats.shape[0]
    w, out = [1 / k] * k, []
    for column in nats.T.tolist():
        lowest = min(column)
        scores = [a * math.exp(lowest - x) for a, x in zip(w, column, strict=True)]
        out.append(lowest - math.log(sum(scores)))
        w = [(1 - share) * s / sum(scores) + share / k for s in scores]
    return out


def draws(k: int, t: int, seed: int, sharp: float = 1.0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return sharp * torch.rand(k, t, generator=draw, dtype=torch.float64) ** 3 * 12


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("t", [1, 3, BLOCK, 2 * BLOCK + 37])
@pytest.mark.parametrize("share", [0.0, 1e-9, 1e-3, 0.5])
def test_scan_equals_the_loop(k, t, share):
    nats = draws(k, t, t + k)
    torch.testing.assert_close(
        hedge_nats(nats, share), torch.tensor(loop(nats, share), dtype=torch.float64), rtol=1e-10, atol=1e-10
    )


def adversaries() -> dict[str, torch.Tensor]:
    t = 4000
    here = torch.arange(t)
    alternating = torch.stack([(here + i) % 3 == 0 for i in range(3)]).double() * 20
    blocks = torch.stack([(here // 500) % 2 == i for i in range(2)]).double() * 9
    worse_for_the_leader = torch.zeros(3, t, dtype=torch.float64)
    total = torch.zeros(3, dtype=torch.float64)
    for i in range(t):
        worse_for_the_leader[total.argmin(), i] = 5.0
        total = worse_for_the_leader[:, : i + 1].sum(1)
    huge = draws(4, t, 1, sharp=50.0)
    return {"alternating": alternating, "blocks": blocks, "leader": worse_for_the_leader, "huge": huge}


@pytest.mark.parametrize("name", adversaries())
def test_regret_without_share_is_at_most_ln_k(name):
    nats = adversaries()[name]
    regret = hedge_nats(nats, 0.0).sum() - nats.sum(1).min()
    assert regret <= math.log(nats.shape[0]) + 1e-6


def test_fixed_share_follows_experts_that_take_turns():
    """8 runs of 500 where one of two is 9 nats worse: the best single expert loses 4 x 500 x 9."""
    nats = adversaries()["blocks"]
    share, switches = 0.002, 7
    bound = math.log(2) + switches * math.log(2 / share) - 4000 * math.log1p(-share)
    got = hedge_nats(nats, share).sum()
    assert got < bound < 100 and nats.sum(1).min() == 18000


def test_bins_have_weights_of_their_own():
    """The model is right where its entropy is low, the counts are where it is high: shared weights suit neither."""
    cfg = NgramConfig(
        scorer="hedge", experts="neural,dirichlet", share=0.0, orders=(1,), concentration=(0.01,), entropy_bins=0
    )
    draw = torch.Generator().manual_seed(1)
    noise = torch.randint(6, 16, (600,), generator=draw)
    tokens = torch.stack([noise, torch.full((600,), 2)], 1).flatten()  # 2 follows anything; what follows 2 is noise
    base = torch.full((1200, 16), 1 / 16, dtype=torch.float64)
    base[1::2] = 0.001 / 15
    base[torch.arange(1, 1199, 2), tokens[2::2]] = 0.999  # the model knows the noise, H near 0, and not the 2
    one, _ = production(SCORERS["hedge"](cfg, 16), tokens, base)
    binned, _ = production(SCORERS["hedge"](replace(cfg, entropy_bins=4), 16), tokens, base)
    assert binned.sum() < 0.5 * one.sum()


def test_hedge_is_within_ln_k_of_its_best_expert():
    tokens, base = stream(500, 5, 4), model(500, 5, 4)
    cfg = NgramConfig(
        orders=(1, 2), experts="neural,witten_bell,kneser_ney,tilt", share=0.0, hint_orders=(1,), entropy_bins=0
    )
    total, _ = production(SCORERS["hedge"](cfg, 5), tokens, base)
    each = [production(SCORERS[name](cfg, 5), tokens, base)[0].sum() for name in cfg.expert_names]
    assert total.sum() <= min(each) + math.log(4) + 1e-9
