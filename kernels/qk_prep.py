"""qk_prep: per-head RMS norm, partial rotary embedding and query gain over one packed QKV projection.

    q^ = q / sqrt(mean(q^2) + eps) per head, k^ likewise
    first r of d channels rotated by halves a = [0, r/2), b = [r/2, r):  (a, b) -> (a cos + b sin, b cos - a sin)
    q <- gain_h * q^

qkv (B, T, (H + 2K) d): heads of q, then k, then v. gain (H,) fp32. cos, sin (T, r/2) or (B, T, r/2) fp32, r = 2 *
cos.shape[-1] <= d. Returns q (B, T, H, d) and k (B, T, K, d) in qkv's dtype; v needs no work and stays a view of qkv.
Since |q^| = |k^| = sqrt(d), attention logits are bounded by gain * sqrt(d).
Raises ValueError on shapes that do not agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .residual import rms_norm


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] channels of x (B, T, heads, d); the others pass through."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # (..., T, 1, r/2)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def qk_prep_ref(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int, eps: float = 2.0**-23
) -> tuple[Tensor, Tensor]:
    """Reference of `qk_prep`, in plain torch."""
    heads = num_heads + num_kv_heads
    d = qkv.shape[-1] // (heads + num_kv_heads)
    qk = qkv[..., : heads * d].unflatten(-1, (heads, d))  # norm and rotation are the same for q and k: one pass
    qk = rotate(rms_norm(qk, eps), cos, sin)
    q, k = qk.split([num_heads, num_kv_heads], dim=2)
    return q * gain.to(q.dtype)[:, None], k


def qk_prep(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int, eps: float = 2.0**-23
) -> tuple[Tensor, Tensor]:
    """See the module's contract."""
    width, heads = qkv.shape[-1], num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or width % heads:
        raise ValueError(f"qk_prep: qkv {tuple(qkv.shape)}, expected (B, T, d * {heads}) for H + 2K = {heads} heads")
    if gain.shape != (num_heads,):
        raise ValueError(f"qk_prep: gain {tuple(gain.shape)}, expected ({num_heads},)")
    if cos.shape != sin.shape or cos.shape[-2] != qkv.shape[1] or 2 * cos.shape[-1] > width // heads:
        raise ValueError(
            f"qk_prep: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, expected (T={qkv.shape[1]}, r/2) with"
            f" r <= {width // heads}"
        )
    return qk_prep_ref(qkv, gain, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps)
