"""Cases of the n-gram kernels: keys of all orders at once, counts of one order, table fill and lookup, the legacy
tables. The production size is one chunk of evaluation, 1,048,576 tokens of a vocabulary of 1,024."""

from __future__ import annotations

import torch

from pgolf.kernels import _ngram_count, _ngram_legacy, _ngram_tables
from pgolf.kernels.ngram_hash import document_starts, ngram_hash, ngram_hash_ref

from .case import PRODUCTION, Case, Make

ORDERS = tuple(range(2, 10))
CHUNK = 1_048_576
EXACT = {"exact": True, "dtypes": (torch.float32,)}  # integers only, so one pass over the sizes


def streams(**small: int) -> dict:
    """Sizes by number of tokens: n, from few ids (v), so that contexts repeat."""
    return {PRODUCTION: {"n": CHUNK, "v": 1024}} | {name: {"n": n, "v": 3} for name, n in small.items()}


def keys_case(name: str, orders, documents: bool, preset: bool = True) -> Case:
    """preset: compiled ahead of time."""

    def inputs(make: Make, n: int, v: int) -> dict:
        tokens = make.ids(n, high=v)
        starts = document_starts(tokens, 0) if documents else None
        return {"tokens": tokens, "orders": orders, "doc_start": starts}

    sizes = streams(odd=45, one=1, many=64, empty=0)
    return Case(
        op="ngram_hash",
        name=name,
        inputs=inputs,
        fn=ngram_hash,
        ref=ngram_hash_ref,
        sizes={k: size for k, size in sizes.items() if preset or k != PRODUCTION},
        traffic=lambda n, v, item: (n * (8 + 4 * documents + 8 * len(orders)), 0),
        **EXACT,
    )


def stacked(fn):
    """`Counts` as one tensor (5, N)."""
    return lambda keys, targets, chunk: torch.stack(list(fn(keys, targets, chunk=chunk)))


def count_inputs(chunk: int):
    """Keys as of order 1, a fifth of them without a context."""

    def build(make: Make, n: int, v: int) -> dict:
        keys = make.ids(n, high=v)
        if make.device != "meta":
            keys = torch.where(keys == v - 1, -1, keys)
        return {"keys": keys, "targets": make.ids(n, high=v), "chunk": chunk}

    return build


def count_case(name: str, chunk: int, **sizes: int) -> Case:
    return Case(
        op="ngram_hash",
        name=name,
        inputs=count_inputs(chunk),
        fn=stacked(_ngram_count.count_before),
        ref=stacked(_ngram_count.count_before_ref),
        sizes={k: s for k, s in streams(**sizes).items() if k != PRODUCTION or not chunk},
        traffic=lambda n, v, item: (n * (164 + 2 * 264), 0),
        **EXACT,
    )


def random_runs(make: Make, contexts: int, v: int) -> tuple:
    """Sorted entries: each context has 1 to v followers."""
    keys = torch.randint(-(2**62), 2**62, (contexts,), generator=make.gen).unique()
    pairs = [(k, t) for k in keys.tolist() for t in range(v) if (k + t) % 3 or t == 0]
    key, token = (make.tensor([p[i] for p in pairs], dtype) for i, dtype in ((0, torch.int64), (1, torch.int32)))
    return key, token, (make.ids(key.numel(), high=9) + 1).to(torch.int32)


def fill_inputs(make: Make, contexts: int, v: int) -> dict:
    if make.device != "meta":
        key, token, count = random_runs(make, contexts, v)
        plan, lines, *_ = _ngram_tables.plan_table(key, count, 0.9)
        return {"plan": plan, "tokens": token, "counts": count, "lines": lines}
    wide, slim = (lambda d: torch.empty(contexts, dtype=d, device="meta")), torch.int32
    plan = _ngram_tables.Plan(*(wide(d) for d in (torch.int64, torch.int64, slim, slim, torch.int64, slim)))
    return {"plan": plan, "tokens": wide(slim), "counts": wide(slim), "lines": 2 * contexts}


def lookup_inputs(make: Make, contexts: int, v: int) -> dict:
    """As many keys as contexts; half of them are in the table."""
    if make.device == "meta":
        table = _ngram_tables.Table(torch.empty((2 * contexts, 32), dtype=torch.int32, device="meta"), 20, 12, 3)
        return {"table": table, "keys": make.ids(contexts, high=v)}
    key, token, count = random_runs(make, contexts, v)
    known = key.cpu()[torch.randint(0, key.numel(), (contexts,), generator=make.gen)]
    miss = torch.arange(contexts) % 2 == 1
    return {
        "table": _ngram_tables.build_table_ref(key, token, count, load=0.9),
        "keys": torch.where(miss, known + 1, known).to(make.device),
    }


TABLE_SIZES = {"odd": {"contexts": 21, "v": 40}, "short": {"contexts": 9, "v": 3}, "one": {"contexts": 1, "v": 1}}


def legacy(update, lookup, copy: bool):
    """Both steps, on a copy of the tables or on them: counts of the whole stream, then the score's parts from position
    `at` on."""

    def fn(tables, tokens, at):
        tables = tables.clone() if copy else tables
        update(tables, tokens, at, tokens.shape[0])
        return tables, *lookup(tables, tokens, at, tokens.shape[0])

    return fn


def legacy_inputs(make: Make, n: int, buckets: int, at: int) -> dict:
    tables = make.ids(8, 2, buckets, high=5).to(torch.int32)
    return {"tables": tables, "tokens": make.ids(n, high=1024).to(torch.int32), "at": at}


LEGACY = (_ngram_legacy.legacy_update, _ngram_legacy.legacy_lookup)
LEGACY_REF = (_ngram_legacy.legacy_update_ref, _ngram_legacy.legacy_lookup_ref)

CASES = [
    keys_case("keys", ORDERS, documents=False),
    keys_case("keys_documents", ORDERS, documents=True),
    keys_case("keys_sparse", (1, 3, 16), documents=True, preset=False),
    count_case("count", 0, odd=45, one=1, many=128, empty=0),
    count_case("count_chunk", 7, odd=45, one=1, empty=0),
    Case(
        op="ngram_hash",
        name="fill",
        inputs=fill_inputs,
        fn=_ngram_tables.fill,
        ref=_ngram_tables.fill_ref,
        sizes=TABLE_SIZES | {PRODUCTION: {"contexts": CHUNK // 2, "v": 2}},
        traffic=lambda contexts, v, item: (contexts * (128 + 36 + 8 + 256), 0),  # 256: zeros
        **EXACT,
    ),
    Case(
        op="ngram_hash",
        name="lookup",
        inputs=lookup_inputs,
        fn=_ngram_tables.lookup,
        ref=_ngram_tables.lookup_ref,
        sizes=TABLE_SIZES | {PRODUCTION: {"contexts": CHUNK // 2, "v": 2}},
        traffic=lambda contexts, v, item: (contexts * (8 + 4 + 128 + 3 * 112), 0),  # most contexts have one line
        **EXACT,
    ),
    Case(
        op="ngram_hash",
        name="legacy",
        inputs=legacy_inputs,
        fn=legacy(*LEGACY, copy=True),
        ref=legacy(*LEGACY_REF, copy=True),
        timed=(legacy(*LEGACY, copy=False), legacy(*LEGACY_REF, copy=False)),
        writes=("tables",),
        sizes={
            PRODUCTION: {"n": CHUNK, "buckets": 2**23, "at": 0},
            "odd": {"n": 45, "buckets": 64, "at": 11},
            "short": {"n": 5, "buckets": 8, "at": 0},
            "empty": {"n": 3, "buckets": 8, "at": 3},
        },
        traffic=lambda n, buckets, at, item: (n * (16 * (64 + 32 + 4) + 8), 0),
        atomics=True,
        **EXACT,
    ),
]
