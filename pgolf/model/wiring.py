"""How sublayers, skips and blocks are joined. Every join is the `residual` op, through `Stream`."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pgolf.kernels.residual import rms_norm
from pgolf.model.attention import Attention
from pgolf.model.config import InitConfig, ModelConfig
from pgolf.model.context import Context
from pgolf.model.mlp import ACTIVATIONS
from pgolf.model.roles import Role
from pgolf.model.stream import Stream


class Block(nn.Module):
    """u = m0 x + m1 x0;  h = l0 u + a Attn(norm(u));  y = l1 h + b Mlp(norm(h)).

    m (2, D) starts at (1, 0), a and b (D,) at 1; l0, l1 are 1 unless residual lambdas are on. With fold_scales a and b
    are multiplied into the rows of the output projections: the same numbers but for rounding.

    Slots, `None` or a module: `attn_adapter` and `mlp_adapter` add a path beside the whole sublayer, from its normed
    input to its output.
    """

    roles = {
        "attn_scale": Role.VECTOR,
        "mlp_scale": Role.VECTOR,
        "resid_mix": Role.VECTOR,
        "resid_lambda": Role.RESID_LAMBDA,
    }

    def __init__(self, cfg: ModelConfig, index: int, fold_scales: bool = False):
        super().__init__()
        self.block_index = index
        self.attn = Attention(cfg, index)
        self.mlp = ACTIVATIONS[cfg.mlp.activation](cfg)
        self.register_module("attn_adapter", None)
        self.register_module("mlp_adapter", None)
        self.attn_scale = nn.Parameter(torch.empty(cfg.dim))
        self.mlp_scale = nn.Parameter(torch.empty(cfg.dim))
        self.resid_mix = nn.Parameter(torch.empty(2, cfg.dim))
        lambdas = cfg.wiring.resid_lambdas
        self.resid_lambda = nn.Parameter(torch.empty(2), requires_grad=not lambdas.frozen) if lambdas else None
        self.lambda_init = lambdas.init if lambdas else 1.0
        self.sandwich = cfg.wiring.sandwich_norm
        self.norm_scale = 1.0 / math.sqrt(index + 1) if cfg.wiring.ln_scale else 1.0
        self.eps = cfg.norm_eps
        self.folded = fold_scales
        if fold_scales:
            self.attn.out.fold_(self.attn_scale)
            self.mlp.down.fold_(self.mlp_scale)

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.ones_(self.attn_scale)
        nn.init.ones_(self.mlp_scale)
        with torch.no_grad():
            self.resid_mix[0].fill_(1.0)
            self.resid_mix[1].zero_()
        if self.resid_lambda is not None:
            nn.init.constant_(self.resid_lambda, self.lambda_init)

    def lambdas(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.resid_lambda is None else (self.resid_lambda[0], self.resid_lambda[1])

    def scales(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.folded else (self.attn_scale, self.mlp_scale)

    def enter(self, x: Stream, x0: Tensor, keep: bool) -> tuple[Tensor | None, Tensor, Tensor]:
        """(x summed, or None without `keep`; u; norm of u)."""
        m0, m1 = self.resid_mix[0], self.resid_mix[1]
        return x.mixed(m0, x0, m1, keep=keep, eps=self.eps, norm_scale=self.norm_scale)

    def attend(self, n: Tensor, ctx: Context) -> Tensor:
        """The attention sublayer with what is beside it, (B, T, D)."""
        y = self.attn(n, ctx)
        return y if self.attn_adapter is None else y + self.attn.out.scaled(self.attn_adapter(n))

    def feed(self, n: Tensor) -> Tensor:
        """The MLP sublayer with what is beside it, (B, T, D)."""
        y = self.mlp(n)
        return y if self.mlp_adapter is None else y + self.mlp.down.scaled(self.mlp_adapter(n))

    def forward(self, u: Tensor, n: Tensor, ctx: Context) -> Stream:
        (l0, l1), (a_scale, b_scale) = self.lambdas(), self.scales()
        a = self.attend(n, ctx)
        if self.sandwich:
            a = rms_norm(a, self.eps)
        h, n = Stream((u, a), (l0, a_scale)).normed(self.eps, self.norm_scale)
        return Stream((h, self.feed(n)), (l1, b_scale))


class ParallelBlock(Block):
    """y = l0 u + a Attn(n) + b Mlp(n), n = norm(u): both sublayers read the same normed input."""

    def __init__(self, cfg: ModelConfig, index: int, fold_scales: bool = False):
        super().__init__(cfg, index, fold_scales)
        if self.resid_lambda is not None:  # one add, one lambda
            self.resid_lambda = nn.Parameter(torch.empty(1), requires_grad=self.resid_lambda.requires_grad)

    def lambdas(self) -> tuple[Tensor | None, Tensor | None]:
        return (None, None) if self.resid_lambda is None else (self.resid_lambda[0], None)

    def forward(self, u: Tensor, n: Tensor, ctx: Context) -> Stream:
        return Stream((u, self.attend(n, ctx), self.feed(n)), (self.lambdas()[0], *self.scales()))


class Skips(nn.Module):
    """U-Net joins. Plain: x + w_j skip. Gated: G x + (1-G) (w_j skip), G = sigmoid(gate_j).

    w starts at 1, gate at 0.
    """

    roles = {"weight": Role.VECTOR, "gate": Role.VECTOR}

    def __init__(self, count: int, dim: int, gated: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, dim))
        self.gate = nn.Parameter(torch.empty(count, dim)) if gated else None

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.ones_(self.weight)
        if self.gate is not None:
            nn.init.zeros_(self.gate)

    def forward(self, x: Stream, skip: Tensor, row: int) -> Stream:
        if self.gate is None:
            return x.plus(skip, self.weight[row])
        g = torch.sigmoid(self.gate[row])
        return x.times(g).plus(skip, (1 - g) * self.weight[row])


class Backout(nn.Module):
    """x - beta * (output of an earlier layer), before the final norm (PR #1130)."""

    roles = {"beta": Role.VECTOR}

    def __init__(self, init: float):
        super().__init__()
        self.beta = nn.Parameter(torch.empty(()))
        self.beta_init = init

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.constant_(self.beta, self.beta_init)

    def forward(self, x: Stream, cached: Tensor) -> Stream:
        return x.plus(cached, -self.beta)
