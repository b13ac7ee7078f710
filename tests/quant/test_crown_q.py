"""CROWN-Q: value and gradient against autograd on the formula, in banks and without; who pays."""

import pytest
import torch
from torch import nn

from pgolf.model.banks import make_banks
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import CrownQConfig, QuantConfig
from pgolf.quant.crown_q import CrownQ


def info(name, shape, role=Role.MATRIX):
    gen = torch.Generator().manual_seed(len(name))
    return ParamInfo(name, nn.Parameter(torch.randn(shape, generator=gen)), role, None)


def settings(**kwargs):
    return QuantConfig(keep_numel=32, crown_q=CrownQConfig(coef=0.7), **kwargs)


CASES = [
    ({}, lambda w: w.abs().amax(1) / 31),
    ({"matrix": "int4", "matrix_clip": "0.9"}, lambda w: w.abs().quantile(0.9, dim=1) / 7),
    ({"matrix_clip": "12sd"}, lambda w: 12 * w.std(1) / 31),
    ({"scale_floor": 9.0}, lambda w: torch.full((len(w),), 9 / 31)),
    ({"matrix_clip": "best"}, lambda w: w.abs().amax(1) / 31),
]


@pytest.mark.parametrize(("quant", "step"), CASES, ids=lambda part: str(part) if isinstance(part, dict) else "step")
def test_value_and_gradient(quant, step):
    infos = [
        info("a", (6, 8)),
        info("bb", (6, 8)),
        info("ccc", (8, 6)),
        info("small", (4, 8)),
        info("t", (6, 8), Role.EMBED),
    ]
    banks = make_banks(infos)
    penalty = CrownQ(banks, infos, settings(**quant))
    assert len(penalty) == 3
    want, grads = 0.0, {}
    for one in infos[:3]:
        w = one.param.detach().clone().requires_grad_()
        term = 0.7 / 12 * (w**2 * step(w.detach())[:, None] ** 2).sum()
        term.backward()
        want, grads[one.name] = want + term.item(), w.grad
    assert penalty.value() == pytest.approx(want, rel=2e-3)
    infos[0].param.grad = torch.ones(6, 8)  # of the loss, and not in the bank
    penalty.add_grads_()
    torch.testing.assert_close(infos[0].param.grad - 1, grads["a"], rtol=3e-3, atol=1e-6)
    for one in infos[1:3]:
        torch.testing.assert_close(one.param.grad, grads[one.name], rtol=3e-3, atol=1e-6)
    assert infos[3].param.grad is None and infos[4].param.grad is None


def test_a_coefficient_of_zero_is_no_penalty():
    assert "coef=0 must be above 0" in CrownQConfig(coef=0).problems()[0]
