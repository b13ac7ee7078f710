"""The one linear layer: fp32 weight, cast to the activations' dtype at use, with two slots for how it is used."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.model.config import InitConfig
from pgolf.model.roles import Role


class Linear(nn.Module):
    """y = x W^T, no bias. W (out, in) fp32.

    Slots, both `None` or a module: `quant` maps the weight (fake quantisation), `adapter` adds a low-rank path. Putting
    a module in a slot is visible to torch.compile; flipping a Python flag is not reliably so. Whoever computes the
    product elsewhere, fused with others, puts `adapted` behind it.

    cast: the compute weight, when somebody keeps one outside the graph (`pgolf.quant.weight_cast`); it then is what the
    product sees, fake quantisation and row scale included, and what collects the gradient.
    """

    roles = {"weight": Role.MATRIX}

    def __init__(self, in_features: int, out_features: int, *, zero: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.zero = zero
        # registered, so that an emptied slot looks to torch.compile like one that was never filled: no third graph
        self.register_module("quant", None)
        self.register_module("adapter", None)
        self.register_buffer("cast", None, persistent=False)
        self.row_scale: tuple[nn.Parameter, ...] = ()  # another module's parameter: in a tuple it is not registered

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        if self.zero:
            nn.init.zeros_(self.weight)
        elif cfg.kind == "orthogonal":
            nn.init.orthogonal_(self.weight, generator=gen)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5), generator=gen)

    def effective_weight(self, dtype: torch.dtype) -> Tensor:
        """The weight as the product sees it: through the quant slot, rows scaled, in `dtype`."""
        if self.cast is not None:
            return self.cast.to(dtype)
        weight = self.weight if self.quant is None else self.quant(self.weight)
        for scale in self.row_scale:
            weight = weight * scale[:, None]
        return weight.to(dtype)

    def fold_(self, scale: nn.Parameter) -> None:
        """From here on y's channels are scaled by `scale` (out,), through the rows of the weight."""
        self.row_scale = (scale,)

    def scaled(self, extra: Tensor) -> Tensor:
        """What joins the product's output, times what scales the product's rows."""
        for scale in self.row_scale:
            extra = extra * scale.to(extra.dtype)
        return extra

    def adapted(self, y: Tensor, x: Tensor) -> Tensor:
        """y, the product of x and the weight, with what the adapter adds."""
        return y if self.adapter is None else y + self.scaled(self.adapter(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.adapted(F.linear(x, self.effective_weight(x.dtype)), x)


class SideLinear(Linear):
    """Projection of a hashed or value embedding. Never zero: table and projection both zero could never train."""

    roles = {"weight": Role.SIDE_MATRIX}

    def __init__(self, in_features: int, out_features: int, *, num_layers: int):
        super().__init__(in_features, out_features)
        self.side_scale = 1.0 / math.sqrt(2 * num_layers)

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.orthogonal_(self.weight, generator=gen)
        if cfg.side_scale:
            with torch.no_grad():
                self.weight.mul_(self.side_scale)


class HeadLinear(Linear):
    """Untied output head, zero at the start: an untrained model predicts the uniform distribution."""

    roles = {"weight": Role.HEAD}

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, zero=True)
