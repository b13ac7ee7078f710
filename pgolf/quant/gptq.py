"""GPTQ on one matrix: columns are rounded one after the other, and those still to come make good the error so far.

    H = mean x x^T over the layer's inputs;  H + damp mean(diag H) I = its damped form, columns by falling H_ii
    U upper, U^T U = H^-1;  for i = 0, 1, ...:  q_i = round(w_i / s);  e = (w_i - s q_i) / U_ii;  w_j -= e U_ij, j > i

which minimises sum_r e_r^T H e_r greedily (Frantar et al. 2022). U_ij / U_ii are the optimal corrections given that
columns before i are final. The variant "v7" (PR #401 v7) takes rising H_ii and H^-1 itself in place of U: it corrects
as if no column were final yet, and so too much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.quant.config import GptqConfig
from pgolf.quant.grid import Grid, steps_of


def quantize(
    w: Tensor, h: Tensor, grid: Grid, clips: list[Tensor], floor: float, cfg: GptqConfig
) -> tuple[Tensor, Tensor]:
    """w (R, C) and h (C, C), floats on one device -> integers (R, C) int8, steps (R,) fp16.

    clips: candidates for the rows' clip, (R,) each; all are tried, and `cfg.clip_by` says which error decides.
    Raises ValueError on a Hessian that is not finite or a row without a finite step.
    """
    order, factor = inverse_factor(h, cfg)
    steps = torch.cat([steps_of(clip, grid, floor) for clip in clips])
    # candidates are more rows: rows do not see each other
    q = round_columns(w[:, order].repeat(len(clips), 1), factor.to(w.dtype), steps, grid, cfg.block)
    q = q[:, torch.argsort(order)].view(len(clips), *w.shape)
    steps = steps.view(len(clips), -1)
    error = w - q.to(w.dtype) * steps.to(w.dtype)[..., None]
    best = CLIP_BY[cfg.clip_by](error, h.to(w.dtype)).argmin(0)
    rows = torch.arange(len(w), device=w.device)
    return q[best, rows], steps[best, rows]


def inverse_factor(h: Tensor, cfg: GptqConfig) -> tuple[Tensor, Tensor]:
    """h (C, C) -> the order of its columns, (C,) int64, and the factor of its damped inverse in that order, (C, C).

    Only the upper triangle counts. In fp64: a Hessian of few tokens is nearly singular, and this is no matter of time.
    """
    if not torch.isfinite(h).all():
        raise ValueError("inf or NaN in the Hessian")
    diagonal = h.diagonal().double()
    order = torch.argsort(diagonal, descending=cfg.variant == "full", stable=True)
    damped = h.double()[order][:, order]
    # inputs that are all zero leave a Hessian of zeros, for which any damping means plain rounding
    damped.diagonal().add_(cfg.damp * diagonal.mean().clamp_min(1e-12))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return order, torch.linalg.cholesky(inverse, upper=True) if cfg.variant == "full" else inverse


def round_columns(w: Tensor, factor: Tensor, step: Tensor, grid: Grid, block: int) -> Tensor:
    """w (N, C) in the order of `factor` (C, C), step (N,) fp16 -> integers (N, C) int8.

    Columns behind the block of `block` at hand are corrected by one product at its end: the same sums, in fewer passes
    over the matrix.
    """
    todo, s = w.T.clone(memory_format=torch.contiguous_format), step.to(w.dtype)  # a column is a contiguous row
    q = torch.empty(todo.shape, dtype=torch.int8, device=w.device)
    for begin in range(0, len(todo), block):
        end = min(begin + block, len(todo))
        errors = torch.empty_like(todo[begin:end])
        for i in range(begin, end):
            rounded = torch.round(todo[i] / s).clamp_(grid.low, grid.high)
            q[i] = rounded.to(torch.int8)
            errors[i - begin] = (todo[i] - rounded * s) / factor[i, i]
            todo[i + 1 : end].addr_(factor[i, i + 1 : end], errors[i - begin], alpha=-1)
        todo[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return q.T


# Errors (K, R, C) of K candidates, h (C, C) -> what they cost, (K, R).
CLIP_BY = {
    "hessian": lambda error, h: ((error @ h) * error).sum(-1),
    "rows": lambda error, h: error.square().sum(-1),
    "matrix": lambda error, h: error.square().sum((-2, -1))[:, None].expand(error.shape[:2]),
}
