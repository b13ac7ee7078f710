"""Which parts share a stream, in which layout, by which codec: all combinations are tried, the smallest is kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from pgolf.artifact import codecs
from pgolf.artifact.layouts import LAYOUTS

ROW_BYTES = 5  # that a stream takes of the compressed table (3 to 5 measured)
# Bytes of a group beyond which its arrays are not tried as one stream. There it saves nothing (brotli's own
# tables are 30 bytes a stream), and one stream is one thread's: brotli takes 3 s for each MB
TOGETHER = 2**21


class Packed(NamedTuple):
    """A stream that was written: the arrays in it (indices into the group's), and how."""

    members: tuple[int, ...]
    codec: int
    layout: str
    data: bytes


def choose(
    groups: Mapping[str, Sequence[np.ndarray]], coders: Sequence[codecs.Codec], level: int
) -> dict[str, list[Packed]]:
    """{group: its streams}: one an array, or one of all if that is smaller, each in its best layout and codec.

    groups: arrays of one little-endian dtype each. The same input gives the same streams: ties go to the first. Codecs
    release the GIL, so threads share the work.
    """
    jobs = [
        (group, members, layout, coder)
        for group, arrays in groups.items()
        for members in _divisions([a.nbytes for a in arrays])
        for layout, order in LAYOUTS.items()
        if order.applies(arrays[0].dtype)
        for coder in coders
    ]

    def encode(job) -> Packed:
        group, members, layout, coder = job
        raw = b"".join(LAYOUTS[layout].encode(groups[group][i]) for i in members)
        return Packed(members, coder.id, layout, coder.compress(raw, level))

    best: dict[tuple[str, tuple[int, ...]], Packed] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (group, members, _, _), packed in zip(jobs, pool.map(encode, jobs), strict=True):
            old = best.get((group, members))
            if old is None or len(packed.data) < len(old.data):
                best[group, members] = packed
    return {group: _smaller(best, group, len(arrays)) for group, arrays in groups.items()}


def _divisions(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """All arrays together, unless they are many bytes, and each alone."""
    apart = [(i,) for i in range(len(sizes))]
    return apart + [tuple(range(len(sizes)))] * (len(sizes) > 1 and sum(sizes) <= TOGETHER)


def _smaller(best: Mapping[tuple[str, tuple[int, ...]], Packed], group: str, n: int) -> list[Packed]:
    together = best.get((group, tuple(range(n))))
    apart = [best[group, (i,)] for i in range(n)]
    if together and len(together.data) + ROW_BYTES <= sum(len(p.data) + ROW_BYTES for p in apart):
        return [together]
    return apart
