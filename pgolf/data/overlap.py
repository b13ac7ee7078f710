"""Whether documents of the val split stand in the training shards: by content, since counts of shards prove nothing.

A document is known by the first WINDOW tokens behind its BOS, or by all of them and its end if it has fewer. Every val
document is looked up among the training documents of the shards that are read: all of them, or as many as the time
allows. Those come in an order in which a leak shows early: a widely copied script once put val documents 10,000 to
49,999 at the front of the training data (PR #2127), so the first shards are read first, then shards all over the split.

Equal documents alone are no leak: crawled text repeats itself, boilerplate above all. Two things tell a leak from that.
Its share is large (80 % in that precedent), or neighbours in val are neighbours in training, which documents that are
equal by chance never are after the shuffle of the corpus.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf.data.shards import Shard
from pgolf.errors import DataError

WINDOW = 64  # tokens: about 200 bytes of text with 8192 pieces
FIRST = 4  # shards at the front that are read before any other
LEAK_SHARE, LEAK_RUN = 0.01, 4  # of val documents; neighbours in both splits, one after another
FEW = 3  # equal documents that no share makes a leak: a small split has large shares
NOTED_SHARE = 0.001
QUICK_TOKENS, QUICK_SHARE = 1 << 23, 0.1
END = 0xFFFF  # stands behind the end of a short document; no vocabulary has this id


@dataclass(frozen=True)
class Match:
    """A val document, and where the equal training document begins."""

    document: int
    shard: str
    position: int


@dataclass
class Overlap:
    """What a check has found. checked, documents: val documents that were looked up, and all."""

    documents: int
    shards_read: int
    shards: int
    train_documents: int
    matches: list[Match]
    longest_run: int  # neighbours in val that are neighbours in training
    seconds: float

    @property
    def overlapping(self) -> int:
        """Val documents with at least one equal training document."""
        return len({m.document for m in self.matches})

    @property
    def share(self) -> float:
        return self.overlapping / max(self.documents, 1)

    @property
    def leaks(self) -> bool:
        return self.longest_run >= LEAK_RUN or (self.share >= LEAK_SHARE and self.overlapping > FEW)

    @property
    def noted(self) -> bool:
        """Whether there are more equal documents than repetition explains well."""
        return self.leaks or (self.share > NOTED_SHARE and self.overlapping > FEW)

    def __str__(self) -> str:
        part = "all" if self.shards_read == self.shards else f"{self.shards_read:,} of {self.shards:,}"
        where = "".join(
            f"; val document {m.document:,} is at token {m.position:,} of {m.shard}" for m in self.matches[:1]
        )
        return (
            f"{self.overlapping:,} of {self.documents:,} val documents ({100 * self.share:.2f} %) are among "
            f"{self.train_documents:,} training documents in {part} shard(s){where}"
        )


def windows(tokens: np.ndarray, bos: int, following: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(starts (d,) int64, windows (d, WINDOW) uint16) of the documents that begin in `tokens`.

    following: at least the WINDOW tokens behind `tokens`, of which the last document may need some; None at the end of
    the stream. What stands before the first BOS belongs to an earlier document.
    """
    starts = np.flatnonzero(tokens == bos)
    whole = np.searchsorted(starts, len(tokens) - WINDOW)  # the documents behind it reach over the end
    tail = np.full(WINDOW, bos, np.uint16)  # the end of the stream ends a document too
    if following is not None:
        tail[: len(following)] = following[:WINDOW]
    at = np.arange(1, WINDOW + 1)
    found = np.empty((len(starts), WINDOW), np.uint16)
    found[:whole] = tokens[starts[:whole, None] + at]
    if whole < len(starts):
        rest = np.concatenate([tokens[starts[whole] :], tail])
        found[whole:] = rest[starts[whole:, None] - starts[whole] + at]
    ended = np.logical_or.accumulate(found == bos, axis=1)
    found[ended] = END
    return starts, found


class Lookup:
    """Val documents by the hash of their windows."""

    def __init__(self, val: np.ndarray, bos: int):
        self.bos = bos
        _, self.windows = windows(val, bos)
        # a fixed odd factor a place: equal windows have equal hashes, and others differ but for 1 in 2**64
        self.factors = np.random.default_rng(0).integers(0, 2**63, WINDOW, np.uint64) * np.uint64(2) + np.uint64(1)
        hashes = self._hash(self.windows)
        self.order = np.argsort(hashes, kind="stable")
        self.hashes = hashes[self.order]

    def _hash(self, found: np.ndarray) -> np.ndarray:
        return (found.astype(np.uint64) * self.factors).sum(axis=1, dtype=np.uint64)

    def find(self, found: np.ndarray) -> Iterator[tuple[int, int]]:
        """(val document, row of `found` (d, WINDOW)) of each pair of equal windows."""
        hashes = self._hash(found)
        low, high = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        for row in np.flatnonzero(high > low).tolist():
            for at in range(low[row], high[row]):
                document = int(self.order[at])
                if np.array_equal(self.windows[document], found[row]):
                    yield document, row


def reading_order(n: int) -> list[int]:
    """The first FIRST of n shards, then the others spread ever more densely over the split."""
    order, seen = list(range(min(FIRST, n))), set(range(min(FIRST, n)))
    parts = 1
    while len(order) < n:
        for k in range(1, parts + 1):
            i = n * k // parts - 1
            if i not in seen and i >= 0:
                order.append(i)
                seen.add(i)
        parts *= 2
    return order


def check(val: np.ndarray, train_files: list[Path], bos: int, seconds: float | None = None) -> Overlap:
    """Looks every val document up. seconds: when to begin no further shard; None = all shards are read.

    One shard of 10**8 tokens takes about a second (reading included).
    """
    began = time.monotonic()
    lookup, matches, seen, read = Lookup(val, bos), [], 0, 0
    runs = _Runs()
    for i in reading_order(len(train_files)):
        if read and seconds is not None and time.monotonic() - began > seconds:
            break
        shard = Shard(train_files[i])
        following = Shard(train_files[i + 1])[:WINDOW] if i + 1 < len(train_files) else None
        starts, found = windows(shard[:], bos, following)
        for document, row in lookup.find(found):
            matches.append(Match(document, train_files[i].name, int(starts[row])))
            runs.add(document, seen + row)
        seen += len(starts) + 1  # shards that are read one after another need not be neighbours
        read += 1
    matches.sort(key=lambda m: m.document)
    seconds_taken = time.monotonic() - began
    return Overlap(len(lookup.windows), read, len(train_files), seen - read, matches, runs.longest, seconds_taken)


class _Runs:
    """The longest row of pairs (document, place), (document + 1, place + 1), ..."""

    def __init__(self):
        self.longest, self.ending = 0, {}

    def add(self, document: int, place: int) -> None:
        """Pairs come with places that never fall."""
        length = self.ending.get((document - 1, place - 1), 0) + 1
        self.ending[document, place] = length
        self.longest = max(self.longest, length)


def quick(val: np.ndarray, first_shard: Path, bos: int) -> None:
    """Raises DataError when the front of the training data is made of val documents: the precedent of PR #2127.

    Reads 16 MB and takes a tenth of a second, so each run does it. `check` looks further.
    """
    _, found = windows(Shard(first_shard)[:QUICK_TOKENS], bos)
    found = found[:-1]  # the last one may be cut
    equal = {row for _, row in Lookup(val, bos).find(found)}
    if len(equal) > FEW and len(equal) > QUICK_SHARE * len(found):
        raise DataError(
            f"{len(equal):,} of the first {len(found):,} documents in {first_shard} stand in the val split too: "
            "training on them makes the score void\n"
            "fix: use an export whose training data hold no val documents; `python -m pgolf data check` says more"
        )
