"""Exact n-gram counts by sorting: what a sequential program that inserts after it scores has seen before each position.

`count_before(keys, targets)`: keys (N,) int64 name the contexts s_t, targets (N,) the tokens x_t that follow them. Per
position t, over the positions u < t with the same key:

    context_count  how many there are, c(s)           pair_count  how many of them have x_u = x_t, c(s, x_t)
    distinct       how many different x_u, T(s)       leader      the x_u that is most frequent, -1 if there is none;
    leader_count   how often the leader occurred                  of equals the one that got there first

all int32 (N,); zeros and -1 where there is no context (key NO_CONTEXT, or valid False). With chunk = C > 0, over the
positions of earlier chunks only, u < C * (t // C): what a program has seen that inserts chunk by chunk.
targets: int32 or int64 in [0, 2^31). N < 2^31. Exact and deterministic. No gradient.

How: a stable sort by key puts a context's positions side by side, in time order; a second one by (group, target) the
pairs'. Then every count is a difference of indices, and T and the leader are prefix sums and maxima:
 - c = i - start(i), start(i) = index of the group's first element = running max of the heads' indices.
 - a group needs no number: start(i) is one, so a pair's sort key is start * 2^31 + target, exact, no second hash.
 - leader: n_i = c(s, x_i) + 1 after inserting i <= i - start + 1, so start + n is never above a later group's start.
   The running max of (start + n) * 2^31 + (2^31 - 1 - i) thus restarts by itself in each group, and its low part is
   the earliest i that reached the max: a leader falls only when strictly exceeded.
Kernels do the scans, two-level: a maximum or a sum a block, torch's scan over these (1/1024 of the elements), then
blocks with their carry. 164 bytes a token, where torch's own scans (int64, each step a tensor) move about 1,000; the
two sorts move 264 each. A result is one row of 8 int32, written once: scattered to time order, five arrays would touch
five sectors a token, a row touches one. `chunk` adds plain torch passes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._op import cdiv, check_device, launch, register_op, tuned, use_kernel
from ._triton import jit, tl

NO_CONTEXT = -1
HALF = 2**31
FIELDS = 8  # int32 a row: five counts, three unused, so that a row is one sector of 32 bytes


class Counts(NamedTuple):
    """Per position, (N,) int32 each; see the module."""

    context_count: Tensor
    pair_count: Tensor
    distinct: Tensor
    leader: Tensor
    leader_count: Tensor


class Runs(NamedTuple):
    """The non-zero counts of a stream: (R,) contexts int64, tokens int32, counts int32, sorted by (context, token)."""

    contexts: Tensor
    tokens: Tensor
    counts: Tensor


def run_starts(x: Tensor) -> Tensor:
    """(N,) int64: the index at which each element's run of equal neighbours begins."""
    here = torch.arange(x.numel(), device=x.device)
    inner = torch.zeros_like(here, dtype=torch.bool)
    inner[1:] = x[1:] == x[:-1]
    return here.masked_fill_(inner, 0).cummax(0).values


def count_before_ref(keys: Tensor, targets: Tensor, valid: Tensor | None = None, *, chunk: int = 0) -> Counts:
    """Reference of `count_before`, in plain torch: the CPU's path."""
    if valid is not None:
        keys = torch.where(valid, keys, NO_CONTEXT)
    here = torch.arange(keys.numel(), device=keys.device)
    sorted_keys, order = torch.sort(keys, stable=True)
    # gather and scatter_ do the same as indexing, on a CPU 4 times as fast
    start, x = run_starts(sorted_keys), targets.gather(0, order).to(torch.int64)
    pairs, pair_order = torch.sort((start << 31) + x, stable=True)
    rank = torch.empty_like(here).scatter_(0, pair_order, here - run_starts(pairs))

    new = (rank == 0).to(torch.int64)
    before = new.cumsum(0) - new
    reached = ((start + rank + 1) << 31) + (HALF - 1 - here)
    reached = torch.cat([reached.new_zeros(1), reached])[:-1].cummax(0).values  # exclusive
    inside = here > start
    leader_count = torch.where(inside, (reached >> 31) - start, 0)
    leader = torch.where(inside, x.gather(0, (HALF - 1 - (reached & (HALF - 1))) * inside), -1)

    none = sorted_keys == NO_CONTEXT
    rows = torch.empty((5, keys.numel()), dtype=torch.int32, device=keys.device)
    sorted_rows = (here - start, rank, before - before.gather(0, start), leader, leader_count)
    for row, values in zip(rows, sorted_rows, strict=True):
        row.scatter_(0, order, torch.where(none, -1 if values is leader else 0, values).to(torch.int32))
    counts = Counts(*rows)
    return _by_chunk(counts, sorted_keys, order, pairs, pair_order, chunk) if chunk else counts


def _by_chunk(counts: Counts, keys: Tensor, order: Tensor, pairs: Tensor, pair_order: Tensor, chunk: int) -> Counts:
    """Counts before each position -> counts before its chunk, which are those at the first of its kind in the chunk."""
    first = lambda run, at: at[run_starts(run * (at.numel() // chunk + 1) + at // chunk)]
    pair_at = order[pair_order]
    of_context, of_pair = torch.empty_like(order), torch.empty_like(order)
    of_context[order] = first(run_starts(keys), order)
    of_pair[pair_at] = first(run_starts(pairs), pair_at)
    moved = [c[of_pair if name == "pair_count" else of_context] for name, c in counts._asdict().items()]
    return Counts(*moved)


def pair_runs(keys: Tensor, targets: Tensor, valid: Tensor | None = None) -> Runs:
    """The counts c(s, x) of a whole stream, for `build_table`; its size depends on the data, so a GPU waits."""
    keep = keys != NO_CONTEXT if valid is None else valid & (keys != NO_CONTEXT)
    keys, targets = keys[keep], targets[keep].to(torch.int32)
    return merge_runs(Runs(keys, targets, torch.ones_like(targets)))


def merge_runs(*parts: Runs) -> Runs:
    """One sorted `Runs` of several, the counts of equal pairs added; the parts may be unsorted."""
    keys, tokens, counts = (torch.cat(c) for c in zip(*parts, strict=True))
    by_token = torch.sort(tokens, stable=True).indices
    order = by_token[torch.sort(keys[by_token], stable=True).indices]
    keys, tokens = keys[order], tokens[order]
    head = torch.ones_like(keys, dtype=torch.bool)
    head[1:] = (keys[1:] != keys[:-1]) | (tokens[1:] != tokens[:-1])
    total = counts[order].cumsum(0, dtype=torch.int64)
    last = torch.cat([head[1:], head.new_ones(1)])[: head.numel()]
    return Runs(keys[head], tokens[head], total[last].diff(prepend=total.new_zeros(1)).to(torch.int32))


# -- kernels: i counts sorted elements, t is time ---------------------------------------------------------------------


@jit
def _larger(a, b):
    return tl.maximum(a, b)


@jit
def _head(sorted_keys, i, live):
    """Sorted keys, and i where a run begins, else -1; int32."""
    key = tl.load(sorted_keys + i, mask=live, other=0)
    before = tl.load(sorted_keys + i - 1, mask=live & (i > 0), other=0)
    return key, tl.where(live & ((key != before) | (i == 0)), i, -1).to(tl.int32)


@jit
def _ngram_heads_kernel(sorted_keys, last, N, BLOCK: tl.constexpr):
    """last[block] = the index of its last head, -1 if there is none."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    _, head = _head(sorted_keys, i, i < N)
    tl.store(last + tl.program_id(0), tl.max(head, axis=0))


@jit
def _ngram_starts_kernel(sorted_keys, carry, order, targets, start, target, pairs, N, BLOCK: tl.constexpr):
    """Group starts, targets in sorted order (-1: no context), sort keys of the pairs."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = i < N
    key, head = _head(sorted_keys, i, live)
    s = tl.maximum(tl.associative_scan(head, 0, _larger), tl.load(carry + tl.program_id(0)))
    t = tl.load(order + i, mask=live, other=0)
    x = tl.load(targets + t, mask=live, other=0).to(tl.int64)
    tl.store(start + i, s, mask=live)
    tl.store(target + i, tl.where(key == -1, -1, x).to(tl.int32), mask=live)
    tl.store(pairs + i, (s.to(tl.int64) << 31) + x, mask=live)


@jit
def _ngram_ranks_kernel(pairs, carry, pair_order, rank, N, BLOCK: tl.constexpr):
    """rank[i] = c(s, x_i) before i. A pair moves within its context's group only, so the writes stay near."""
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    live = i < N
    _, head = _head(pairs, i, live)
    s = tl.maximum(tl.associative_scan(head, 0, _larger), tl.load(carry + tl.program_id(0)))
    at = tl.load(pair_order + i, mask=live, other=0)
    tl.store(rank + at, i.to(tl.int32) - s, mask=live)


@jit
def _before(start, rank, i, live):
    """What element i - 1 adds to the state that i sees: is it a new follower, and the packed count it reached.

    A group's head sees nothing. Its packed count of 0 is no less than what the groups before it reached.
    """
    s = tl.load(start + i, mask=live, other=0)
    inside = live & (s < i)
    n = tl.where(inside, tl.load(rank + i - 1, mask=inside, other=0) + 1, 0)
    reached = ((s + n).to(tl.int64) << 31) + (2147483647 - i)
    return s, live & (s == i), (n == 1).to(tl.int32), reached


@jit
def _ngram_reduce_kernel(start, rank, last, new_since, best, N, BLOCK: tl.constexpr):
    """Per block: its last head, the new followers from there (or its start) on, the largest packed value."""
    block = tl.program_id(0)
    i = (block * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    _, head, new, reached = _before(start, rank, i, i < N)
    final = tl.max(tl.where(head, i, -1), axis=0)
    tl.store(last + block, final.to(tl.int32))
    tl.store(new_since + block, tl.sum(tl.where(i >= final, new, 0), axis=0))
    tl.store(best + block, tl.max(reached, axis=0))


@jit
def _ngram_states_kernel(start, rank, target, order, new_carry, best_carry, rows, N, BLOCK: tl.constexpr):
    """Rows (N, 8) of counts in time order."""
    block = tl.program_id(0)
    first = block * BLOCK
    i = (first + tl.arange(0, BLOCK)).to(tl.int64)
    live = i < N
    s, head, new, reached = _before(start, rank, i, live)
    total = tl.cumsum(new, axis=0)
    at_head = tl.associative_scan(tl.where(head, total, 0), 0, _larger)  # totals only grow, so the last head's wins
    distinct = total - at_head + tl.where(s < first, tl.load(new_carry + block), 0)
    best = tl.maximum(tl.associative_scan(reached, 0, _larger), tl.load(best_carry + block))
    leader_count = ((best >> 31) - s).to(tl.int32)
    who = 2147483646 - (best & 2147483647)  # packed at i, reached by i - 1
    leader = tl.load(target + who, mask=live & (leader_count > 0), other=-1)
    known = tl.load(target + i, mask=live, other=-1) >= 0
    pair = tl.load(rank + i, mask=live, other=0)
    t = tl.load(order + i, mask=live, other=0)
    j = tl.arange(0, 8)[None, :]
    row = tl.where(j == 0, (i.to(tl.int32) - s)[:, None], tl.where(j == 1, pair[:, None], 0))
    row = tl.where(j == 2, distinct[:, None], tl.where(j == 3, leader[:, None], row))
    row = tl.where(j == 4, leader_count[:, None], row)
    row = tl.where(known[:, None], row, tl.where(j == 3, -1, 0))
    tl.store(rows + t[:, None] * 8 + j, row, mask=live[:, None])


# -- launcher --------------------------------------------------------------------------------------------------------


def _carry_max(per_block: Tensor, first: int) -> Tensor:
    """The maximum over all earlier blocks; `first` for the first one."""
    return torch.cat([per_block.new_full((1,), first), per_block[:-1].cummax(0).values])


def _carry_since(last: Tensor, new: Tensor) -> Tensor:
    """The sum over earlier blocks since the last head: sums only grow, so a running max finds the sum at that head."""
    total = new.cumsum(0, dtype=torch.int32)
    at_head = torch.where(last >= 0, total - new, 0).cummax(0).values
    return torch.cat([new.new_zeros(1), (total - at_head)[:-1]])


def _ngram_count(keys: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """(N, 8) int32 rows of counts; columns 5 to 7 are zero."""
    n = keys.shape[0]
    if n == 0:
        return _ngram_count_fake(keys, targets, chunk)
    how = tuned("ngram_count", keys)
    grid = (cdiv(n, how.blocks["BLOCK"]),)
    new = lambda size, dtype: torch.empty(size, dtype=dtype, device=keys.device)
    ints = lambda: new(n, torch.int32)
    last, new_since, best = new(grid, torch.int32), new(grid, torch.int32), new(grid, torch.int64)

    sorted_keys, order = torch.sort(keys, stable=True)
    start, target, rank, pairs = ints(), ints(), ints(), new(n, torch.int64)
    launch(_ngram_heads_kernel, grid, sorted_keys, last, n, how=how)
    args = (sorted_keys, _carry_max(last, -1), order, targets.contiguous(), start, target, pairs, n)
    launch(_ngram_starts_kernel, grid, *args, how=how)
    pairs, pair_order = torch.sort(pairs, stable=True)
    launch(_ngram_heads_kernel, grid, pairs, last, n, how=how)
    launch(_ngram_ranks_kernel, grid, pairs, _carry_max(last, -1), pair_order, rank, n, how=how)
    launch(_ngram_reduce_kernel, grid, start, rank, last, new_since, best, n, how=how)
    carries, rows = (_carry_since(last, new_since), _carry_max(best, 0)), _ngram_count_fake(keys, targets, chunk)
    launch(_ngram_states_kernel, grid, start, rank, target, order, *carries, rows, n, how=how)
    if chunk:
        moved = _by_chunk(Counts(*rows[:, :5].unbind(1)), sorted_keys, order, pairs, pair_order, chunk)
        rows = torch.stack([*moved, *rows[:, 5:].unbind(1)], 1)
    return rows


def _ngram_count_fake(keys, targets, chunk):
    return torch.empty((keys.shape[0], FIELDS), dtype=torch.int32, device=keys.device)


_op = register_op(_ngram_count, _ngram_count_fake)


def count_before(keys: Tensor, targets: Tensor, valid: Tensor | None = None, *, chunk: int = 0) -> Counts:
    """See the module's contract. On the kernels' path the five counts are columns of one (N, 8) tensor."""
    if keys.ndim != 1 or keys.dtype != torch.int64 or keys.shape[0] >= HALF:
        raise ValueError(f"count_before: keys are {tuple(keys.shape)} {keys.dtype}, expected (N,) int64 with N < 2^31")
    if targets.shape != keys.shape or targets.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(targets.shape)} {targets.dtype}"
        raise ValueError(f"count_before: targets are {got}, expected {tuple(keys.shape)} int32 or int64")
    if valid is not None and (valid.shape != keys.shape or valid.dtype != torch.bool):
        got = f"{tuple(valid.shape)} {valid.dtype}"
        raise ValueError(f"count_before: valid is {got}, expected {tuple(keys.shape)} bool")
    if chunk < 0:
        raise ValueError(f"count_before: chunk {chunk}, expected 0 or a number of positions")
    check_device("count_before", keys, targets=targets, valid=valid)
    if not use_kernel("ngram_hash", keys):
        return count_before_ref(keys, targets, valid, chunk=chunk)
    keys = keys if valid is None else torch.where(valid, keys, NO_CONTEXT)
    return Counts(*_op(keys, targets, chunk)[:, :5].unbind(1))
