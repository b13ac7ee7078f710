"""Bad steps are noticed once and for good; diverging losses are told once an excursion."""

import torch

from pgolf.optim.health import LAG, Divergence, Health


def test_first_bad_step_sticks():
    health = Health(torch.device("cpu"))
    for step, value in enumerate([1.0, 2.0, float("nan"), 3.0, float("inf")]):
        health.update_(step, torch.tensor(value))
        assert health.ok.item() == (step < 2) and health.bad.item() == (step >= 2)
    health.post()
    assert health.read() == 2
    health.reset_()
    health.post()
    assert health.read() is None and health.ok == 1 and health.bad == 0


def test_what_was_queued_last_may_be_missing():
    """A GPU is LAG steps ahead: the host then knows of step 3 when step 3 + LAG is queued."""
    health, seen = Health(torch.device("cpu")), []
    for step in range(8):
        health.update_(step, torch.tensor(float("nan") if step == 3 else 1.0))
        health.post()
        seen.append(health.read(late=LAG))
    assert seen == [None] * (3 + LAG) + [3] * (8 - 3 - LAG)


def test_divergence_is_told_once_an_excursion():
    divergence = Divergence(window=16)
    assert not any(divergence.note(4.0 + 0.01 * (i % 5)) for i in range(20))
    assert "standard deviations above the mean" in divergence.note(9.0)
    assert divergence.note(20.0) is None  # the same excursion
    assert not any(divergence.note(4.0) for _ in range(16))
    assert divergence.note(9.0)


def test_noise_of_a_settled_run_is_none():
    """Late losses lie so close that a small rise is many standard deviations."""
    divergence = Divergence()
    assert not any(divergence.note(1.2 + 1e-6 * (i % 3)) for i in range(32))
    assert divergence.note(1.25) is None
    assert divergence.note(1.0) is None
