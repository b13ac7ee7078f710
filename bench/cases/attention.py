"""Cases of the attention op by its own flash kernels, and of the XSA kernels that follow a library's core."""

from __future__ import annotations

import torch

from pgolf.kernels._attention_xsa import exclude
from pgolf.kernels.attention import attention, attention_ref, exclude_own_value

from .case import HEAD, PRODUCTION, B, Case, H, K, Make, T

FULL = {PRODUCTION: {"b": B, "t": T, "h": H, "k": K, "d": HEAD}}
# two blocks of queries and of keys, the last of each not full; a head that no block width divides
ODD = {"b": 1, "t": 21, "h": 4, "k": 2, "d": 20}
SMALL = {"b": 2, "t": 5, "h": 2, "k": 1, "d": 8}
EMPTY = {"b": 0, "t": 5, "h": 2, "k": 2, "d": 8}


def inputs(xsa: bool, gain: float | None = None, starts: bool = False):
    """gain: q and k as after qk-norm, and the bound that follows. starts: documents, one token long and longer."""

    def build(make: Make, b: int, t: int, h: int, k: int, d: int) -> dict:
        q, keys, v = make.randn(b, t, h, d), make.randn(b, t, k, d), make.randn(b, t, k, d)
        out = {"q": q, "k": keys, "v": v, "xsa": xsa}
        if gain is not None:
            if make.device != "meta":
                out["q"] = torch.nn.functional.rms_norm(q.float(), (d,)).mul(gain).to(q.dtype)
                out["k"] = torch.nn.functional.rms_norm(keys.float(), (d,)).to(q.dtype)
            out["logit_bound"] = make.tensor([gain * d**0.5] * h, torch.float32)
        if starts:
            edges = sorted({0, 3, 4, t // 2 + 1, t + t // 3, b * t - 1, b * t} & set(range(b * t + 1)))
            out["cu_seqlens"] = make.tensor(edges, torch.int32)
        return out

    return build


def traffic(b: int, t: int, h: int, k: int, d: int, item: int) -> tuple[int, int]:
    """Forward reads q, k, v and writes y, lse and s. Backward: dy, y, v, s in and do, dv, delta out; then q, k, v, do,
    lse, delta in twice, dv once, and dq, dk, dv out."""
    q, kv, row = b * t * h * d * item, b * t * k * d * item, 4 * b * t * h
    return 2 * q + 2 * kv + 2 * row, 3 * q + 2 * kv + 2 * row + 2 * (2 * q + 2 * kv + 2 * row) + q + 3 * kv


def flops(b: int, t: int, h: int, k: int, d: int) -> tuple[int, int]:
    """Causal: half of two products of T x T x d a head; backward five instead of two."""
    forward = 2 * b * t * t * h * d
    return forward, forward * 5 // 2


def case(name: str, sizes: dict, xsa: bool = True, **kind) -> Case:
    return Case(
        op="attention",
        name=name,
        inputs=inputs(xsa, **kind),
        fn=attention,
        ref=attention_ref,
        sizes=sizes,
        grads=("q", "k", "v"),
        traffic=traffic,
        flops=flops,
    )


def exclude_inputs(make: Make, b: int, t: int, h: int, k: int, d: int) -> dict:
    return {"o": make.randn(b, t, h, d), "v": make.randn(b, t, k, d)}


def exclude_traffic(b: int, t: int, h: int, k: int, d: int, item: int) -> tuple[int, int]:
    """Forward reads o, v and writes y, s; backward reads dy, y, v, s and writes do, dv."""
    q, kv, s = b * t * h * d * item, b * t * k * d * item, 4 * b * t * h
    return 2 * q + kv + s, 3 * q + 2 * kv + s


CASES = [
    case("plain", {"small": SMALL, "mha": {**ODD, "h": 2}, "empty": EMPTY}, xsa=False),
    case("xsa", {"small": SMALL, "odd": ODD, "mqa": {**ODD, "k": 1, "d": 8, "t": 18}, "empty": EMPTY}),
    case("xsa_bound", {"small": SMALL, "odd": {**ODD, "h": 2, "k": 1, "d": 16}} | FULL, gain=4.0),
    case("documents", {"small": SMALL, "odd": {**ODD, "b": 2, "h": 2, "k": 1}}, starts=True),
    Case(
        op="attention",
        name="exclude",
        inputs=exclude_inputs,
        fn=exclude,
        ref=exclude_own_value,
        sizes={"small": SMALL, "odd": {**ODD, "b": 2, "t": 7}, "mqa": {**ODD, "k": 1}, "empty": EMPTY} | FULL,
        grads=("o", "v"),
        traffic=exclude_traffic,
    ),
]
