"""Cases of the residual op: the joins that a block of `rat_rod_green` makes, and the odd ones."""

from __future__ import annotations

from pgolf.kernels.residual import residual, residual_ref

from .case import PRODUCTION, B, Case, D, Make, T

SIZES = {
    PRODUCTION: {"b": B, "t": T, "d": D},
    "odd": {"b": 3, "t": 7, "d": 20},
    "one": {"b": 1, "t": 1, "d": 5},
    "many": {"b": 2, "t": 33, "d": 16},
    "empty": {"b": 0, "t": 4, "d": 8},
}


def inputs(weights: str, normalize: bool):
    """weights: a letter a term: n none, v a (D,) vector, s a scalar."""

    def build(make: Make, b: int, t: int, d: int) -> dict:
        of = {"n": lambda: None, "v": lambda: make.param(d), "s": lambda: make.param()}
        return {
            "terms": [make.randn(b, t, d) for _ in weights],
            "weights": [of[w]() for w in weights],
            "norm_scale": 0.5,
            "eps": 1e-6,
            "normalize": normalize,
        }

    return build


def case(name: str, weights: str, normalize: bool = True, preset: bool = True) -> Case:
    """preset: whether one of the presets joins like this; only then it is compiled ahead of time and timed."""
    weighted = [i for i, w in enumerate(weights) if w != "n"]
    terms, plain, outs = len(weights), int(len(weighted) < len(weights)), 1 + normalize

    def traffic(b: int, t: int, d: int, item: int) -> tuple[int, int]:
        """Forward reads the terms and writes the outputs; backward reads both gradients, the sum and the weighted
        terms and writes a gradient a weighted term and one for all others."""
        stream = b * t * d * item
        return stream * (terms + outs), stream * (outs + normalize + 2 * len(weighted) + plain)

    return Case(
        op="residual",
        name=name,
        inputs=inputs(weights, normalize),
        fn=residual,
        ref=residual_ref,
        sizes={name: size for name, size in SIZES.items() if preset or name != PRODUCTION},
        grads=tuple([f"terms.{i}" for i in range(terms)] + [f"weights.{i}" for i in weighted]),
        traffic=traffic,
    )


CASES = [
    case("mix", "vv"),
    case("add", "nv"),
    case("add_lambda", "sv"),
    case("skip", "nv", normalize=False),
    case("skip_gated", "vv", normalize=False, preset=False),
    case("parallel", "svv", normalize=False),
    case("add_folded", "nn"),
    case("four", "vnsv", preset=False),
    case("norm_only", "n"),
]
