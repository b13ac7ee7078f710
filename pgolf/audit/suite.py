"""All tests on one scorer, the negative controls, and the report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from pgolf import node
from pgolf.artifact.bundle import bundle
from pgolf.audit import bookkeeping, causality, coding, isolation, normalisation, streams
from pgolf.audit.controls import CONTROLS
from pgolf.audit.interface import Scorer, check, offers
from pgolf.audit.result import FAILED, SKIPPED, Result, Sizes, judged
from pgolf.audit.valid import VALID
from pgolf.errors import ConfigError, PgolfError

Test = Callable[[Scorer, Sizes], Result]
CONTROL_VOCAB = 64


def run_tests(scorer: Any, sizes: Sizes, names: tuple[str, ...] = ()) -> dict[str, Result]:
    """Results by name of all tests, or of the named ones. A scorer that raises fails the test that it raises in.

    Raises ConfigError when the object is no scorer.
    """
    check(scorer)
    out = {}
    for name in names or TESTS:
        try:
            out[name] = TESTS[name](scorer, sizes)
        except ConfigError:  # a shape that is wrong in every test
            raise
        except Exception as err:  # anybody's code: whatever it raises is its result
            text = str(err) if isinstance(err, PgolfError) else f"{type(err).__name__}: {err}"
            out[name] = Result(FAILED, None, 0, None, f"it raises {text[:300]}")
    return out


def negative_controls(sizes: Sizes) -> Result:
    """13: every control is flagged by every test that must flag it, and small valid scorers by none: here, now."""
    small = Sizes(sizes.seed, positions=3, substitutions=CONTROL_VOCAB, tails=1, noise_tokens=2048, round_trip=64)
    missed = []
    for name, control in CONTROLS.items():
        found = run_tests(control.make(CONTROL_VOCAB), small, control.must)
        missed += [f"{name} passes {test}" for test, result in found.items() if result.status != FAILED]
    for name, make in VALID.items():
        found = run_tests(make(CONTROL_VOCAB), small)
        missed += [f"{name}, which is valid, fails {t}" for t, result in found.items() if result.status == FAILED]
    checked = sum(len(control.must) for control in CONTROLS.values()) + len(VALID) * len(TESTS)
    return judged(len(missed), checked, 0, "; ".join(missed) or f"{len(CONTROLS)} controls flagged, no false alarm")


def audit(scorer: Any, sizes: Sizes | None = None, controls: bool = True) -> dict[str, Any]:
    """The report of one scorer as JSON values; `passed` is whether no test failed. controls: whether test 13 is made.

    Raises ConfigError when the object is no scorer.
    """
    sizes = sizes or Sizes()
    results = run_tests(scorer, sizes)
    if controls:
        results["controls"] = negative_controls(sizes)
    return report(scorer, sizes, results)


def report(scorer: Any, sizes: Sizes, results: Mapping[str, Result]) -> dict[str, Any]:
    """What `pgolf submit --audit` takes: PG121 wants `passed` and the `code_sha256` of the script that ships."""
    digest = None
    if offers(scorer, "ledger"):
        digest = scorer.ledger(streams.text(scorer.vocab_size, sizes.length, sizes)).digest()
    commit = node.git()
    return {
        "scorer": scorer.name,
        "vocab_size": scorer.vocab_size,
        "config_digest": getattr(scorer, "config_digest", None),
        "code_sha256": hashlib.sha256(bundle()).hexdigest(),
        "git": commit,
        "seed": sizes.seed,
        "text": "given" if sizes.text is not None else "synthetic",
        "tests": {name: result.to_dict() for name, result in results.items()},
        "skipped": [name for name, result in results.items() if result.status == SKIPPED],
        "ledger_digest": digest,
        "passed": all(result.status != FAILED for result in results.values()),
    }


TESTS: dict[str, Test] = {
    "substitution": normalisation.substitution_sum,
    "vector": normalisation.materialised_vector,
    "future": causality.future_perturbation,
    "class_flip": causality.class_flip,
    "noise": normalisation.noise,
    "ledger": bookkeeping.ledger,
    "neutral": bookkeeping.neutral_settings,
    "prefix": causality.prefix_equivalence,
    "ranks": bookkeeping.rank_invariance,
    "round_trip": coding.round_trip,
    "warm_up": bookkeeping.warm_up_isolation,
    "isolation": isolation.isolation,
}
