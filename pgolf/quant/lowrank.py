"""Low-rank correction of what rounding left over (LQER, PR #1797): W ~ dequant(Q) + A B, A and B stored small.

E = W - dequant(Q); A B is its truncated SVD, with a Hessian's diagonal h that of E diag(sqrt(h)), which is the error
that the layer's outputs see. The `top_k` matrices with the largest error, or gain, get factors; a gain counts what is
left of it after the factors were rounded, and where nothing is, there are no factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np
import torch
from torch import Tensor

from pgolf.quant.config import LowRankConfig
from pgolf.quant.grid import GRIDS, Grid, round_to
from pgolf.quant.records import Record, as_rows, base_of, dequantize, factors_product

LEFT, RIGHT = Grid(-2, 1), Grid(-8, 7)  # of the asymmetric variant: 2 bits and 4 bits
SMALLEST = 2.0**-24  # fp16's smallest step


def correct(
    records: list[Record],
    state: Mapping[str, Tensor],
    cfg: LowRankConfig,
    diagonals: Mapping[str, Tensor] | None = None,
) -> list[Record]:
    """`records` of the weights `state`, the `top_k` of them with factors of what they miss.

    diagonals: {name: mean square of each input (cols,)}, for those that have one.
    """
    worst: list[tuple[float, int, Tensor, Tensor]] = []
    for at, record in enumerate(records):
        if base_of(record.kind) not in GRIDS or len(record.shape) < 2 or not fnmatchcase(record.name, cfg.scope):
            continue
        error = as_rows(state[record.name].detach().to("cpu", torch.float32) - dequantize([record])[record.name])
        weight = _weight((diagonals or {}).get(record.name), error.shape[1])
        worst.append(((error * weight).norm().item(), at, error, weight))
    worst.sort(key=lambda row: -row[0])
    tried = worst if cfg.select == "gain" else worst[: cfg.top_k]
    fixes = []
    for size, at, error, weight in tried:
        parts = factors_of(error, weight, cfg)
        left = ((error - factors_product(parts)) * weight).norm().item()
        fixes.append((size - left, at, parts))
    out = list(records)
    for gain, at, parts in sorted(fixes, key=lambda row: -row[0])[: cfg.top_k]:
        if gain > 0:
            out[at] = replace(out[at], kind=f"{out[at].kind}+lowrank", parts={**out[at].parts, **parts})
    return out


def _weight(diagonal: Tensor | None, cols: int) -> Tensor:
    """sqrt of a Hessian's diagonal (cols,) fp32, mean 1 before the root; ones without. Dead inputs count a little."""
    if diagonal is None:
        return torch.ones(cols)
    h = diagonal.detach().to("cpu", torch.float32)
    return (h / h.mean()).clamp_min(1e-6).sqrt()


def factors_of(error: Tensor, weight: Tensor, cfg: LowRankConfig) -> dict[str, np.ndarray]:
    """error (rows, cols) fp32, weight (cols,) of its columns -> the stored parts of A and B, a component a row."""
    u, size, v = torch.linalg.svd(error * weight, full_matrices=False)
    left, right = (u * size).T[: cfg.rank].contiguous(), (v / weight)[: cfg.rank].contiguous()
    if cfg.factors == "fp16":
        return {"left": left.half().numpy(), "right": right.half().numpy()}
    if cfg.factors == "asym":
        group = cfg.group if right.numel() % cfg.group == 0 else right.shape[1]
        runs = {"left": (left.view(1, -1), LEFT, 1.5), "right": (right.view(-1, group), RIGHT, 7.5)}
    else:
        grid = GRIDS[cfg.factors]
        runs = {"left": (left, grid, float(grid.high)), "right": (right, grid, float(grid.high))}
    out = {}
    for side, shape in (("left", left.shape), ("right", right.shape)):
        rows, grid, reach = runs[side]
        scale = (rows.abs().amax(dim=1) / reach).half().clamp_min(SMALLEST)
        out |= {side: round_to(rows, scale, grid).view(shape).numpy(), f"{side}_scale": scale.numpy()}
    return out
