"""ngram_hash: 64-bit keys of the tokens before each position; with them, exact n-gram counts and count tables.

    key_n(t) = sum_{i=1..n} (x_{t-i} + 1) * base^(i-1)  mod 2^64        for t - doc_start(t) >= n, else NO_CONTEXT

tokens (N,) uint16, int32 or int64, ids >= 0 -> keys (len(orders), N) int64, or (N,) for one order; orders 1 to 16,
ascending. torch's int64 wraps, so it carries the bits of uint64. NO_CONTEXT (-1) is reserved: a context that hashes to
it gets -2. doc_start (N,) int32: where the document of position t begins; contexts that would reach before it are
masked. One launch makes all orders, and each token leaves memory once.

Exact? The id offset of 1 keeps orders apart. `base` is a 64-bit multiplier with good spectral figures, which says how
short a vector d of id differences with sum d_i base^i = 0 mod 2^64 can be: no two contexts share a key at all for
order 3 with up to 1.46 M ids, order 4 with 31,616, order 5 with 2,952. Beyond, any two collide with chance 2^-64, 62 M
contexts with 1e-4; `hash_collisions` counts them for a given stream. Two contexts that did collide would share one
count vector, which is noise and not an error of normalisation.

No gradient. Exact on every path. Limits: N < 2^31. Raises ValueError on wrong shapes, dtypes, devices, orders, bases.
Source of the default base: Steele and Vigna, "Computationally easy, spectrally good multipliers", 2021.

`count_before` (kernels/_ngram_count.py) makes counts of keys by sorting; `build_table`, `lookup`
(kernels/_ngram_tables.py) keep them in rows of 128 bytes. The hashed count tables of earlier submissions, which give
no probability, are in kernels/_ngram_legacy.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._ngram_count import NO_CONTEXT, Counts, Runs, count_before, count_before_ref, merge_runs, pair_runs
from ._ngram_tables import Table, build_table, build_table_ref, lookup, lookup_ref
from ._op import cdiv, check_device, launch, register_op, tuned, use_kernel
from ._triton import jit, tl

__all__ = [
    "BASE",
    "MAX_ORDER",
    "NO_CONTEXT",
    "Counts",
    "Runs",
    "Table",
    "build_table",
    "build_table_ref",
    "count_before",
    "count_before_ref",
    "document_starts",
    "hash_collisions",
    "lookup",
    "lookup_ref",
    "merge_runs",
    "ngram_hash",
    "ngram_hash_ref",
    "pair_runs",
]

BASE = 0xD1342543DE82EF95
MAX_ORDER = 16
DTYPES = (torch.uint16, torch.int32, torch.int64)


def document_starts(tokens: Tensor, bos: int) -> Tensor:
    """(N,) int32: where the document of each position starts, which is its last `bos` token; 0 before the first."""
    here = torch.arange(tokens.numel(), dtype=torch.int32, device=tokens.device)
    is_bos = tokens.to(torch.int32) == bos  # uint16 has few operators
    return torch.where(is_bos, here, torch.zeros_like(here)).cummax(0).values


def ngram_hash_ref(
    tokens: Tensor, orders: int | Sequence[int], *, doc_start: Tensor | None = None, base: int = BASE
) -> Tensor:
    """Reference of `ngram_hash`, in plain torch."""
    x = tokens.to(torch.int64) + 1
    n = x.numel()
    reach = torch.arange(n, device=x.device)  # how many tokens of its document lie before t
    reach = reach if doc_start is None else reach - doc_start
    key, power, rows = torch.zeros_like(x), 1, []
    wanted = (orders,) if isinstance(orders, int) else tuple(orders)
    for order in range(1, max(wanted) + 1):
        key[order:] += x[: max(n - order, 0)] * _signed(power)
        power = power * base % 2**64
        if order in wanted:
            key_or_next = torch.where(key == NO_CONTEXT, NO_CONTEXT - 1, key)
            rows.append(torch.where(reach >= order, key_or_next, NO_CONTEXT))
    return rows[0] if isinstance(orders, int) else torch.stack(rows)


def hash_collisions(tokens: Tensor, keys: Tensor, order: int) -> Tensor:
    """How many times a key of (N,) `keys` = ngram_hash(tokens, order) changes its context; 0 proves the keys exact.

    One sort: neighbours with one key must have the same `order` tokens before them.
    """
    sorted_keys, at = torch.sort(keys, stable=True)
    same = (sorted_keys[1:] == sorted_keys[:-1]) & (sorted_keys[1:] != NO_CONTEXT)
    x = tokens.to(torch.int64)
    differs = torch.zeros_like(same)
    for i in range(1, order + 1):
        token = x[(at - i).clamp(min=0)]
        differs |= token[1:] != token[:-1]
    return (same & differs).sum()


def _signed(x: int) -> int:
    """The int64 that has the low 64 bits of x."""
    x %= 2**64
    return x - 2**64 if x >= 2**63 else x


# -- kernel ----------------------------------------------------------------------------------------------------------


@jit
def _ngram_hash_kernel(
    tokens, doc_start, keys, N, base, ORDERS: tl.constexpr, LONGEST: tl.constexpr, BLOCK: tl.constexpr
):
    """ORDERS: bit n-1 stands for order n. The shifted loads of a block hit the L1 cache."""
    t = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = t < N
    reach = t
    if doc_start is not None:
        reach = t - tl.load(doc_start + t, mask=live, other=0).to(tl.int64)
    key = tl.zeros((BLOCK,), tl.int64)
    power = tl.full((BLOCK,), 1, tl.int64)
    row = keys + t
    for i in tl.static_range(1, LONGEST + 1):
        x = tl.load(tokens + t - i, mask=live & (t >= i), other=0).to(tl.int64)
        key += (x + 1) * power  # wraps
        power *= base
        if (ORDERS >> (i - 1)) & 1:
            out = tl.where(key == -1, -2, key)  # -1 is NO_CONTEXT
            tl.store(row, tl.where(reach >= i, out, -1), mask=live)
            row += N
    # a position with reach >= i has i tokens before it, so the zeros of masked loads never enter a stored key


# -- launcher --------------------------------------------------------------------------------------------------------


def _ngram_hash(tokens: Tensor, doc_start: Tensor | None, orders: int, base: int) -> Tensor:
    n = tokens.numel()
    keys = _ngram_hash_fake(tokens, doc_start, orders, base)
    how = tuned("ngram_hash", tokens)
    starts = None if doc_start is None else doc_start.contiguous()
    grid = (cdiv(n, how.blocks["BLOCK"]),)
    args = (tokens.contiguous(), starts, keys, n, base)
    launch(_ngram_hash_kernel, grid, *args, how=how, ORDERS=orders, LONGEST=orders.bit_length())
    return keys


def _ngram_hash_fake(tokens, doc_start, orders, base):
    return torch.empty((orders.bit_count(), tokens.shape[0]), dtype=torch.int64, device=tokens.device)


_op = register_op(_ngram_hash, _ngram_hash_fake)


def ngram_hash(
    tokens: Tensor, orders: int | Sequence[int], *, doc_start: Tensor | None = None, base: int = BASE
) -> Tensor:
    """See the module's contract."""
    wanted = (orders,) if isinstance(orders, int) else tuple(orders)
    _check(tokens, wanted, doc_start, base)
    if not use_kernel("ngram_hash", tokens):
        return ngram_hash_ref(tokens, orders, doc_start=doc_start, base=base)
    keys = _op(tokens, doc_start, sum(1 << (n - 1) for n in wanted), _signed(base))
    return keys[0] if isinstance(orders, int) else keys


def _check(tokens: Tensor, orders: tuple[int, ...], doc_start: Tensor | None, base: int) -> None:
    if tokens.ndim != 1 or tokens.dtype not in DTYPES or tokens.shape[0] >= 2**31:
        got = f"{tuple(tokens.shape)} {tokens.dtype}"
        raise ValueError(f"ngram_hash: tokens are {got}, expected (N,) uint16, int32 or int64 with N < 2^31")
    if not orders or list(orders) != sorted(set(orders)) or orders[0] < 1 or orders[-1] > MAX_ORDER:
        raise ValueError(f"ngram_hash: orders {orders}, expected ascending ones within 1 to {MAX_ORDER}")
    if base % 2 == 0:
        raise ValueError(f"ngram_hash: base {base:#x} is even, expected an odd one: an even one drops old tokens")
    if doc_start is not None:
        if doc_start.shape != tokens.shape or doc_start.dtype != torch.int32:
            got = f"{tuple(doc_start.shape)} {doc_start.dtype}"
            raise ValueError(f"ngram_hash: doc_start is {got}, expected {tuple(tokens.shape)} int32")
        check_device("ngram_hash", tokens, doc_start=doc_start)
