"""Cases of flat_update: the MLP banks of the reference model as late QAT leaves them, and what else it can do.

The op works in place; a case gives it copies and returns what it wrote.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pgolf.kernels.flat_update import flat_update, flat_update_ref

from .case import PRODUCTION, Case, D, F, Make

SIZES = {
    "odd": {"n": 3, "rows": 5, "cols": 20},
    "one": {"n": 1, "rows": 1, "cols": 1},
    "many": {"n": 2, "rows": 33, "cols": 16},
    "empty": {"n": 0, "rows": 4, "cols": 8},
}
TIGHT = dict.fromkeys((torch.float32, torch.bfloat16), 2.0**-22)  # two ulps of the largest weight


def on_copies(fn: Callable) -> Callable:
    """fn(w, direction, ema=, out=...) as a function of its inputs: (w, ema, out) after the update."""
    update = in_place(fn)

    def run(w: Tensor, direction: Tensor, ema: Tensor | None, cast: bool, **options) -> tuple[Tensor | None, ...]:
        return update(w.clone(), direction, None if ema is None else ema.clone(), cast, **options)

    return run


def in_place(fn: Callable) -> Callable:
    """The same, writing to w and ema."""

    def run(w: Tensor, direction: Tensor, ema: Tensor | None, cast: bool, **options) -> tuple[Tensor | None, ...]:
        narrow = torch.bfloat16 if w.dtype == torch.float32 else w.dtype  # the truth stays in fp64
        out = torch.empty_like(w, dtype=narrow) if cast else None
        fn(w, direction, ema=ema, out=out, **options)
        return w, ema, out

    return run


def case(name: str, production: dict, *, ema: bool = True, cast: bool = True, rates: bool = False, **options) -> Case:
    scaled = options.pop("scaled", False)

    def inputs(make: Make, n: int, rows: int, cols: int) -> dict:
        lr, decay = (make.param(), make.param()) if rates else (0.02, 0.04)
        return {
            "w": make.param(n, rows, cols),
            "direction": make.randn(n, rows, cols),
            "ema": make.param(n, rows, cols) if ema else None,
            "cast": cast,
            "lr": lr,
            "weight_decay": decay,
            "scale": 3.0**0.5,
            "ema_decay": 0.997 if ema else 0.0,
            **({"row_scale": make.param(n, rows)} if scaled else {}),
            **options,
        }

    def traffic(n: int, rows: int, cols: int, item: int) -> tuple[int, int]:
        """Reads w, the direction and ema, writes w, ema and the bf16 cast."""
        return n * rows * (cols * (8 + item + 8 * ema + 2 * cast) + 4 * scaled), 0

    return Case(
        op="flat_update",
        name=name,
        inputs=inputs,
        fn=on_copies(flat_update),
        ref=on_copies(flat_update_ref),
        timed=(in_place(flat_update), in_place(flat_update_ref)),
        writes=("w", "ema"),
        sizes={**({PRODUCTION: production} if production else {}), **SIZES},
        traffic=traffic,
        slack=TIGHT,
    )


CASES = [
    case("up", {"n": 11, "rows": F, "cols": D}, quantize=True),
    case("down", {"n": 11, "rows": D, "cols": F}, quantize=True, scaled=True),
    case("no_qat", {"n": 22, "rows": D, "cols": D}, scaled=True),
    case("rates", {}, rates=True, ema=False, quantize=True, scale_floor=1.0),
    case("apply", {}, ema=False, cast=False),
]
