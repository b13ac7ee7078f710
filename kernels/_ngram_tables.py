"""Count tables in rows of 128 bytes: the whole count vector of a context, not one entry of it, in one or two reads.

    table = build_table(contexts, tokens, counts)           the non-zero c(s, v), sorted by (s, v), each pair once
    tokens (P, S), counts (P, S), totals (P,) = lookup(table, keys)                       all int32; S = 14 * chain

Row p lists every v with c(s_p, v) > 0 in ascending order, padded with token -1 and count 0, and totals[p] = c(s_p) is
the sum of its counts: a proper count vector by construction, since a line is found by its *context* alone. A key that
is not in the table, or NO_CONTEXT, gives an empty row. Counts and totals below 2^31.

Line, 32 int32:  0-1 the context's key (64 bits, so that no two contexts share a row) | 2 total | 3 next line or -1
                 4-17 tokens, -1 where there is none | 18-31 their counts
A context with more than 14 followers goes on in further lines past the hashed area, chained by word 3; `chain` is the
longest one's number of lines. Unused lines are zero, which no used one is (its total is positive).

Open addressing, linear probing, yet built without a race or an atomic: home(s) = the high bits of key * golden ratio;
with contexts sorted by home, line(r) = max(home_r, line(r-1) + 1) = r + running max of (home_r - r). That is one scan,
independent of the order of insertion. The area goes on past its last home, so that nothing wraps around, and `probes`,
the longest way from a home plus one, bounds every lookup. A build reads sizes back from the GPU and waits for them.
Bytes: build 128 written a line, its entries and 36 of plan read; lookup 16 a probe (a sector of 32), 112 of the line's
remaining bytes and 112 written a line of the chain. Exact. No gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._op import cdiv, check_device, launch, register_op, tuned, use_kernel
from ._triton import jit, tl

SLOTS = 14  # pairs a line: (128 - 16) / 8
WORDS = 32  # int32 a line
GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as int64


@dataclass(frozen=True)
class Table:
    """Lines (L, 32) int32 and what a lookup needs to know of them; see the module."""

    lines: Tensor
    bits: int  # log2 of the number of homes
    probes: int  # lines to try at most
    chain: int  # lines of the context with the most followers


@dataclass(frozen=True)
class Plan:
    """What goes into each used line: (M,) each."""

    line: Tensor  # int64
    key: Tensor  # int64
    total: Tensor  # int32
    next: Tensor  # int32
    first: Tensor  # int64, its first entry
    size: Tensor  # int32, its number of entries

    def args(self) -> tuple[Tensor, ...]:
        """The fields in the order of `_ngram_fill`."""
        return self.line, self.key, self.total, self.next, self.first, self.size


def home_of(keys: Tensor, bits: int) -> Tensor:
    """Home lines, int64: the high `bits` of keys * GOLDEN mod 2^64."""
    return ((keys * GOLDEN) >> (64 - bits)) & ((1 << bits) - 1)  # int64 shifts arithmetically


def plan_table(contexts: Tensor, counts: Tensor, load: float) -> tuple[Plan, int, int, int, int]:
    """(plan, number of lines, bits, probes, chain) for sorted entries, in plain torch on either device."""
    device = contexts.device
    head = torch.ones_like(contexts, dtype=torch.bool)
    head[1:] = contexts[1:] != contexts[:-1]
    first = head.nonzero()[:, 0]
    groups = first.numel()
    bits = max(1, (max(1, int(groups / load)) - 1).bit_length())
    if not groups:
        none = [torch.empty(0, dtype=d, device=device) for d in (torch.int64, torch.int32)]
        return Plan(none[0], none[0], none[1], none[1], none[0], none[1]), (1 << bits) + 1, bits, 1, 1
    size = first.diff(append=first.new_tensor([contexts.numel()]))
    summed = torch.cat([first.new_zeros(1), counts.cumsum(0, dtype=torch.int64)])
    total = summed[first + size] - summed[first]

    home, order = torch.sort(home_of(contexts[first], bits), stable=True)
    here = torch.arange(groups, device=device)
    placed = here + (home - here).cummax(0).values
    probes = int((placed - home).max()) + 1
    own = torch.empty_like(here)
    own[order] = placed
    overflow = (1 << bits) + probes  # probing ends inside the hashed area and its margin

    lines = (size + SLOTS - 1) // SLOTS  # of each group
    ends = lines.cumsum(0)
    group = torch.repeat_interleave(here, lines)
    nth = torch.arange(group.numel(), device=device) - (ends - lines)[group]
    further = overflow + (ends - lines - here)[group] + nth - 1  # overflow lines of a group lie side by side
    line = torch.where(nth == 0, own[group], further)
    next = torch.where(nth + 1 < lines[group], further + 1, -1)
    plan = Plan(
        line,
        contexts[first][group],
        total[group].to(torch.int32),
        next.to(torch.int32),
        first[group] + nth * SLOTS,
        (size[group] - nth * SLOTS).clamp(max=SLOTS).to(torch.int32),
    )
    return plan, overflow + int((lines - 1).sum()), bits, probes, int(lines.max())


# -- reference -------------------------------------------------------------------------------------------------------


def fill_ref(plan: Plan, tokens: Tensor, counts: Tensor, lines: int) -> Tensor:
    """(lines, 32) int32: the table's memory, in plain torch."""
    out = torch.zeros((lines, WORDS), dtype=torch.int32, device=tokens.device)
    out[plan.line, 2], out[plan.line, 3] = plan.total, plan.next
    out.view(torch.int64)[plan.line, 0] = plan.key
    slot = torch.arange(SLOTS, device=tokens.device)
    used = slot < plan.size[:, None]
    entry = (plan.first[:, None] + slot) * used
    if tokens.numel():
        out[plan.line, 4 : 4 + SLOTS] = torch.where(used, tokens[entry], -1).to(torch.int32)
        out[plan.line, 4 + SLOTS :] = torch.where(used, counts[entry], 0).to(torch.int32)
    return out


def build_table_ref(contexts: Tensor, tokens: Tensor, counts: Tensor, *, load: float = 0.5) -> Table:
    """Reference of `build_table`."""
    plan, lines, bits, probes, chain = plan_table(contexts, counts, load)
    return Table(fill_ref(plan, tokens, counts, lines), bits, probes, chain)


def lookup_ref(table: Table, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `lookup`, in plain torch."""
    tags, open = table.lines.view(torch.int64)[:, 0], keys != -1
    home, at = home_of(keys, table.bits), torch.full_like(keys, -1)
    for probe in range(table.probes):
        at = torch.where(open & (tags[home + probe] == keys) & (table.lines[home + probe, 2] > 0), home + probe, at)
    totals = torch.where(at >= 0, table.lines[at.clamp(min=0), 2], 0)
    tokens, counts = [], []
    for _ in range(table.chain):
        line = table.lines[at.clamp(min=0)]
        tokens.append(torch.where((at >= 0)[:, None], line[:, 4 : 4 + SLOTS], -1))
        counts.append(torch.where((at >= 0)[:, None], line[:, 4 + SLOTS :], 0))
        at = torch.where(at >= 0, line[:, 3].to(torch.int64), -1)
    return torch.cat(tokens, 1), torch.cat(counts, 1), totals


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _ngram_fill_kernel(line, key, total, next, first, size, tokens, counts, out, M, BLOCK_M: tl.constexpr):
    """Whole lines: reads their entries side by side, writes 128 bytes each."""
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    live = m < M
    tag = tl.load(key + m, mask=live, other=0)
    j = tl.arange(0, 32)[None, :]
    entry = tl.load(first + m, mask=live, other=0)[:, None] + tl.where(j < 18, j - 4, j - 18)
    used = (j >= 4) & (tl.where(j < 18, j - 4, j - 18) < tl.load(size + m, mask=live, other=0)[:, None])
    word = tl.load(tokens + entry, mask=used & (j < 18), other=-1)
    word = tl.where(j < 18, word, tl.load(counts + entry, mask=used & (j >= 18), other=0))
    word = tl.where(j == 0, tag.to(tl.int32)[:, None], tl.where(j == 1, (tag >> 32).to(tl.int32)[:, None], word))
    word = tl.where(j == 2, tl.load(total + m, mask=live, other=0)[:, None], word)
    word = tl.where(j == 3, tl.load(next + m, mask=live, other=-1)[:, None], word)
    at = tl.load(line + m, mask=live, other=0)
    tl.store(out + at[:, None] * 32 + j, word, mask=live[:, None])


@jit
def _ngram_lookup_kernel(
    lines, tags, keys, tokens, counts, totals, P, golden, shift, homes, probes, chain, BLOCK_P: tl.constexpr
):
    """tags: the lines as 16 int64 each."""
    p = (tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)).to(tl.int64)
    live = p < P
    key = tl.load(keys + p, mask=live, other=-1)
    line = ((key * golden) >> shift) & (homes - 1)
    at = tl.full((BLOCK_P,), -1, tl.int64)
    open = live & (key != -1)
    probe = 0
    while (probe < probes) & (tl.sum(open.to(tl.int32), axis=0) > 0):
        tag = tl.load(tags + line * 16, mask=open, other=0)
        used = tl.load(lines + line * 32 + 2, mask=open, other=0) > 0
        hit = open & used & (tag == key)
        at = tl.where(hit, line, at)
        open = open & used & (tag != key)
        line += 1
        probe += 1
    found = at >= 0
    tl.store(totals + p, tl.load(lines + at * 32 + 2, mask=found, other=0), mask=live)
    j = tl.arange(0, 16)[None, :]
    out = p[:, None] * (chain * 14) + j
    for _ in range(chain):
        here = lines + at[:, None] * 32 + j
        mask = (at >= 0)[:, None] & (j < 14)
        tl.store(tokens + out, tl.load(here + 4, mask=mask, other=-1), mask=live[:, None] & (j < 14))
        tl.store(counts + out, tl.load(here + 18, mask=mask, other=0), mask=live[:, None] & (j < 14))
        at = tl.load(lines + at * 32 + 3, mask=at >= 0, other=-1).to(tl.int64)
        out += 14


# -- launchers -------------------------------------------------------------------------------------------------------


def _ngram_fill(
    line: Tensor, key: Tensor, total: Tensor, next: Tensor, first: Tensor, size: Tensor, tokens: Tensor, counts: Tensor,
    lines: int,
) -> Tensor:  # fmt: skip
    out = torch.zeros((lines, WORDS), dtype=torch.int32, device=tokens.device)
    how = tuned("ngram_fill", tokens)
    plan = [t.contiguous() for t in (line, key, total, next, first, size, tokens, counts)]
    launch(_ngram_fill_kernel, (cdiv(line.shape[0], how.blocks["BLOCK_M"]),), *plan, out, line.shape[0], how=how)
    return out


def _ngram_fill_fake(line, key, total, next, first, size, tokens, counts, lines):
    return torch.empty((lines, WORDS), dtype=torch.int32, device=tokens.device)


def _ngram_lookup(lines: Tensor, keys: Tensor, bits: int, probes: int, chain: int) -> tuple[Tensor, Tensor, Tensor]:
    tokens, counts, totals = _ngram_lookup_fake(lines, keys, bits, probes, chain)
    how = tuned("ngram_lookup", keys)
    args = (lines, lines.view(torch.int64), keys.contiguous(), tokens, counts, totals, keys.shape[0])
    grid = (cdiv(keys.shape[0], how.blocks["BLOCK_P"]),)
    launch(_ngram_lookup_kernel, grid, *args, GOLDEN, 64 - bits, 1 << bits, probes, chain, how=how)
    return tokens, counts, totals


def _ngram_lookup_fake(lines, keys, bits, probes, chain):
    new = lambda *shape: torch.empty(shape, dtype=torch.int32, device=keys.device)
    return new(keys.shape[0], chain * SLOTS), new(keys.shape[0], chain * SLOTS), new(keys.shape[0])


_fill_op = register_op(_ngram_fill, _ngram_fill_fake)
_lookup_op = register_op(_ngram_lookup, _ngram_lookup_fake)


def fill(plan: Plan, tokens: Tensor, counts: Tensor, lines: int) -> Tensor:
    """(lines, 32) int32: the memory of a planned table."""
    if not use_kernel("ngram_hash", tokens):
        return fill_ref(plan, tokens, counts, lines)
    return _fill_op(*plan.args(), tokens, counts, lines)


def build_table(contexts: Tensor, tokens: Tensor, counts: Tensor, *, load: float = 0.5) -> Table:
    """See the module's contract. contexts (R,) int64, tokens and counts (R,) int32: `Runs` of pair_runs or merge_runs.

    load: contexts a home line, at most; the number of homes is the next power of two.
    """
    for name, t in (("contexts", contexts), ("tokens", tokens), ("counts", counts)):
        dtype = torch.int64 if name == "contexts" else torch.int32
        if t.ndim != 1 or t.shape != contexts.shape or t.dtype != dtype:
            got = f"{tuple(t.shape)} {t.dtype}"
            raise ValueError(f"build_table: {name} are {got}, expected ({contexts.numel()},) {str(dtype)[6:]}")
    if not 0 < load <= 1:
        raise ValueError(f"build_table: load {load}, expected one in (0, 1]")
    check_device("build_table", contexts, tokens=tokens, counts=counts)
    if bool((contexts == -1).any()) or bool((counts < 1).any()):
        raise ValueError("build_table: got NO_CONTEXT among the contexts or a count below 1, expected non-zero counts")
    in_order = (contexts[1:] > contexts[:-1]) | ((contexts[1:] == contexts[:-1]) & (tokens[1:] > tokens[:-1]))
    if not bool(in_order.all()):
        raise ValueError("build_table: entries are not in order, expected each (context, token) once, sorted")
    plan, lines, bits, probes, chain = plan_table(contexts, counts, load)
    return Table(fill(plan, tokens, counts, lines), bits, probes, chain)


def lookup(table: Table, keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See the module's contract."""
    if keys.ndim != 1 or keys.dtype != torch.int64:
        raise ValueError(f"lookup: keys are {tuple(keys.shape)} {keys.dtype}, expected (P,) int64")
    check_device("lookup", keys, table=table.lines)
    if not use_kernel("ngram_hash", keys):
        return lookup_ref(table, keys)
    return _lookup_op(table.lines, keys, table.bits, table.probes, table.chain)
