"""qk_prep: per-head RMS norm, partial rotary embedding and query gain over one packed QKV projection.

    q^ = q / sqrt(mean(q^2) + eps) per head, k^ likewise
    first r of d channels rotated by halves a = [0, r/2), b = [r/2, r):  (a, b) -> (a cos + b sin, b cos - a sin)
    q <- gain_h * q^

qkv (B, T, (H + 2K) d): heads of q, then k, then v. gain (H,) fp32. cos, sin fp32 without gradient, r = 2 *
cos.shape[-1] <= d: (T, r/2), where token t of every row has position t, or (B, T, r/2), a position each.
Returns q (B, T, H, d), k and v (B, T, K, d) in qkv's dtype; v is unchanged: a view of qkv here in the reference, a copy
from the kernel, whose outputs must own their memory. Since |q^| = |k^| = sqrt(d), logits are bounded by gain * sqrt(d).

Kernel: one pass each way in fp32, rounded once (the reference rounds after norm, rotation and gain). Backward reads
qkv and the three gradients, computes the norm again, and writes one packed gradient, dv in its place:
    g = R^T(dq), p = <g, q^>:  dq_pre = gain_h rstd (g - q^ p / d),  dgain_h = sum p
Nothing is divided by the gain, so a gain of 0 has its exact gradient. dgain gathers in registers of a persistent grid,
one fp32 row a program, added in fixed order: no atomics, bit-reproducible. A missing gradient counts as 0.
Saved: qkv and gain; the op's own outputs are not (q is gain * q^, which at gain 0 says nothing of q^).
Limits: d <= 256; fp32, bf16, fp16. Error against fp64, relative: bf16 2e-3, dgain 1e-6; fp32 1e-6.
Raises ValueError when shapes, dtypes or devices do not agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import cdiv, check_device, check_kernel_dtype, launch, pow2, register_op, sm_count, tuned, use_kernel
from ._triton import jit, tl

MAX_HEAD_DIM = 256
PROGRAMS_PER_SM = 4  # of the backward's persistent grid: 4 x 4 warps x 32 lanes x 128 registers fill a multiprocessor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first 2 * cos.shape[-1] channels of x (B, T, heads, d); the others pass through."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)  # (..., T, 1, r/2)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos + b * sin, b * cos - a * sin, rest], dim=-1)


def qk_prep_ref(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int, eps: float = 2.0**-23
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `qk_prep`, in plain torch."""
    heads = num_heads + 2 * num_kv_heads
    q_k_v = qkv.unflatten(-1, (heads, qkv.shape[-1] // heads))
    qk, v = q_k_v.split([num_heads + num_kv_heads, num_kv_heads], dim=2)
    qk = rotate(F.rms_norm(qk, qk.shape[-1:], eps=eps), cos, sin)  # the same for q and k: one pass
    q, k = qk.split([num_heads, num_kv_heads], dim=2)
    return q * gain.to(q.dtype)[:, None], k, v


# -- kernels: tiles (BLOCK_T tokens, BLOCK_H heads, BLOCK_D channels) of rows (H + 2K) D wide; HALF = r/2 -------------
# A tile takes q, k and v heads alike: a token's whole row is one piece of memory, and masks are uniform within a warp.


@jit
def _tables(cos, sin, row, T, j, turned, HALF: tl.constexpr, SHARED: tl.constexpr):
    """cos, and sin with the sign that it has in the rotation; 1 and 0 where nothing is turned. By head, though all
    heads have the same: L1 serves that, where numbers shared by heads would be handed out through shared memory."""
    at = row % T if SHARED else row
    at = at.to(tl.int64) * HALF + tl.where(j < HALF, j, j - HALF)
    c = tl.load(cos + at, mask=turned, other=1.0).to(tl.float32)
    s = tl.load(sin + at, mask=turned, other=0.0).to(tl.float32)
    return c, tl.where(j < HALF, s, -s)


@jit
def _qk_prep_fwd_kernel(
    qkv, gain, cos, sin, q, k, v, rows, T, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
    h = (tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H))[None, :, None]
    j = tl.arange(0, BLOCK_D)[None, None, :]
    wide = row.to(tl.int64)
    live = (row < rows) & (j < D)
    is_q, is_k, is_v = h < H, (h >= H) & (h < H + K), (h >= H + K) & (h < H + 2 * K)
    base = qkv + wide * ((H + 2 * K) * D) + h * D
    x = tl.load(base + j, mask=live & (h < H + 2 * K), other=0.0).to(tl.float32)
    y = x
    if HALF > 0:
        turned = live & (h < H + K) & (j < 2 * HALF)
        other = tl.load(base + tl.where(j < HALF, j + HALF, j - HALF), mask=turned, other=0.0).to(tl.float32)
        c, s = _tables(cos, sin, row, T, j, turned, HALF, SHARED)
        y = x * c + other * s
    r = tl.rsqrt(tl.sum(x * x, axis=2) / D + eps)[:, :, None]
    y = y * (r * tl.load(gain + h, mask=is_q, other=1.0).to(tl.float32))
    tl.store(q + wide * (H * D) + h * D + j, y.to(q.dtype.element_ty), mask=live & is_q)
    tl.store(k + wide * (K * D) + (h - H) * D + j, y.to(k.dtype.element_ty), mask=live & is_k)
    tl.store(v + wide * (K * D) + (h - H - K) * D + j, x.to(v.dtype.element_ty), mask=live & is_v)


@jit
def _qk_prep_bwd_kernel(
    dq, dk, dv, qkv, gain, cos, sin, dqkv, dgain, rows, T, eps,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, SHARED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    heads = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    h = heads[None, :, None]
    j = tl.arange(0, BLOCK_D)[None, None, :]
    is_q, is_k, is_v = h < H, (h >= H) & (h < H + K), (h >= H + K) & (h < H + 2 * K)
    partner = tl.where(j < HALF, j + HALF, j - HALF)
    scale = tl.load(gain + h, mask=is_q, other=1.0).to(tl.float32)
    acc = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for block in range(pid, tl.cdiv(rows, BLOCK_T), programs):
        row = (block * BLOCK_T + tl.arange(0, BLOCK_T))[:, None, None]
        wide = row.to(tl.int64)
        live = (row < rows) & (j < D)
        at = wide * ((H + 2 * K) * D) + h * D + j
        x = tl.load(qkv + at, mask=live & (h < H + K), other=0.0).to(tl.float32)
        g = tl.zeros((BLOCK_T, BLOCK_H, BLOCK_D), tl.float32)  # of q, k and v heads side by side
        other = g
        turned = live & (h < H + K) & (j < 2 * HALF)
        if dq is not None:
            base = dq + wide * (H * D) + h * D
            g += tl.load(base + j, mask=live & is_q, other=0.0).to(tl.float32)
            if HALF > 0:
                other += tl.load(base + partner, mask=turned & is_q, other=0.0).to(tl.float32)
        if dk is not None:
            base = dk + wide * (K * D) + (h - H) * D
            g += tl.load(base + j, mask=live & is_k, other=0.0).to(tl.float32)
            if HALF > 0:
                other += tl.load(base + partner, mask=turned & is_k, other=0.0).to(tl.float32)
        d = g
        if HALF > 0:
            c, s = _tables(cos, sin, row, T, j, turned, HALF, SHARED)
            d = g * c - other * s  # back through the rotation; v heads are 0 so far
        r = tl.rsqrt(tl.sum(x * x, axis=2) / D + eps)[:, :, None]
        unit = x * r
        p = tl.sum(d * unit, axis=2)
        acc += p
        d = (scale * r) * (d - unit * (p / D)[:, :, None])
        if dv is not None:
            base = dv + wide * (K * D) + (h - H - K) * D
            d += tl.load(base + j, mask=live & is_v, other=0.0).to(tl.float32)
        tl.store(dqkv + at, d.to(dqkv.dtype.element_ty), mask=live & (h < H + 2 * K))
    tl.store(dgain + pid.to(tl.int64) * H + heads, tl.sum(acc, axis=0), mask=heads < H)


# -- launchers -------------------------------------------------------------------------------------------------------


def _sizes(qkv: Tensor, cos: Tensor, num_heads: int, num_kv_heads: int) -> dict[str, int]:
    d = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    sizes = {"H": num_heads, "K": num_kv_heads, "D": d, "HALF": cos.shape[-1], "SHARED": int(cos.ndim == 2)}
    return sizes | {"BLOCK_D": pow2(d)}


def _qk_prep(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    rows, length, sizes = qkv.shape[0] * qkv.shape[1], qkv.shape[1], _sizes(qkv, cos, num_heads, num_kv_heads)
    out = _qk_prep_fake(qkv, gain, cos, sin, num_heads, num_kv_heads, eps)
    how = tuned("qk_prep_fwd", qkv, f"D{sizes['BLOCK_D']}")
    grid = (cdiv(rows, how.blocks["BLOCK_T"]), cdiv(num_heads + 2 * num_kv_heads, how.blocks["BLOCK_H"]))
    args = (*(t.contiguous() for t in (qkv, gain, cos, sin)), *out, rows, length, eps)
    launch(_qk_prep_fwd_kernel, grid, *args, how=how, **sizes)
    return out


def _qk_prep_fake(qkv, gain, cos, sin, num_heads, num_kv_heads, eps):
    d = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    new = lambda heads: qkv.new_empty((*qkv.shape[:2], heads, d))
    return new(num_heads), new(num_kv_heads), new(num_kv_heads)


def _qk_prep_bwd(
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    qkv: Tensor,
    gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of qkv, packed like it, and of gain."""
    rows, length, sizes = qkv.shape[0] * qkv.shape[1], qkv.shape[1], _sizes(qkv, cos, num_heads, num_kv_heads)
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    how = tuned("qk_prep_bwd", qkv, f"D{sizes['BLOCK_D']}")
    programs = max(1, min(cdiv(rows, how.blocks["BLOCK_T"]), PROGRAMS_PER_SM * sm_count(qkv)))
    grid = (programs, cdiv(num_heads + 2 * num_kv_heads, how.blocks["BLOCK_H"]))
    partial = torch.empty((programs, num_heads), dtype=torch.float32, device=qkv.device)
    grads = (g if g is None else g.contiguous() for g in (dq, dk, dv))
    args = (*grads, *(t.contiguous() for t in (qkv, gain, cos, sin)), dqkv, partial, rows, length, eps)
    launch(_qk_prep_bwd_kernel, grid, *args, how=how, **sizes)
    return dqkv, partial.sum(0).to(gain.dtype)


def _qk_prep_bwd_fake(dq, dk, dv, qkv, gain, cos, sin, num_heads, num_kv_heads, eps):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (qkv, gain))


def _setup(ctx, inputs, output):
    qkv, gain, cos, sin, *ctx.plain = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(qkv, gain, cos, sin)


def _backward(ctx, dq, dk, dv):
    if dq is None and dk is None and dv is None:
        return (None,) * 7
    return *_bwd_op(dq, dk, dv, *ctx.saved_tensors, *ctx.plain), None, None, None, None, None


_bwd_op = register_op(_qk_prep_bwd, _qk_prep_bwd_fake)
_op = register_op(_qk_prep, _qk_prep_fake, setup=_setup, backward=_backward)


def qk_prep(
    qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, *, num_heads: int, num_kv_heads: int, eps: float = 2.0**-23
) -> tuple[Tensor, Tensor, Tensor]:
    """See the module's contract."""
    _check(qkv, gain, cos, sin, num_heads, num_kv_heads)
    if not use_kernel("qk_prep", qkv):
        return qk_prep_ref(qkv, gain, cos, sin, num_heads=num_heads, num_kv_heads=num_kv_heads, eps=eps)
    check_kernel_dtype("qk_prep", qkv=qkv, gain=gain, cos=cos, sin=sin)
    d = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    if d > MAX_HEAD_DIM:
        raise ValueError(f"qk_prep: head width {d}, expected at most {MAX_HEAD_DIM} for the kernel")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("qk_prep: cos or sin requires a gradient, expected constant tables for the kernel")
    return _op(qkv, gain, cos, sin, num_heads, num_kv_heads, eps)


def _check(qkv: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int) -> None:
    if num_heads < 1 or num_kv_heads < 1:
        raise ValueError(f"qk_prep: {num_heads} query and {num_kv_heads} KV heads, expected at least 1 of each")
    heads = num_heads + 2 * num_kv_heads
    if qkv.dim() != 3 or qkv.shape[-1] % heads or not qkv.shape[-1]:
        raise ValueError(f"qk_prep: qkv {tuple(qkv.shape)}, expected (B, T, d * {heads}) for H + 2K = {heads} heads")
    if gain.shape != (num_heads,):
        raise ValueError(f"qk_prep: gain {tuple(gain.shape)}, expected ({num_heads},)")
    b, t, d = *qkv.shape[:2], qkv.shape[-1] // heads
    if cos.shape != sin.shape or cos.shape[:-1] not in ((t,), (b, t)) or 2 * cos.shape[-1] > d:
        raise ValueError(
            f"qk_prep: cos {tuple(cos.shape)}, sin {tuple(sin.shape)}, expected (T={t}, r/2) or (B={b}, T={t}, r/2)"
            f" with r <= {d}"
        )
    check_device("qk_prep", qkv, gain=gain, cos=cos, sin=sin)
