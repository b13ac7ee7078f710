"""residual: weighted sum of streams, then RMS norm.

    out   = sum_i w_i * t_i                      (B, T, D), dtype of t_0
    normed = out / sqrt(mean(out^2) + eps) * norm_scale

Every join of the network is this one op: input mix (x, x0), attention add, MLP add, U-Net skip. The norm is taken of
the *rounded* sum that is returned, so forward and backward see the same tensor; the mean is accumulated in fp32.

terms: 1 to 4 tensors (B, T, D), one dtype. weights: per term `None` (1), a (D,) vector or a scalar tensor, fp32.
Returns (out, normed); `normed` is None with `normalize=False`.
Raises ValueError when the shapes, dtypes or counts do not agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, no gain; mean in fp32, result in x's dtype."""
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def residual_ref(
    terms: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    *,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
    normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Reference of `residual`, in plain torch."""
    out = None
    for term, weight in zip(terms, weights, strict=True):
        if out is None:
            out = term if weight is None else term * weight.to(term.dtype)
        elif weight is None:
            out = out + term
        else:
            out = torch.addcmul(out, term, weight.to(term.dtype))
    if not normalize:
        return out, None
    normed = rms_norm(out, eps)
    return out, normed if norm_scale == 1.0 else normed * norm_scale


def residual(
    terms: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    *,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
    normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See the module's contract."""
    if not 1 <= len(terms) <= 4 or len(weights) != len(terms):
        raise ValueError(f"residual: got {len(terms)} terms and {len(weights)} weights, expected 1 to 4 pairs")
    first = terms[0]
    for i, (term, weight) in enumerate(zip(terms, weights, strict=True)):
        if term.shape != first.shape or term.dtype != first.dtype:
            raise ValueError(
                f"residual: term {i} is {tuple(term.shape)} {term.dtype}, expected {tuple(first.shape)} {first.dtype}"
            )
        if weight is not None and weight.shape not in ((), (first.shape[-1],)):
            raise ValueError(f"residual: weight {i} is {tuple(weight.shape)}, expected () or ({first.shape[-1]},)")
    return residual_ref(terms, weights, norm_scale=norm_scale, eps=eps, normalize=normalize)
