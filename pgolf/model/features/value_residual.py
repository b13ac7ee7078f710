"""Value residual: later layers mix in the values of the first one (PR #549, #609)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgolf.model.config import InitConfig, ModelConfig
from pgolf.model.context import Context
from pgolf.model.roles import Role


class ValueResidual(nn.Module):
    """Block 0 leaves its values in the context; the others read them.

    mode "add": v + sigmoid(a) v0, a starts at 0. mode "mix": l0 v0 + l1 v, both start at 0.5.
    """

    roles = {"mix": Role.VECTOR}

    def __init__(self, cfg: ModelConfig, block: int):
        super().__init__()
        self.mode = cfg.attn.value_residual.mode
        self.first = block == 0
        if not self.first:  # block 0 has nothing to mix with; a parameter there would never get a gradient
            self.mix = nn.Parameter(torch.empty(1 if self.mode == "add" else 2))

    @staticmethod
    def on(cfg: ModelConfig, block: int) -> bool:
        return cfg.attn.value_residual is not None

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        if not self.first:
            nn.init.constant_(self.mix, 0.0 if self.mode == "add" else 0.5)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        if self.first:
            ctx.first_value = v
            return q, k, v
        mix = self.mix.to(v.dtype)
        if self.mode == "add":
            return q, k, v + torch.sigmoid(mix) * ctx.first_value
        return q, k, mix[0] * ctx.first_value + mix[1] * v
