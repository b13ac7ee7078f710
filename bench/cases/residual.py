"""Cases of the residual op: the joins that a block of `rat_rod_green` makes, and the odd ones."""

from __future__ import annotations

from dataclasses import replace

from pgolf.kernels.residual import residual, residual_kept, residual_kept_ref, residual_ref

from .case import PRODUCTION, B, Case, D, Make, T

SIZES = {
    PRODUCTION: {"b": B, "t": T, "d": D},
    "odd": {"b": 3, "t": 7, "d": 20},
    "one": {"b": 1, "t": 1, "d": 5},
    "many": {"b": 2, "t": 33, "d": 16},
    "empty": {"b": 0, "t": 4, "d": 8},
}


def inputs(weights: str, normalize: bool):
    """weights: a letter a term: n none, v a (D,) vector, s a scalar, = the weight of the term before."""

    def build(make: Make, b: int, t: int, d: int) -> dict:
        of = {"n": lambda: None, "v": lambda: make.param(d), "s": lambda: make.param()}
        own = [of[w]() for w in weights.replace("=", "n")]
        return {
            "terms": [make.randn(b, t, d) for _ in weights],
            "weights": [own[i - 1] if w == "=" else own[i] for i, w in enumerate(weights)],
            "norm_scale": 0.5,
            "eps": 1e-6,
            "normalize": normalize,
        }

    return build


def case(name: str, weights: str, normalize: bool = True, preset: bool = True) -> Case:
    """preset: whether one of the presets joins like this; only then it is compiled ahead of time and timed."""
    weighted = [i for i, w in enumerate(weights) if w != "n"]
    owners = [i for i in weighted if weights[i] != "="]
    terms, plain, outs = len(weights), int("n" in weights), 1 + normalize

    def traffic(b: int, t: int, d: int, item: int) -> tuple[int, int]:
        """Forward reads the terms and writes the outputs; backward reads both gradients, the sum and the weighted
        terms and writes a gradient a weight and one for all others."""
        stream = b * t * d * item
        return stream * (terms + outs), stream * (outs + normalize + len(weighted) + len(owners) + plain)

    return Case(
        op="residual",
        name=name,
        inputs=inputs(weights, normalize),
        fn=residual,
        ref=residual_ref,
        sizes={name: size for name, size in SIZES.items() if preset or name != PRODUCTION},
        grads=tuple([f"terms.{i}" for i in range(terms)] + [f"weights.{i}" for i in owners]),
        traffic=traffic,
    )


def kept_case(name: str, weights: str, inner: int, preset: bool = True) -> Case:
    """A sum inside the sum: the first `inner` letters are inside."""
    plain = case(name, weights, preset=preset)

    def build(make: Make, b: int, t: int, d: int) -> dict:
        given = plain.inputs(make, b, t, d)
        del given["normalize"]
        return {**given, "kept_weight": make.param(d), "inner": inner}

    def traffic(b: int, t: int, d: int, item: int) -> tuple[int, int]:
        """One output more forward; backward reads its gradient, and it too."""
        stream = b * t * d * item
        forward, backward = plain.traffic(b, t, d, item)
        return forward + stream, backward + 2 * stream

    grads = (*plain.grads, "kept_weight")
    return replace(plain, inputs=build, fn=residual_kept, ref=residual_kept_ref, grads=grads, traffic=traffic)


CASES = [
    kept_case("keep_mix", "nvv", 2),
    kept_case("keep_mix_folded", "nnv", 2),
    kept_case("keep_one", "vvv", 1, preset=False),
    kept_case("keep_three", "v=nv", 3, preset=False),
    case("mix", "vvv"),
    case("mix_folded", "v=v"),
    case("mix_skip", "vvvv"),
    case("mix_after_kept", "vv"),
    case("add", "nv"),
    case("add_folded", "nn"),
    case("add_lambda", "sv"),
    case("kept", "nv", normalize=False),
    case("shared", "v=sn", preset=False),
    case("skip_gated", "vv", normalize=False, preset=False),
    case("parallel", "svv", normalize=False, preset=False),
    case("four", "vnsv", preset=False),
    case("norm_only", "n"),
]
