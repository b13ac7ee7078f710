"""Late quantisation-aware training: puts the export's int6 grid into the forward pass, gradients straight through.

It fills the `quant` slot of linear layers. A module that appears is visible to torch.compile; a flag that flips is not
reliably so: several of the challenge's entries trained with late QAT that never ran for that reason (PR #421, #586).
"""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor, nn

from pgolf.kernels.int6 import int6
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import QuantConfig
from pgolf.quant.policy import kind_of


class FakeQuant(nn.Module):
    """w (out, in) fp32 -> the weight that the artifact will hold, bit for bit, (out, in) fp32."""

    def __init__(self, scale_floor: float):
        super().__init__()
        self.scale_floor = scale_floor

    def forward(self, w: Tensor) -> Tensor:
        return int6(w, scale_floor=self.scale_floor)


@lru_cache
def shared(scale_floor: float) -> FakeQuant:
    """One instance for all slots: it has no state, and torch.compile, which knows modules by identity, then finds the
    graph of an earlier attachment (the warm-up's) again."""
    return FakeQuant(scale_floor)


def names_on_grid(infos: list[ParamInfo], cfg: QuantConfig) -> set[str]:
    """Names of the parameters that training may round to the export's int6 grid."""
    return {
        info.name
        for info in infos
        if info.role in (Role.MATRIX, Role.SIDE_MATRIX) and kind_of(info.role, info.param.numel(), cfg) == "int6"
    }


def attach(model: nn.Module, infos: list[ParamInfo], cfg: QuantConfig) -> int:
    """Fills the `quant` slot of every module whose MATRIX or SIDE_MATRIX `weight` is exported as int6.

    Returns how many slots are filled now; attaching twice changes nothing. Call it outside of compiled code.
    """
    grid = names_on_grid(infos, cfg)
    count = 0
    for name, module in list(model.named_modules()):
        if hasattr(module, "quant") and f"{name}.weight".lstrip(".") in grid:
            module.quant = shared(cfg.scale_floor)
            count += 1
    return count


def detach(model: nn.Module) -> None:
    """Empties every `quant` slot that `attach` filled."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "quant", None), FakeQuant):
            module.quant = None
