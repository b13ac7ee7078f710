"""Our own flash attention, forward: the kernel behind `attention`'s "triton" route, and what backward shares with it.

One program a block of queries of one head, the latest queries, which see the most keys, first; online softmax or, under
a bound on the logits, one without a maximum; XSA as the epilogue. Loads are plain masked ones, so that head widths,
strides and document edges need no special form.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._documents import document_bounds
from ._op import cdiv, launch, pow2, tuned
from ._triton import jit, tl

LOG2E = 1.4426950408889634
MAX_FREE_LIMIT = 40.0  # e^40 = 2.4e17: sums over 1e6 tokens and values up to 1e14 stay in fp32's range, both ways


# -- kernel ----------------------------------------------------------------------------------------------------------


@jit
def tile(base, rows, stride, T, D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr):
    """(rows, BLOCK_D) of one head; 0 past column D and, with EDGE, past row T."""
    j = tl.arange(0, BLOCK_D)
    at = base + rows[:, None].to(tl.int64) * stride + j[None, :]
    if EDGE:
        return tl.load(at, mask=(rows < T)[:, None] & (j < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(at)
    return tl.load(at, mask=(j < D)[None, :], other=0.0)


@jit
def _attend_block(
    queries, k, v, k_t, v_t, rows, first, n0, T, scale, acc, total, peak,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr, ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys. `scale` makes base-2 logits. Online: probabilities relative to the row's maximum so far,
    earlier sums rescaled. Otherwise relative to 1: no maximum, no rescaling."""
    cols = n0 + tl.arange(0, BLOCK_N)
    keys = tile(k, cols, k_t, T, D, BLOCK_D, MASKED)
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        keep = cols[None, :] <= rows[:, None]
        if first is not None:
            keep = keep & (cols[None, :] >= first[:, None])
        logits = tl.where(keep, logits, float("-inf"))
    if ONLINE:
        top = tl.maximum(peak, tl.max(logits, axis=1) * scale)
        base = top
        if MASKED:  # a row whose document starts later has seen no key yet
            base = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp2(logits * scale - base[:, None])
        fade = tl.exp2(peak - base)
        total = total * fade + tl.sum(p, axis=1)
        acc = acc * fade[:, None]
        peak = top
    else:
        p = tl.exp2(logits * scale)
        total = total + tl.sum(p, axis=1)
    values = tile(v, cols, v_t, T, D, BLOCK_D, MASKED)
    acc = tl.dot(p.to(values.dtype), values, acc, input_precision=PRECISION)
    return acc, total, peak


@jit
def _attend(
    queries, k, v, k_t, v_t, rows, first, low, full, high, T, scale,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ONLINE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All rows see keys [low, full), some see [full, high). Returns sum p v, sum p, and what p is relative to."""
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    peak = tl.zeros((BLOCK_M,), tl.float32)
    if ONLINE:
        peak = peak + float("-inf")
    for n0 in range(low, full, BLOCK_N):
        acc, total, peak = _attend_block(
            queries, k, v, k_t, v_t, rows, first, n0, T, scale, acc, total, peak,
            D, BLOCK_N, BLOCK_D, False, ONLINE, PRECISION,
        )  # fmt: skip
    for n0 in range(full, high, BLOCK_N):
        acc, total, peak = _attend_block(
            queries, k, v, k_t, v_t, rows, first, n0, T, scale, acc, total, peak,
            D, BLOCK_N, BLOCK_D, True, ONLINE, PRECISION,
        )  # fmt: skip
    return acc, total, peak


@jit
def _attention_fwd_kernel(
    q, k, v, bound, starts, y, lse, s, T, scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    LIMIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (blocks - 1 - pid % blocks) * BLOCK_M
    b, h = (pid // blocks // H).to(tl.int64), pid // blocks % H
    q += b * q_b + h.to(tl.int64) * q_h
    k += b * k_b + (h // G).to(tl.int64) * k_h
    v += b * v_b + (h // G).to(tl.int64) * v_h
    rows = m0 + tl.arange(0, BLOCK_M)
    queries = tile(q, rows, q_t, T, D, BLOCK_D, True)
    low, full, high = 0, m0 // BLOCK_N * BLOCK_N, tl.minimum(m0 + BLOCK_M, T)
    first = None
    if starts is not None:
        first = tl.load(starts + b * T + rows, mask=rows < T, other=0)
        low = tl.load(starts + b * T + m0)
        full = low
    if bound is None:
        acc, total, peak = _attend(
            queries, k, v, k_t, v_t, rows, first, low, full, high, T, scale,
            D, BLOCK_M, BLOCK_N, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    else:
        limit = tl.load(bound + h)
        if (limit >= 0.0) & (limit <= LIMIT):  # false for NaN
            acc, total, peak = _attend(
                queries, k, v, k_t, v_t, rows, first, low, full, high, T, scale,
                D, BLOCK_M, BLOCK_N, BLOCK_D, False, PRECISION,
            )  # fmt: skip
        else:
            acc, total, peak = _attend(
                queries, k, v, k_t, v_t, rows, first, low, full, high, T, scale,
                D, BLOCK_M, BLOCK_N, BLOCK_D, True, PRECISION,
            )  # fmt: skip
    inside = rows < T
    tl.store(lse + (b * H + h) * T + rows, (peak + tl.log2(total)) * 0.6931471805599453, mask=inside)
    out = acc / total[:, None]
    token = b * T + rows.to(tl.int64)
    if s is not None:  # XSA: minus the projection on the position's own value
        own = tile(v, rows, v_t, T, D, BLOCK_D, True).to(tl.float32)
        unit = own * (1.0 / tl.maximum(tl.sqrt(tl.sum(own * own, axis=1)), 1e-12))[:, None]
        along = tl.sum(out * unit, axis=1)
        out -= along[:, None] * unit
        tl.store(s + token * H + h, along, mask=inside)
    j = tl.arange(0, BLOCK_D)
    at = y + (token * H + h)[:, None] * D + j[None, :]
    tl.store(at, out.to(y.dtype.element_ty), mask=inside[:, None] & (j < D)[None, :])


# -- launcher --------------------------------------------------------------------------------------------------------


def rows_of(x: Tensor) -> Tensor:
    """x as the kernels read it: any strides but a contiguous head."""
    return x if x.stride(-1) == 1 else x.contiguous()


def kernel_constants(q: Tensor, k: Tensor) -> dict:
    """The constants that all kernels share; tl.dot needs a width of 16."""
    exact = q.dtype == torch.float32
    sizes = {"G": q.shape[2] // k.shape[2], "D": q.shape[3], "BLOCK_D": max(16, pow2(q.shape[3]))}
    return sizes | {"PRECISION": "ieee" if exact else "tf32"}


def shape_class(q: Tensor) -> str:
    """The launch table's class."""
    return "fp32" if q.dtype == torch.float32 else f"D{max(16, pow2(q.shape[3]))}"


def flash_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, bound: Tensor | None, xsa: bool
) -> list[Tensor]:
    """[y, lse (B, H, T) fp32] and, with XSA, s (B, T, H) fp32."""
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    b, t, h, d = q.shape
    y = torch.empty((b, t, h, d), dtype=q.dtype, device=q.device)
    lse = torch.empty((b, h, t), dtype=torch.float32, device=q.device)
    s = torch.empty((b, t, h), dtype=torch.float32, device=q.device) if xsa else None
    starts = None if cu_seqlens is None else document_bounds(cu_seqlens, b, t)[0]
    if q.dtype == torch.float16:
        bound = None  # its probabilities end at 65504
    how = tuned("attention_fwd", q, shape_class(q))
    launch(
        _attention_fwd_kernel, (cdiv(t, how.blocks["BLOCK_M"]) * b * h,),
        q, k, v, bound, starts, y, lse, s, t, d**-0.5 * LOG2E,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], how=how, H=h, LIMIT=MAX_FREE_LIMIT, **kernel_constants(q, k),
    )  # fmt: skip
    return [y, lse] if s is None else [y, lse, s]
