"""The MLP sublayer: every activation of `ACTIVATIONS`, gated or not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.kernels.mlp import ACTIVATIONS as POINTWISE
from pgolf.kernels.mlp import mlp
from pgolf.model.config import InitConfig, ModelConfig
from pgolf.model.linear import Linear
from pgolf.model.roles import Role


class Mlp(nn.Module):
    """down(act(up(x))), the activation pointwise. (B, T, D) -> (B, T, D)."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        hidden = cfg.mlp.hidden_width(cfg.dim)
        self.up = Linear(cfg.dim, hidden)
        self.down = Linear(hidden, cfg.dim, zero=True)
        self.activation, self.slope = cfg.mlp.activation, cfg.mlp.leaky_slope

    def forward(self, x: Tensor) -> Tensor:
        if self.up.adapter is None and self.down.adapter is None:
            up, down = self.up.effective_weight(x.dtype), self.down.effective_weight(x.dtype)
            return mlp(x, up, down, activation=self.activation, slope=self.slope)
        return self.down(POINTWISE[self.activation](self.up(x), self.slope))  # an adapter sits inside the fused region


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        hidden = cfg.mlp.hidden_width(cfg.dim)
        self.gate = Linear(cfg.dim, hidden)
        self.up = Linear(cfg.dim, hidden)
        self.down = Linear(hidden, cfg.dim, zero=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class StarRelu(nn.Module):
    """down(s * relu(up(x))^2 + b), s and b learned per hidden unit."""

    roles = {"scale": Role.VECTOR, "bias": Role.VECTOR}

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        hidden = cfg.mlp.hidden_width(cfg.dim)
        self.up = Linear(cfg.dim, hidden)
        self.down = Linear(hidden, cfg.dim, zero=True)
        self.scale = nn.Parameter(torch.empty(hidden))
        self.bias = nn.Parameter(torch.empty(hidden))

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.ones_(self.scale)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square() * self.scale.to(x.dtype) + self.bias.to(x.dtype))


class StarReluGlu(SwiGlu):
    """down(relu(gate(x))^2 * up(x))."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.gate(x)).square() * self.up(x))


ACTIVATIONS: dict[str, type[nn.Module]] = {
    **dict.fromkeys(POINTWISE, Mlp),
    "swiglu": SwiGlu,
    "star_relu": StarRelu,
    "star_relu_glu": StarReluGlu,
}
