"""Cases of the qk_prep op: the head layouts and rotations of the presets, and the odd ones."""

from __future__ import annotations

from pgolf.kernels.qk_prep import qk_prep, qk_prep_ref

from .case import HEAD, PRODUCTION, B, Case, H, K, Make, T

EPS = 2.0**-23


def inputs(by_position: bool):
    """by_position: a position for every token, as documents that were packed into a row have them."""

    def build(make: Make, b: int, t: int, h: int, k: int, d: int, r: int) -> dict:
        qkv, gain = make.randn(b, t, (h + 2 * k) * d), make.param(h)
        angle = make.param(b, t, r // 2) if by_position else make.param(t, r // 2)
        return {
            "qkv": qkv,
            "gain": gain,
            "cos": angle.cos(),
            "sin": angle.sin(),
            "num_heads": h,
            "num_kv_heads": k,
            "eps": EPS,
        }

    return build


def case(name: str, sizes: dict[str, dict[str, int]], by_position: bool = False) -> Case:
    def traffic(b: int, t: int, h: int, k: int, d: int, r: int, item: int) -> tuple[int, int]:
        """Forward reads qkv and writes q, k, v. Backward reads q and k of qkv and three gradients, writes one. The
        tables are read once each way."""
        token, table = d * item, 2 * 4 * (r // 2) * (b * t if by_position else t)
        forward = b * t * token * 2 * (h + 2 * k) + table
        return forward, forward + b * t * token * (h + k)

    return Case(
        op="qk_prep",
        name=name,
        inputs=inputs(by_position),
        fn=qk_prep,
        ref=qk_prep_ref,
        sizes=sizes,
        grads=("qkv", "gain"),
        traffic=traffic,
    )


REFERENCE = {"b": B, "t": T, "h": H, "k": K, "d": HEAD}

CASES = [
    case(
        "partial",
        {
            PRODUCTION: REFERENCE | {"r": 16},
            "odd": {"b": 2, "t": 17, "h": 3, "k": 1, "d": 20, "r": 6},
            "one": {"b": 1, "t": 1, "h": 4, "k": 2, "d": 8, "r": 4},
            "empty": {"b": 0, "t": 4, "h": 2, "k": 1, "d": 8, "r": 2},
        },
    ),
    case(
        "full",
        {
            PRODUCTION: REFERENCE | {"r": HEAD},
            "one_kv": {"b": 2, "t": 3, "h": 4, "k": 1, "d": 16, "r": 16},
            "no_groups": {"b": 1, "t": 7, "h": 2, "k": 2, "d": 12, "r": 12},
        },
    ),
    case("by_position", {"odd": {"b": 3, "t": 5, "h": 2, "k": 2, "d": 10, "r": 4}}, by_position=True),
    case("unrotated", {"odd": {"b": 2, "t": 3, "h": 2, "k": 1, "d": 6, "r": 0}}),
]
