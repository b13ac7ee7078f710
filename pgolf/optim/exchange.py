"""Which rank orthogonalises which matrix, and what that sends: reduce-scatter, Newton-Schulz on a share, all-gather.

A pool holds every matrix of one shape up to transposition, wide side last: of 11 layers q and o (22), k and v (22), up
and down (22). At 8 ranks 22 slots become 24; one pool for each of the four shapes would make 80 of 66 matrices, for up
and down have 11 each. A pool that padding would make more than half as large again is not split: its gradients travel
with all others that ranks hold in full, and every rank does its work.
Source: Parallel Muon (PR #399, #549); arithmetic of the padding in docs/distributed.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.dist import Dist, Pending
from pgolf.model.banks import Bank
from pgolf.optim.config import MuonConfig

MOST_PADDED = 1.5  # slots a matrix, above which a pool is not split


def padded(matrices: int, world_size: int) -> int:
    """The next multiple of world_size."""
    return -(-matrices // world_size) * world_size


def is_split(matrices: int, world_size: int, split: bool = True) -> bool:
    """Whether a pool of `matrices` is shared out over the ranks."""
    return split and world_size > 1 and padded(matrices, world_size) <= MOST_PADDED * matrices


class Pool:
    """Banks whose matrices are equal in shape up to transposition.

    buffer (slots, rows, cols), rows <= cols, in `dtype`: gradients on their way out, updates on their way back; slots
    behind the last matrix stay zero. shard (slots / ranks, rows, cols): this rank's; the buffer itself where the pool
    is not split. momentum: as shard. updates: what `gather` brought, as buffer.
    """

    def __init__(self, banks: Sequence[Bank], dist: Dist, dtype: torch.dtype, split: bool = True):
        self.banks, self.dist = list(banks), dist
        self.matrices = sum(map(len, banks))
        self.is_split = is_split(self.matrices, dist.world_size, split)
        slots = padded(self.matrices, dist.world_size) if self.is_split else self.matrices
        like, shape = banks[0].master, wide(banks[0])
        self.buffer = like.new_zeros(slots, *shape, dtype=dtype)
        share = slots // dist.world_size if self.is_split else slots
        self.shard = like.new_zeros(share, *shape, dtype=dtype) if self.is_split else self.buffer
        self.momentum = torch.zeros_like(self.shard)
        self.updates = self.buffer

    def views(self, slots: Tensor) -> list[Tensor]:
        """The part of `slots` (slots, rows, cols) of each bank, shaped as the bank."""
        parts = slots[: self.matrices].split([len(b) for b in self.banks])
        return [part.mT if bank.rows > bank.cols else part for bank, part in zip(self.banks, parts, strict=True)]

    def reduce(self) -> Pending:
        """Starts to make `shard` this rank's part of the mean gradient. The banks' gradients must be collected, and
        where the pool is not split averaged."""
        for bank, view in zip(self.banks, self.views(self.buffer), strict=True):
            if self.is_split:
                # dividing first: gloo knows no mean, and fp32 rounds to bf16 once
                torch.mul(bank.grad, 1.0 / self.dist.world_size, out=view)
            else:
                view.copy_(bank.grad)
        return self.dist.reduce_scatter(self.shard, self.buffer) if self.is_split else Pending()

    def gather(self, updates: Tensor) -> Pending:
        """Starts to make `updates` those of all ranks from this rank's, shaped as shard."""
        if self.is_split:
            return self.dist.all_gather(self.buffer, updates)
        self.updates = updates
        return Pending()

    def full_momentum(self) -> list[Tensor]:
        """The momentum of each bank's matrices, shaped as the bank, in full on every rank. A collective."""
        full = self.momentum
        if self.is_split:
            full = torch.empty_like(self.buffer)
            self.dist.all_gather(full, self.momentum).wait()
        return self.views(full)

    def load_momentum_(self, of_banks: Sequence[Tensor]) -> None:
        """Takes this rank's share of the momentum; one tensor a bank, shaped as the bank."""
        full = torch.zeros_like(self.buffer)
        for view, given in zip(self.views(full), of_banks, strict=True):
            view.copy_(given)
        at = self.dist.rank * len(self.shard) if self.is_split else 0
        self.momentum.copy_(full[at : at + len(self.shard)])


def wide(bank: Bank) -> tuple[int, int]:
    """(shorter, longer side)."""
    return min(bank.rows, bank.cols), max(bank.rows, bank.cols)


def make_pools(banks: Iterable[Bank], dist: Dist, dtype: torch.dtype, split: bool = True) -> list[Pool]:
    """Pools of all banks, the largest first: it has the longest way to go."""
    by_shape: dict[tuple[int, int], list[Bank]] = {}
    for bank in banks:
        by_shape.setdefault(wide(bank), []).append(bank)
    pools = [Pool(group, dist, dtype, split) for group in by_shape.values()]
    return sorted(pools, key=lambda pool: -pool.buffer.numel())


@dataclass(frozen=True)
class Sent:
    """A collective of each step. payload: bytes of the whole tensor. wire: bytes that leave each rank, by a ring."""

    collective: str  # reduce_scatter, all_gather, all_reduce, broadcast
    what: str
    payload: int
    wire: int


def traffic_of(matrices: dict[tuple[int, int], int], others: int, cfg: MuonConfig, world_size: int) -> list[Sent]:
    """What a step sends, in order. matrices: how many of each (shorter, longer side); others: numbers that AdamW
    trains."""
    if world_size == 1:
        return []
    ring, itemsize, full, rows = (world_size - 1) / world_size, {"fp32": 4, "bf16": 2}[cfg.exchange_dtype], others, []
    for (short, long), n in sorted(matrices.items(), key=lambda kv: -kv[0][0] * kv[0][1] * kv[1]):
        if not is_split(n, world_size, cfg.parallel == "shard"):
            full += n * short * long
            continue
        slots = padded(n, world_size)
        size = slots * short * long * itemsize
        what = f"{n} matrices {short}x{long} in {slots} slots, {cfg.exchange_dtype}"
        rows += [Sent(c, what, size, round(ring * size)) for c in ("reduce_scatter", "all_gather")]
    for what, size in ((f"gradients held in full: {full:,} numbers, fp32", 4 * full), ("norm and loss", 8)):
        rows.append(Sent("all_reduce", what, size, round(2 * ring * size)))
    return rows
