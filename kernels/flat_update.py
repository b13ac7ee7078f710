"""flat_update: the tail of a Muon step for a bank of matrices in one pass: apply, average, cast. In place.

    w   <- w * (1 - lr * weight_decay) - lr * scale * direction
    ema <- lerp(ema, w, 1 - ema_decay)                                                   if ema is given
    out <- dtype(int6_cast(w, quantize=quantize, row_scale=row_scale))                   if out is given

w (rows, cols) or (n, rows, cols) fp32, contiguous; direction of its shape in fp32, bf16 or fp16; ema like w; out of w's
shape in fp32, bf16 or fp16; row_scale (rows,) or (n, rows) fp32. Nothing is returned, nothing is differentiable. ema,
out and the others share no memory. lr and weight_decay are numbers or 0-D fp32 tensors on w's device: a captured CUDA
graph, or a compiled optimiser, then takes a new rate without a new capture or graph.

Kernel: a program holds whole rows, because a grid's step needs the row's maximum: every number is read once and written
once, 4 + 2 + 4 bytes in and 4 + 4 + 2 out a weight with a bf16 direction. All arithmetic in fp32: the product with
1 - lr * weight_decay is rounded, the rest is one fused multiply-add, as torch's foreach kernels on CUDA do it (they are
compiled with contraction); so w and ema equal `torch._foreach_mul_`, `_foreach_add_(alpha=)` and `_foreach_lerp_` to an
ulp, and `out` is exactly the cast of the w that was written. With tensors, 1 - lr * weight_decay is rounded once from
the fp32 values; as numbers it comes from Python's fp64.
Limits: cols <= 8192 for the kernel. A row with inf or NaN, or too large for the grid, gives NaN in out's whole row.
Raises ValueError on other shapes, dtypes, devices, layouts and ranges, and on quantize or row_scale without out.
Like int6 it is an opaque op on either path, for the fp16 rounding of the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import cdiv, check_device, check_kernel_dtype, launch, pow2, register_op, tuned, use_kernel
from ._triton import jit, tl
from .int6 import abs_max, check_bank, check_range, fake_quant, int6_cast_ref

Rate = float | Tensor


def flat_update_ref(
    w: Tensor,
    direction: Tensor,
    *,
    lr: Rate,
    weight_decay: Rate,
    scale: float = 1.0,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
    out: Tensor | None = None,
    quantize: bool = False,
    row_scale: Tensor | None = None,
    qmax: int = 31,
    qmin: int = -32,
    scale_floor: float = 0.0,
) -> None:
    """Reference of `flat_update`, in plain torch."""
    keep, alpha = 1.0 - lr * weight_decay, -lr * scale
    if isinstance(keep, Tensor):
        keep = (1.0 - torch.as_tensor(lr).double() * weight_decay).to(w.dtype)
    w.mul_(keep)
    if isinstance(alpha, Tensor):
        w.addcmul_(direction.to(w.dtype), alpha.to(w.dtype))
    else:
        w.add_(direction.to(w.dtype), alpha=alpha)
    if ema is not None:
        ema.lerp_(w, 1.0 - ema_decay)
    if out is not None:
        grid = {"qmax": qmax, "qmin": qmin, "scale_floor": scale_floor}
        out.copy_(int6_cast_ref(w, quantize=quantize, row_scale=row_scale, dtype=out.dtype, **grid))


# -- kernel: R rows of C weights, contiguous -------------------------------------------------------------------------


@jit
def _flat_update_kernel(
    w, direction, ema, out, row_scale, lr_at, decay_at, R, keep, alpha, scale, ema_weight, qmax, qmin, floor,
    QUANTIZE: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    j = tl.arange(0, BLOCK_C)
    mask = (row < R)[:, None] & (j < C)[None, :]
    at = row[:, None] * C + j[None, :]
    if lr_at is not None:
        lr = tl.load(lr_at)
        keep = tl.fma(-lr, tl.load(decay_at), 1.0)
        alpha = -lr * scale
    x = tl.load(w + at, mask=mask, other=0.0) * keep
    d = tl.load(direction + at, mask=mask, other=0.0).to(tl.float32)
    x = tl.fma(d, alpha, x)  # explicit: which product is rounded must not be the compiler's choice
    tl.store(w + at, x, mask=mask)
    if ema is not None:
        e = tl.load(ema + at, mask=mask, other=0.0)
        # torch.lerp: from the nearer end, so that weight 1 gives x itself
        e = tl.where(ema_weight < 0.5, tl.fma(x - e, ema_weight, e), tl.fma(x - e, ema_weight - 1.0, x))
        tl.store(ema + at, e, mask=mask)
    if out is not None:
        if QUANTIZE:
            x = fake_quant(x, abs_max(x), qmax, qmin, floor)
        if row_scale is not None:
            x = x * tl.load(row_scale + row, mask=row < R, other=0.0)[:, None]
        tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


# -- op --------------------------------------------------------------------------------------------------------------


def _flat_update(
    w: Tensor,
    ema: Tensor | None,
    out: Tensor | None,
    direction: Tensor,
    row_scale: Tensor | None,
    lr_at: Tensor | None,
    decay_at: Tensor | None,
    lr: float,
    weight_decay: float,
    scale: float,
    ema_decay: float,
    quantize: bool,
    qmax: int,
    qmin: int,
    scale_floor: float,
) -> None:
    """The rates are the tensors where there are any, both or none."""
    if not use_kernel("flat_update", w):
        lr, weight_decay = (lr, weight_decay) if lr_at is None else (lr_at, decay_at)
        average = {"ema": ema, "ema_decay": ema_decay}
        cast = {"out": out, "quantize": quantize, "row_scale": row_scale}
        grid = {"qmax": qmax, "qmin": qmin, "scale_floor": scale_floor}
        flat_update_ref(w, direction, lr=lr, weight_decay=weight_decay, scale=scale, **average, **cast, **grid)
        return
    cols = w.shape[-1]
    rows = w.numel() // cols
    how = tuned("flat_update", w, f"C{pow2(cols)}")
    row_scale = None if row_scale is None else row_scale.contiguous()
    tensors = (w, direction.contiguous(), ema, out, row_scale, lr_at, decay_at)
    rates = (1.0 - lr * weight_decay, -lr * scale, scale, 1.0 - ema_decay)
    args = (*tensors, rows, *rates, float(qmax), float(qmin), scale_floor / qmax)
    grid = (cdiv(rows, how.blocks["BLOCK_R"]),)
    launch(_flat_update_kernel, grid, *args, how=how, QUANTIZE=quantize, C=cols, BLOCK_C=pow2(cols))


_op = register_op(_flat_update, lambda *args: None, mutates=("w", "ema", "out"))


def flat_update(
    w: Tensor,
    direction: Tensor,
    *,
    lr: Rate,
    weight_decay: Rate,
    scale: float = 1.0,
    ema: Tensor | None = None,
    ema_decay: float = 0.0,
    out: Tensor | None = None,
    quantize: bool = False,
    row_scale: Tensor | None = None,
    qmax: int = 31,
    qmin: int = -32,
    scale_floor: float = 0.0,
) -> None:
    """See the module's contract."""
    check_bank("flat_update", w, row_scale=row_scale, out=out)
    check_range("flat_update", w, qmax, qmin, path="flat_update")
    _check(w, direction, ema, ema_decay)
    if out is None and (quantize or row_scale is not None):
        raise ValueError("flat_update: quantize or row_scale without out, expected a tensor to cast into")
    bare = lambda t: None if t is None else t.detach()
    tensors = (bare(t) for t in (w, ema, out, direction, row_scale))
    rates = _rates(w, lr, weight_decay)
    _op(*tensors, *rates, scale, ema_decay, quantize, qmax, qmin, scale_floor)


def _rates(w: Tensor, lr: Rate, weight_decay: Rate) -> tuple[Tensor | None, Tensor | None, float, float]:
    """(tensors or None, numbers) for lr and weight_decay. A number beside a tensor becomes one: one small launch."""
    if not isinstance(lr, Tensor) and not isinstance(weight_decay, Tensor):
        return None, None, lr, weight_decay
    given = {"lr": lr, "weight_decay": weight_decay}
    rates = {name: r.detach() if isinstance(r, Tensor) else w.new_full((), r) for name, r in given.items()}
    for name, r in rates.items():
        if r.ndim or r.dtype != torch.float32:
            raise ValueError(f"flat_update: {name} is {tuple(r.shape)} {r.dtype}, expected a number or () float32")
    check_device("flat_update", w, **rates)
    return rates["lr"], rates["weight_decay"], 0.0, 0.0


def _check(w: Tensor, direction: Tensor, ema: Tensor | None, ema_decay: float) -> None:
    if not w.is_contiguous():
        raise ValueError(f"flat_update: w has strides {w.stride()}, expected contiguous: it is updated in place")
    if direction.shape != w.shape:
        raise ValueError(f"flat_update: direction is {tuple(direction.shape)}, expected {tuple(w.shape)} like w")
    if ema is not None and (ema.shape != w.shape or ema.dtype != w.dtype or not ema.is_contiguous()):
        got = f"{tuple(ema.shape)} {ema.dtype}, strides {ema.stride()}"
        raise ValueError(f"flat_update: ema is {got}, expected {tuple(w.shape)} {w.dtype}, contiguous")
    if not 0.0 <= ema_decay <= 1.0:
        raise ValueError(f"flat_update: ema_decay={ema_decay}, expected 0 to 1")
    check_kernel_dtype("flat_update", direction=direction)
    check_device("flat_update", w, direction=direction, ema=ema)
