"""The front of the network: token embedding with its hashed companions and the smear gate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.kernels._documents import document_reach
from pgolf.kernels.bigram import bigram, bigram_index, shifted, trigram_index
from pgolf.model.config import BigramConfig, InitConfig, ModelConfig, TrigramConfig
from pgolf.model.linear import SideLinear
from pgolf.model.roles import Role


class HashTable(nn.Module):
    """A hashed table and its projection to the model's width: scale * P @ table, (rows, D)."""

    roles = {"table": Role.EMBED, "scale": Role.VECTOR}

    def __init__(self, cfg: BigramConfig | TrigramConfig, dim: int, num_layers: int):
        super().__init__()
        self.table = nn.Parameter(torch.empty(cfg.rows, cfg.dim))
        self.proj = SideLinear(cfg.dim, dim, num_layers=num_layers)
        self.scale = nn.Parameter(torch.empty(()))
        self.scale_init = cfg.scale_init

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.zeros_(self.table)
        nn.init.constant_(self.scale, self.scale_init)

    def rows(self, dtype: torch.dtype) -> Tensor:
        return self.proj(self.table.to(dtype)) * self.scale.to(dtype)


class Trigram(HashTable):
    """Trigram table of its own: row (17911 x_{t-2} + 36313 x_{t-1} + 27191 x_t) mod (rows - 1). (B, T) -> (B, T, D)."""

    def index(self, ids: Tensor, reach: Tensor | None = None) -> Tensor:
        """The row that each token takes; x_{t-1}, x_{t-2} are 0 where `reach`, the op's, ends."""
        before = 17911 * shifted(ids, 2, reach) + 36313 * shifted(ids, 1, reach)
        return (before + 27191 * ids) % (self.table.shape[0] - 1)

    def forward(self, ids: Tensor, dtype: torch.dtype, reach: Tensor | None = None) -> Tensor:
        return F.embedding(self.index(ids, reach), self.rows(dtype))


class Smear(nn.Module):
    """Owns the gate's logits; the op applies them."""

    roles = {"gate": Role.VECTOR}

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))
        self.gate_init = init

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.constant_(self.gate, self.gate_init)


class Embed(nn.Module):
    """ids (B, T) -> the normed, smeared stream (B, T, D) that blocks start from and mix back in.

    Hashes and smear look back inside a token's own document only: where cu_seqlens has a start is as at position 0.
    """

    roles = {"weight": Role.EMBED}

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        e, layers = cfg.embed, cfg.plan.num_layers
        self.weight = nn.Parameter(torch.empty(e.vocab_size, cfg.dim))
        self.std = e.tied_init_std if e.tied else 1.0
        self.bigram = HashTable(e.bigram, cfg.dim, layers) if e.bigram else None
        self.trigram = Trigram(e.trigram, cfg.dim, layers) if e.trigram else None
        self.smear = Smear(cfg.dim, e.smear.init) if e.smear else None
        self.hash = e.bigram.hash if e.bigram else "xor"
        self.shared_trigram = e.bigram is not None and e.bigram.trigram
        self.eps = cfg.norm_eps

    def init_(self, cfg: InitConfig, gen: torch.Generator) -> None:
        nn.init.normal_(self.weight, std=self.std, generator=gen)

    def table_rows(self, ids: Tensor, cu_seqlens: Tensor | None = None) -> Iterator[tuple[HashTable, Tensor]]:
        """Each hashed table with the rows that the tokens `ids` take from it; a table may come twice."""
        reach = None if cu_seqlens is None else document_reach(cu_seqlens, *ids.shape)
        if self.bigram is not None:
            rows = self.bigram.table.shape[0]
            yield self.bigram, bigram_index(ids, rows, self.hash, reach)
            if self.shared_trigram:
                yield self.bigram, trigram_index(ids, rows, reach)
        if self.trigram is not None:
            yield self.trigram, self.trigram.index(ids, reach)

    def forward(self, ids: Tensor, dtype: torch.dtype, cu_seqlens: Tensor | None = None) -> Tensor:
        reach = None if cu_seqlens is None else document_reach(cu_seqlens, *ids.shape)
        return bigram(
            ids,
            self.weight.to(dtype),
            None if self.bigram is None else self.bigram.rows(dtype),
            hash=self.hash,
            trigram=self.shared_trigram,
            extra=None if self.trigram is None else self.trigram(ids, dtype, reach),
            gate=None if self.smear is None else self.smear.gate,
            reach=reach,
            eps=self.eps,
        )
