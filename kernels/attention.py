"""attention: causal grouped-query attention, optionally exclusive (XSA).

    o_t = softmax_{s <= t}(q_t . k_s / sqrt(d)) v_s          query head h reads KV head h // (H / K)
    XSA: y_t = o_t - (o_t . v^_t) v^_t,  v^ = v / max(|v|, 1e-12), v the value of the position's own KV head

q (B, T, H, d); k, v (B, T, K, d), H a multiple of K, one dtype -> y (B, T, H, d). Softmax in fp32.
cu_seqlens (n+1,) int32: document starts over the flattened B*T tokens; a token attends inside its own document only.
With XSA y is orthogonal to the position's value and the first token of a document, where o = v, gives 0.
XSA is the projection form of the public record PR #265 / #374. Raises ValueError on shapes that do not agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_mask(cu_seqlens: Tensor, batch: int, length: int) -> Tensor:
    """(B, 1, T, T) bool: key at or before the query, of the query's document."""
    at = torch.arange(batch * length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.to(at.dtype), at, right=True).view(batch, length)
    same = document[:, :, None] == document[:, None, :]
    return (same & torch.ones(length, length, dtype=torch.bool, device=same.device).tril())[:, None]


def exclude_own_value(o: Tensor, v: Tensor) -> Tensor:
    """o (B, T, H, d) minus its projection on the position's value v (B, T, K, d). No repeat: a view by KV head."""
    b, t, h, d = o.shape
    unit = F.normalize(v, dim=-1, eps=1e-12)[:, :, :, None, :]  # (B, T, K, 1, d)
    grouped = o.view(b, t, v.shape[2], h // v.shape[2], d)
    return (grouped - (grouped * unit).sum(-1, keepdim=True) * unit).view(b, t, h, d)


def attention_ref(q: Tensor, k: Tensor, v: Tensor, *, xsa: bool = False, cu_seqlens: Tensor | None = None) -> Tensor:
    """Reference of `attention`, on torch's scaled_dot_product_attention."""
    mask = None if cu_seqlens is None else document_mask(cu_seqlens, q.shape[0], q.shape[1])
    o = F.scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=q.shape[2] != k.shape[2],
    ).transpose(1, 2)
    return exclude_own_value(o.contiguous(), v) if xsa else o


def attention(q: Tensor, k: Tensor, v: Tensor, *, xsa: bool = False, cu_seqlens: Tensor | None = None) -> Tensor:
    """See the module's contract."""
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}:"
            " expected (B, T, H, d), (B, T, K, d), (B, T, K, d)"
        )
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"attention: {q.shape[2]} query heads, expected a multiple of the {k.shape[2]} KV heads")
    return attention_ref(q, k, v, xsa=xsa, cu_seqlens=cu_seqlens)
