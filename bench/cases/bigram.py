"""Cases of the bigram op: the fronts of the presets, the other hash, trigrams and streams that may join, documents."""

from __future__ import annotations

import itertools

import torch

from pgolf.kernels._documents import document_reach
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
SMALL = ("odd", "wide", "one", "empty")


def reach(make: Make, b: int, t: int):
    """Of documents of 1, 2, 3 and 7 tokens in turn: each kind of start, documents across two rows."""
    edges = itertools.accumulate(itertools.cycle((1, 2, 3, 7)), initial=0)
    starts = [*itertools.takewhile(lambda at: at < b * t, edges), b * t]
    return document_reach(torch.tensor(starts, dtype=torch.int32), b, t).to(make.device)


def case(
    name: str,
    hash: str | None = "xor",
    trigram: bool = False,
    extra: bool = False,
    gate: bool = True,
    documents: bool = False,
    sizes: tuple[str, ...] = tuple(SIZES),
) -> Case:
    """sizes: with "production" if a preset's runs do this: then it is compiled ahead of time and timed."""

    def inputs(make: Make, b: int, t: int, d: int, v: int, n: int) -> dict:
        return {
            "ids": make.ids(b, t, high=v),
            "token_table": make.randn(v, d),
            "rows": make.randn(n, d) if hash else None,
            "hash": hash or "xor",
            "trigram": trigram,
            "extra": make.randn(b, t, d) if extra else None,
            "gate": make.param(d) if gate else None,
            "reach": reach(make, b, t) if documents else None,
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
        sizes={name: SIZES[name] for name in sizes},
        grads=("token_table", *with_rows, *with_extra, *with_gate),
        traffic=traffic,
    )


CASES = [
    case("tokens", hash=None, gate=False),
    case("xor"),
    case("trigram", trigram=True),
    case("mul1009", hash="mul1009", gate=False, sizes=SMALL),
    case("extra", hash=None, extra=True, sizes=SMALL),
    case("documents", documents=True, sizes=(PRODUCTION, "odd")),
    case("all", trigram=True, extra=True, documents=True, sizes=SMALL),
]
