"""int6: fake quantisation of a weight on the grid that the export uses, with a straight-through gradient.

    step_r = fp16(max(max_c |w_rc| / qmax, scale_floor / qmax)), raised to 2^-24 where that rounds to zero
    q_rc   = clip(round_half_even(w_rc / step_r), qmin, qmax)
    out_rc = q_rc * step_r;  d out / d w = 1 everywhere, also where q was clipped

w (rows, cols) fp32 -> out (rows, cols) fp32. All arithmetic in fp32, the step rounded to fp16 because the artifact
stores it so; forward equals dequantising `int6_quantize_ref`, bit for bit. The grid is defined here and nowhere else.
`scale_floor=1` is the fixed grid of the challenge's scripts for rows with max |w| < 1 (PR #374, PR #401), 0 the plain
relative one.

int6_cast: the cast to a compute weight, once a step, outside the compiled graph.

    out_rc = dtype((out_rc of above, or w_rc with quantize=False) * row_scale_r)

w (rows, cols) or (n, rows, cols) fp32, row_scale (rows,) or (n, rows) fp32 -> out in fp32, bf16 or fp16. `int6_cast_`
writes a given tensor, so compute weights keep their storage; late QAT is its argument `quantize`, and no graph changes.
Not differentiable by intent: out is where the graph begins. With G the gradient at out, straight through,
d w = G * row_scale and d row_scale_r = sum_c W_rc G_rc, W being what row_scale multiplied.
clip < 1: that quantile of the row's |w| takes the place of the maximum; larger weights end at qmin and qmax. It costs a
sort, and quantiles of a GPU and a CPU may differ in the last bit.

Kernel: a program holds whole rows in registers, reads w once and writes out once; exact, no error but the rounding to
dtype. Divisions are IEEE: Triton's `/` is up to 2 ulp off and would leave the grid. The maximum is taken of bit
patterns, as integers, where NaN > inf > any number. Nothing is saved for backward.
Limits: cols <= 8192 for the kernel. 2^-24 is fp16's smallest step, so rows with max |w| < 31 * 2^-25 = 9.2e-7 round to
multiples of 6e-8, and a row of zeros stays zeros. A row with max |w| >= 31 * 65520 = 2.03e6 has no fp16 step:
quantising it raises ValueError, fake quantisation returns NaN for the whole row, never a finite wrong value. The same
holds for a row with inf or NaN. `int6` raises ValueError on non-finite weights on a CPU; on a GPU or when compiled,
where looking would stall the device once a layer, and in `int6_cast`, the NaN row reaches the loss, which the training
loop checks. Raises ValueError on other shapes, dtypes, devices and ranges.

On either path it is one opaque op to torch.compile: Inductor keeps a fused fp16 intermediate in fp32, so the compiled
reference leaves the step unrounded and misses the grid (5,900 of 6,144 values differed, by up to a whole step).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import cdiv, check_device, check_kernel_dtype, launch, pow2, register_op, tuned, use_kernel
from ._triton import jit, tl

SMALLEST_STEP = 2.0**-24  # fp16's smallest subnormal
MAX_WIDTH = 8192  # columns that a program's registers hold
QUANTILE_LIMIT = 2**23  # elements per torch.quantile call; torch refuses more than 2^24


def row_step(peak: Tensor, qmax: int, scale_floor: float) -> Tensor:
    """peak (rows,) fp32, the largest magnitude to keep -> step (rows,) fp16, > 0; inf or NaN where none fits."""
    # by a tensor: CUDA multiplies by the reciprocal of a Python number, an ulp off the CPU's quotient
    step = torch.clamp_min(peak / peak.new_full((), qmax), scale_floor / qmax).half()
    return torch.clamp_min(step, SMALLEST_STEP)


def row_peak(w: Tensor, clip: float) -> Tensor:
    """(..., cols) -> (...): max |w|, or its quantile `clip` < 1 where that maximum is finite."""
    size = w.abs()
    peak = size.amax(dim=-1)
    if clip == 1.0 or not peak.numel():
        return peak
    rows = size.flatten(0, -2)
    chunks = rows.split(max(1, QUANTILE_LIMIT // rows.shape[1]))
    inner = torch.cat([c.quantile(clip, dim=1) for c in chunks]).view(peak.shape)
    return torch.where(torch.isfinite(peak), inner, peak)


def int6_grid(w: Tensor, qmax: int, qmin: int, scale_floor: float, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """(q integers as floats (..., cols), step fp16 (...)), unchecked: rows without a finite step hold NaN or zeros."""
    step = row_step(row_peak(w, clip), qmax, scale_floor)
    return torch.round(w / step.to(w.dtype)[..., None]).clamp(qmin, qmax), step


def int6_quantize_ref(w: Tensor, *, qmax: int = 31, qmin: int = -32, scale_floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """w (rows, cols) fp32 -> (q int8 (rows, cols), step fp16 (rows,)). ValueError when a row has no finite step."""
    check_weight(w)
    q, step = int6_grid(w.detach(), qmax, qmin, scale_floor)
    check_steps(step)
    return q.to(torch.int8), step


def int6_ref(w: Tensor, *, qmax: int = 31, qmin: int = -32, scale_floor: float = 0.0) -> Tensor:
    """Reference of `int6`, in plain torch."""
    q, step = int6_grid(w.detach(), qmax, qmin, scale_floor)
    # w - w is exactly 0 and carries the gradient; w + (out - w) would round and leave the export's grid by an ulp
    return q * step.to(w.dtype)[:, None] + (w - w.detach())


def int6_cast_ref(
    w: Tensor,
    *,
    quantize: bool,
    row_scale: Tensor | None = None,
    qmax: int = 31,
    qmin: int = -32,
    scale_floor: float = 0.0,
    clip: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Reference of `int6_cast`, in plain torch."""
    w = w.detach()
    if quantize:
        q, step = int6_grid(w, qmax, qmin, scale_floor, clip)
        w = (q + 0.0) * step.to(w.dtype)[..., None]  # an integer has no -0
    if row_scale is not None:
        w = w * row_scale.detach()[..., None]
    return w.to(dtype, copy=True)


# -- kernel: R rows of C weights, contiguous -------------------------------------------------------------------------


@jit
def fake_quant(x, peak, qmax, qmin, floor):
    """x (R, C) fp32 on its rows' grid, peak (R,) fp32 the magnitudes to keep, floor = scale_floor / qmax."""
    inf = float("inf")
    peak = tl.where(peak < inf, peak, inf)  # NaN too: a maximum with it would be the other number
    step = tl.maximum(tl.div_rn(peak, qmax), floor).to(tl.float16).to(tl.float32)
    step = tl.maximum(step, 5.9604644775390625e-08)  # SMALLEST_STEP
    step = tl.where(step < inf, step, float("nan"))[:, None]
    # adding 1.5 * 2^23 leaves no fraction bit and rounds half to even; from 2^22 on q is clipped anyway
    q = (tl.div_rn(x, step) + 12582912.0) - 12582912.0
    return tl.minimum(tl.maximum(q, qmin), qmax) * step


@jit
def abs_max(x):
    """max_c |x| of (R, C) fp32, NaN if there is one."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=1).to(tl.float32, bitcast=True)


@jit
def _int6_cast_kernel(
    w, row_scale, peaks, out, R, qmax, qmin, floor,
    QUANTIZE: tl.constexpr, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)).to(tl.int64)
    j = tl.arange(0, BLOCK_C)
    mask = (row < R)[:, None] & (j < C)[None, :]
    at = row[:, None] * C + j[None, :]
    x = tl.load(w + at, mask=mask, other=0.0)
    if QUANTIZE:
        if peaks is not None:
            peak = tl.load(peaks + row, mask=row < R, other=0.0)
        else:
            peak = abs_max(x)
        x = fake_quant(x, peak, qmax, qmin, floor)
    if row_scale is not None:
        x = x * tl.load(row_scale + row, mask=row < R, other=0.0)[:, None]
    tl.store(out + at, x.to(out.dtype.element_ty), mask=mask)


# -- ops -------------------------------------------------------------------------------------------------------------


def _int6_cast_(
    out: Tensor,
    w: Tensor,
    row_scale: Tensor | None,
    quantize: bool,
    qmax: int,
    qmin: int,
    scale_floor: float,
    clip: float,
) -> None:
    how_to = {"quantize": quantize, "qmax": qmax, "qmin": qmin, "scale_floor": scale_floor, "clip": clip}
    if not use_kernel("int6", w):
        out.copy_(int6_cast_ref(w, row_scale=row_scale, dtype=out.dtype, **how_to))
        return
    cols = w.shape[-1]
    rows = w.numel() // cols
    how = tuned("int6_cast", w, f"C{pow2(cols)}")
    scale = None if row_scale is None else row_scale.contiguous()
    peaks = row_peak(w, clip).contiguous() if quantize and clip < 1.0 else None
    args = (w.contiguous(), scale, peaks, out, rows, float(qmax), float(qmin), scale_floor / qmax)
    grid = (cdiv(rows, how.blocks["BLOCK_R"]),)
    launch(_int6_cast_kernel, grid, *args, how=how, QUANTIZE=quantize, C=cols, BLOCK_C=pow2(cols))


def _int6(w: Tensor, qmax: int, qmin: int, scale_floor: float) -> Tensor:
    out = torch.empty_like(w, memory_format=torch.contiguous_format)
    _int6_cast_(out, w, None, True, qmax, qmin, scale_floor, 1.0)
    return out


def _int6_fake(w, qmax, qmin, scale_floor):
    return torch.empty_like(w, memory_format=torch.contiguous_format)


_op = register_op(_int6, _int6_fake, setup=lambda ctx, inputs, output: None, backward=lambda ctx, g: (g, *[None] * 3))
_cast_op = register_op(_int6_cast_, lambda *args: None, mutates=("out",))


def int6(w: Tensor, *, qmax: int = 31, qmin: int = -32, scale_floor: float = 0.0) -> Tensor:
    """See the module's contract."""
    check_weight(w)
    check_range("int6", w, qmax, qmin)
    if w.device.type == "cpu" and not torch.compiler.is_compiling():
        check_finite(w)
    return _op(w, qmax, qmin, scale_floor)


def int6_cast(
    w: Tensor,
    *,
    quantize: bool,
    row_scale: Tensor | None = None,
    qmax: int = 31,
    qmin: int = -32,
    scale_floor: float = 0.0,
    clip: float = 1.0,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """See the module's contract."""
    out = torch.empty(w.shape, dtype=dtype, device=w.device)
    grid = {"qmax": qmax, "qmin": qmin, "scale_floor": scale_floor, "clip": clip}
    int6_cast_(out, w, quantize=quantize, row_scale=row_scale, **grid)
    return out


def int6_cast_(
    out: Tensor,
    w: Tensor,
    *,
    quantize: bool,
    row_scale: Tensor | None = None,
    qmax: int = 31,
    qmin: int = -32,
    scale_floor: float = 0.0,
    clip: float = 1.0,
) -> None:
    """`int6_cast` into `out`, which is contiguous and shares no memory with the other tensors."""
    check_bank("int6_cast", w, row_scale=row_scale, out=out)
    check_range("int6_cast", w, qmax, qmin)
    if not 0.0 < clip <= 1.0:
        raise ValueError(f"int6_cast: clip={clip}, expected a quantile in (0, 1]")
    scale = None if row_scale is None else row_scale.detach()
    _cast_op(out.detach(), w.detach(), scale, quantize, qmax, qmin, scale_floor, clip)


# -- checks ----------------------------------------------------------------------------------------------------------


def check_weight(w: Tensor) -> None:
    """ValueError unless w is (rows, cols >= 1) fp32."""
    if w.dim() != 2 or w.shape[1] == 0 or w.dtype != torch.float32:
        raise ValueError(f"int6: w {tuple(w.shape)} {w.dtype}, expected (rows, cols >= 1) torch.float32")


def check_bank(op: str, w: Tensor, *, row_scale: Tensor | None, out: Tensor | None) -> None:
    """ValueError unless w is one matrix or a bank of them, fp32, with a scale a row and a contiguous `out`."""
    shape = tuple(w.shape)
    if w.dim() not in (2, 3) or shape[-1] == 0 or w.dtype != torch.float32:
        raise ValueError(f"{op}: w {shape} {w.dtype}, expected (rows, cols >= 1) or (n, rows, cols >= 1) torch.float32")
    if row_scale is not None and (row_scale.shape != shape[:-1] or row_scale.dtype != torch.float32):
        got = f"{tuple(row_scale.shape)} {row_scale.dtype}"
        raise ValueError(f"{op}: row_scale {got}, expected {shape[:-1]} torch.float32")
    if out is not None and (out.shape != shape or not out.is_contiguous()):
        raise ValueError(f"{op}: out {tuple(out.shape)}, strides {out.stride()}, expected {shape}, contiguous")
    check_kernel_dtype(op, out=out)
    check_device(op, w, row_scale=row_scale, out=out)


def check_range(op: str, w: Tensor, qmax: int, qmin: int, path: str = "int6") -> None:
    """ValueError unless q fits int8 and, if op `path` runs its kernel, a row fits registers."""
    if not (1 <= qmax <= 127 and -128 <= qmin <= 0):
        raise ValueError(f"{op}: qmin={qmin}, qmax={qmax}, expected -128 <= qmin <= 0 < qmax <= 127")
    if use_kernel(path, w) and w.shape[-1] > MAX_WIDTH:
        raise ValueError(f"{op}: {w.shape[-1]} columns, expected at most {MAX_WIDTH} for the kernel")


def check_finite(w: Tensor) -> None:
    """ValueError on inf or NaN, naming the first row."""
    bad = ~torch.isfinite(w).all(dim=1)
    if bad.any():
        raise ValueError(f"int6: {int(bad.sum())} rows with inf or NaN, first row {int(bad.nonzero()[0])}")


def check_steps(step: Tensor) -> None:
    """ValueError when a row's fp16 step is inf or NaN."""
    bad = ~torch.isfinite(step)
    if bad.any():
        raise ValueError(
            f"int6: {int(bad.sum())} rows without a finite fp16 step, first row {int(bad.nonzero()[0])}:"
            " non-finite or too large weights"
        )
