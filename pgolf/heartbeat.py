"""Which rank is late, and which failed first: each rank's sign of life in torchrun's key-value store.

The store is reached over the network, so that nodes need no common file system, and under torchrun it lives in the
launcher and outlives every rank. A thread writes once a second; the training loop pays nothing.
"""

from __future__ import annotations

import atexit
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

# Of a wait, before it is told who is missing, in seconds.
TELL_AFTER = 20.0
LEAVE_AFTER = 5.0  # seconds that `close` waits for a thread whose store does not answer
NAMED = 4  # late ranks named in a message


class Sign(NamedTuple):
    """A rank's last sign of life."""

    count: int
    phase: str
    step: int
    waits_for: str  # the collective that it is in; empty while it works

    def __str__(self) -> str:
        doing = f"waiting in {self.waits_for}" if self.waits_for else "working"
        return f"phase {self.phase}, after step {self.step}, {doing}"


class Heartbeat:
    """store: torch.distributed's (`set`, `multi_get`, `compare_set`, `check`). every: seconds between two signs."""

    def __init__(self, store, rank: int, world_size: int, every: float = 1.0, tell_after: float = TELL_AFTER):
        self.store, self.rank, self.world_size = store, rank, world_size
        self.every, self.tell_after = every, tell_after
        self.where: Callable[[], tuple[str, int]] = lambda: ("start", 0)  # phase, steps taken
        self.say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
        self.waits_for, self._since, self._told, self._count = "", 0.0, False, 0
        self._end, self._thread = threading.Event(), None
        self.beat()

    def start(self) -> None:
        """Lets a thread beat until `close`. Every rank must have been built before: a missing sign blocks a reader."""
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """Ends the thread. Inside the store while the interpreter shuts down, it would abort the process."""
        self._end.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(LEAVE_AFTER)
            atexit.unregister(self.close)

    def waiting(self, what: str) -> None:
        """The main thread enters a collective (what), or leaves it ("")."""
        self._since, self._told, self.waits_for = time.monotonic(), False, what

    def beat(self) -> None:
        self._count += 1
        sign = (self._count, *self.where(), self.waits_for)
        self.store.set(f"sign/{self.rank}", json.dumps(sign))

    def claim(self, what: str) -> str:
        """Says that this rank has failed; returns what failed first of all ranks, `"rank 1: <what>"`."""
        try:
            return self.store.compare_set("failed", "", f"rank {self.rank}: {what}").decode()
        except RuntimeError:  # the store is gone with its machine: nobody can be asked
            return f"rank {self.rank}: {what}"

    def failed(self) -> str:
        """What failed first, as `claim` gives it; empty when nothing has, or nobody can say."""
        try:
            return self.store.get("failed").decode() if self.store.check(["failed"]) else ""
        except RuntimeError:
            return ""

    def late(self) -> str:
        """Names the ranks that the others wait for. Takes two beats: a rank that does not beat is dead or stopped."""
        try:
            first = self._signs()
            time.sleep(2.2 * self.every)
            return self._describe(first, self._signs())
        except RuntimeError as err:
            return f"Nobody can say which rank is late: the store does not answer ({str(err).splitlines()[0]})."

    def _describe(self, first: list[Sign], signs: list[Sign]) -> str:
        others = [r for r in range(self.world_size) if r != self.rank]
        silent = [r for r in others if signs[r].count == first[r].count]
        if silent:
            return _listed(silent, signs, "gives no sign of life: killed (out of memory?), stopped or cut off; last in")
        behind = min(signs[r].step for r in others)
        late = [r for r in others if not signs[r].waits_for] or [
            r for r in others if signs[r].step == behind < signs[self.rank].step
        ]
        return _listed(late, signs, "is late:") if late else "No rank is behind the others."

    def _signs(self) -> list[Sign]:
        found = self.store.multi_get([f"sign/{r}" for r in range(self.world_size)])
        return [Sign(*json.loads(text)) for text in found]

    def _run(self) -> None:
        while not self._end.wait(self.every):
            try:
                self.beat()
            except RuntimeError:
                continue  # what it means shows in the next collective
            waited = time.monotonic() - self._since
            if self.waits_for and waited > self.tell_after and not self._told:
                self._told = True
                # one rank tells, once for each collective that is waited for
                told = f"rank {self.rank}"
                if self.store.compare_set(f"told/{self.where()}", "", told).decode() == told:
                    self.say(f"rank {self.rank} has waited {waited:.0f} s in {self.waits_for}. {self.late()}")


def _listed(ranks: list[int], signs: list[Sign], what: str) -> str:
    named = "; ".join(f"rank {r} {what} {signs[r]}" for r in ranks[:NAMED])
    more = len(ranks) - NAMED
    return named + (f"; and {more} more" if more > 0 else "") + "."
