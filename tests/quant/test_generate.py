"""Text of the model's own."""

from dataclasses import replace

import torch

from pgolf.data.batch import Batch
from pgolf.model.config import RopeConfig
from pgolf.model.gpt import GPT
from pgolf.presets import smoke
from pgolf.quant import generate
from pgolf.quant.config import GeneratedConfig

LENGTH = 100  # more than one prefix width
CFG = GeneratedConfig(sequences=5, rows=2)


def model() -> GPT:
    base = smoke().model
    # a rotary base that depends on the length: 100 is beyond the reference
    cfg = replace(base, attn=replace(base.attn, rope=RopeConfig(dims=4, ntk_reference=48)))
    made = GPT(cfg, train_length=LENGTH).init_weights(0)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in made.parameters():
            param.add_(0.2 * torch.randn(param.shape, generator=gen))
    return made.eval()


def test_cold_text_is_the_likeliest_token_of_a_whole_row():
    """Each token again from one forward over the whole row: prefixes have the angles and masks that rows have."""
    net = model()
    ids = generate.write(net, 3, LENGTH, 1e-6, seed=5)
    with torch.no_grad():
        logits = net.logits(net.hidden(Batch(ids, ids)))
    assert ids.shape == (3, LENGTH) and torch.equal(ids[:, 1:], logits.argmax(-1)[:, :-1])
    assert len(set(ids[:, 0].tolist())) > 1


def test_temperature_widens_and_the_seed_decides():
    net = model()
    texts = {t: generate.write(net, 4, 40, t, seed=1) for t in (0.05, 5.0)}
    assert len(texts[0.05].unique()) < len(texts[5.0].unique())
    assert torch.equal(texts[5.0], generate.write(net, 4, 40, 5.0, seed=1))
    assert not torch.equal(texts[5.0], generate.write(net, 4, 40, 5.0, seed=2))


def test_ranks_share_the_same_texts():
    net = model()
    alone = [b.ids for b in generate.batches(net, CFG, 20, seed=3, rank=0, world=1)]
    assert [len(ids) for ids in alone] == [2, 2, 1]
    shared = [[b.ids for b in generate.batches(net, CFG, 20, seed=3, rank=r, world=2)] for r in range(2)]
    assert [len(s) for s in shared] == [2, 1]
    for ids, want in zip([shared[0][0], shared[1][0], shared[0][1]], alone, strict=True):
        assert torch.equal(ids, want)


def test_settings_out_of_range_are_refused():
    bad = replace(CFG, sequences=0, rows=0, temperature=0.0).problems()
    assert [p.partition("=")[0] for p in bad] == ["sequences", "rows", "temperature"]
