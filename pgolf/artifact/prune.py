"""Selective pruning of +-1 (PR #609): zeroes the integers that are cheapest to lose until the bytes fit.

An integer of +-1 that becomes 0 costs about step^2 of squared error: rows with small steps go first. The smallest count
is searched by the real packed size, which falls as zeros make the streams easier to code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from pgolf.quant.grid import GRIDS
from pgolf.quant.records import Record, base_of


def prune(records: list[Record], target: int, size_of: Callable[[list[Record]], int]) -> tuple[list[Record], int]:
    """(records, how many integers were zeroed), so few that `size_of(records)` is at most `target` bytes.

    It may be up to target / 10,000 bytes below what one fewer would give. (`records`, 0) when nothing needs to be done,
    and when zeroing every +-1 would not do: that ruins the weights in vain.
    """
    places = [_ones(r) for r in records]
    ends = np.cumsum([len(at) for at, _ in places])
    order = np.argsort(np.concatenate([cost for _, cost in places]), kind="stable")

    def cut(count: int) -> list[Record]:
        chosen = np.zeros(len(order), bool)
        chosen[order[:count]] = True
        masks = np.split(chosen, ends[:-1])
        return [_without(r, at[mask]) for r, (at, _), mask in zip(records, places, masks, strict=True)]

    few, many = 0, len(order)
    above = size_of(records)
    if above <= target or (below := size_of(cut(many))) > target:
        return records, 0
    halve = False
    while many - few > 1 and target - below > target // 10_000:
        # nearly linear in the count: a straight line's guess, and a halving after each, lest one end stay where it is
        guess = (few + many) // 2 if halve else few + round((many - few) * (above - target) / (above - below))
        guess, halve = min(max(guess, few + 1), many - 1), not halve
        size = size_of(cut(guess))
        if size > target:
            few, above = guess, size
        else:
            many, below = guess, size
    return cut(many), many


def _ones(record: Record) -> tuple[np.ndarray, np.ndarray]:
    """(flat places of +-1 int64, what zeroing each costs fp32) of a record's integers."""
    if base_of(record.kind) not in GRIDS:
        return np.empty(0, np.int64), np.empty(0, np.float32)
    at = np.flatnonzero(np.abs(record.parts["q"]) == 1)
    row = at // (record.parts["q"].size // len(record.parts["scale"]))
    return at, record.parts["scale"].astype(np.float32)[row] ** 2


def _without(record: Record, at: np.ndarray) -> Record:
    """`record` with zeros at the flat places `at` of its integers."""
    if not len(at):
        return record
    q = record.parts["q"].copy()
    q.reshape(-1)[at] = 0
    return replace(record, parts={**record.parts, "q": q})
