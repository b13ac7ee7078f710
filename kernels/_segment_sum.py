"""Sums of rows by key: the gradient of table lookups, deterministic and without atomics.

    table[k] = sum of x[i mod n] over all i with keys[i] = k;  exact zeros where there is none

x (n, D); keys (m n,) int32 in [0, sum(sizes)): m lookups of each row, the tables' rows numbered one after the other.
Returns one table (size, D) in x's dtype a size, 1 or 2 of them; sums in fp32, rounded once.

The keys are sorted (stable), which makes a segment of every table row. Segments are cut into chunks of CHUNK rows:
Zipf's law gives the most frequent of 1,024 tokens 3,000 to 4,000 of 98,304 hits, and one program would still add
these when all others are done. Chunk sums go to an fp32 buffer, a second pass adds them in order. Row k's chunks begin
at slot k + starts[k] // CHUNK: distinct slots, known from `starts` alone, at most (table rows + hits // CHUNK) of them,
so no counts are scanned and the host never waits for the device. Limit: hits < 2^31.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._op import cdiv, launch, tuned
from ._triton import jit, tl


@jit
def _segment_sum_kernel(
    x, order, starts, partial, n, segments,
    D: tl.constexpr, STEPS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0)
    low, high = 0, segments - 1  # bisection: the last segment whose first slot is not beyond this one
    for _ in tl.static_range(STEPS):
        middle = (low + high + 1) // 2
        reached = middle + tl.load(starts + middle) // CHUNK <= slot
        low, high = tl.where(reached, middle, low), tl.where(reached, high, middle - 1)
    begin = tl.load(starts + low)
    first = begin + (slot - low - begin // CHUNK) * CHUNK
    last = tl.minimum(first + CHUNK, tl.load(starts + low + 1))
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = j < D
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for at in range(first, last, BLOCK_R):
        place = at + tl.arange(0, BLOCK_R)
        live = place < last
        row = (tl.load(order + place, mask=live, other=0).to(tl.int32) % n).to(tl.int64)
        mask = live[:, None] & cols[None, :]
        acc += tl.load(x + row[:, None] * D + j[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(partial + slot.to(tl.int64) * D + j, tl.sum(acc, axis=0), mask=cols & (first < last))


@jit
def _segment_fold_kernel(
    partial, starts, table0, table1, size0,
    D: tl.constexpr, CHUNK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    k = tl.program_id(0)
    begin, end = tl.load(starts + k), tl.load(starts + k + 1)
    slot, count = k + begin // CHUNK, tl.cdiv(end - begin, CHUNK)
    j = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    cols = j < D
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for at in range(0, count, BLOCK_R):
        i = at + tl.arange(0, BLOCK_R)
        mask = (i < count)[:, None] & cols[None, :]
        acc += tl.load(partial + (slot + i).to(tl.int64)[:, None] * D + j[None, :], mask=mask, other=0.0)
    total = tl.sum(acc, axis=0)
    row = k.to(tl.int64)
    tl.store(table0 + row * D + j, total.to(table0.dtype.element_ty), mask=cols & (k < size0))
    if table1 is not None:
        tl.store(table1 + (row - size0) * D + j, total.to(table1.dtype.element_ty), mask=cols & (k >= size0))


def segment_sum(x: Tensor, keys: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """The tables. x and keys must be contiguous; the keys are not checked."""
    n, width = x.shape
    segments = sum(sizes)
    ordered, order = torch.sort(keys, stable=True)
    starts = torch.searchsorted(
        ordered, torch.arange(segments + 1, dtype=keys.dtype, device=keys.device), out_int32=True
    )
    how, fold = tuned("segment_sum", x), tuned("segment_fold", x)
    chunk, steps = how.blocks["CHUNK"], max(segments - 1, 0).bit_length()
    slots = segments + keys.numel() // chunk
    partial = torch.empty((slots, width), dtype=torch.float32, device=x.device)
    tables = [torch.empty((size, width), dtype=x.dtype, device=x.device) for size in sizes]
    grid = (slots, cdiv(width, how.blocks["BLOCK_D"]))
    launch(_segment_sum_kernel, grid, x, order, starts, partial, n, segments, how=how, D=width, STEPS=steps)
    slot0, slot1 = tables if len(tables) == 2 else (tables[0], None)
    grid = (segments, cdiv(width, fold.blocks["BLOCK_D"]))
    launch(_segment_fold_kernel, grid, partial, starts, slot0, slot1, sizes[0], how=fold, D=width, CHUNK=chunk)
    return tables
