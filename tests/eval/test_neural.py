"""A model as evaluation sees it: nats, probabilities, temperature, statistics."""

import math

import pytest
import torch
from helpers import random_batch

from pgolf import presets
from pgolf.dist import Dist
from pgolf.errors import DataError
from pgolf.eval.base import evaluate
from pgolf.eval.neural import Neural, Temperature
from pgolf.eval.order import STREAM, length_sorted
from pgolf.eval.stats import Collector, TokenStats
from pgolf.eval.temperature import CANDIDATES, choose
from pgolf.eval.windowed import SlidingWindows
from pgolf.model.gpt import GPT

ONES = lambda ids, targets: torch.ones_like(targets)


@pytest.fixture(scope="module")
def model():
    model = GPT(presets.smoke().model, train_length=32).init_weights(0).eval()
    with torch.no_grad():
        for block in model.blocks:  # output projections start at zero
            block.attn.out.weight.normal_(std=0.2)
            block.mlp.down.weight.normal_(std=0.2)
        model.embed.weight.normal_(std=0.4)
    return model


def test_nats_are_the_models_at_the_positions_asked_for(model):
    batch = random_batch(1024, rows=3, length=20)
    index = torch.tensor([0, 7, 19, 20, 59])
    with torch.no_grad():
        whole, neural = model(batch)[0].flatten(), Neural(model)
        torch.testing.assert_close(neural.nats(batch, index), whole[index])
        probs = neural.log_probs(batch, index)
    torch.testing.assert_close(-probs.gather(1, batch.targets.flatten()[index, None])[:, 0], whole[index])
    torch.testing.assert_close(probs.exp().sum(-1), torch.ones(5))


@pytest.mark.parametrize("t", [Temperature(0.8), Temperature(1.3), Temperature(0.85, adaptive=True)])
def test_temperature_is_a_distribution_and_neutral_at_one(model, t):
    batch, index = random_batch(1024), torch.arange(0, 64, 3)
    with torch.no_grad():
        plain, warm = Neural(model), Neural(model, t)
        probs = warm.log_probs(batch, index)
        torch.testing.assert_close(probs.exp().sum(-1), torch.ones(len(index)))
        expected = -probs.gather(1, batch.targets.flatten()[index, None])[:, 0]
        torch.testing.assert_close(warm.nats(batch, index), expected)
        assert (warm.nats(batch, index) - plain.nats(batch, index)).abs().max() > 1e-3
        same = Neural(model, Temperature(1.0, t.adaptive)).nats(batch, index)
        assert torch.equal(same, plain.nats(batch, index))


def test_adaptive_temperature_follows_the_entropy():
    """clamp(1 - (1 - t0) (1 - H / ln V), 0.9, 1.05): uniform logits keep 1, sharp ones get t0, no lower than 0.9."""
    flat, sharp = torch.zeros(1, 8), torch.tensor([[50.0] + [0.0] * 7])
    sharper = Temperature(0.85, adaptive=True).log_probs(torch.cat([flat, sharp]))
    torch.testing.assert_close(sharper[0], flat[0].log_softmax(-1))
    torch.testing.assert_close(sharper[1], (sharp[0] / 0.9).log_softmax(-1))


class Table:
    """A bigram table as a neural scorer."""

    def __init__(self, vocab, temperature=None, seed=0):
        self.logits = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(seed)) * 2
        self.temperature = temperature or Temperature()

    def log_probs(self, batch, index):
        return self.temperature.log_probs(self.logits[batch.ids.flatten()[index]])

    def nats(self, batch, index):
        return -self.log_probs(batch, index).gather(1, batch.targets.flatten()[index, None])[:, 0]


def test_the_temperature_is_chosen_where_the_loss_is_smallest():
    """Tokens drawn from a model at temperature 0.8 ask for 0.8 again."""
    gen, table, drawn = torch.Generator().manual_seed(0), Table(16), [0]
    probs = (table.logits / 0.8).softmax(-1)
    for _ in range(6000):
        drawn.append(int(torch.multinomial(probs[drawn[-1]], 1, generator=gen)))
    tokens, windows = torch.tensor(drawn), SlidingWindows(64, 64, 640)
    best, gain = choose(table, tokens, windows, Dist())
    losses = {t: evaluate(windows, Table(16, Temperature(t)), tokens, ONES, Dist()).val_loss for t in CANDIDATES[::5]}
    losses[best.value] = evaluate(windows, Table(16, best), tokens, ONES, Dist()).val_loss
    assert best.value == min(losses, key=losses.get) and 0.77 <= best.value <= 0.83
    assert gain == pytest.approx(losses[1.0] - losses[best.value], abs=1e-5) and gain > 0


def collected(model, tokens, hints, dist):
    collector = Collector(len(tokens) - 1, entropy=True, hints=hints)
    result = evaluate(SlidingWindows(16, 4, 64), Neural(model), tokens, ONES, dist, readers=[collector])
    return result, collector.merged(dist, STREAM, "sliding")


def test_statistics_are_of_the_scored_distributions(model):
    tokens = torch.randint(0, 1024, (61,), generator=torch.Generator().manual_seed(3))
    hints = torch.stack([tokens[1:], torch.full((60,), 7), torch.full((60,), -1)]).int()
    result, stats = collected(model, tokens, hints, Dist())
    assert stats.nats.mean().item() == pytest.approx(result.val_loss, rel=1e-6)
    torch.testing.assert_close(stats.hint_nats[0], stats.nats)  # a hint that is right costs what the target costs
    assert (stats.hint_nats[2] == 0).all() and (stats.entropy > 0).all() and (stats.entropy < math.log(1024)).all()
    plain = evaluate(SlidingWindows(16, 4, 64), Neural(model), tokens, ONES, Dist())
    assert plain.val_loss == pytest.approx(result.val_loss, rel=1e-6)
    assert len(stats.first(10)) == 10 and stats.first(10).hints.shape == (3, 10)


def test_statistics_survive_a_file_and_refuse_a_stranger(model, tmp_path):
    tokens = torch.tensor([1, 5, 6, 1, 7, 8, 9, 1])
    stats = TokenStats(torch.rand(7), torch.rand(7), None, None, length_sorted(tokens), "x")
    stats.save(tmp_path / "s.pt", {"artifact": "a"})
    again = TokenStats.load(tmp_path / "s.pt", {"artifact": "a"})
    assert torch.equal(again.nats, stats.nats) and again.order == stats.order and again.hints is None
    with pytest.raises(DataError, match="artifact is a, expected b"):
        TokenStats.load(tmp_path / "s.pt", {"artifact": "b"})
    (tmp_path / "s.pt").write_bytes(b"nothing")
    with pytest.raises(DataError, match="remove it"):
        TokenStats.load(tmp_path / "s.pt", {"artifact": "a"})
