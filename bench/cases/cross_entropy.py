"""Cases of the cross_entropy op: vocabularies of 1,024 and 8,192, with and without the entropy, and the odd ones."""

from __future__ import annotations

import torch

from pgolf.kernels.cross_entropy import cross_entropy, cross_entropy_ref

from .case import PRODUCTION, B, Case, Make, T, V

SMALL = {
    "odd": {"n": 7, "v": 37},
    "one": {"n": 1, "v": 5},
    "pair": {"n": 5, "v": 2},
    "many": {"n": 33, "v": 32},
    "empty": {"n": 0, "v": 8},
}


def inputs(entropy: bool, cap: float):
    """Logits of scale 8, some well into the cap; of scale 2 for the entropy, which would be nearly nothing where the
    kernel's error is absolute."""

    def build(make: Make, n: int, v: int) -> dict:
        return {
            "logits": make.randn(n, v, scale=2.0 if entropy else 8.0),
            "targets": make.ids(n, high=v),
            "cap": cap,
            "entropy": entropy,
        }

    return build


def case(name: str, vocab: int, entropy: bool = False, cap: float = 30.0, small: dict | None = None) -> Case:
    def traffic(n: int, v: int, item: int) -> tuple[int, int]:
        """Forward reads logits and targets and writes nll, lse (and H); backward reads logits, targets, lse and d nll
        and writes d logits."""
        return n * (v * item + 16 + 4 * entropy), n * (2 * v * item + 16)

    return Case(
        op="cross_entropy",
        name=name,
        inputs=inputs(entropy, cap),
        fn=cross_entropy,
        ref=cross_entropy_ref,
        sizes={PRODUCTION: {"n": B * T, "v": vocab}, **(small or SMALL)},
        grads=("logits",),
        traffic=traffic,
        slack={torch.float32: 2e-5, torch.bfloat16: 2.0**-8},  # z is held to 1e-7 of the cap, not of itself
    )


CASES = [
    case("v1024", V),
    case("v1024_entropy", V, entropy=True),
    case("v8192", 8192, cap=15.0, small={"blocks": {"n": 5, "v": 100}}),
]
