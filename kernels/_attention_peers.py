"""Attention cores of other libraries, under one signature: FlashAttention-3, and cuDNN through torch.

    forward(q, k, v, cu_seqlens)               -> o (B, T, H, d), lse (B, H, T) fp32, natural logarithm
    backward(do, q, k, v, out, lse, cu_seqlens) -> dq, dk, dv, contiguous

The backward ones are called with out = y after XSA, which autograd's own rule could not do; that is why neither goes
through `scaled_dot_product_attention` or `flash_attn_func`. All three layouts agree with our own kernels', so that a
forward of one and a backward of another fit together.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Need:
    """What a call asks of a core. The defaults are what the presets ask."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    head_dim: int = 64
    documents: bool = False
    tokens: int = 2048  # a row
    rows: int = 1


@dataclass(frozen=True)
class Core:
    """A library's attention. why_not(need) is empty when it can be used."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    why_not: Callable[[Need], str]


def _why_not_either(need: Need) -> str:
    if need.device.type != "cuda":
        return f"needs a CUDA device, got {need.device.type}"
    if need.dtype not in (torch.bfloat16, torch.float16):
        return f"needs bfloat16 or float16, got {need.dtype}"
    if need.head_dim % 8:
        return f"needs a head width that is a multiple of 8, got {need.head_dim}"
    if need.rows * need.tokens == 0:
        return "needs at least one token"
    return ""


# -- FlashAttention-3 ------------------------------------------------------------------------------------------------


@lru_cache
def fa3_installed() -> bool:
    """Whether FlashAttention-3's module can be found; it is not imported."""
    return importlib.util.find_spec("flash_attn_interface") is not None


def _why_not_fa3(need: Need) -> str:
    if why := _why_not_either(need):
        return why
    if torch.cuda.get_device_capability(need.device) != (9, 0):
        return "needs compute capability 9.0"
    return "" if fa3_installed() else "flash_attn_interface is not installed"


@lru_cache
def _fa3() -> tuple[Callable, Callable]:
    module = importlib.import_module("flash_attn_interface")
    return module._flash_attn_forward, module._flash_attn_backward


def call_by_name(fn: Callable, **given):
    """fn with the arguments it has names for, `causal` also as `is_causal`, None for those it requires beyond.

    FA3's low-level functions have changed: earlier ones require each optional argument, later ones are custom ops.
    """
    inner = getattr(fn, "_init_fn", fn)  # a custom op's own signature says nothing
    names = inspect.signature(inner).parameters
    if "causal" not in names and "is_causal" in names:
        given["is_causal"] = given.pop("causal")
    if unknown := set(given) - set(names):
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{inner.__name__}: has no {names}; expected FlashAttention-3 of 2025-04 on")
    required = {n: None for n, p in names.items() if p.default is p.empty and n not in given}
    return fn(**required, **given)


def _packed(cu_seqlens: Tensor | None, length: int, *tensors: Tensor) -> tuple[list[Tensor], dict]:
    """(B T, heads, d) tensors and FA3's arguments for documents. Rows end documents too: their starts are merged in,
    where both coincide a document of no token arises, which is allowed; no number leaves the GPU."""
    if cu_seqlens is None:
        return list(tensors), {}
    total = tensors[0].shape[0] * length
    rows = torch.arange(0, total + 1, length, dtype=torch.int32, device=cu_seqlens.device)
    cu = torch.cat([cu_seqlens.clamp(0, total), rows]).sort().values
    arguments = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": length, "max_seqlen_k": length}
    return [t.flatten(0, 1) for t in tensors], arguments


def fa3_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the module's head."""
    b, t, h, d = q.shape
    (q, k, v), documents = _packed(cu_seqlens, t, q, k, v)
    o, lse = call_by_name(_fa3()[0], q=q, k=k, v=v, softmax_scale=d**-0.5, causal=True, **documents)[:2]
    if documents:  # (H, B T)
        lse = lse.view(h, b, t).transpose(0, 1).contiguous()
    return o.view(b, t, h, d), lse


def fa3_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the module's head. Its dq is summed by atomics unless torch is told to be deterministic."""
    b, t, h, d = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if cu_seqlens is not None:
        lse = lse.transpose(0, 1).reshape(h, b * t).contiguous()
    packed, documents = _packed(cu_seqlens, t, do, q, k, v, out, dq, dk, dv)
    names = ("dout", "q", "k", "v", "out", "dq", "dk", "dv")
    arguments = dict(zip(names, packed, strict=True)) | documents
    settings = {"softmax_scale": d**-0.5, "causal": True, "deterministic": torch.are_deterministic_algorithms_enabled()}
    call_by_name(_fa3()[1], softmax_lse=lse, **arguments, **settings)
    return dq, dk, dv


# -- cuDNN, by torch's operators, which want (B, H, T, d); any strides with contiguous heads, fewer KV heads allowed ---

_cudnn_forward_op = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_cudnn_backward_op = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default


def _why_not_cudnn(need: Need) -> str:
    if why := _why_not_either(need):
        return why
    if torch.cuda.get_device_capability(need.device) < (8, 0):
        return "needs compute capability 8.0"
    if not torch.backends.cudnn.is_available() or (torch.backends.cudnn.version() or 0) < 90000:
        return "needs cuDNN 9"
    if need.documents:
        return "has no document segments"
    if need.tokens < 2:
        return "needs rows of 2 tokens or more"
    if max(need.rows, 1) > 65535:
        return f"takes at most 65535 rows, got {need.rows}"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "is not deterministic"
    return ""


@lru_cache
def _cudnn_stats_dim() -> int:
    """4 or 3: whether this torch gives and takes the logsumexp as (B, H, T, 1) or as (B, H, T)."""
    x = torch.empty((1, 1, 8, 8), dtype=torch.bfloat16, device="meta")
    return _cudnn_forward_op(x, x, x, None, True, 0.0, True)[1].dim()


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """See the module's head."""
    b, t, h, d = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, lse = _cudnn_forward_op(q, k, v, None, True, 0.0, True, False, scale=d**-0.5)[:2]
    return o.transpose(1, 2).contiguous(), lse.reshape(b, h, t)


def cudnn_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See the module's head. Seed and offset are the dropout's and unused without one."""
    t, d = q.shape[1], q.shape[3]
    do, q, k, v, out = (x.transpose(1, 2) for x in (do, q, k, v, out))
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    lse = lse.unsqueeze(-1) if _cudnn_stats_dim() == 4 else lse
    none = (None, None, None)  # bias, and document starts of queries and keys
    grads = _cudnn_backward_op(do, q, k, v, out, lse, seed, seed, *none, t, t, 0.0, True, scale=d**-0.5)
    return tuple(g.transpose(1, 2).contiguous() for g in grads)


CORES: dict[str, Core] = {
    "fa3": Core(fa3_forward, fa3_backward, _why_not_fa3),
    "cudnn": Core(cudnn_forward, cudnn_backward, _why_not_cudnn),
}
