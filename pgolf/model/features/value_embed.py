"""Value embeddings: a token's own learned value, added to the values of some layers (PR #401 and later records)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.model.config import InitConfig, ModelConfig
from pgolf.model.context import Context
from pgolf.model.linear import SideLinear
from pgolf.model.roles import Role


class ValueTable(nn.Module):
    """The table, projection and scale that all listed layers share: ids (B, T) -> (B, T, K, d)."""

    roles = {"table": Role.EMBED, "scale": Role.VECTOR}

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.shape = (cfg.attn.num_kv_heads, cfg.head_dim)
        self.table = nn.Parameter(torch.empty(cfg.embed.vocab_size, cfg.attn.value_embed.dim))
        self.proj = SideLinear(
            cfg.attn.value_embed.dim, cfg.attn.num_kv_heads * cfg.head_dim, num_layers=cfg.plan.num_layers
        )
        self.scale = nn.Parameter(torch.empty(()))

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.normal_(self.table, std=0.01, generator=gen)
        nn.init.constant_(self.scale, 0.1)

    def forward(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.proj(self.table.to(dtype)) * self.scale.to(dtype)  # V rows are fewer than tokens: project those
        return F.embedding(ids, rows).unflatten(-1, self.shape)


class ValueEmbed(nn.Module):
    """A layer's share: v + s_layer * value_embed."""

    roles = {"scale": Role.VECTOR}

    def __init__(self, cfg: ModelConfig, block: int):
        super().__init__()
        self.scale = nn.Parameter(torch.empty(()))

    @staticmethod
    def on(cfg: ModelConfig, block: int) -> bool:
        return cfg.attn.value_embed is not None and block in cfg.attn.value_embed.layers

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.ones_(self.scale)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        return q, k, v + ctx.value_embed * self.scale.to(v.dtype)
