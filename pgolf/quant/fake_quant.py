"""Late quantisation-aware training: puts the export's grids into the forward pass, gradients straight through.

It fills the `quant` slot of linear layers. A module that appears is visible to torch.compile; a flag that flips is not
reliably so: several of the challenge's entries trained with late QAT that never ran for that reason (PR #421, #586).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgolf.errors import ConfigError
from pgolf.kernels.int6 import int6_cast
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import SEARCHES, QuantConfig
from pgolf.quant.grid import GRIDS
from pgolf.quant.policy import Storage, storage_of


class Rounding(NamedTuple):
    """The arguments of `int6_cast` that make it round as the export does."""

    qmax: int
    qmin: int
    scale_floor: float
    clip: float  # quantile of a row's |w|; 1 is the maximum


class FakeQuant(nn.Module):
    """w (out, in) fp32 -> the weight that the artifact will hold, bit for bit, (out, in) fp32."""

    def __init__(self, rounding: Rounding):
        super().__init__()
        self.rounding = rounding

    def forward(self, w: Tensor) -> Tensor:
        rounded = int6_cast(w.detach(), quantize=True, dtype=torch.float32, **self.rounding._asdict())
        return rounded + (w - w.detach())  # exactly 0, and carries the gradient


@lru_cache
def shared(rounding: Rounding) -> FakeQuant:
    """One instance for all slots of a kind: it has no state, and torch.compile, which knows modules by identity, then
    finds the graph of an earlier attachment (the warm-up's) again."""
    return FakeQuant(rounding)


def roundings(infos: list[ParamInfo], cfg: QuantConfig) -> dict[str, Rounding]:
    """{name: rounding} of the parameters that training may round to the export's grid.

    A search for the best clip has not happened while training: its rows then go by their maximum, one of the clips that
    it tries. ConfigError when late QAT is on and a parameter's clip is neither.
    """
    out = {}
    for info, storage in zip(infos, storage_of(infos, cfg).values(), strict=True):
        if info.role not in (Role.MATRIX, Role.SIDE_MATRIX) or storage.kind not in GRIDS:
            continue
        if found := _rounding(storage, cfg.scale_floor):
            out[info.name] = found
        elif cfg.late_qat:
            raise ConfigError(
                f"quant.late_qat cannot round {info.name} as the export does, which clips by {storage.clip.rule}:"
                " give it max or a quantile in quant.overrides, or set LATE_QAT_THRESHOLD=0"
            )
    return out


def _rounding(storage: Storage, floor: float) -> Rounding | None:
    quantiles = {"quantile": storage.clip.value, **dict.fromkeys(("max", *SEARCHES), 1.0)}
    if storage.clip.rule not in quantiles:
        return None
    grid = GRIDS[storage.kind]
    return Rounding(grid.high, grid.low, floor, quantiles[storage.clip.rule])


def attach(model: nn.Module, infos: list[ParamInfo], cfg: QuantConfig) -> int:
    """Fills the `quant` slot of every module whose MATRIX or SIDE_MATRIX `weight` is exported on a grid.

    Returns how many slots are filled now; attaching twice changes nothing. Call it outside of compiled code.
    """
    found = roundings(infos, cfg)
    count = 0
    for name, module in list(model.named_modules()):
        rounding = found.get(f"{name}.weight".lstrip("."))
        if hasattr(module, "quant") and rounding:
            module.quant = shared(rounding)
            count += 1
    return count


def detach(model: nn.Module) -> None:
    """Empties every `quant` slot that `attach` filled."""
    for module in list(model.modules()):
        if isinstance(getattr(module, "quant", None), FakeQuant):
            module.quant = None
