"""Muon against a plain fp64 loop in numpy, one matrix at a time."""

import numpy as np
import pytest
import torch

from pgolf.optim.config import MuonConfig
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


@pytest.mark.parametrize(("decay", "ns_steps"), [(0.0, 5), (0.3, 3)])
def test_equals_the_loop(decay, ns_steps):
    rng = np.random.default_rng(0)
    start = [rng.standard_normal(s) for s in SHAPES]
    grads = [[rng.standard_normal(s) for _ in range(4)] for s in SHAPES]
    rates, momenta = [0.1, 0.2, 0.05, 0.0], [0.85, 0.9, 0.95, 0.99]
    params = [torch.nn.Parameter(torch.from_numpy(w.copy())) for w in start]
    optimizer = Muon(params, lr=1.0, weight_decay=decay, ns_steps=ns_steps)
    for t in range(4):
        for p, g in zip(params, grads, strict=True):
            p.grad = torch.from_numpy(g[t].copy())
        optimizer.param_groups[0].update(lr=rates[t], momentum=momenta[t])
        optimizer.step()
    for p, w, g in zip(params, start, grads, strict=True):
        np.testing.assert_allclose(p.detach().numpy(), loop(w, g, rates, momenta, decay, ns_steps), atol=1e-10)


def test_groups_keep_their_own_rate_and_gradients_stay():
    a, b = (torch.nn.Parameter(torch.zeros(4, 4)) for _ in range(2))
    optimizer = Muon([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.3}], lr=1.0)
    g = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    a.grad, b.grad = g.clone(), g.clone()
    optimizer.step()
    torch.testing.assert_close(b.detach(), 3 * a.detach())
    assert torch.equal(a.grad, g)


def test_parameter_without_gradient_is_left_alone():
    a, b = (torch.nn.Parameter(torch.ones(3, 3)) for _ in range(2))
    optimizer = Muon([a, b], lr=0.1, weight_decay=0.5)
    a.grad = torch.eye(3)
    optimizer.step()
    assert torch.equal(b.detach(), torch.ones(3, 3)) and not torch.equal(a.detach(), torch.ones(3, 3))


def test_zero_gradient_only_decays():
    a = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = Muon([a], lr=0.1, weight_decay=0.5)
    a.grad = torch.zeros(3, 3)
    optimizer.step()
    torch.testing.assert_close(a.detach(), torch.full((3, 3), 0.95))


def test_refuses_vectors_and_half_precision():
    with pytest.raises(ValueError, match="expected a matrix of fp32"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)
    with pytest.raises(ValueError, match="expected a matrix of fp32"):
        Muon([torch.nn.Parameter(torch.zeros(3, 3, dtype=torch.bfloat16))], lr=0.1)


def test_momentum_warmup():
    cfg = MuonConfig(momentum=0.95, momentum_start=0.85, momentum_warmup_steps=500)
    got = [momentum_at(k, cfg) for k in (0, 250, 276, 500, 9000)]
    np.testing.assert_allclose(got, [0.85, 0.90, 0.9052, 0.95, 0.95])
    assert momentum_at(0, MuonConfig(momentum_warmup_steps=0)) == 0.95
