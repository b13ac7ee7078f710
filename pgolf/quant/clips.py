"""How far a row's grid reaches: the clip rules of `pgolf.quant.config.Clip` on rows of weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.kernels.int6 import row_peak
from pgolf.quant.config import SEARCHES, Clip

# GPTQ-lite (PR #414, PR #549); 15 candidates were no better there.
SEARCHED = (Clip("quantile", 0.999), Clip("quantile", 0.9995), Clip("quantile", 0.9999), Clip("quantile", 0.99999),
            Clip("max"))  # fmt: skip


def _clip(rows: Tensor, clip: Clip) -> Tensor:
    if clip.rule == "sd":
        return clip.value * rows.std(dim=1, correction=1)
    if clip.rule == "mean":
        return rows.abs().mean(dim=1)
    return row_peak(rows, clip.value if clip.rule == "quantile" else 1.0)


def clips_of(rows: Tensor, clip: Clip) -> list[Tensor]:
    """rows (rows, cols) fp32 -> what to try as clips, each (rows,) fp32; one unless `clip` is a search."""
    tried = SEARCHED if clip.rule in SEARCHES else (clip,)
    return [_clip(rows, one) for one in tried]


def least(errors: list[Tensor], clip: Clip) -> Tensor:
    """errors: for each try the squared error of each row, (rows,) -> the number of the try to keep, (rows,) int64."""
    table = torch.stack(errors).double()
    if clip.rule != "best-row":
        table = table.sum(dim=1, keepdim=True).expand_as(table)
    return table.argmin(dim=0)
