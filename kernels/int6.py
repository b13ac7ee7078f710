"""int6: fake quantisation of a weight on the grid that the export uses, with a straight-through gradient.

    step_r = fp16(max(max_c |w_rc| / qmax, scale_floor / qmax)), raised to 2^-24 where that rounds to zero
    q_rc   = clip(round_half_even(w_rc / step_r), qmin, qmax)
    out_rc = q_rc * step_r;  d out / d w = 1 everywhere, also where q was clipped

w (rows, cols) fp32 -> out (rows, cols) fp32. All arithmetic in fp32, the step rounded to fp16 because the artifact
stores it so; forward equals dequantising `int6_quantize_ref`, bit for bit. The grid is defined here and nowhere else.
`scale_floor=1` is the fixed grid of the challenge's scripts for rows with max |w| < 1 (PR #374, PR #401), 0 the plain
relative one.
Limits: 2^-24 is fp16's smallest step, so rows with max |w| < 31 * 2^-25 = 9.2e-7 round to multiples of 6e-8, and a row
of zeros stays zeros. A row with max |w| >= 31 * 65520 = 2.03e6 has no fp16 step: quantising it raises ValueError, fake
quantisation returns NaN for the whole row, never a finite wrong value. The same holds for a row with inf or NaN.
`int6` raises ValueError on non-finite weights on a CPU; on a GPU or when compiled, where looking would stall the device
once a layer, the NaN row reaches the loss, which the training loop checks. Raises ValueError on other shapes or dtypes.

It is one opaque op to torch.compile: Inductor keeps a fused fp16 intermediate in fp32, so the compiled reference leaves
the step unrounded and misses the grid (5,900 of 6,144 values differed, by up to a whole step).
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST_STEP = 2.0**-24  # fp16's smallest subnormal


def row_step(peak: Tensor, qmax: int, scale_floor: float) -> Tensor:
    """peak (rows,) fp32, the largest magnitude to keep -> step (rows,) fp16, > 0; inf or NaN where none fits."""
    step = torch.clamp_min(peak / qmax, scale_floor / qmax).half()
    return torch.clamp_min(step, SMALLEST_STEP)


def int6_grid(w: Tensor, qmax: int, qmin: int, scale_floor: float) -> tuple[Tensor, Tensor]:
    """(q fp32 integers (rows, cols), step fp16 (rows,)), unchecked: rows without a finite step hold NaN or zeros."""
    step = row_step(w.abs().amax(dim=1), qmax, scale_floor)
    return torch.round(w / step.float()[:, None]).clamp(qmin, qmax), step


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
    return q * step.float()[:, None] + (w - w.detach())


@torch.library.custom_op("pgolf::int6", mutates_args=())
def _int6(w: Tensor, qmax: int, qmin: int, scale_floor: float) -> Tensor:
    return int6_ref(w, qmax=qmax, qmin=qmin, scale_floor=scale_floor)


_int6.register_fake(lambda w, qmax, qmin, scale_floor: torch.empty_like(w))
_int6.register_autograd(lambda ctx, grad: (grad, None, None, None))


def int6(w: Tensor, *, qmax: int = 31, qmin: int = -32, scale_floor: float = 0.0) -> Tensor:
    """See the module's contract."""
    check_weight(w)
    if w.device.type == "cpu" and not torch.compiler.is_compiling():
        check_finite(w)
    return _int6(w, qmax, qmin, scale_floor)


def check_weight(w: Tensor) -> None:
    """ValueError unless w is (rows, cols >= 1) fp32."""
    if w.dim() != 2 or w.shape[1] == 0 or w.dtype != torch.float32:
        raise ValueError(f"int6: w {tuple(w.shape)} {w.dtype}, expected (rows, cols >= 1) torch.float32")


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
