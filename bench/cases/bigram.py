"""Cases of the bigram op: the fronts of the presets and the other hash, trigrams and streams that may join."""

from __future__ import annotations

from pgolf.kernels.bigram import bigram, bigram_ref

from .case import PRODUCTION, B, Case, D, Make, T, V

SIZES = {
    PRODUCTION: {"b": B, "t": T, "d": D, "v": V, "n": 2048},
    "odd": {"b": 2, "t": 5, "d": 6, "v": 5, "n": 4},
    "wide": {"b": 3, "t": 7, "d": 20, "v": 9, "n": 7},
    "collide": {"b": 2, "t": 11, "d": 5, "v": 2, "n": 2},
    "one": {"b": 1, "t": 1, "d": 4, "v": 1, "n": 3},
    "empty": {"b": 0, "t": 4, "d": 8, "v": 5, "n": 4},
}


def case(
    name: str,
    hash: str | None = "xor",
    trigram: bool = False,
    extra: bool = False,
    gate: bool = True,
    preset: bool = True,
) -> Case:
    """preset: whether one of the presets starts like this; only then it is compiled ahead of time and timed."""

    def inputs(make: Make, b: int, t: int, d: int, v: int, n: int) -> dict:
        return {
            "ids": make.ids(b, t, high=v),
            "token_table": make.randn(v, d),
            "rows": make.randn(n, d) if hash else None,
            "hash": hash or "xor",
            "trigram": trigram,
            "extra": make.randn(b, t, d) if extra else None,
            "gate": make.param(d) if gate else None,
            "eps": 1e-6,
        }

    lookups = 1 + bool(hash) + trigram

    def traffic(b: int, t: int, d: int, v: int, n: int, item: int) -> tuple[int, int]:
        """Forward reads ids and tables, writes the stream; backward reads its gradient, writes that of the sum, and
        reads it again once a lookup. Gathers from the tables are of the L2 and do not count, nor do keys."""
        stream, tables = b * t * d * item, (v + n * bool(hash)) * d * item
        return stream * (1 + extra) + tables, stream * (2 + lookups + extra) + 2 * tables

    with_rows, with_extra, with_gate = ["rows"] * bool(hash), ["extra"] * extra, ["gate"] * gate
    return Case(
        op="bigram",
        name=name,
        inputs=inputs,
        fn=bigram,
        ref=bigram_ref,
        sizes={name: size for name, size in SIZES.items() if preset or name not in (PRODUCTION, "collide")},
        grads=("token_table", *with_rows, *with_extra, *with_gate),
        traffic=traffic,
    )


CASES = [
    case("tokens", hash=None, gate=False),
    case("xor"),
    case("trigram", trigram=True),
    case("mul1009", hash="mul1009", gate=False, preset=False),
    case("extra", hash=None, extra=True, preset=False),
    case("all", trigram=True, extra=True, preset=False),
]
