"""Our own flash attention, backward.

    p = exp(logits - lse) anew,  ds = p (dp - delta),  dp = do v^T;   dv = p^T do,  dk = ds^T q,  dq = ds k

Three launches: delta (with XSA also do and v's direct part, in one pass), then a program a block of keys that adds up
the query heads of its group in registers, then a program a block of queries. Logits and dp are computed in both, seven
products where five are needed, so that no sum crosses programs: no atomics, two runs are bit-equal. In each head the
longest loops come first: the first keys are seen by the most queries, the latest queries see the most keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._attention_flash import LOG2E, kernel_constants, rows_of, shape_class, tile
from ._attention_xsa import exclude_backward
from ._documents import document_bounds
from ._op import cdiv, launch, tuned
from ._triton import jit, tl

# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _dkdv_block(
    keys, values, q, do, lse, delta, starts, q_t, do_t, cols, m0, T, scale, dk, dv,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one block of queries, as (keys, queries) tiles: both products then take p and ds from registers. Queries
    past the end are zeros with a zero gradient: they add nothing."""
    rows = m0 + tl.arange(0, BLOCK_M)
    queries = tile(q, rows, q_t, T, D, BLOCK_D, True)
    logits = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale
    p = tl.exp2(logits - (tl.load(lse + rows, mask=rows < T, other=0.0) * 1.4426950408889634)[None, :])
    if MASKED:
        keep = cols[:, None] <= rows[None, :]
        if starts is not None:
            first = tl.load(starts + rows, mask=rows < T, other=0)
            keep = keep & (cols[:, None] >= first[None, :])
        p = tl.where(keep, p, 0.0)
    grads = tile(do, rows, do_t, T, D, BLOCK_D, True)
    dv = tl.dot(p.to(grads.dtype), grads, dv, input_precision=PRECISION)
    dp = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    ds = p * (dp - tl.load(delta + rows, mask=rows < T, other=0.0)[None, :])
    dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=PRECISION)
    return dk, dv


@jit
def _attention_dkdv_kernel(
    q, k, v, do, lse, delta, starts, ends, dk, dv, T, scale, softmax_scale,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, K: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ADD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """ADD: dv already holds the part that XSA sends to v directly."""
    blocks = tl.cdiv(T, BLOCK_N)
    pid = tl.program_id(0)
    n0 = pid % blocks * BLOCK_N
    b, kv = (pid // blocks // K).to(tl.int64), (pid // blocks % K).to(tl.int64)
    cols = n0 + tl.arange(0, BLOCK_N)
    keys = tile(k + b * k_b + kv * k_h, cols, k_t, T, D, BLOCK_D, True)
    values = tile(v + b * v_b + kv * v_h, cols, v_t, T, D, BLOCK_D, True)
    edge, high = tl.minimum(n0 + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M, T), T
    if starts is not None:
        starts += b * T
        high = tl.load(ends + b * T + tl.minimum(n0 + BLOCK_N, T) - 1)
        edge = high
    grad_k = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for g in range(G):
        h = kv * G + g
        q_head, do_head = q + b * q_b + h * q_h, do + (b * T * K * G + h) * D
        lse_head, delta_head = lse + (b * K * G + h) * T, delta + (b * K * G + h) * T
        for m0 in range(n0, edge, BLOCK_M):
            grad_k, grad_v = _dkdv_block(
                keys, values, q_head, do_head, lse_head, delta_head, starts, q_t, K * G * D, cols, m0, T, scale,
                grad_k, grad_v, D, BLOCK_M, BLOCK_D, True, PRECISION,
            )  # fmt: skip
        for m0 in range(edge, high, BLOCK_M):
            grad_k, grad_v = _dkdv_block(
                keys, values, q_head, do_head, lse_head, delta_head, starts, q_t, K * G * D, cols, m0, T, scale,
                grad_k, grad_v, D, BLOCK_M, BLOCK_D, False, PRECISION,
            )  # fmt: skip
    j = tl.arange(0, BLOCK_D)
    at = ((b * T + cols.to(tl.int64)) * K + kv)[:, None] * D + j[None, :]
    mask = (cols < T)[:, None] & (j < D)[None, :]
    if ADD:
        grad_v += tl.load(dv + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dv + at, grad_v.to(dv.dtype.element_ty), mask=mask)
    tl.store(dk + at, (grad_k * softmax_scale).to(dk.dtype.element_ty), mask=mask)


@jit
def _dq_block(
    queries, grads, k, v, k_t, v_t, stats, delta, rows, first, n0, T, scale, dq,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds one block of keys."""
    cols = n0 + tl.arange(0, BLOCK_N)
    keys = tile(k, cols, k_t, T, D, BLOCK_D, MASKED)
    values = tile(v, cols, v_t, T, D, BLOCK_D, MASKED)
    logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    p = tl.exp2(logits - stats[:, None])
    if MASKED:
        keep = cols[None, :] <= rows[:, None]
        if first is not None:
            keep = keep & (cols[None, :] >= first[:, None])
        p = tl.where(keep, p, 0.0)
    dp = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(keys.dtype), keys, dq, input_precision=PRECISION)


@jit
def _attention_dq_kernel(
    q, k, v, do, lse, delta, starts, dq, T, scale, softmax_scale, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(T, BLOCK_M)
    pid = tl.program_id(0)
    m0 = (blocks - 1 - pid % blocks) * BLOCK_M
    b, h = (pid // blocks // H).to(tl.int64), pid // blocks % H
    k += b * k_b + (h // G).to(tl.int64) * k_h
    v += b * v_b + (h // G).to(tl.int64) * v_h
    rows = m0 + tl.arange(0, BLOCK_M)
    inside = rows < T
    queries = tile(q + b * q_b + h.to(tl.int64) * q_h, rows, q_t, T, D, BLOCK_D, True)
    grads = tile(do + (b * T * H + h) * D, rows, H * D, T, D, BLOCK_D, True)
    stats = tl.load(lse + (b * H + h) * T + rows, mask=inside, other=0.0) * 1.4426950408889634
    row_delta = tl.load(delta + (b * H + h) * T + rows, mask=inside, other=0.0)
    low, full, high = 0, m0 // BLOCK_N * BLOCK_N, tl.minimum(m0 + BLOCK_M, T)
    first = None
    if starts is not None:
        first = tl.load(starts + b * T + rows, mask=inside, other=0)
        low = tl.load(starts + b * T + m0)
        full = low
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n0 in range(low, full, BLOCK_N):
        acc = _dq_block(
            queries, grads, k, v, k_t, v_t, stats, row_delta, rows, first, n0, T, scale, acc,
            D, BLOCK_N, BLOCK_D, False, PRECISION,
        )  # fmt: skip
    for n0 in range(full, high, BLOCK_N):
        acc = _dq_block(
            queries, grads, k, v, k_t, v_t, stats, row_delta, rows, first, n0, T, scale, acc,
            D, BLOCK_N, BLOCK_D, True, PRECISION,
        )  # fmt: skip
    j = tl.arange(0, BLOCK_D)
    at = dq + ((b * T + rows.to(tl.int64)) * H + h)[:, None] * D + j[None, :]
    tl.store(at, (acc * softmax_scale).to(dq.dtype.element_ty), mask=inside[:, None] & (j < D)[None, :])


# -- launcher --------------------------------------------------------------------------------------------------------


def flash_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, s: Tensor | None, cu_seqlens: Tensor | None
) -> list[Tensor]:
    """[dq, dk, dv]. With XSA (s given) y is orthogonal to the own value, so rowsum(do * y) = rowsum(do * o)."""
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    (b, t, h, d), kv, constants = q.shape, k.shape[2], kernel_constants(q, k)
    delta = torch.empty_like(lse)
    do, dv = exclude_backward(dy.contiguous(), y, v, s, delta)
    dv = torch.empty((b, t, kv, d), dtype=v.dtype, device=v.device) if dv is None else dv
    dk, dq = torch.empty_like(dv), torch.empty((b, t, h, d), dtype=q.dtype, device=q.device)
    starts, ends = (None, None) if cu_seqlens is None else document_bounds(cu_seqlens, b, t)
    strides, scale = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]), d**-0.5
    how = tuned("attention_dkdv", q, shape_class(q))
    launch(
        _attention_dkdv_kernel, (cdiv(t, how.blocks["BLOCK_N"]) * b * kv,),
        q, k, v, do, lse, delta, starts, ends, dk, dv, t, scale * LOG2E, scale, *strides,
        how=how, K=kv, ADD=s is not None, **constants,
    )  # fmt: skip
    how = tuned("attention_dq", q, shape_class(q))
    launch(
        _attention_dq_kernel, (cdiv(t, how.blocks["BLOCK_M"]) * b * h,),
        q, k, v, do, lse, delta, starts, dq, t, scale * LOG2E, scale, *strides, how=how, H=h, **constants,
    )  # fmt: skip
    return [dq, dk, dv]
