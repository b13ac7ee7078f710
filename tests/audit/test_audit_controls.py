"""Every negative control is flagged by each test that must flag it, valid scorers never; and an audit that lets one
through says so."""

import pytest

from pgolf.audit import suite
from pgolf.audit.controls import CONTROLS
from pgolf.audit.result import FAILED, PASSED, SKIPPED, Sizes, judged
from pgolf.audit.suite import CONTROL_VOCAB, TESTS, run_tests
from pgolf.audit.valid import VALID

SMALL = Sizes(positions=3, substitutions=CONTROL_VOCAB, tails=1, noise_tokens=2048, round_trip=64)


@pytest.mark.parametrize("name", CONTROLS)
def test_control_is_flagged(name):
    control = CONTROLS[name]
    found = run_tests(control.make(CONTROL_VOCAB), SMALL, control.must)
    assert {t: r.status for t, r in found.items()} == dict.fromkeys(control.must, FAILED), found
    assert all(r.detail and r.worst > r.threshold for r in found.values())


def test_every_test_has_a_control_that_must_fail_it():
    assert {test for control in CONTROLS.values() for test in control.must} == set(TESTS)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", VALID)
def test_valid_scorers_pass(name, seed):
    sizes = Sizes(seed, positions=3, substitutions=CONTROL_VOCAB, noise_tokens=2048, round_trip=64)
    found = run_tests(VALID[name](CONTROL_VOCAB), sizes)
    assert not [f"{t}: {r.detail}" for t, r in found.items() if r.status == FAILED or r.warning]
    skips = {t for t, r in found.items() if r.status == SKIPPED}
    assert skips == {"uniform": {"neutral", "warm_up"}, "unigram": {"neutral", "warm_up", "ranks"}}.get(name, set())


def only(monkeypatch, controls, valid):
    monkeypatch.setattr(suite, "CONTROLS", {name: CONTROLS[name] for name in controls})
    monkeypatch.setattr(suite, "VALID", {name: VALID[name] for name in valid})


def test_test_13_passes_and_can_fail(monkeypatch):
    only(monkeypatch, ["rank_local", "not_neutral"], ["uniform"])
    assert suite.negative_controls(SMALL).status == PASSED
    monkeypatch.setitem(TESTS, "ranks", lambda scorer, sizes: judged(0, 1, 0, "asleep"))
    found = suite.negative_controls(SMALL)
    assert found.status == FAILED and "rank_local passes ranks" in found.detail
    monkeypatch.setitem(TESTS, "ranks", lambda scorer, sizes: judged(1, 1, 0, "always"))
    found = suite.negative_controls(SMALL)
    assert found.status == FAILED and "uniform, which is valid, fails ranks" in found.detail
