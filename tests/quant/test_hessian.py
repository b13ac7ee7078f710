"""Hessians: what the layers of a model really see, and that every layer is seen."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import random_batch

from pgolf.calibrate import targets
from pgolf.kernels.residual import rms_norm
from pgolf.model.config import EmbedConfig, MlpConfig, TrigramConfig
from pgolf.model.gpt import GPT
from pgolf.model.roles import roles_of
from pgolf.presets import smoke
from pgolf.quant.hessian import Hessians, table_rows, tables_of
from pgolf.quant.policy import grid_of, storage_of
from pgolf.quant.weight_cast import WeightCast, linears_of

QUANT = replace(smoke().quant, keep_numel=0)
MODEL = smoke().model


def randomised(cfg=MODEL, **kwargs) -> GPT:
    """No weight is zero, as in a new model some are."""
    model = GPT(cfg, train_length=32, **kwargs).init_weights(0)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(0.1 * torch.randn(param.shape, generator=gen))
    return model


def names_of(model: GPT, skip_mlp=False) -> list[str]:
    return targets(model, storage_of(roles_of(model), QUANT), skip_mlp)


VARIANTS = {
    "smoke": MODEL,
    "swiglu": replace(MODEL, mlp=MlpConfig(activation="swiglu")),
    "star_relu_glu": replace(MODEL, mlp=MlpConfig(activation="star_relu_glu")),
    "parallel": replace(MODEL, wiring=replace(MODEL.wiring, parallel=True)),
    "untied": replace(MODEL, embed=EmbedConfig(vocab_size=300, tied=False)),
    "trigram": replace(MODEL, embed=replace(MODEL.embed, trigram=TrigramConfig(rows=99, dim=8))),
    "shared trigram": replace(MODEL, embed=replace(MODEL.embed, bigram=replace(MODEL.embed.bigram, trigram=True))),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_quantised_matrix_gets_a_hessian(name):
    """All that is stored as integers is a linear layer with inputs, or one of the tables."""
    model = randomised(VARIANTS[name])
    storage, names = storage_of(roles_of(model), QUANT), names_of(model)
    hessians = Hessians(model, names)
    batch = random_batch(model.cfg.embed.vocab_size)
    hessians.add(batch)
    for weight in names:
        h = hessians.of(weight)
        assert h is not None and h.shape == (dict(model.named_parameters())[weight].shape[1],) * 2
        assert torch.isfinite(h).all() and h.diagonal().max() > 0, weight
    rest = {n for n, s in storage.items() if grid_of(s.kind)} - set(names)
    assert rest == {n for n in storage if n == "embed.weight" or n.endswith(".table")}


def test_sums_are_those_of_the_inputs():
    """Inputs recorded one by one, in fp64, over two batches."""
    model, seen = randomised(), {}
    names = [n for n in names_of(model) if n not in tables_of(model)]

    class Recorder(torch.nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            seen.setdefault(self.name, []).append(x.flatten(0, -2).double())
            return torch.zeros(())

    hessians, batches = Hessians(model, names), [random_batch(MODEL.embed.vocab_size, seed=s) for s in (1, 2)]
    for batch in batches:
        hessians.add(batch)
    for name in names:
        linears_of(model)[name].adapter = Recorder(name)
    with torch.no_grad():
        for batch in batches:
            model.hidden(batch)
    for name in names:
        x = torch.cat(seen[name])
        torch.testing.assert_close(hessians.of(name).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["smoke", "trigram", "shared trigram"])
def test_tables_are_counted_by_the_tokens_that_take_their_rows(name):
    model = randomised(replace(VARIANTS[name], embed=replace(VARIANTS[name].embed, smear=None)))
    batch = random_batch(model.cfg.embed.vocab_size)
    hessians, taken = Hessians(model, names_of(model)), {}
    hessians.add(batch)
    for table, rows in table_rows(model, batch):
        taken.setdefault(table, []).append(table.table.detach().double()[rows].flatten(0, 1))
    for weight, table in tables_of(model).items():
        x = torch.cat(taken[table])
        torch.testing.assert_close(hessians.of(weight).double(), x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    # and those are the rows that the front of the network takes
    x = F.embedding(batch.ids, model.embed.weight)
    for table, rows in model.embed.table_rows(batch.ids):
        x = x + F.embedding(rows, table.rows(torch.float32))
    torch.testing.assert_close(rms_norm(x, MODEL.norm_eps), model.embed(batch.ids, torch.float32))


@pytest.mark.parametrize("kwargs", [{}, {"fold_scales": True}, {"compute_dtype": torch.bfloat16}])
@pytest.mark.parametrize("cast", [False, True])
def test_looking_changes_nothing(kwargs, cast):
    model = randomised(**kwargs)
    if cast:
        WeightCast(model, roles_of(model), QUANT, model.compute_dtype)
    batch = random_batch(MODEL.embed.vocab_size)
    with torch.no_grad():
        before = model.hidden(batch).float()
        hessians, other = Hessians(model, names_of(model)), []
        with hessians._observing():
            other.append(model.hidden(batch).float())
        after = model.hidden(batch).float()
    tolerance = 0.05 if model.compute_dtype == torch.bfloat16 else 1e-5  # the unfused path rounds elsewhere
    torch.testing.assert_close(other[0], before, rtol=tolerance, atol=tolerance)
    assert torch.equal(after, before)
    assert all(layer.adapter is None for layer in linears_of(model).values())


def test_skip_mlp_leaves_the_mlp_out():
    model = randomised()
    left = set(names_of(model)) - set(names_of(model, skip_mlp=True))
    assert left == {f"blocks.{i}.mlp.{name}.weight" for i in range(3) for name in ("up", "down")}
