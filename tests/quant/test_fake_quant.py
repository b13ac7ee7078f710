"""attach fills the slots of what the export stores as int6, and no others; the forward changes by exactly that grid."""

import torch
import torch.nn.functional as F
from torch import nn

from pgolf.model.roles import Role, roles_of
from pgolf.quant.config import QuantConfig
from pgolf.quant.fake_quant import FakeQuant, attach, detach
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import dequantize


class Linear(nn.Module):
    roles = {"weight": Role.MATRIX}

    def __init__(self, n_in, n_out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in))
        self.quant = None

    def forward(self, x):
        return F.linear(x, self.weight if self.quant is None else self.quant(self.weight))


class Side(Linear):
    roles = {"weight": Role.SIDE_MATRIX}


class Head(Linear):
    roles = {"weight": Role.HEAD}


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.big, self.small, self.side, self.head = Linear(16, 16), Linear(16, 4), Side(4, 40), Head(40, 50)

    def forward(self, x):
        return self.head(self.side(self.small(self.big(x))))


CFG = QuantConfig(keep_numel=64)  # `small` has exactly 64 elements


def test_attaches_to_what_the_export_quantises_as_int6():
    model = Toy()
    assert attach(model, roles_of(model), CFG) == 2
    filled = {name for name, m in model.named_modules() if isinstance(getattr(m, "quant", None), FakeQuant)}
    assert filled == {"big", "side"}
    assert attach(model, roles_of(model), CFG) == 2  # idempotent


def test_nothing_to_attach_when_the_export_has_no_grid():
    model = Toy()
    assert attach(model, roles_of(model), QuantConfig(matrix="fp16", keep_numel=0)) == 0
    assert not any(isinstance(m, FakeQuant) for m in model.modules())


def test_module_that_is_the_root():
    layer = Linear(16, 16)
    assert attach(layer, roles_of(layer), CFG) == 1


def test_forward_is_that_of_the_reloaded_weights_and_detach_restores_it():
    model, x = Toy(), torch.randn(3, 16)
    infos = roles_of(model)
    keys, plain = list(model.state_dict()), model(x)
    attach(model, infos, CFG)
    assert list(model.state_dict()) == keys  # checkpoints do not change
    exported = dequantize(quantize_state(model.state_dict(), infos, CFG))
    for layer, name in ((model.big, "big.weight"), (model.side, "side.weight")):
        assert torch.equal(layer.quant(layer.weight), exported[name])
    assert not torch.equal(model(x), plain)
    detach(model)
    assert torch.equal(model(x), plain) and not any(isinstance(m, FakeQuant) for m in model.modules())


def test_gradient_reaches_the_fp32_weight_with_the_floor_of_the_config():
    model = Toy()
    attach(model, roles_of(model), QuantConfig(keep_numel=64, scale_floor=1.0))
    assert model.big.quant.rounding.scale_floor == 1.0
    x = torch.randn(5, 16)
    model.big(x).sum().backward()
    torch.testing.assert_close(model.big.weight.grad, x.sum(0).expand(16, 16))  # as if there were no rounding
