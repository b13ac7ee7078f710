"""Cases of the mlp op: one an activation."""

from __future__ import annotations

from pgolf.kernels.mlp import mlp, mlp_ref

from .case import PRODUCTION, B, Case, D, F, Make, T

# hidden width in the presets: 3 D, and 2 D in the smaller ones
HIDDEN = {"relu2": F, "leaky_relu2": F, "silu2": 2 * D}
SIZES = {
    "odd": {"b": 3, "t": 13, "d": 24, "f": 200},
    "one": {"b": 1, "t": 1, "d": 8, "f": 8},
    "empty": {"b": 0, "t": 4, "d": 8, "f": 16},
}


def case(activation: str) -> Case:
    """The production size is there for the activations that presets use."""

    def inputs(make: Make, b: int, t: int, d: int, f: int) -> dict:
        return {
            "x": make.randn(b, t, d),
            "w_up": make.randn(f, d, scale=d**-0.5),
            "w_down": make.randn(d, f, scale=f**-0.5),
            "activation": activation,
            "slope": 0.5,
        }

    def traffic(b: int, t: int, d: int, f: int, item: int) -> tuple[int, int]:
        """Forward: up reads x and Wup and writes post and what backward needs besides; down reads post and Wdown and
        writes y. Backward: du reads dy, Wdown and post (or act') and signs and writes du; dx reads du and Wup, dWup du
        and x, dWdown dy and post; each writes its gradient."""
        x, hidden, w = b * t * d * item, b * t * f * item, d * f * item
        signs = hidden // (8 * item) if activation == "leaky_relu2" else 0
        extra = hidden if activation in ("gelu2", "silu2") else signs
        return 2 * x + 2 * hidden + extra + 2 * w, 4 * x + 5 * hidden + signs + 4 * w

    def flops(b: int, t: int, d: int, f: int) -> tuple[int, int]:
        """Two products forward, four backward."""
        return 2 * 2 * b * t * d * f, 4 * 2 * b * t * d * f

    production = {PRODUCTION: {"b": B, "t": T, "d": D, "f": HIDDEN[activation]}} if activation in HIDDEN else {}
    return Case(
        op="mlp",
        name=activation,
        inputs=inputs,
        fn=mlp,
        ref=mlp_ref,
        sizes=production | SIZES,
        grads=("x", "w_up", "w_down"),
        traffic=traffic,
        flops=flops,
    )


CASES = [case("relu2"), case("leaky_relu2"), case("silu2"), case("gelu2")]
