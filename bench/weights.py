"""Weights that look trained, without training; no pytest here, a report imports this."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def look_trained_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Adds to every parameter normal noise whose scale differs by row, log-normally, as trained rows do; nothing stays
    zero. Codecs find in it what they find in trained weights: no repeats, uneven rows."""
    gen = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        rows = p.shape[:1] + (1,) * (p.ndim - 1)
        scale = 0.02 * torch.exp(0.5 * torch.randn(rows, generator=gen))
        p.add_((scale * torch.randn(p.shape, generator=gen)).to(p.dtype))
    return model
