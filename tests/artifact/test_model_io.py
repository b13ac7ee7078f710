"""A model to bytes and back; and descriptions that lie."""

import pytest
import torch

from pgolf.artifact.model_io import load_model, save_model
from pgolf.artifact.pack import pack, unpack
from pgolf.data.batch import Batch
from pgolf.errors import ArtifactError
from pgolf.model.config import AttentionConfig, BigramConfig, EmbedConfig, ModelConfig, PlanConfig, SmearConfig
from pgolf.model.gpt import GPT
from pgolf.model.lora import TARGETS, attach
from pgolf.model.roles import Role, roles_of
from pgolf.quant.config import QuantConfig

CFG = ModelConfig(
    dim=32,
    embed=EmbedConfig(vocab_size=64, bigram=BigramConfig(rows=32, dim=8), smear=SmearConfig()),
    plan=PlanConfig(num_layers=2),
    attn=AttentionConfig(num_heads=4, num_kv_heads=2),
)


def model():
    net = GPT(CFG, train_length=16, max_length=32).init_weights(1)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    return net


def packed(**kwargs):
    net = model()
    return net, save_model(net, roles_of(net), QuantConfig(codec="zlib", level=6, **kwargs), "abc")


def test_float_round_trip_is_exact_but_for_vectors_which_are_fp16():
    net, data = packed(matrix="float", embed="float", keep_numel=0)
    ids = torch.randint(0, 64, (2, 33), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    with torch.no_grad():
        loaded = dict(load_model(data).named_parameters())
        for info in roles_of(net):
            stored = info.param.half().float() if info.role is Role.VECTOR else info.param
            assert torch.equal(loaded[info.name], stored), info.name
        torch.testing.assert_close(load_model(data)(batch)[0], net(batch)[0], rtol=1e-3, atol=1e-3)


def test_adapters_are_no_part_of_an_artifact():
    net, data = packed()
    for lora in attach(net, TARGETS, rank=2, alpha=2.0, slots=3, seed=0):
        torch.nn.init.ones_(lora.b)
    again = save_model(net, roles_of(net), QuantConfig(codec="zlib", level=6), "abc")
    assert again == data and load_model(again).cfg == net.cfg


def test_loaded_model_evaluates_at_its_longest_length():
    _, data = packed()
    ids = torch.zeros((1, 33), dtype=torch.int64)
    assert load_model(data)(Batch(ids[:, :-1], ids[:, 1:]))[0].shape == (1, 32)
    assert not load_model(data).training


def forge(change):
    _, data = packed()
    records, meta = unpack(data)
    change(meta)
    return pack(records, meta, "zlib", 6)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("model"),
        lambda m: m["model"].update(dim=64),
        lambda m: m["model"].update(dim=1 << 40),
        lambda m: m["model"].update(dim="wide"),
        lambda m: m["model"].update(surprise=1),
        lambda m: m["model"]["plan"].update(num_layers=10**9),
        lambda m: m["model"]["embed"].update(vocab_size=41000),
        lambda m: m["model"]["attn"].update(num_kv_heads=3),
        lambda m: m.update(max_length=10**15),
        lambda m: m.update(train_length="x"),
        lambda m: m.update(model=[1]),
    ],
)
def test_a_description_that_lies_is_refused_without_allocating(change):
    with pytest.raises(ArtifactError):
        load_model(forge(change))
