"""Is it better, by enough, beyond chance: a one-sided Welch test, in nats and in bits per byte.

The tail of Student's t is computed here and not by scipy, which is 170 MB for one number: two routes to the same p
could differ by what is installed. A test holds it to closed forms and to numerical integration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev

NATS = 0.005  # by which a record must beat the one before
P = 0.01


@dataclass(frozen=True)
class Test:
    """of: the margin. p: probability of a difference as large if there were none beyond the margin; t and df behind it.

    margin_bpb: the margin in bits per byte.
    """

    of: str
    margin_bpb: float
    t: float
    df: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """New runs against a baseline. Gains are baseline less new: positive is better.

    baseline_std is None where only its mean is known; then the test has one sample, and the baseline counts as exact.
    """

    baseline: str
    n: int
    mean_bpb: float
    std_bpb: float
    baseline_n: int
    baseline_bpb: float
    baseline_std: float | None
    gain_bpb: float
    gain_nats_per_token: float
    gain_nats_per_byte: float
    tests: tuple[Test, ...]

    @property
    def significant(self) -> bool:
        """Whether the challenge's bar is passed: better by 0.005 nats per token with p < 0.01."""
        return self.tests[1].p < P

    def to_dict(self) -> dict:
        """JSON values; an infinite t, where all seeds agree to the last bit, is None."""
        tests = [{**asdict(test), "t": test.t if math.isfinite(test.t) else None} for test in self.tests]
        return {**asdict(self), "tests": tests, "significant": self.significant}


def compare(new: Sequence[float], baseline: Sequence[float], name: str, nats_per_token_of_bpb: float) -> Comparison:
    """new, baseline: bits per byte, one a seed; at least two of the new. nats_per_token_of_bpb: nats per token that are
    one bit per byte with the new runs' tokenizer (bytes per token times ln 2).

    Raises ValueError when there are too few values.
    """
    if len(new) < 2 or not baseline:
        raise ValueError(f"a test needs two seeds and a baseline, got {len(new)} and {len(baseline)}")
    margins = {
        "any difference": 0.0,
        f"{NATS:g} nats per token": NATS / nats_per_token_of_bpb,
        f"{NATS:g} nats per byte": NATS / math.log(2),
    }
    gain = fmean(baseline) - fmean(new)
    return Comparison(
        name, len(new), fmean(new), stdev(new), len(baseline), fmean(baseline),
        stdev(baseline) if len(baseline) > 1 else None,
        gain, gain * nats_per_token_of_bpb, gain * math.log(2),
        tuple(Test(of, margin, *welch(new, baseline, margin)) for of, margin in margins.items()),
    )  # fmt: skip


def welch(new: Sequence[float], baseline: Sequence[float], margin: float = 0.0) -> tuple[float, float, float]:
    """(t, degrees of freedom, one-sided p) of "the baseline's mean is above the new one by more than `margin`".

    A baseline of one value is taken as exact. Not paired: runs of one seed diverge by chance, like any others.
    """
    parts = [(stdev(x) ** 2 / len(x), len(x) - 1) for x in (new, baseline) if len(x) > 1]
    variance = sum(v for v, _ in parts)
    excess = fmean(baseline) - fmean(new) - margin
    if variance == 0:  # seeds that agree to the last bit: t is infinite, or 0/0, which shows nothing
        return (math.inf, 1.0, 0.0) if excess > 0 else (-math.inf, 1.0, 1.0)
    df = variance**2 / sum(v**2 / n for v, n in parts)
    t = excess / math.sqrt(variance)
    return t, df, t_tail(t, df)


def t_tail(t: float, df: float) -> float:
    """P(T > t) for Student's t with `df` degrees of freedom, to about 1e-13 of its value."""
    square = t * t
    if square < df:  # near the middle the complement keeps the digits
        half = 0.5 - 0.5 * incomplete_beta(square / (df + square), 0.5, df / 2)
    else:
        half = 0.5 * incomplete_beta(df / (df + square), df / 2, 0.5)
    return half if t >= 0 else 1 - half


def incomplete_beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction (Lentz's method)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the complement converges faster
        return 1 - incomplete_beta(1 - x, b, a)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / a * _fraction(x, a, b)


def _fraction(x: float, a: float, b: float) -> float:
    value, c, d = 2.0, 2.0, 1.0
    for i in range(1, 500):
        m, even = i // 2, i % 2 == 0
        top = m * (b - m) * x if even else -(a + m) * (a + b + m) * x
        term = top / ((a + i - 1) * (a + i))
        c, d = 1 + term / c, 1 / (1 + term * d)
        value *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return value - 1
