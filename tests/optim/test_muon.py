"""Muon against a plain fp64 loop in numpy, one matrix at a time."""

import numpy as np
import pytest
import torch

from pgolf.model.banks import make_banks
from pgolf.model.roles import ParamInfo, Role
from pgolf.optim.config import MuonConfig
from pgolf.optim.groups import Group
from pgolf.optim.muon import Muon, momentum_at


def orthogonalise(g: np.ndarray, steps: int) -> np.ndarray:
    x = g / (np.linalg.norm(g) + 1e-7)
    if g.shape[0] > g.shape[1]:
        x = x.T
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


def loop(w, grads, rates, momenta, decay, steps):
    """The published update, one matrix, one step at a time."""
    m = np.zeros_like(w)
    for g, lr, mu in zip(grads, rates, momenta, strict=True):
        m = mu * m + g
        o = orthogonalise(g + mu * m, steps) * max(1.0, w.shape[0] / w.shape[1]) ** 0.5
        w = w * (1 - lr * decay)
        w = w - lr * o
    return w


SHAPES = [(6, 6), (6, 6), (12, 4), (4, 12), (6, 6), (12, 4), (1, 5)]


def group(params, name="muon", lr=1.0, decay=0.0) -> Group:
    infos = [ParamInfo(f"{name}.{i}", p, Role.MATRIX, None) for i, p in enumerate(params)]
    return Group(name, "muon", lr, decay, (0.9, 0.95), 1e-8, infos)


def muon(params, lr=1.0, decay=0.0, **settings) -> Muon:
    return Muon([group(params, lr=lr, decay=decay)], MuonConfig(**settings))


def parameter(rows, cols, value=None) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(rows, cols) if value is None else value)


@pytest.mark.parametrize(("decay", "ns_steps"), [(0.0, 5), (0.3, 3)])
def test_equals_the_loop(decay, ns_steps):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(s) for s in SHAPES]
    grads = [[rng.standard_normal(s) for _ in range(4)] for s in SHAPES]
    rates, momenta = [0.1, 0.2, 0.05, 0.0], [0.85, 0.9, 0.95, 0.99]
    params = [parameter(*w.shape, torch.from_numpy(w).float()) for w in start]
    optimizer = muon(params, decay=decay, ns_steps=ns_steps)
    for t in range(4):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(g[t]).float()
        optimizer.lr_scale, optimizer.momentum = rates[t], momenta[t]
        optimizer.update_()
    for p, w, g in zip(params, start, grads, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), loop(w, g, rates, momenta, decay, ns_steps), atol=2e-5)


def test_shapes_that_are_equal_up_to_transposition_share_a_pool():
    optimizer = muon([parameter(*s) for s in SHAPES])
    assert [(pool.buffer.shape, pool.matrices) for pool in optimizer.pools] == [
        ((3, 4, 12), 3), ((3, 6, 6), 3), ((1, 1, 5), 1),
    ]  # fmt: skip
    assert [bank.master.shape for bank in optimizer.pools[0].banks] == [(2, 12, 4), (1, 4, 12)]


def test_groups_keep_their_own_rate_and_gradients_stay():
    a, b = parameter(4, 4, torch.zeros(4, 4)), parameter(4, 4, torch.zeros(4, 4))
    optimizer = Muon([group([a], "a", 0.1), group([b], "b", 0.3)], MuonConfig())
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    a.grad, b.grad = g.clone(), g.clone()
    optimizer.update_()
    torch.testing.assert_close(b.detach(), 3 * a.detach())
    assert torch.equal(a.grad, g) and len(optimizer.pools) == 1


def test_weights_and_gradients_are_views_of_the_bank():
    params = [parameter(3, 4) for _ in range(3)]
    optimizer = muon(params)
    (bank,) = optimizer.banks
    for i, p in enumerate(params):
        p.grad = torch.full((3, 4), float(i))
    optimizer.update_()
    for i, p in enumerate(params):
        assert p.data_ptr() == bank.master[i].data_ptr() and p.grad.data_ptr() == bank.grad[i].data_ptr()
        assert torch.equal(bank.grad[i], torch.full((3, 4), float(i)))


def test_backward_adds_to_a_collected_gradient():
    p = parameter(2, 3)
    (bank,) = make_banks([ParamInfo("p", p, Role.MATRIX, None)])
    for _ in range(2):
        (2 * p).sum().backward()
        bank.collect_()
    assert torch.equal(bank.grad[0], torch.full((2, 3), 4.0)) and p.grad.data_ptr() == bank.grad.data_ptr()


def test_parameter_without_gradient_is_left_alone():
    a, b = parameter(3, 3), parameter(3, 3)
    optimizer = muon([a, b], lr=0.1, decay=0.5)
    optimizer.banks[0].grad.fill_(7.0)  # of an earlier step
    a.grad = torch.eye(3)
    optimizer.update_()
    assert torch.equal(b.detach(), torch.ones(3, 3)) and not torch.equal(a.detach(), torch.ones(3, 3))
    assert not optimizer.pools[0].momentum[1].any()


def test_zero_gradient_only_decays():
    a = parameter(3, 3)
    optimizer = muon([a], lr=0.1, decay=0.5)
    a.grad = torch.zeros(3, 3)
    optimizer.update_()
    torch.testing.assert_close(a.detach(), torch.full((3, 3), 0.95))


def test_nothing_moves_once_a_step_was_bad():
    a = parameter(3, 3)
    optimizer = muon([a], lr=0.1, decay=0.5)
    a.grad = torch.full((3, 3), float("nan"))
    optimizer.update_(ok=torch.zeros(()))
    # NaN is in the update, and 0 * NaN is NaN: the weights must not have met it
    assert torch.equal(a.detach(), torch.ones(3, 3))


def test_bf16_exchange_is_close_and_keeps_bf16_momentum():
    rng = np.random.default_rng(1)
    w, grads = rng.standard_normal((6, 6)), [rng.standard_normal((6, 6)) for _ in range(4)]
    p = parameter(6, 6, torch.from_numpy(w).float())
    optimizer = muon([p], exchange_dtype="bf16")
    optimizer.momentum = 0.9
    for g in grads:
        p.grad = torch.from_numpy(g).float()
        optimizer.update_()
    assert optimizer.pools[0].momentum.dtype == torch.bfloat16 and p.dtype == torch.float32
    expected = loop(w, grads, [1.0] * 4, [0.9] * 4, 0.0, 5)
    assert 1e-6 < np.abs(p.detach().numpy() - expected).max() < 0.1


def test_state_goes_to_another_optimiser():
    params = [parameter(*s) for s in SHAPES]
    optimizer = muon(params)
    for i, p in enumerate(params):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    optimizer.update_()
    saved = {name: t.clone() for name, t in optimizer.tensors().items()}
    assert {name: t.shape for name, t in saved.items()} == {f"muon.{i}.momentum": s for i, s in enumerate(SHAPES)}
    assert all(torch.equal(saved[f"muon.{i}.momentum"], p.grad) for i, p in enumerate(params))
    other = muon([parameter(*s) for s in SHAPES])
    other.load_tensors_(saved)
    assert all(torch.equal(t, saved[name]) for name, t in other.tensors().items())
    other.reset_()
    assert not any(t.any() for t in other.tensors().values())


def test_refuses_vectors_and_half_precision():
    with pytest.raises(ValueError, match="expected a matrix of fp32"):
        muon([torch.nn.Parameter(torch.zeros(3))])
    with pytest.raises(ValueError, match="expected a matrix of fp32"):
        muon([torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.bfloat16))])


def test_momentum_warmup():
    cfg = MuonConfig(momentum=0.95, momentum_start=0.85, momentum_warmup_steps=500)
    got = [momentum_at(k, cfg) for k in (0, 250, 276, 500, 9000)]
    np.testing.assert_allclose(got, [0.85, 0.90, 0.9052, 0.95, 0.95])
    assert momentum_at(0, MuonConfig(momentum_warmup_steps=0)) == 0.95
