"""UNSAFE, a negative control: the hashed n-gram tables of earlier submissions. They give no probability.

Contexts of n-1 tokens, n = 2 to 9, and (context, target) pairs are counted in two *independent* tables of B counters:

    h_n(j) = XOR_{k=0..n-2} x_{j-(n-1)+k} * p[k mod 7]       p = 36313, 27191, 51647, 81929, 131071, 174763, 233017
    C_n[h & (B-1)] += 1         F_n[(h ^ x_j * p[(n-1) mod 7]) & (B-1)] += 1          score min(F, C) / C

Why unsafe: the two tables collide independently, so sum_v F(s, v) != C(s). A token that never followed s still finds
the counts of strangers in its pair bucket, and nothing takes away from others what it is credited with: over the
vocabulary the scores sum to hundreds. On uniform random tokens, where no code can beat log2 V bits, this scorer claims
a fraction of that; the fewer the buckets, the "better" it gets. Audits must fail it; nothing else may use it. The hash
is weak as well: primes repeat with period 7, so at order 9 the oldest and the newest context token share one, which
cancels them where they are equal and makes a swap of them invisible.

legacy_tables(B) -> (8, 2, B) int32, [n-2, 0] = C, [n-2, 1] = F. `legacy_update` adds the n-grams that lie wholly within
tokens[start:end], in place. `legacy_lookup` gives (C, F), (8, end - start) int32 each, of the n-grams that end there,
0 where the stream has fewer than n-1 tokens before. tokens (N,) uint16, int32 or int64; ids < 2^31. Integer atomics:
sums do not depend on their order, two runs are equal. Per token and order an update touches two sectors of 32 bytes at
random, a lookup likewise; tables take 64 B bytes in all, 537 MB at B = 8,388,608.
Sources: the challenge's records PR #659 and #702; the count of its invalidity is PR #886's and #1147's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import cdiv, check_device, launch, register_op, tuned, use_kernel
from ._triton import jit, tl

PRIMES = (36313, 27191, 51647, 81929, 131071, 174763, 233017)
ORDERS = range(2, 10)
MAX_BUCKETS = 2**29  # the kernels step from order to order by 2 B in int32
DTYPES = (torch.uint16, torch.int32, torch.int64)


def legacy_tables(buckets: int, device: torch.device | str = "cpu") -> Tensor:
    """Empty tables (8, 2, buckets) int32."""
    if not 1 <= buckets <= MAX_BUCKETS or buckets & (buckets - 1):
        raise ValueError(f"legacy_tables: {buckets} buckets, expected a power of two up to 2^29")
    return torch.zeros((len(ORDERS), 2, buckets), dtype=torch.int32, device=device)


def legacy_buckets(tokens: Tensor, order: int, buckets: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Context and pair buckets of the targets tokens[first:end], each with order - 1 tokens before it; plain torch."""
    x = tokens.to(torch.int64)
    h = torch.zeros(max(end - first, 0), dtype=torch.int64, device=x.device)
    for k in range(order - 1):
        oldest = first - (order - 1) + k
        h = h ^ (x[oldest : oldest + h.numel()] * PRIMES[k % 7])
    pair = h ^ (x[first : first + h.numel()] * PRIMES[(order - 1) % 7])
    return h & (buckets - 1), pair & (buckets - 1)


def legacy_update_ref(tables: Tensor, tokens: Tensor, start: int, end: int) -> None:
    """Reference of `legacy_update`, in plain torch."""
    for row, order in zip(tables, ORDERS, strict=True):
        buckets = legacy_buckets(tokens, order, tables.shape[2], start + order - 1, end)
        for table, bucket in zip(row, buckets, strict=True):
            table += torch.bincount(bucket, minlength=tables.shape[2]).to(torch.int32)


def legacy_lookup_ref(tables: Tensor, tokens: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """Reference of `legacy_lookup`, in plain torch."""
    out = torch.zeros((2, len(ORDERS), end - start), dtype=torch.int32, device=tables.device)
    for i, order in enumerate(ORDERS):
        first = max(start, order - 1)
        for which, bucket in enumerate(legacy_buckets(tokens, order, tables.shape[2], first, end)):
            out[which, i, min(first, end) - start :] = tables[i, which][bucket]
    return out[0].clone(), out[1].clone()


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _hashes(tokens, j, mask, ORDER: tl.constexpr, PRIMES: tl.constexpr):
    """Unmasked context and pair hashes of targets j."""
    h = tl.zeros_like(j)
    for k in tl.static_range(ORDER - 1):
        h ^= tl.load(tokens + j - (ORDER - 1) + k, mask=mask, other=0).to(tl.int64) * PRIMES[k % 7]
    return h, h ^ (tl.load(tokens + j, mask=mask, other=0).to(tl.int64) * PRIMES[(ORDER - 1) % 7])


@jit
def _ngram_legacy_update_kernel(tables, tokens, start, end, B, PRIMES: tl.constexpr, BLOCK: tl.constexpr):
    j = start + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    for order in tl.static_range(2, 10):
        mask = (j >= start + order - 1) & (j < end)
        h, pair = _hashes(tokens, j, mask, order, PRIMES)
        tl.atomic_add(tables + (h & (B - 1)), 1, mask=mask, sem="relaxed")
        tl.atomic_add(tables + B + (pair & (B - 1)), 1, mask=mask, sem="relaxed")
        tables += 2 * B


@jit
def _ngram_legacy_lookup_kernel(
    tables, tokens, contexts, pairs, start, end, B, PRIMES: tl.constexpr, BLOCK: tl.constexpr
):
    j = start + (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = j < end
    for order in tl.static_range(2, 10):
        mask = live & (j >= order - 1)
        h, pair = _hashes(tokens, j, mask, order, PRIMES)
        tl.store(contexts + (j - start), tl.load(tables + (h & (B - 1)), mask=mask, other=0), mask=live)
        tl.store(pairs + (j - start), tl.load(tables + B + (pair & (B - 1)), mask=mask, other=0), mask=live)
        tables += 2 * B
        contexts += end - start
        pairs += end - start


# -- launchers -------------------------------------------------------------------------------------------------------


def _ngram_legacy_update(tables: Tensor, tokens: Tensor, start: int, end: int) -> None:
    how = tuned("ngram_legacy", tokens)
    args = (tables, tokens.contiguous(), start, end, tables.shape[2])
    launch(_ngram_legacy_update_kernel, (cdiv(end - start, how.blocks["BLOCK"]),), *args, how=how, PRIMES=PRIMES)


def _ngram_legacy_lookup(tables: Tensor, tokens: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    contexts, pairs = _ngram_legacy_lookup_fake(tables, tokens, start, end)
    how = tuned("ngram_legacy", tokens)
    args = (tables.contiguous(), tokens.contiguous(), contexts, pairs, start, end, tables.shape[2])
    launch(_ngram_legacy_lookup_kernel, (cdiv(end - start, how.blocks["BLOCK"]),), *args, how=how, PRIMES=PRIMES)
    return contexts, pairs


def _ngram_legacy_lookup_fake(tables, tokens, start, end):
    new = lambda: torch.empty((len(ORDERS), end - start), dtype=torch.int32, device=tables.device)
    return new(), new()


_update_op = register_op(_ngram_legacy_update, lambda tables, tokens, start, end: None, mutates=("tables",))
_lookup_op = register_op(_ngram_legacy_lookup, _ngram_legacy_lookup_fake)


def legacy_update(tables: Tensor, tokens: Tensor, start: int, end: int) -> None:
    """UNSAFE, see the module's contract."""
    _check("legacy_update", tables, tokens, start, end)
    (_update_op if use_kernel("ngram_hash", tokens) else legacy_update_ref)(tables, tokens, start, end)


def legacy_lookup(tables: Tensor, tokens: Tensor, start: int, end: int) -> tuple[Tensor, Tensor]:
    """UNSAFE, see the module's contract."""
    _check("legacy_lookup", tables, tokens, start, end)
    return (_lookup_op if use_kernel("ngram_hash", tokens) else legacy_lookup_ref)(tables, tokens, start, end)


def _check(op: str, tables: Tensor, tokens: Tensor, start: int, end: int) -> None:
    shape, buckets = tuple(tables.shape), tables.shape[-1] if tables.ndim else 0
    power = 1 <= buckets <= MAX_BUCKETS and not buckets & (buckets - 1)
    if shape != (len(ORDERS), 2, buckets) or not power or tables.dtype != torch.int32:
        raise ValueError(f"{op}: tables are {shape} {tables.dtype}, expected (8, 2, a power of two up to 2^29) int32")
    if not tables.is_contiguous():
        raise ValueError(f"{op}: tables have strides {tables.stride()}, expected contiguous ones: they change in place")
    if tokens.ndim != 1 or tokens.dtype not in DTYPES:
        raise ValueError(f"{op}: tokens are {tuple(tokens.shape)} {tokens.dtype}, expected (N,) uint16, int32 or int64")
    if not 0 <= start <= end <= tokens.shape[0]:
        raise ValueError(f"{op}: positions {start} to {end}, expected within 0 to {tokens.shape[0]}")
    check_device(op, tokens, tables=tables)
