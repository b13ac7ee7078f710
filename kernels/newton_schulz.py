"""newton_schulz: the nearest semi-orthogonal matrix, roughly, by a quintic iteration (Muon's orthogonalisation).

    X_0 = G / (||G||_F + eps)
    A = X X^T;  X <- a X + (b A + c A^2) X,   (a, b, c) = (3.4445, -4.7750, 2.0315), `steps` times

The coefficients trade accuracy for speed: singular values of at least 0.002 ||G||_F end between 0.68 and 1.21 after 5
steps, not at 1. Smaller ones end below that, at up to 486 times (3.4445^5) their share of the norm. Zero stays zero.

g (n, r, c) or (r, c), any float dtype -> the same shape and dtype, contiguous. Matrices of a batch do not mix. The
shorter side is multiplied out, so A is min(r, c) square. The norm is taken in at least fp32; the iteration runs in
`compute_dtype`: bf16 on CUDA (products accumulate in fp32), at least fp32 elsewhere, because a CPU's bf16 matmul is
some 70 times slower than its fp32 one. Error against fp64, as a share of the result's norm: bf16 1.5 %, fp32 2e-6.
Not differentiable by intent. Raises ValueError on fewer than 2 or more than 3 axes and on steps < 1.
Source: Muon (K. Jordan 2024); Parameter Golf's baseline optimiser.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz_ref(g: Tensor, steps: int = 5, eps: float = 1e-7, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Reference of `newton_schulz`, in plain torch: three batched products a step."""
    wide = torch.promote_types(g.dtype, torch.float32)
    if compute_dtype is None:
        compute_dtype = torch.bfloat16 if g.is_cuda else wide
    a, b, c = COEFFICIENTS
    x = g.unsqueeze(0) if g.ndim == 2 else g
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    x = (x / (norm + eps)).to(compute_dtype)
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    x = x.mT if tall else x
    return x.contiguous().to(g.dtype).view(g.shape)


def newton_schulz(g: Tensor, steps: int = 5, eps: float = 1e-7, compute_dtype: torch.dtype | None = None) -> Tensor:
    """See the module's contract."""
    if g.ndim not in (2, 3):
        raise ValueError(f"newton_schulz: g is {tuple(g.shape)}, expected (r, c) or (n, r, c)")
    if steps < 1:
        raise ValueError(f"newton_schulz: steps={steps} must be at least 1")
    return newton_schulz_ref(g, steps, eps, compute_dtype)
