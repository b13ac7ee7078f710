"""What was scored and what was learned from, in the order in which it happened: the proof of score before update.

An event is (seq, kind, component, targets [start, end), rank, epoch). `epoch` counts the barriers that a rank has
passed: of two events the first happened before the second if its epoch is smaller, or if it stands earlier in the same
rank's ledger. Consecutive events of one kind that continue each other are one row, so that an evaluation that never
learns has a row a rank.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pgolf.eval.order import STREAM, Order

SCORE, UPDATE = "SCORE", "UPDATE"
EACH = "SCORE_THEN_UPDATE"  # token by token: each target is learned from right after its own score
KINDS = (SCORE, UPDATE, EACH)
Interval = tuple[int, int]  # targets [start, end)


class Event(NamedTuple):
    seq: int
    kind: str
    component: str
    start: int
    end: int
    rank: int
    epoch: int
    order: str


class Ledger:
    """Events of one rank, or of all after `merged`."""

    def __init__(self, rank: int = 0, order: Order = STREAM):
        self.rank, self.order, self.epoch = rank, order.id, 0
        self.events: list[Event] = []

    def score(self, component: str, intervals: Iterable[Interval]) -> None:
        """Scores of these targets are final."""
        self._add(SCORE, component, intervals)

    def update(self, component: str, intervals: Iterable[Interval]) -> None:
        """The component has learned from these targets."""
        self._add(UPDATE, component, intervals)

    def each(self, component: str, intervals: Iterable[Interval]) -> None:
        """The component scores and then learns from each of these targets in turn."""
        self._add(EACH, component, intervals)

    def barrier(self) -> None:
        """All ranks have met: what they did before happened before what any of them does from here on."""
        self.epoch += 1

    def _add(self, kind: str, component: str, intervals: Iterable[Interval]) -> None:
        for start, end in intervals:
            last = self.events[-1] if self.events else None
            if last and last[1:3] == (kind, component) and last.end == start and last.epoch == self.epoch:
                self.events[-1] = last._replace(end=end)
            elif start < end:
                seq = last.seq + 1 if last else 0
                self.events.append(Event(seq, kind, component, start, end, self.rank, self.epoch, self.order))

    def merged(self, dist) -> Ledger:
        """The events of all ranks (`pgolf.dist.Dist`), by epoch, rank and seq. A collective."""
        out = Ledger()
        out.order, out.epoch = self.order, self.epoch
        rows = [Event(*row) for part in dist.gather_objects([tuple(e) for e in self.events]) for row in part]
        out.events = sorted(rows, key=lambda e: (e.epoch, e.rank, e.seq))
        return out

    def problems(self, n_targets: int) -> list[str]:
        """What is wrong with it as the record of scoring targets 0 to n_targets - 1; empty if nothing."""
        orders = sorted({e.order for e in self.events})
        out = [f"components have {len(orders)} orders: {', '.join(orders)}"] if len(orders) > 1 else []
        by_component: dict[str, list[Event]] = defaultdict(list)
        for event in self.events:
            by_component[event.component].append(event)
        if not by_component:
            return [*out, "nothing was scored"]
        for name, events in by_component.items():
            out += [f"{name}: {text}" for text in _coverage(events, n_targets)]
        for name, events in by_component.items():
            out += [f"{name}: {text}" for text in _learned_early(events)]
        return out

    def digest(self) -> str:
        """sha256 of the events."""
        return hashlib.sha256(json.dumps(self.rows(), separators=(",", ":")).encode()).hexdigest()

    def rows(self) -> list[list]:
        """The events as JSON values."""
        return [list(e) for e in self.events]

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence], rank: int = 0) -> Ledger:
        """The inverse of `rows`; new events go on behind the last of them."""
        out = cls(rank)
        out.events = [Event(*row) for row in rows]
        if out.events:
            out.order, out.epoch = out.events[-1].order, out.events[-1].epoch
        return out

    def write(self, path: Path) -> None:
        """As JSON: {"digest", "fields", "events"}."""
        data = {"digest": self.digest(), "fields": Event._fields, "events": self.rows()}
        path.write_text(json.dumps(data) + "\n")


def _scores(events: Iterable[Event]) -> list[Event]:
    return sorted((e for e in events if e.kind != UPDATE), key=lambda e: e.start)


def _coverage(events: Sequence[Event], n_targets: int) -> list[str]:
    """Each target scored exactly once, and none besides."""
    out, reached = [], 0
    for event in _scores(events):
        if event.start < reached:
            out.append(f"targets {event.start} to {min(reached, event.end) - 1} are scored again")
        if event.start > reached:
            out.append(f"targets {reached} to {event.start - 1} are never scored")
        reached = max(reached, event.end)
    if reached != n_targets:
        missing = f"targets {reached} to {n_targets - 1} are never scored"
        out.append(missing if reached < n_targets else f"targets up to {reached - 1} are scored, there are {n_targets}")
    return out[:5]


def _learned_early(events: Sequence[Event]) -> list[str]:
    """Updates on targets whose score does not happen before them."""
    scores = _scores(events)
    starts = [e.start for e in scores]
    out = []
    for update in (e for e in events if e.kind == UPDATE):
        at = update.start
        for score in scores[max(bisect_right(starts, at) - 1, 0) :]:
            if score.start > at or at >= update.end:
                break
            before = score.epoch < update.epoch or (score.rank == update.rank and score.seq < update.seq)
            if score.end > at:
                if not before:
                    out.append(f"learns from target {at} before its score is final")
                    break
                at = score.end
        if at < update.end and not (out and out[-1].startswith(f"learns from target {at} ")):
            out.append(f"learns from target {at}, which is not scored")
    return out[:5]
