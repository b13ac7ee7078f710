"""Cases of int6 and int6_cast: the matrices of the reference model in banks of one shape, and the odd ones.

No gradients here: int6's is the identity, which leaves no op in the backward graph, and int6_cast has none.
"""

from __future__ import annotations

import torch

from pgolf.kernels.int6 import int6, int6_cast, int6_cast_ref, int6_ref

from .case import PRODUCTION, Case, D, F, Make

FP32 = (torch.float32,)
SIZES = {
    "odd": {"n": 3, "rows": 5, "cols": 20},
    "one": {"n": 1, "rows": 1, "cols": 1},
    "many": {"n": 2, "rows": 33, "cols": 16},
    "empty": {"n": 0, "rows": 4, "cols": 8},
}


def spread(make: Make, *shape: int):
    """Weights whose rows are of very different size, for grids with large, small and subnormal steps."""
    return make.param(*shape) * (2.0 ** (make.param(*shape[:-1], 1) * 6))


def case(name: str, production: dict, *, quantize: bool = True, scaled: bool = True, **options) -> Case:
    def inputs(make: Make, n: int, rows: int, cols: int) -> dict:
        scale = {"row_scale": make.param(n, rows)} if scaled else {}
        return {"w": spread(make, n, rows, cols), "quantize": quantize, **scale, **options}

    def traffic(n: int, rows: int, cols: int, item: int) -> tuple[int, int]:
        """w is read in fp32 and written in dtype, with a scale a row."""
        out = options.get("dtype", torch.bfloat16).itemsize
        return n * rows * (cols * (4 + out) + 4 * scaled), 0

    return Case(
        op="int6",
        name=name,
        inputs=inputs,
        fn=int6_cast,
        ref=int6_cast_ref,
        sizes={**({PRODUCTION: production} if production else {}), **SIZES},
        dtypes=FP32,
        traffic=traffic,
        exact=True,
    )


def matrix(make: Make, n: int, rows: int, cols: int) -> dict:
    return {"w": spread(make, n * rows, cols), "scale_floor": 0.5}


CASES = [
    Case(
        op="int6",
        name="fake_quant",
        inputs=matrix,
        fn=int6,
        ref=int6_ref,
        sizes={PRODUCTION: {"n": 1, "rows": F, "cols": D}, **SIZES},
        dtypes=FP32,
        traffic=lambda n, rows, cols, item: (8 * n * rows * cols, 0),
        exact=True,
    ),
    case("cast", {"n": 22, "rows": D, "cols": D}),
    case("cast_plain", {"n": 22, "rows": D, "cols": D}, quantize=False),
    case("cast_up", {"n": 11, "rows": F, "cols": D}, scaled=False),
    case("cast_down", {"n": 11, "rows": D, "cols": F}),
    case("cast_floor_fp16", {}, scaled=False, scale_floor=1.0, dtype=torch.float16),
    case("cast_clip", {}, clip=0.9, qmin=-31),
]
