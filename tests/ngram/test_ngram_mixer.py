"""The trained gate: what it learns, and that it is scored as it is stored."""

from dataclasses import replace

import pytest
import torch
from ngram_streams import model, stats_of, stream

from pgolf.errors import ArtifactError
from pgolf.eval.order import BOS
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.mixer import Mixer

CFG = NgramConfig(scorer="mixer", orders=(1, 2, 3), mixer_floor=0.02)


def text(seed: int) -> torch.Tensor:
    """Pairs that repeat, and noise between them: after a token of 2 to 5 always the same, after others anything."""
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(2, 6, (900,), generator=draw)
    noise = torch.randint(6, 16, (900,), generator=draw)
    return torch.stack([noise, first, first + 14], 1).flatten().clamp(max=19)


def test_fit_learns_where_counts_are_right():
    """Trained on one text, it scores another better than the untrained gate and than the model."""
    train, val = text(1), text(2)
    base = model(train.numel(), 20, 7, sharp=0.5)
    mixer = Mixer(CFG, 20)
    prepared, stats = mixer.prepare(val), stats_of(val, base)
    before = mixer.nats(prepared, stats).mean()
    losses = mixer.fit(train, stats_of(train, base), steps=60, batch=256)
    after = mixer.nats(prepared, stats).mean()
    assert losses[-1] < losses[0]
    assert after < before - 0.1 < stats.nats.mean() - 0.1
    again = Mixer(CFG, 20)
    again.load_state(mixer.state())
    assert torch.equal(again.nats(prepared, stats).mean(), after)  # fp16 weights are what was scored


def test_size_in_the_artifact():
    mixer = Mixer(NgramConfig(scorer="mixer"), 20)
    assert mixer.stored_bytes == 2 * (25 * 9 + 9) == 468
    assert mixer.stored_bytes == sum(w.numel() * w.element_size() for w in mixer.state().values())


def test_weights_of_other_settings_are_refused():
    with pytest.raises(ArtifactError, match="do not fit its settings"):
        Mixer(CFG, 20).load_state(Mixer(replace(CFG, orders=(1, 2)), 20).state())


def test_hidden_states_reach_the_gate():
    tokens = stream(200, 4, 1, documents=True)
    base, mixer = model(200, 4, 1), Mixer(CFG, 4, hidden_state=3)
    hidden = torch.randn(199, 3, generator=torch.Generator().manual_seed(0))
    stats, prepared = stats_of(tokens, base), mixer.prepare(tokens)
    mixer.fit(tokens, stats, steps=20, batch=64, hidden=hidden)
    a, b = mixer.mixed(prepared, stats, hidden), mixer.mixed(prepared, stats, hidden + 1)
    assert not torch.equal(a, b)
    assert tokens[0] == BOS


def test_the_untrained_gate_trusts_the_model_most():
    w = Mixer(CFG, 4).weights(Mixer(CFG, 4).head(torch.zeros(1, 10).double()), torch.tensor([[True, False, True]]))
    assert abs(w.sum() - 1) < 1e-12 and w[0, 2] == 0 and w[0, 0] > 3 * w[0, 1]
