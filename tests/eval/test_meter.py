"""Meter against numpy in float64."""

import math

import numpy as np
import pytest
import torch

from pgolf.errors import DataError, NumericalError
from pgolf.eval.meter import Meter


def test_equals_numpy_in_float64():
    rng = np.random.default_rng(0)
    meter, nats, nbytes, count = Meter(), 0.0, 0, 0
    for shape in [(3, 7), (1,), (2, 5, 4), (0,)]:
        nll = rng.gamma(2.0, 1.0, shape).astype(np.float32)
        size = rng.integers(0, 9, shape)
        meter.add(torch.from_numpy(nll), torch.from_numpy(size))
        nats, nbytes, count = nats + nll.astype(np.float64).sum(), nbytes + size.sum(), count + nll.size
    assert (meter.targets, meter.bytes) == (count, nbytes)
    assert meter.val_loss == pytest.approx(nats / count, rel=1e-14)
    assert meter.bpb == pytest.approx(nats / nbytes / math.log(2), rel=1e-14)


def test_sums_in_float64_where_float32_would_lose_the_small_ones():
    meter = Meter()
    meter.add(torch.tensor([2.0**24]), torch.tensor([1]))
    for _ in range(100):
        meter.add(torch.tensor([1.0]), torch.tensor([1]))
    assert meter.nats == 2**24 + 100


def test_zero_bytes_and_nothing_scored_are_errors_and_not_nan():
    meter = Meter()
    with pytest.raises(DataError, match="nothing was scored"):
        _ = meter.val_loss
    meter.add(torch.ones(3), torch.zeros(3, dtype=torch.int64))
    assert meter.val_loss == 1.0  # nats of targets without bytes count
    with pytest.raises(DataError, match="3 scored targets stand for 0 bytes"):
        _ = meter.bpb


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_losses_are_named(bad):
    meter = Meter()
    meter.add(torch.tensor([1.0, bad]), torch.tensor([1, 1]))
    with pytest.raises(NumericalError, match="2 losses"):
        _ = meter.bpb


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="same shape"):
        Meter().add(torch.ones(3), torch.ones(2, dtype=torch.int64))
