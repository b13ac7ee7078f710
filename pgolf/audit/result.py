"""What one test of the audit says, and how large the tests are."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"


@dataclass(frozen=True)
class Result:
    """worst: the largest deviation found, in the unit of threshold; None where a test is skipped. samples: how many
    comparisons. detail: where the worst one is, or why a test was skipped. values: measured numbers by name."""

    status: str
    worst: float | None
    samples: int
    threshold: float | None
    detail: str
    warning: str = ""
    values: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with the names of the report."""
        out = asdict(self)
        return {"status": out.pop("status"), "worst_deviation": out.pop("worst"), **out}


def skipped(why: str) -> Result:
    """A test that cannot be made of this scorer."""
    return Result(SKIPPED, None, 0, None, why)


def judged(worst: float, samples: int, threshold: float, detail: str, warning: str = "", **values: float) -> Result:
    """Passed when worst <= threshold; a NaN fails."""
    status = PASSED if worst <= threshold else FAILED
    return Result(status, float(worst), samples, threshold, detail, warning, values)


class Worst:
    """The largest of several deviations, and what it is of. NaN counts as infinite."""

    def __init__(self, nothing: str):
        """nothing: the detail while no deviation is above 0."""
        self.value, self.detail, self.samples = 0.0, nothing, 0

    def see(self, deviation: float, what: str) -> None:
        """One more comparison."""
        deviation = math.inf if math.isnan(deviation) else deviation
        self.samples += 1
        if deviation > self.value:
            self.value, self.detail = deviation, what

    def judged(self, threshold: float, warning: str = "", **values: float) -> Result:
        """As `judged`."""
        return judged(self.value, self.samples, threshold, self.detail, warning, **values)


@dataclass(frozen=True)
class Sizes:
    """How large the tests are, and from which seed their streams come. Thresholds are those of docs/audit.md."""

    seed: int = 0
    length: int = 192  # tokens of the short stream that tests 1 to 4 and 6 to 12 score
    positions: int = 4  # targets of it that are looked at
    substitutions: int = 1024  # runs that test 1 may take; at least one position is done whatever it costs
    tails: int = 2  # random futures a position
    noise_tokens: int = 8192  # of test 5
    noise_vocab: int = 0  # ids that noise is drawn from; 0 = all
    ranks: tuple[int, ...] = (1, 2, 8)
    round_trip: int = 160  # tokens that are encoded and decoded
    text: Tensor | None = None  # (N,) int64: real text instead of the synthetic one; cut to what a test needs

    @classmethod
    def full(cls, seed: int = 0, text: Tensor | None = None) -> Sizes:
        """Minutes instead of seconds for a cheap scorer: the spec's 10^5 tokens of noise, 400 coded tokens."""
        return cls(
            seed, length=512, positions=12, substitutions=16384, tails=4, noise_tokens=131072, round_trip=400, text=text
        )
