"""The exported weights equal the documented source, recomputed from the recorded history in fp64."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pgolf.errors import ConfigError
from pgolf.optim.average import Averager
from pgolf.optim.config import AverageConfig, EmaConfig, SwaConfig

STEPS, EVERY = 30, 4
SCALES = [max(0.0, 1 - k / 25) for k in range(1, STEPS + 1)]  # below 0.5 from step 13 on


def walk(cfg: AverageConfig, steps: int = STEPS):
    """Random weights for `steps` steps: (averager, weights after 0, 1, ... steps in fp64, params)."""
    gen = torch.Generator().manual_seed(0)
    params = {
        "w": nn.Parameter(torch.randn(3, 4, generator=gen)),
        "table": nn.Parameter(torch.randn(5, 2, generator=gen).bfloat16()),
    }
    averager = Averager(params, cfg)
    history = [{n: p.detach().double().numpy().copy() for n, p in params.items()}]
    for k in range(1, steps + 1):
        for p in params.values():
            p.data = torch.randn(p.shape, generator=gen).to(p.dtype)
        averager.update(k, SCALES[k - 1])
        history.append({n: p.detach().double().numpy().copy() for n, p in params.items()})
    return averager, history, params


def ema_path(history, decay):
    path = [history[0]]
    for w in history[1:]:
        path.append({n: decay * path[-1][n] + (1 - decay) * w[n] for n in w})
    return path


def mean_of_snapshots(path):
    taken = [k for k in range(1, STEPS + 1) if SCALES[k - 1] < 0.5 and k % EVERY == 0]
    assert taken == [16, 20, 24, 28]
    return {n: np.mean([path[k][n] for k in taken], axis=0) for n in path[0]}


def check(averager: Averager, source: str, expected: dict) -> None:
    got_source, got = averager.averaged()
    assert got_source == source and list(got) == ["w", "table"]
    assert got["w"].dtype == torch.float32 and got["table"].dtype == torch.bfloat16
    np.testing.assert_allclose(got["w"], expected["w"], atol=2e-6)
    np.testing.assert_allclose(got["table"].float(), expected["table"], rtol=2**-8, atol=1e-6)


EMA = EmaConfig(decay=0.9)


def test_raw_when_nothing_is_on():
    averager, history, _ = walk(AverageConfig())
    check(averager, "raw", history[-1])


def test_ema():
    averager, history, _ = walk(AverageConfig(ema=EMA))
    check(averager, "ema", ema_path(history, 0.9)[-1])
    assert all(e.dtype == torch.float32 for e in averager.ema)


def test_swa_of_ema_comes_before_ema():
    averager, history, _ = walk(AverageConfig(ema=EMA, swa=SwaConfig(every=EVERY, threshold=0.5, source="ema")))
    check(averager, "swa(ema)", mean_of_snapshots(ema_path(history, 0.9)))


@pytest.mark.parametrize("ema", [None, EMA])
def test_swa_of_raw(ema):
    averager, history, _ = walk(AverageConfig(ema=ema, swa=SwaConfig(every=EVERY, threshold=0.5, source="raw")))
    check(averager, "swa(raw)", mean_of_snapshots(history))


def test_one_snapshot_is_not_an_average():
    swa = SwaConfig(every=EVERY, threshold=0.5, source="raw")
    averager, history, _ = walk(AverageConfig(ema=EMA, swa=swa), steps=19)  # one snapshot, at 16
    assert averager.swa_count == 1
    check(averager, "ema", ema_path(history, 0.9)[-1])
    averager, history, _ = walk(AverageConfig(swa=swa), steps=19)
    check(averager, "raw", history[-1])


def test_result_shares_no_memory():
    for cfg in (AverageConfig(), AverageConfig(ema=EMA)):
        averager, _, params = walk(cfg)
        kept = copy.deepcopy(averager.averaged()[1])
        live = {n: p.detach().clone() for n, p in params.items()}
        for tensor in averager.averaged()[1].values():
            tensor.zero_()
        assert all(torch.equal(averager.averaged()[1][n], kept[n]) for n in kept)
        assert all(torch.equal(params[n], live[n]) for n in live)


def test_resume_equals_straight():
    cfg = AverageConfig(ema=EMA, swa=SwaConfig(every=EVERY, threshold=0.5))
    straight, history, _ = walk(cfg)
    first, _, params = walk(cfg, steps=22)
    saved = copy.deepcopy(first.state_dict())
    second = Averager(params, cfg)
    second.load_state_dict(saved)
    for k in range(23, STEPS + 1):
        for n, p in params.items():
            p.data = torch.from_numpy(history[k][n]).to(p.dtype)
        second.update(k, SCALES[k - 1])
    (source, a), (_, b) = straight.averaged(), second.averaged()
    assert source == "swa(ema)" and all(torch.equal(a[n], b[n]) for n in a)


def test_refuses_a_foreign_state():
    with_ema, _, params = walk(AverageConfig(ema=EMA), steps=1)
    with pytest.raises(ConfigError, match="ema of the saved run is on with 2 tensors, here off"):
        Averager(params, AverageConfig()).load_state_dict(with_ema.state_dict())
    with pytest.raises(ConfigError, match="resume with"):
        Averager({"w": params["w"]}, AverageConfig(ema=EMA)).load_state_dict(with_ema.state_dict())
