"""XSA on its own: y = o - (o . v^) v^, the part of `attention` that follows a library's attention core.

    forward    s = o . v^,  y = o - s v^                                  v^ = v / max(|v|, 1e-12)
    backward   t = dy . v^,  do = dy - t v^,  dv = -(1/|v|) sum_h (s_h do_h + t_h y_h)

dv is the derivative -(1/|v|) sum_h (s_h dy_h + t_h o_h - 2 s_h t_h v^) written with what is at hand: o = y + s v^ need
not be kept. v^ stays in fp32 registers. The gradient through the clamp is dropped: it matters below |v| = 1e-12 only.
The backward kernel can also give delta = rowsum(dy * y), which equals rowsum(do * o): y and do are orthogonal to v^.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import cdiv, launch, pow2, register_op, tuned
from ._triton import jit, tl

# -- kernels: a row is a (token, KV head) pair with its G query heads, which lie side by side in o, y and s ----------


@jit
def _unit(v, row, ok, v_t, v_h, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """v^ (rows, BLOCK_D) fp32 and 1 / |v|."""
    j = tl.arange(0, BLOCK_D)
    at = v + (row // K * v_t + row % K * v_h)[:, None] + j[None, :]
    own = tl.load(at, mask=ok[:, None] & (j < D)[None, :], other=0.0).to(tl.float32)
    inverse = 1.0 / tl.maximum(tl.sqrt(tl.sum(own * own, axis=1)), 1e-12)
    return own * inverse[:, None], inverse


@jit
def _exclude_fwd_kernel(
    o, v, y, s, rows, v_t, v_h,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    ok = row < rows
    j = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (j < D)[None, :]
    unit, _ = _unit(v, row, ok, v_t, v_h, K, D, BLOCK_D)
    for g in tl.static_range(G):
        at = (row * G + g)[:, None] * D + j[None, :]
        x = tl.load(o + at, mask=mask, other=0.0).to(tl.float32)
        along = tl.sum(x * unit, axis=1)
        tl.store(s + row * G + g, along, mask=ok)
        tl.store(y + at, (x - along[:, None] * unit).to(y.dtype.element_ty), mask=mask)


@jit
def _exclude_bwd_kernel(
    dy, y, v, s, do, dv, delta, rows, T, v_t, v_h,
    K: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Without s (no XSA) only delta is written."""
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    ok = row < rows
    j = tl.arange(0, BLOCK_D)
    mask = ok[:, None] & (j < D)[None, :]
    if s is not None:
        unit, inverse = _unit(v, row, ok, v_t, v_h, K, D, BLOCK_D)
    grad = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for g in tl.static_range(G):
        at = (row * G + g)[:, None] * D + j[None, :]
        dx = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        out = tl.load(y + at, mask=mask, other=0.0).to(tl.float32)
        if delta is not None:  # (B, H, T)
            token = row // K
            to = (token // T * K * G + row % K * G + g) * T + token % T
            tl.store(delta + to, tl.sum(dx * out, axis=1), mask=ok)
        if s is not None:
            t = tl.sum(dx * unit, axis=1)[:, None]
            dx -= t * unit
            tl.store(do + at, dx.to(do.dtype.element_ty), mask=mask)
            grad += tl.load(s + row * G + g, mask=ok, other=0.0)[:, None] * dx + t * out
    if s is not None:
        at = row[:, None] * D + j[None, :]
        tl.store(dv + at, (grad * -inverse[:, None]).to(dv.dtype.element_ty), mask=mask)


# -- launchers -------------------------------------------------------------------------------------------------------


def _by_token(v: Tensor) -> Tensor:
    """v with one stride over all tokens, which a slice of a packed projection has."""
    one = v.stride(3) == 1 and (v.shape[0] < 2 or v.stride(0) == v.shape[1] * v.stride(1))
    return v if one else v.contiguous()


def _sizes(y: Tensor, v: Tensor) -> dict[str, int]:
    return {"K": v.shape[2], "G": y.shape[2] // v.shape[2], "D": y.shape[3], "BLOCK_D": pow2(y.shape[3])}


def exclude_forward(o: Tensor, v: Tensor) -> list[Tensor]:
    """[y, s (B, T, H) fp32]."""
    o, v = o.contiguous(), _by_token(v)
    b, t, h, _ = o.shape
    y, s = torch.empty_like(o), torch.empty((b, t, h), dtype=torch.float32, device=o.device)
    sizes, rows = _sizes(o, v), b * t * v.shape[2]
    how = tuned("exclude_fwd", o, f"D{sizes['BLOCK_D']}")
    grid = (cdiv(rows, how.blocks["BLOCK_R"]),)
    launch(_exclude_fwd_kernel, grid, o, v, y, s, rows, v.stride(1), v.stride(2), how=how, **sizes)
    return [y, s]


def exclude_backward(
    dy: Tensor, y: Tensor, v: Tensor, s: Tensor | None, delta: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(do, dv); without s (no XSA) they are dy and None. Fills `delta` (B, H, T) where it is given."""
    dy, y, v = dy.contiguous(), y.contiguous(), _by_token(v)
    b, t, _, d = y.shape
    do = dy if s is None else torch.empty_like(y)
    dv = None if s is None else torch.empty((b, t, v.shape[2], d), dtype=v.dtype, device=v.device)
    sizes, rows = _sizes(y, v), b * t * v.shape[2]
    how = tuned("exclude_bwd", y, f"D{sizes['BLOCK_D']}")
    grid = (cdiv(rows, how.blocks["BLOCK_R"]),)
    args = (dy, y, v, s, None if s is None else do, dv, delta, rows, t, v.stride(1), v.stride(2))
    launch(_exclude_bwd_kernel, grid, *args, how=how, **sizes)
    return do, dv


def _exclude(o: Tensor, v: Tensor) -> list[Tensor]:
    return exclude_forward(o, v)


def _exclude_fake(o, v):
    y = torch.empty_like(o, memory_format=torch.contiguous_format)
    return [y, torch.empty(o.shape[:3], dtype=torch.float32, device=o.device)]


def _exclude_bwd(dy: Tensor, y: Tensor, v: Tensor, s: Tensor) -> list[Tensor]:
    return list(exclude_backward(dy, y, v, s))


def _exclude_bwd_fake(dy, y, v, s):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (y, v)]


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[1], *output)


def _backward(ctx, grads):
    v, y, s = ctx.saved_tensors
    return (None, None) if grads[0] is None else tuple(_bwd_op(grads[0], y, v, s))


_bwd_op = register_op(_exclude_bwd, _exclude_bwd_fake)
_op = register_op(_exclude, _exclude_fake, setup=_setup, backward=_backward)


def exclude(o: Tensor, v: Tensor) -> Tensor:
    """o (B, T, H, d) minus its projection on the position's value v (B, T, K, d), by the kernels."""
    return _op(o, v)[0]
