"""The attention sublayer: packed QKV projection, q/k preparation, qkv features, attention op, output projection."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.kernels.attention import attention
from pgolf.kernels.qk_prep import qk_prep
from pgolf.model.config import InitConfig, ModelConfig, RopeConfig
from pgolf.model.context import Context
from pgolf.model.features.value_embed import ValueEmbed
from pgolf.model.features.value_residual import ValueResidual
from pgolf.model.linear import Linear
from pgolf.model.roles import Role


def rope_base(cfg: RopeConfig, rotated: int, train_length: int) -> float:
    """The rotary base after NTK scaling to the training length (r/(r-2) exponent; r = 2 has no scaling)."""
    if cfg.ntk_reference and train_length > cfg.ntk_reference and rotated > 2:
        return cfg.base * (train_length / cfg.ntk_reference) ** (rotated / (rotated - 2))
    return cfg.base


def rope_tables(cfg: RopeConfig, head_dim: int, train_length: int, length: int, device=None) -> tuple[Tensor, Tensor]:
    """cos, sin (length, r/2) fp32 of the angles t * base^(-2i/r)."""
    rotated = cfg.dims or head_dim
    exponent = torch.arange(0, rotated, 2, dtype=torch.float64, device=device) / rotated
    frequency = rope_base(cfg, rotated, train_length) ** -exponent
    angle = torch.arange(length, dtype=torch.float64, device=device)[:, None] * frequency
    return angle.cos().float(), angle.sin().float()


class Attention(nn.Module):
    """(B, T, D) normed input -> (B, T, D)."""

    roles = {"gain": Role.VECTOR}

    def __init__(self, cfg: ModelConfig, block: int):
        super().__init__()
        self.heads, self.kv_heads, self.eps = cfg.attn.num_heads, cfg.attn.num_kv_heads, cfg.norm_eps
        self.gain_init, self.bound = cfg.attn.qk_gain_init, math.sqrt(cfg.head_dim)
        kv_width = self.kv_heads * cfg.head_dim
        self.q = Linear(cfg.dim, cfg.dim)  # three weights, one product: Muon orthogonalises q, k and v on their own
        self.k = Linear(cfg.dim, kv_width)
        self.v = Linear(cfg.dim, kv_width)
        self.out = Linear(cfg.dim, cfg.dim, zero=True)
        self.gain = nn.Parameter(torch.empty(self.heads))
        self.xsa = cfg.attn.xsa is not None and block >= cfg.plan.num_layers - cfg.attn.xsa.last_n
        self.qkv_features = nn.ModuleDict(
            {name: cls(cfg, block) for name, cls in QKV_FEATURES.items() if cls.on(cfg, block)}
        )

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.constant_(self.gain, self.gain_init)

    def project(self, x: Tensor) -> Tensor:
        """(B, T, (H + 2K) d): q, k, v side by side, one GEMM; what adapters of the three add comes behind it."""
        parts = (self.q, self.k, self.v)
        qkv = F.linear(x, torch.cat([p.effective_weight(x.dtype) for p in parts]))
        if all(p.adapter is None for p in parts):
            return qkv
        cut = qkv.split([len(p.weight) for p in parts], dim=-1)
        return torch.cat([p.adapted(y, x) for p, y in zip(parts, cut, strict=True)], dim=-1)

    def forward(self, x: Tensor, ctx: Context) -> Tensor:
        qkv = self.project(x)
        sizes = {"num_heads": self.heads, "num_kv_heads": self.kv_heads, "eps": self.eps}
        q, k, v = qk_prep(qkv, self.gain, ctx.cos, ctx.sin, **sizes)
        for feature in self.qkv_features.values():
            q, k, v = feature(q, k, v, ctx)
        bound = self.gain.detach().abs() * self.bound  # |q| <= gain sqrt(d) and |k| <= sqrt(d), divided by sqrt(d)
        y = attention(q, k, v, xsa=self.xsa, cu_seqlens=ctx.cu_seqlens, logit_bound=bound)
        return self.out(y.flatten(2))


QKV_FEATURES: dict[str, type[nn.Module]] = {"value_embed": ValueEmbed, "value_residual": ValueResidual}
