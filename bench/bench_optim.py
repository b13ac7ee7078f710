"""Benchmarks of the optimiser on a CPU: a step of Muon and AdamW, Newton-Schulz in batches, the moving average."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pgolf import presets
from pgolf.config import RunConfig
from pgolf.kernels.newton_schulz import newton_schulz
from pgolf.model.config import BigramConfig, RopeConfig, ValueEmbedConfig, XsaConfig
from pgolf.model.gpt import GPT
from pgolf.model.roles import roles_of
from pgolf.optim.average import Averager
from pgolf.optim.config import AverageConfig, EmaConfig
from pgolf.optim.groups import build_groups
from pgolf.optim.step import Optimizers

from . import naive
from .fixtures import build, one_thread  # noqa: F401
from .ratios import CPU_TIME, gate, rates

LR_SCALE, MOMENTUM = 0.7, 0.9


def reduced_rat_rod_green() -> RunConfig:
    """The preset at a quarter of its width, with all its 11 layers: as many tensors of as many kinds."""
    cfg = presets.rat_rod_green()
    attn = replace(
        cfg.model.attn,
        rope=RopeConfig(dims=4, ntk_reference=1024),
        value_embed=ValueEmbedConfig(dim=32, layers=(9, 10)),
        xsa=XsaConfig(last_n=11),
    )
    embed = replace(cfg.model.embed, bigram=BigramConfig(rows=512, dim=32))
    return replace(cfg, model=replace(cfg.model, dim=128, attn=attn, embed=embed))


SYSTEMS = {"cpu": presets.cpu, "rat_rod_green_reduced": reduced_rat_rod_green}


def with_gradients(cfg: RunConfig) -> tuple[GPT, Optimizers]:
    """The model with a random gradient everywhere, and its optimisers."""
    model = build(cfg)
    infos = roles_of(model)
    layers = (cfg.model.plan.num_layers, cfg.model.plan.n_encoder)
    # clipping is in place; and the oracle is fp64, which momentum in bf16 is not close to
    unclipped = replace(cfg.optim, clip=None, muon=replace(cfg.optim.muon, exchange_dtype="fp32"))
    optim = Optimizers(build_groups(infos, cfg.optim, layers, cfg.model.embed.tied), unclipped)
    gen = torch.Generator().manual_seed(2)
    for p in optim.params:
        p.grad = torch.randn(p.shape, generator=gen) * 0.01
    return model, optim


def step(optim: Optimizers) -> None:
    """From gradients in place to new weights. The gradients stay."""
    optim.reduce_(torch.zeros(()))
    optim.step()


def assert_steps_agree(optim: Optimizers, oracle: naive.Optimizer, steps: int = 3) -> None:
    """Every weight's way over some steps, against fp64."""
    infos = [info for group in optim.groups for info in group.infos]
    before = {i.name: i.param.detach().double() for i in infos}
    for t in range(steps):
        grads = {i.name: i.param.grad * (t + 1) for i in infos}
        for i in infos:
            i.param.grad = grads[i.name]
        oracle.step(grads, LR_SCALE, MOMENTUM)
        step(optim)
    for i in infos:
        way, expected = i.param.detach().double() - before[i.name], oracle.weights[i.name] - before[i.name]
        error = naive.relative_error(way, expected)
        assert error <= 1e-3, f"{i.name}: its way over {steps} steps is off by {error:.2g}, allowed 0.001"


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.benchmark(group="optimizer")
def test_optimizer_step(benchmark, system):
    """A step of all parameters, against the same one parameter at a time in fp32."""
    cfg = SYSTEMS[system]()
    _, optim = with_gradients(cfg)
    optim.set(LR_SCALE, MOMENTUM)
    assert_steps_agree(optim, naive.Optimizer(optim.groups, cfg.optim.muon.ns_steps))
    plain = naive.Optimizer(optim.groups, cfg.optim.muon.ns_steps, torch.float32)
    grads = {i.name: i.param.grad for g in optim.groups for i in g.infos}
    one_by_one = lambda: plain.step(grads, LR_SCALE, MOMENTUM)
    whole = lambda: step(optim)
    gate(benchmark, ("pgolf", whole), ("one by one", one_by_one), at_most=1.1, clock=CPU_TIME)
    benchmark(whole)
    rates(benchmark, parameters=sum(p.numel() for p in optim.params))


# Rows, columns and the bound. A batch saves calls, which shows on small matrices; the larger ones are all products, and
# there a CPU's batched product was up to 1.13 times as slow
BANKS = {"key_value": (64, 128, 1.0), "query_out": (128, 128, 1.3)}


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.benchmark(group="newton_schulz")
def test_newton_schulz(benchmark, bank):
    """The 22 matrices of one shape in 11 layers as one batch, against one by one."""
    rows, cols, at_most = BANKS[bank]
    g = torch.randn(22, rows, cols, generator=torch.Generator().manual_seed(0))
    expected = torch.stack([naive.newton_schulz(one, 5) for one in g.double()])

    def check(got: torch.Tensor) -> None:
        assert naive.relative_error(got, expected) <= 1e-4

    batched, one_by_one = lambda: newton_schulz(g), lambda: torch.stack([newton_schulz(one) for one in g])
    check(one_by_one())
    sides = ("batched", batched), ("one by one", one_by_one)
    gate(benchmark, *sides, at_most=at_most, check=check, clock=CPU_TIME)
    benchmark(batched)
    rates(benchmark, matrices=len(g))


@pytest.mark.benchmark(group="average")
def test_ema_update(benchmark):
    """The moving average of a model of 11 layers, against one parameter at a time."""
    model = build(reduced_rat_rod_green())
    named = dict(model.named_parameters())
    averager = Averager(named, AverageConfig(ema=EmaConfig(decay=0.9)))
    expected = {name: p.detach().double() for name, p in named.items()}
    with torch.no_grad():
        for _ in range(3):
            for name, p in named.items():
                p.add_(0.1)
                expected[name] = 0.9 * expected[name] + 0.1 * p.double()
            averager.update(1, 1.0)
    source, got = averager.averaged()
    assert source == "ema" and all(naive.relative_error(got[n], e) <= 1e-6 for n, e in expected.items())
    averages = [p.detach().clone() for p in named.values()]
    one_by_one = lambda: [a.lerp_(p.detach(), 0.1) for a, p in zip(averages, named.values(), strict=True)]
    update = lambda: averager.update(1, 1.0)
    gate(benchmark, ("foreach", update), ("one by one", one_by_one), at_most=1.1, clock=CPU_TIME)
    benchmark(update)
    rates(benchmark, parameters=sum(p.numel() for p in named.values()))
