"""Cases of the newton_schulz op: the banks of 11 layers' matrices that Muon orthogonalises, and the odd ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.kernels.newton_schulz import newton_schulz, newton_schulz_ref

from .case import PRODUCTION, Case, D, F, Make

SMALL = {
    "odd": {"n": 2, "r": 17, "c": 37},
    "tall": {"n": 2, "r": 40, "c": 19},
    "square": {"n": 1, "r": 33, "c": 33},
    "one": {"n": 1, "r": 1, "c": 1},
    "empty": {"n": 0, "r": 3, "c": 4},
}


def inputs(steps: int, compute_dtype: torch.dtype | None):
    def build(make: Make, n: int, r: int, c: int) -> dict:
        return {"g": make.randn(n, r, c), "steps": steps, "eps": 1e-7, "compute_dtype": compute_dtype}

    return build


def ref(g: Tensor, steps: int, eps: float, compute_dtype: torch.dtype | None) -> Tensor:
    """The reference; given fp64, it iterates in fp64."""
    return newton_schulz_ref(g, steps, eps, None if g.dtype == torch.float64 else compute_dtype)


def case(name: str, sizes: dict, steps: int = 5, compute_dtype: torch.dtype | None = torch.bfloat16) -> Case:
    def traffic(n: int, r: int, c: int, item: int) -> tuple[int, int]:
        """g is read for the norm and for the scaling, the result written; of the iteration, in bf16, a step reads X
        for A, A for P, P and X for the new X."""
        x, a = n * r * c, n * min(r, c) ** 2
        return x * (3 * item + 4) + steps * 2 * (3 * x + 4 * a), 0

    def flops(n: int, r: int, c: int) -> tuple[int, int]:
        """Half of a product each for A and P, and the whole of P X."""
        s, long = min(r, c), max(r, c)
        return steps * n * s * ((s + 1) * long + (s + 1) * s + 2 * s * long), 0

    return Case(
        op="newton_schulz",
        name=name,
        inputs=inputs(steps, compute_dtype),
        fn=newton_schulz,
        ref=ref,
        sizes=sizes,
        dtypes=(torch.bfloat16, torch.float32),  # Muon's momentum is fp32
        traffic=traffic,
        flops=flops,
    )


CASES = [
    case("bf16", {"pair": {"n": 2, "r": 17, "c": 20}, PRODUCTION: {"n": 22, "r": D, "c": D}}),
    case("up", {"tall": SMALL["tall"], PRODUCTION: {"n": 11, "r": F, "c": D}}, steps=3),
    case("down", {"square": SMALL["square"], PRODUCTION: {"n": 11, "r": D, "c": F}}, steps=1),
    case("default", SMALL, steps=2, compute_dtype=None),
]
