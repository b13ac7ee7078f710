"""Integer grids of stored weights: ranges, a row's step, rounding to it. The formulas are `pgolf.kernels.int6`'s."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pgolf.kernels.int6 import check_steps, row_step


class Grid(NamedTuple):
    """Integers from `low` to `high`; a row's clip is `high` steps long."""

    low: int
    high: int


GRIDS = {
    "int8": Grid(-127, 127),
    "int7": Grid(-64, 63),
    "int6": Grid(-32, 31),
    "int5": Grid(-16, 15),
    "int4": Grid(-8, 7),
    "ternary": Grid(-1, 1),
}


def steps_of(clip: Tensor, grid: Grid, floor: float) -> Tensor:
    """clip (rows,) fp32, the magnitudes to keep -> step (rows,) fp16. ValueError when a row has no finite one."""
    step = row_step(clip, grid.high, floor)
    check_steps(step)
    return step


def round_to(rows: Tensor, step: Tensor, grid: Grid) -> Tensor:
    """rows (rows, cols) fp32, step (rows,) fp16 -> integers (rows, cols) int8."""
    return torch.round(rows / step.float()[:, None]).clamp(grid.low, grid.high).to(torch.int8)
