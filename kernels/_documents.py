"""Packed documents: what `cu_seqlens` says of each token.

cu_seqlens (n+1,) int32, ascending: where documents start in the flattened B * T tokens, and where the last one ends.
Equal neighbours are documents of no token, so that a list can be filled up to a constant length with B * T. Rows end
documents too. Whatever the numbers, what is returned here points inside a token's own row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_bounds(cu_seqlens: Tensor, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """(B T,) int32 each: first position of a token's document inside its row, and the position after its last."""
    cu_seqlens = cu_seqlens.contiguous()
    at = torch.arange(batch * length, device=cu_seqlens.device, dtype=torch.int32)
    document = torch.searchsorted(cu_seqlens, at, right=True)
    edges = torch.cat([cu_seqlens.new_zeros(1), cu_seqlens, cu_seqlens.new_full((1,), batch * length)])
    position, row = at % max(length, 1), at - at % max(length, 1)
    start = (edges[document] - row).clamp(min=0).minimum(position)  # memory-safe for any contents of cu_seqlens
    end = (edges[document + 1] - row).clamp(max=length).maximum(position + 1)
    return start.int(), end.int()


def document_reach(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, T) int32: how many tokens of its own document lie before each one in its row."""
    start, _ = document_bounds(cu_seqlens, batch, length)
    return torch.arange(length, device=start.device, dtype=torch.int32) - start.view(batch, length)
