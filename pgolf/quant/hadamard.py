"""OptRot: a Hadamard rotation of a matrix's rows before it is rounded, undone after.

It mixes all rows into each, so that outliers spread and rows get alike. The input side is untouched, and with it the
Hessian that GPTQ goes by. Only additions in a fixed order and one product: the same bits on every machine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def can_rotate(rows: int) -> bool:
    """Whether there is a Sylvester Hadamard matrix of this size, other than 1."""
    return rows > 1 and rows & (rows - 1) == 0


def rotate(w: Tensor) -> Tensor:
    """w (rows, cols) fp32 -> H w, H Sylvester's matrix / sqrt(rows): its own inverse, up to fp32's rounding.

    ValueError unless `can_rotate(rows)`.
    """
    rows, cols = w.shape
    if not can_rotate(rows):
        raise ValueError(f"a Hadamard rotation needs a power of two as number of rows, got {rows}")
    half = 1
    while half < rows:
        pairs = w.reshape(rows // (2 * half), 2, half, cols)
        w = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), dim=1)
        half *= 2
    return w.reshape(rows, cols) * rows**-0.5
