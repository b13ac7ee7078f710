"""Time: the one training clock that all ranks obey, and the ledger of a run's phases.

Ranks never decide alone: whatever comes from time is read on rank 0 and broadcast (`Clock.tick`). In the challenge's
scripts each rank scaled its learning rate by its own clock, and replicas drifted apart by fractions of a step.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgolf.dist import Dist


class Clock:
    """Training time in milliseconds: rank 0's, the same on all ranks, without the pauses (validation).

    dist: the ranks. cap_ms: where training ends; None = no cap. now: seconds, monotonic; only rank 0's is read.
    """

    def __init__(self, dist: Dist, cap_ms: float | None = None, now: Callable[[], float] = time.monotonic):
        self.dist, self.cap_ms, self._now = dist, cap_ms, now
        self._done_ms = 0.0  # of the stretches that have ended
        self._since: float | None = None  # start of the running stretch; None while paused
        self.elapsed_ms = 0.0  # at the last tick
        self.last_ms = 0.0  # between the last two ticks
        self.stop_code = 0  # at the last tick: the largest of all ranks

    def start(self, at_ms: float = 0.0) -> None:
        """Starts the clock at `at_ms`: the time already spent when a run is resumed."""
        self._done_ms = self.elapsed_ms = at_ms
        self._since = None
        self.resume()

    def pause(self) -> None:
        """Stops the clock after the queued training work, which counts as training."""
        if self._since is not None:
            self.dist.synchronize()
            self._done_ms += 1000.0 * (self._now() - self._since)
            self._since = None

    def resume(self) -> None:
        """Lets the clock go on after the queued other work, which does not count."""
        if self._since is None:
            self.dist.synchronize()
            self._since = self._now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """`with clock.paused():` around validation. A clock that was not running stays so."""
        was_running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if was_running:
                self.resume()

    def tick(self, stop_code: int = 0) -> float:
        """Milliseconds of training so far. A collective: every rank gets rank 0's reading, bit for bit.

        stop_code: of this rank (`pgolf.signals`); the largest of all ranks comes in the same message, `self.stop_code`.
        """
        running = 0.0 if self._since is None else 1000.0 * (self._now() - self._since)
        before = self.elapsed_ms
        self.elapsed_ms, self.stop_code = self.dist.first_and_max(self._done_ms + running, stop_code)
        self.last_ms = self.elapsed_ms - before
        return self.elapsed_ms

    @property
    def expired(self) -> bool:
        """Whether the last tick had reached the cap."""
        return self.cap_ms is not None and self.elapsed_ms >= self.cap_ms

    @property
    def left_ms(self) -> float | None:
        """Budget left at the last tick; None without a cap."""
        return None if self.cap_ms is None else max(self.cap_ms - self.elapsed_ms, 0.0)


# The challenge's two budgets of 600 s. Compilation, serialisation and compression count for neither in practice; what
# reads training data to change the weights (calibration) counts as training.
COUNTED = {"train": "training", "calibrate": "training", "evaluate": "evaluation", "adapt": "evaluation"}


class TimeLedger:
    """Seconds per named phase, and which budget each phase counts for (`COUNTED`; other names count for none).

    A phase inside a phase stops the outer one, so that no second is booked twice: validation within "train" is not
    training. now: seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0
        self.carried = 0.0  # seconds of earlier processes among them
        self.failed_in = ""  # the phase that the first exception came from

    @property
    def current(self) -> str:
        """The innermost phase under way; empty outside of phases."""
        return self._stack[-1] if self._stack else ""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._seconds.setdefault(name, 0.0)
        self._stack.append(name)
        try:
            yield
        except BaseException:
            self.failed_in = self.failed_in or name
            raise
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        now = self._now()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    def carry(self, earlier: Mapping[str, Mapping]) -> None:
        """Adds the seconds of an earlier process of this run, in the form of `to_dict`."""
        for name, row in earlier.items():
            seconds = float(row["seconds"])
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
            self.carried += seconds

    def seconds(self, name: str) -> float:
        """Seconds booked for `name` so far; 0 if it has not run."""
        self._book()
        return self._seconds.get(name, 0.0)

    def to_dict(self) -> dict[str, dict]:
        """{phase: {"seconds": float, "counted": "training" | "evaluation" | None}} in order of first entry."""
        self._book()
        return {name: {"seconds": s, "counted": COUNTED.get(name)} for name, s in self._seconds.items()}

    def lines(self) -> list[str]:
        """The ledger as aligned text: a line a phase, then the sum of each budget and of all."""
        return ledger_lines(self.to_dict())


def ledger_lines(ledger: Mapping[str, Mapping], limits: Mapping[str, float] | None = None) -> list[str]:
    """Text of a ledger in the form of `TimeLedger.to_dict()`, as a saved result holds it. limits: seconds by budget."""
    rows = [(name, row["seconds"], row["counted"] or "not counted") for name, row in ledger.items()]
    for budget in ("training", "evaluation"):
        limit = (limits or {}).get(budget)
        seconds = sum(r["seconds"] for r in ledger.values() if r["counted"] == budget)
        rows.append((f"= {budget}", seconds, f"of {limit:g} s" if limit else ""))
    rows.append(("= all", sum(r["seconds"] for r in ledger.values()), ""))
    width = max(len(name) for name, _, _ in rows)
    return [f"{name:<{width}}  {seconds:10.2f} s  {note}".rstrip() for name, seconds, note in rows]
