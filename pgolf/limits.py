"""The two time limits: what training and evaluation may take, checked by rank 0's clock.

Training stops by itself at its cap (`Clock.expired`); what is checked afterwards is that nothing went wrong there, and
that calibration fitted into the reserve. An evaluation says after 2 % how long it will take, and is stopped before
its limit: a score that took too long does not count, and an hour of sliding windows is no way to learn that.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pgolf import signals
from pgolf.clock import Clock, TimeLedger
from pgolf.dist import Dist
from pgolf.errors import BudgetError
from pgolf.signals import Stop

WORTH_TELLING = 10.0  # seconds that an evaluation takes at least for its predicted time to be told
MARKS = 50  # looks at the time per evaluation; each waits for the GPU
# The step that runs when the cap comes is finished, as in the challenge's own script, and a GPU's queue holds two more.
STEPS_UNDER_WAY = 3


def spent(ledger: TimeLedger, budget: str) -> float:
    """Seconds booked so far in phases that count for `budget`, "training" or "evaluation"."""
    return sum(row["seconds"] for row in ledger.to_dict().values() if row["counted"] == budget)


def over_training(seconds: float, limit: float, step_seconds: float) -> str:
    """What is wrong with `seconds` of training and calibration; empty if nothing. limit: 0 = none.

    step_seconds: of the last step, which may run over.
    """
    if not limit or seconds <= limit + STEPS_UNDER_WAY * step_seconds:
        return ""
    return (
        f"training and calibration took {seconds:.1f} s, the limit is {limit:g} s (train.max_wallclock_seconds).\n"
        f"Keep more for calibration: train.reserve_ms={1000 * (seconds - limit):.0f} or more on top of what it was."
    )


def over_evaluation(seconds: float, limit: float) -> str:
    """The same for an evaluation."""
    if not limit or seconds <= limit:
        return ""
    return (
        f"evaluation took {seconds:.1f} s, the limit is {limit:g} s (eval.max_seconds).\n"
        "Use a larger eval.stride, or eval.max_seconds=0 for no limit."
    )


class OutOfTime(BudgetError):
    """An evaluation that would have gone over its limit; it was stopped before, without a score."""


class Watch:
    """What `evaluate` calls after every round of batches, on every rank: a safe point for signals, and the time limit.

    limit: seconds, 0 = none. reserve: seconds before it at which the evaluation is stopped. already: seconds that count
    and are over. now: seconds, monotonic; only rank 0's is read.
    """

    def __init__(
        self,
        dist: Dist,
        stop: Stop,
        label: str,
        *,
        limit: float = 0.0,
        reserve: float = 0.0,
        already: float = 0.0,
        say: Callable[[str], None] = print,
        now: Callable[[], float] = time.monotonic,
    ):
        self.dist, self.stop, self.label, self.say = dist, stop, label, say
        self.limit, self.reserve = limit, reserve
        self.clock = Clock(dist, now=now)
        self.clock.start(1000 * already)
        self.already, self.first_s, self.mark_s = already, 0.0, already
        self.next_mark, self.predicted = 1, False

    def __call__(self, done: int, rounds: int) -> None:
        """done of `rounds` are over, the same on all ranks. Raises Stopped and OutOfTime, on all ranks alike."""
        mark = done >= self.next_mark
        if mark:
            self.dist.synchronize()
        now = self.clock.tick(self.stop.code) / 1000
        signals.check(self.clock.stop_code, f"during {self.label}, at {done} of {rounds} batches")
        if mark:
            self._look(now, done, rounds)
            self.next_mark = done + max(rounds // MARKS, 1)

    def _look(self, now: float, done: int, rounds: int) -> None:
        if done == 1:
            self.first_s = now  # it compiles, and says little about the others
        elif not self.predicted:
            self.predicted = True
            total = self.first_s + (now - self.first_s) * (rounds - 1) / (done - 1)
            if self.limit and total > self.limit - self.reserve:
                self.say(
                    f"warning: {self.label} will take until {total:.0f} s of evaluation, the limit is {self.limit:g} s"
                    " (eval.max_seconds) and it will be stopped before; a larger eval.stride takes less,"
                    " eval.sliding_max_tokens scores a part, eval.max_seconds=0 lifts the limit"
                )
            elif total - self.already >= WORTH_TELLING:
                self.say(
                    f"{self.label} will take about {total - self.already:.0f} s ({done} of {rounds} batches are done)"
                )
        last, self.mark_s = now - self.mark_s if done > 1 else 0.0, now
        if self.limit and done < rounds and now + last > self.limit - self.reserve:
            raise OutOfTime(
                f"{self.label} was stopped after {now:.1f} s of evaluation with {done} of {rounds} batches scored: the"
                f" limit is {self.limit:g} s (eval.max_seconds), of which {self.reserve:g} s are kept in reserve.\n"
                "Use a larger eval.stride, score a part with eval.sliding_max_tokens, or set eval.max_seconds=0."
            )
