"""The trainer's handle on the optimisers: real steps, rates, clipping, resuming."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pgolf.errors import ConfigError
from pgolf.model.roles import Role, roles_of
from pgolf.optim.config import AdamWConfig, ClipConfig, MuonConfig, OptimConfig
from pgolf.optim.groups import build_groups
from pgolf.optim.step import Optimizers, clip_, sum_of_squares


class ToyBlock(nn.Module):
    roles = {"w": Role.MATRIX, "scale": Role.VECTOR, "lam": Role.RESID_LAMBDA}

    def __init__(self, index: int):
        super().__init__()
        self.block_index = index
        self.w = nn.Parameter(torch.randn(8, 8) / 3)
        self.scale = nn.Parameter(torch.ones(8))
        self.lam = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.lam * x + self.scale * torch.tanh(x @ self.w.T)


class Toy(nn.Module):
    """Every trained role once or more, one bf16 table, one frozen vector, one that only adaptation trains."""

    roles = {
        "table": Role.EMBED,
        "side": Role.SIDE_MATRIX,
        "head": Role.HEAD,
        "frozen": Role.FROZEN,
        "adapt": Role.ADAPT_ONLY,
    }

    def __init__(self, table_dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(16, 4).to(table_dtype))
        self.side = nn.Parameter(torch.randn(8, 4))
        self.blocks = nn.ModuleList(ToyBlock(i) for i in range(4))
        self.head = nn.Parameter(torch.randn(16, 8))
        self.frozen = nn.Parameter(torch.ones(8), requires_grad=False)
        self.adapt = nn.Parameter(torch.ones(8))

    def forward(self, ids):
        x = self.table[ids].float() @ self.side.T * self.frozen
        for block in self.blocks:
            x = block(x)
        return x @ self.head.T


CFG = OptimConfig(
    muon=MuonConfig(lr=0.02, lr_late=0.05, weight_decay=0.04),
    adamw=AdamWConfig(weight_decay=0.04),
    decoder_lr_mult=2.0,
    clip=ClipConfig(norm=0.3),
)


def make(cfg: OptimConfig = CFG, table_dtype=torch.float32) -> tuple[Toy, Optimizers]:
    model = Toy(table_dtype)
    return model, Optimizers(build_groups(roles_of(model), cfg, (4, 3), tied=False), cfg)


def backward(model: Toy, step: int) -> torch.Tensor:
    ids = torch.randint(16, (32,), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(ids), (ids * 3 + 1) % 16)
    loss.backward()
    return loss.detach()


def train(model: Toy, optimizers: Optimizers, steps: range) -> None:
    for k in steps:
        loss = backward(model, k)
        optimizers.set(1.0 - 0.05 * k, momentum=0.85 + 0.01 * k)
        assert torch.equal(optimizers.reduce_(loss, k), loss)
        optimizers.step()
        optimizers.zero_grad()


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_every_trained_parameter_moves_and_every_optimiser_is_called(table_dtype):
    model, optimizers = make(table_dtype=table_dtype)
    before = weights(model)
    train(model, optimizers, range(1))
    moved = {n: not torch.equal(b, p) for (n, p), b in zip(model.named_parameters(), before, strict=True)}
    assert {n for n, m in moved.items() if not m} == {"frozen", "adapt"}
    train(model, optimizers, range(1, 3))
    assert optimizers.counts == {"muon": 3, "adamw": 3}
    assert all(p.grad is None for p in optimizers.params)


def test_counter_counts_steps_of_the_optimisers_and_not_calls_of_the_handle():
    model, optimizers = make()
    backward(model, 0)
    optimizers.adamw.step()
    assert optimizers.counts == {"muon": 0, "adamw": 1}


def test_set_scales_every_base_rate():
    _, optimizers = make()
    optimizers.set(0.25, momentum=0.9)
    adamw = [g for g in optimizers.groups if g.kind == "adamw"]
    rates = {g.name: t["lr"] for g, t in zip(adamw, optimizers.adamw.param_groups, strict=True)}
    rates |= {g.name: g.lr * optimizers.muon.lr_scale for g in optimizers.muon.groups}
    assert rates == pytest.approx(
        {
            "muon": 0.25 * 0.02,
            "muon.late": 0.25 * 0.05,
            "muon.late.decoder": 0.25 * 0.05 * 2,
            "adamw.embed": 0.25 * 0.6,
            "adamw.head": 0.25 * 0.008,
            "adamw.scalar": 0.25 * 0.04,
            "adamw.scalar.decoder": 0.25 * 0.04 * 2,
            "adamw.resid_lambda": 0.25 * 0.2,
        }
    )
    assert optimizers.muon.momentum == 0.9


def test_adamw_first_step_is_the_textbook_one():
    """After one step both moments' corrections cancel: w (1 - lr wd) - lr g / (|g| + eps)."""
    model, optimizers = make()
    backward(model, 0)
    block = model.blocks[0]
    w, g = block.scale.detach().double().numpy().copy(), block.scale.grad.double().numpy().copy()
    head, hg = model.head.detach().double().numpy().copy(), model.head.grad.double().numpy().copy()
    optimizers.set(0.5, momentum=0.9)
    optimizers.adamw.step()
    lr = 0.5 * 0.04
    np.testing.assert_allclose(block.scale.detach(), w * (1 - lr * 0.04) - lr * g / (np.abs(g) + 1e-8), rtol=1e-5)
    np.testing.assert_allclose(model.head.detach(), head - 0.004 * hg / (np.abs(hg) + 1e-8), rtol=1e-5, atol=1e-7)


def test_settings_reach_torch():
    cfg = replace(CFG, muon=replace(CFG.muon, ns_steps=3), adamw=AdamWConfig(beta1=0.8, beta2=0.7, eps=1e-5))
    _, optimizers = make(replace(cfg, adamw=replace(cfg.adamw, weight_decay=0.2)))
    muon, adamw = optimizers.muon, optimizers.adamw.param_groups
    assert muon.cfg.ns_steps == 3 and all(d == pytest.approx(0.04) for d in muon.decays.values())
    assert all(g["betas"] == (0.8, 0.7) and g["eps"] == 1e-5 and g["fused"] for g in adamw)
    decays = dict(zip([g.name for g in optimizers.groups if g.kind == "adamw"], adamw, strict=True))
    undecayed = {name for name, g in decays.items() if g["weight_decay"] == 0.0}
    assert undecayed == {"adamw.head", "adamw.resid_lambda"} and decays["adamw.embed"]["weight_decay"] == 0.2


@pytest.mark.parametrize("norm", [0.3, 1e6])
def test_clip_equals_torch(norm):
    model, optimizers = make(replace(CFG, clip=ClipConfig(norm=norm)))
    loss = backward(model, 0)
    twin = copy.deepcopy(optimizers.params)  # deepcopy keeps no gradients
    for p, q in zip(optimizers.params, twin, strict=True):
        q.grad = p.grad.clone()
    expected = nn.utils.clip_grad_norm_(twin, norm)
    optimizers.reduce_(loss)
    torch.testing.assert_close(optimizers.grad_norm, expected)
    clipped = {id(p): q.grad for p, q in zip(optimizers.params, twin, strict=True)}
    for group in optimizers.groups:
        if group.kind == "adamw":
            for p in group.params:
                torch.testing.assert_close(p.grad, clipped[id(p)])
    for pool in optimizers.muon.pools:  # a matrix's clipped gradient is where Muon takes it from
        for bank, got in zip(pool.banks, pool.views(pool.shard), strict=True):
            torch.testing.assert_close(got, torch.stack([clipped[id(p)] for p in bank.params]))


def test_clip_norm_is_exact_with_a_bf16_table():
    model, optimizers = make(table_dtype=torch.bfloat16)
    backward(model, 0)
    grads = [p.grad.clone() for p in optimizers.params]
    truth = np.sqrt(sum((g.double().numpy() ** 2).sum() for g in grads))
    squares = sum_of_squares(grads)
    assert squares.dtype == torch.float32 and squares.shape == ()
    np.testing.assert_allclose(squares.sqrt(), truth, rtol=1e-6)
    before = [g.float().clone() for g in grads]
    clip_(grads, squares, ClipConfig(norm=0.3))
    for g, was in zip(grads, before, strict=True):
        np.testing.assert_allclose(g.float(), was * (0.3 / truth), rtol=8e-3, atol=1e-7)
    assert sum_of_squares([]) == 0


def test_clip_by_rank_scales_gradients_before_they_are_averaged():
    """Alone the two scopes are one; tests/test_distributed.py tells them apart."""
    runs = []
    for scope in ("global", "rank"):
        model, optimizers = make(replace(CFG, clip=ClipConfig(norm=0.3, scope=scope)))
        train(model, optimizers, range(3))
        runs.append(weights(model))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("poison", ["loss", "gradient", "table"])
def test_from_a_bad_step_on_nothing_moves(poison):
    model, optimizers = make()
    train(model, optimizers, range(2))
    before = weights(model)
    loss = backward(model, 2)
    if poison == "loss":
        loss = loss / 0.0
    else:
        (model.blocks[2].w if poison == "gradient" else model.table).grad[1, 2] = float("nan")
    optimizers.reduce_(loss, 2)
    optimizers.step()
    optimizers.zero_grad()
    optimizers.reduce_(backward(model, 3), 3)  # finite again
    optimizers.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    optimizers.health.post()
    assert optimizers.health.read() == 2
    assert all(torch.isfinite(t).all() for t in optimizers.tensors().values())


@pytest.mark.parametrize("table_dtype", [torch.float32, torch.bfloat16])
def test_five_and_five_steps_equal_ten(table_dtype):
    straight, optimizers = make(table_dtype=table_dtype)
    train(straight, optimizers, range(10))
    first, first_optimizers = make(table_dtype=table_dtype)
    train(first, first_optimizers, range(5))
    saved = copy.deepcopy((first.state_dict(), first_optimizers.tensors()))
    train(first, first_optimizers, range(5, 8))  # must not reach into what was saved
    second, second_optimizers = make(table_dtype=table_dtype)
    second.load_state_dict(saved[0])
    second_optimizers.load_tensors_(saved[1])
    train(second, second_optimizers, range(5, 10))
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(second), strict=True))
    assert second_optimizers.counts == {"muon": 5, "adamw": 5}  # of this process


def test_reset_undoes_a_warmup():
    model, optimizers = make()
    before = copy.deepcopy(model.state_dict())
    train(model, optimizers, range(3))
    model.load_state_dict(before)
    optimizers.reset_()
    train(model, optimizers, range(4))
    fresh, fresh_optimizers = make()
    train(fresh, fresh_optimizers, range(4))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(fresh), strict=True))
    assert optimizers.counts == {"muon": 4, "adamw": 4}


def test_loading_keeps_this_runs_rates_and_refuses_other_groups():
    model, optimizers = make()
    train(model, optimizers, range(1))
    _, other = make(replace(CFG, muon=replace(CFG.muon, lr=0.5)))
    other.load_tensors_(optimizers.tensors())
    other.set(1.0, momentum=0.9)
    assert other.muon.groups[0].lr == 0.5
    _, moved = make(replace(CFG, side_matrix="adamw"))
    with pytest.raises(ConfigError, match=r"side\.exp_avg, side\.exp_avg_sq, side\.momentum, side\.step in one of"):
        moved.load_tensors_(optimizers.tensors())


def test_a_kind_without_parameters_has_no_optimiser():
    class OneMatrix(nn.Module):
        roles = {"w": Role.MATRIX}

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.eye(2))

    model = OneMatrix()
    optimizers = Optimizers(build_groups(roles_of(model), CFG, (1, 0), tied=True), CFG)
    model.w.grad = torch.ones(2, 2)
    optimizers.set(1.0, momentum=0.9)
    optimizers.reduce_(torch.zeros(()))
    optimizers.step()
    assert optimizers.counts == {"muon": 1}
