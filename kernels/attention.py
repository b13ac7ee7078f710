"""attention: causal grouped-query attention, optionally exclusive (XSA).

    o_t = softmax_{s <= t}(q_t . k_s / sqrt(d)) v_s          query head h reads KV head h // (H / K)
    XSA: y_t = o_t - (o_t . v^_t) v^_t,  v^ = v / max(|v|, 1e-12), v the value of the position's own KV head

q (B, T, H, d); k, v (B, T, K, d), H a multiple of K, one dtype -> y (B, T, H, d). Products and softmax in fp32.
cu_seqlens (n+1,) int32, ascending: document starts over the flattened B*T tokens; a token attends inside its own
document, and its own row, only. With XSA y is orthogonal to the position's value, and the first token of a document,
where o = v, gives 0.

One op with one gradient rule and three routes, chosen by `explain`: FlashAttention-3's core where it is installed
(sm_90), else cuDNN's, else our own flash kernels, which go anywhere and alone run in the interpreter. A library's core
is followed and preceded by the XSA kernels; our own forward has XSA as its epilogue.
Saved: q, k, v, y, lse (B, H, T) and, with XSA, s = o . v^ (B, T, H), both fp32. o is never saved: y and do are
orthogonal to v^, so the core's backward may be given y for o (delta = rowsum(do * y) is unchanged), and
do = dy - t v^, t = dy . v^, dv += -(1/|v|) sum_h (s_h do_h + t_h y_h). Probabilities are recomputed in backward. The
three routes save the same, so any backward fits any forward.

logit_bound (H,) fp32, for our own forward: |q_t . k_s| / sqrt(d) never exceeds it (gain * sqrt(d) after qk-norm). A
head whose bound is 0 to 40 takes exp(logit) as it is: no running maximum, no rescaling; sums lie between e^-40 and
T e^40, far inside fp32 and bf16, and a bound that bf16 rounding breaks by a little does no harm. Any other bound (above
40, negative, infinite, NaN), fp16 and the libraries take the online softmax. Never differentiated, never needed by
backward.

Limits: d <= 128, fp32, bf16, fp16. Deterministic by our own kernels (no atomics); the libraries' backward is so only
under torch.use_deterministic_algorithms(True), which rules cuDNN out. Error against fp64, relative to the largest
value: bf16 4e-3 forward, 1e-2 gradients; fp32 2e-6. XSA is the projection form of the public record PR #265 / #374.
Raises ValueError on shapes, dtypes or devices that do not agree, and where the back end that was asked for cannot run.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._attention_flash import flash_forward
from ._attention_flash_bwd import flash_backward
from ._attention_peers import CORES, Need
from ._attention_xsa import exclude_backward, exclude_forward
from ._op import PATHS, check_device, check_kernel_dtype, register_op, use_kernel

MAX_HEAD_DIM = 128


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


def attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    xsa: bool = False,
    cu_seqlens: Tensor | None = None,
    logit_bound: Tensor | None = None,
) -> Tensor:
    """Reference of `attention`, on torch's scaled_dot_product_attention; it needs no bound."""
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


# -- back ends -------------------------------------------------------------------------------------------------------


def explain(device: torch.device, asked: str = "auto", **need) -> tuple[str, str]:
    """(back end, why) on `device`: "fa3", "cudnn" or "triton". asked: one of these, or "auto" for the first that can.

    need: what is not as the presets have it, see `Need`. ValueError if what was asked for cannot run.
    """
    if asked not in ("auto", "triton", *CORES):
        raise ValueError(f"attention: got back end {asked!r}, expected auto, triton, {' or '.join(CORES)}")
    if asked == "triton":
        return asked, "asked for"
    call = Need(torch.device(device), **need)
    if asked != "auto":
        if why := CORES[asked].why_not(call):
            raise ValueError(f"attention: got back end {asked}, which {why}; expected auto, triton or reference")
        return asked, "asked for"
    reasons = []
    for name in ("fa3", "cudnn"):
        why = CORES[name].why_not(call)
        if not why:
            return name, "; ".join(reasons) or "FlashAttention-3 is installed"
        reasons.append(f"no {name}: {why}")
    return "triton", "; ".join(reasons)


def backend(q: Tensor, cu_seqlens: Tensor | None = None, asked: str = "auto") -> str:
    """The back end of a call."""
    rows, tokens, _, d = q.shape
    documents = cu_seqlens is not None
    need = {"dtype": q.dtype, "head_dim": d, "documents": documents, "tokens": tokens, "rows": rows}
    return explain(q.device, asked, **need)[0]


# -- op --------------------------------------------------------------------------------------------------------------


def _attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, logit_bound: Tensor | None, xsa: bool, asked: str
) -> list[Tensor]:
    """[y, lse] or, with XSA, [y, lse, s]."""
    route = backend(q, cu_seqlens, asked)
    if route == "triton":
        return flash_forward(q, k, v, cu_seqlens, logit_bound, xsa)
    o, lse = CORES[route].forward(q, k, v, cu_seqlens)
    if not xsa:
        return [o, lse]
    y, s = exclude_forward(o, v)
    return [y, lse, s]


def _attention_fake(q, k, v, cu_seqlens, logit_bound, xsa, asked):
    b, t, h, _ = q.shape
    fp32 = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    return [y, fp32(b, h, t), *([fp32(b, t, h)] if xsa else [])]


def _attention_bwd(
    dy: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    y: Tensor,
    lse: Tensor,
    s: Tensor | None,
    cu_seqlens: Tensor | None,
    asked: str,
) -> list[Tensor]:
    """[dq, dk, dv]; s is there with XSA."""
    route = backend(q, cu_seqlens, asked)
    if route == "triton":
        return flash_backward(dy, q, k, v, y, lse, s, cu_seqlens)
    do, extra = (dy.contiguous(), None) if s is None else exclude_backward(dy, y, v, s)
    dq, dk, dv = CORES[route].backward(do, q, k, v, y, lse, cu_seqlens)
    return [dq, dk, dv if extra is None else dv.add_(extra)]


def _attention_bwd_fake(dy, q, k, v, y, lse, s, cu_seqlens, asked):
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]


def _setup(ctx, inputs, output):
    q, k, v, cu_seqlens, _, xsa, ctx.asked = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, output[0], output[1], output[2] if xsa else None, cu_seqlens)


def _backward(ctx, grads):
    q, k, v, y, lse, s, cu_seqlens = ctx.saved_tensors
    got = [None] * 3 if grads[0] is None else _bwd_op(grads[0], q, k, v, y, lse, s, cu_seqlens, ctx.asked)
    return *got, None, None, None, None


_bwd_op = register_op(_attention_bwd, _attention_bwd_fake)
_op = register_op(_attention, _attention_fake, setup=_setup, backward=_backward)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    xsa: bool = False,
    cu_seqlens: Tensor | None = None,
    logit_bound: Tensor | None = None,
) -> Tensor:
    """See the module's contract."""
    _check(q, k, v, cu_seqlens, logit_bound)
    if not use_kernel("attention", q):
        return attention_ref(q, k, v, xsa=xsa, cu_seqlens=cu_seqlens)
    check_kernel_dtype("attention", q=q)
    if q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(f"attention: head width {q.shape[3]}, expected at most {MAX_HEAD_DIM} for the kernel")
    bound = None if logit_bound is None else logit_bound.detach()
    return _op(q, k, v, cu_seqlens, bound, xsa, PATHS.get("attention", "auto"))[0]


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, logit_bound: Tensor | None) -> None:
    if q.dim() != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}:"
            " expected (B, T, H, d), (B, T, K, d), (B, T, K, d)"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2] or 0 in q.shape[2:]:
        raise ValueError(
            f"attention: {q.shape[2]} query heads of {q.shape[3]}, expected a multiple of the {k.shape[2]} KV heads"
        )
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype}, expected one dtype")
    if cu_seqlens is not None and (cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or cu_seqlens.shape[0] < 2):
        raise ValueError(
            f"attention: cu_seqlens {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}, expected (documents + 1,) int32"
        )
    if logit_bound is not None and (logit_bound.shape != q.shape[2:3] or logit_bound.dtype != torch.float32):
        raise ValueError(
            f"attention: logit_bound {tuple(logit_bound.shape)} {logit_bound.dtype}, expected ({q.shape[2]},) float32"
        )
    check_device("attention", q, k=k, v=v, cu_seqlens=cu_seqlens, logit_bound=logit_bound)
