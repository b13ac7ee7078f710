"""Settings of n-gram scoring. No torch here (see pgolf/model/config.py).

An order is the length of a context, without the target: order 8 is what tables of "n-grams, n = 2 to 9" call n = 9.
A tuple with one value an order may be shorter than the orders: its last value then holds for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

# What `scorer` may be; pgolf/ngram/scorers.py has the classes. Only scorers that give a probability distribution.
EXPERT_NAMES = (
    "neural", "dirichlet", "pitman_yor", "kneser_ney", "witten_bell", "hashed_rows", "entropy_gate", "tilt",
    "calibrated_tilt",
)  # fmt: skip
SCORER_NAMES = (*EXPERT_NAMES, "ppm_c", "geometric", "hedge", "mixer")
UNSAFE = "legacy_hashed_unsafe"
MAX_ORDER = 16
Value = TypeVar("Value")


@dataclass(frozen=True)
class NgramConfig:
    """n-gram information from targets that are scored already, mixed into what the model says."""

    scorer: str = "hedge"  # how counts and the model become one distribution (docs/ngram.md lists them)
    orders: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)  # context lengths in tokens, without the target; ascending
    within_documents: bool = True  # contexts end where their document begins
    chunk: int = 0  # targets after which counts take them in, all together; 0 = each right after its score
    # dirichlet, hashed_rows, geometric: counts that the lower order's vector is worth; an order each
    concentration: tuple[float, ...] = (50.0, 20.0, 8.0, 4.0, 2.0, 1.0)
    discount: tuple[float, ...] = (0.8,)  # pitman_yor, kneser_ney: taken off each count, in [0, 1); an order each
    strength: tuple[float, ...] = (0.5,)  # pitman_yor, kneser_ney: above -discount; an order each
    row_bits: int = 22  # hashed_rows: log2 of the rows of an order
    power: float = 0.5  # geometric: p0^(1 - power) P^power / Z; 0 = the model alone, 1 = dirichlet
    min_count: int = 2  # entropy_gate, mixer: context count from which an order is used
    alpha_min: float = 0.05  # entropy_gate: weight of the n-gram where the model is sure
    alpha_max: float = 0.60  # entropy_gate: weight where it is not
    gate_entropy: float = 3.0  # entropy_gate: nats at which the weight is halfway, for order 1; 0.25 less an order
    gate_slope: float = 2.0  # entropy_gate: per nat
    multipliers: tuple[float, ...] = (0.3, 0.3, 0.97, 2.0)  # entropy_gate: factors on the weight, an order each
    hint_orders: tuple[int, ...] = (8, 10, 12, 14, 16)  # tilt, calibrated_tilt: contexts that may name a hint
    hint_share: tuple[float, ...] = (0.7, 0.7, 0.6, 0.5)  # least share of the leader; a hint order each
    hint_count: tuple[int, ...] = (3, 3, 2)  # least count of the leader; a hint order each
    hints: int = 1  # tilt: most hints at a target, of the longest contexts that have one
    boost: float = 2.0  # tilt: added to the hint's logit
    boost_by_share: bool = True  # tilt: times the leader's share
    boost_slope: float = 0.0  # tilt: times (1 - p(hint)) to this power
    prior_hits: float = 1.0  # calibrated_tilt: hits that each bin starts with
    prior_misses: float = 1.0  # calibrated_tilt: misses that each bin starts with
    experts: str = "neural,kneser_ney,calibrated_tilt"  # hedge: scorers that it weighs, comma-separated
    share: float = 1e-5  # hedge: part of the weight dealt out evenly after each target; 0 = plain Bayes
    entropy_bins: int = 6  # hedge: weights by longest known context and the model's entropy, bins of 1 nat; 0 = one set
    mixer_hidden: int = 0  # mixer: width of its hidden layer; 0 = none
    mixer_floor: float = 0.05  # mixer: least weight of the model

    def problems(self) -> list[str]:
        out = _order_problems("orders", self.orders) + _order_problems("hint_orders", self.hint_orders)
        out += self._name_problems() + self._range_problems()
        for name in ("concentration", "discount", "strength", "multipliers", "hint_share", "hint_count"):
            if not getattr(self, name):
                out.append(f"{name} is empty: it needs a value, or one for each order")
        if not out:
            pairs = zip(spread(self.discount, self.orders), spread(self.strength, self.orders), strict=True)
            if any(not 0 <= d < 1 for d in self.discount):
                out.append(f"discount={_text(self.discount)} must be in [0, 1): a count of 1 must stay positive")
            elif any(strength <= -discount for discount, strength in pairs):
                out.append(f"strength={_text(self.strength)} must be above -discount, order by order")
        return out

    def _name_problems(self) -> list[str]:
        out = []
        if self.scorer == UNSAFE:
            out.append(f"scorer={UNSAFE!r} gives no probabilities and is for audits only: no run may score with it")
        elif self.scorer not in SCORER_NAMES:
            out.append(f"scorer={self.scorer!r} must be one of {', '.join(SCORER_NAMES)}")
        names = self.expert_names
        wrong = [name for name in names if name not in EXPERT_NAMES]
        if wrong or not names or len(set(names)) < len(names):
            out.append(f"experts={self.experts!r} must be different ones of {', '.join(EXPERT_NAMES)}")
        return out

    def _range_problems(self) -> list[str]:
        low = dict.fromkeys(("chunk", "gate_slope", "boost", "boost_slope", "entropy_bins", "mixer_hidden"), 0)
        low |= {"min_count": 1, "hints": 1, "row_bits": 1}
        high = {"row_bits": 31, "power": 1, "alpha_max": 1, "share": 0.5, "mixer_floor": 1, "hints": 8, "boost": 50}
        low |= dict.fromkeys(("power", "alpha_min", "share", "mixer_floor"), 0)
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        out += [f"{n}={getattr(self, n)} must be at most {v}" for n, v in high.items() if getattr(self, n) > v]
        if 0 < self.share < 1e-9:
            out.append(f"share={self.share} must be 0 or at least 1e-9")
        if self.alpha_min > self.alpha_max:
            out.append(f"alpha_min={self.alpha_min} must be at most alpha_max={self.alpha_max}")
        if any(x <= 0 for x in self.concentration):
            out.append(f"concentration={_text(self.concentration)} must be positive")
        if any(x < 0 for x in self.multipliers):
            out.append(f"multipliers={_text(self.multipliers)} must not be negative")
        if any(not 0 <= x <= 1 for x in self.hint_share) or any(x < 1 for x in self.hint_count):
            shares, counts = _text(self.hint_share), _text(self.hint_count)
            out.append(f"hint_share={shares} must be in [0, 1] and hint_count={counts} at least 1")
        out += [
            f"{n}={getattr(self, n)} must be positive" for n in ("prior_hits", "prior_misses") if getattr(self, n) <= 0
        ]
        return out

    @property
    def expert_names(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.experts.split(",") if name.strip())


def spread(values: tuple[Value, ...], orders: tuple[int, ...]) -> tuple[Value, ...]:
    """One value an order: the last one holds for orders beyond the given ones."""
    return (values + values[-1:] * len(orders))[: len(orders)]


def _order_problems(name: str, orders: tuple[int, ...]) -> list[str]:
    if orders and list(orders) == sorted(set(orders)) and orders[0] >= 1 and orders[-1] <= MAX_ORDER:
        return []
    return [f"{name}={_text(orders)} must be ascending context lengths within 1 to {MAX_ORDER}"]


def _text(values: tuple) -> str:
    return ",".join(map(str, values))
