"""LQER: factors against numpy's SVD, weighted and not; the choice of matrices; what a damaged record may not be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from pgolf.artifact.pack import pack, unpack
from pgolf.errors import ArtifactError
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import LowRankConfig, QuantConfig
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import Record, dequantize


def info(name, shape, role=Role.MATRIX, seed=0, spread=1.0):
    gen = torch.Generator().manual_seed(seed)
    return ParamInfo(name, nn.Parameter(torch.randn(shape, generator=gen) * spread), role, None)


INFOS = [info("a", (48, 64), seed=1), info("b", (64, 48), seed=2, spread=3.0), info("c", (48, 64), seed=3, spread=2.0),
         info("t", (80, 32), Role.EMBED, seed=4), info("v", (9,), Role.VECTOR)]  # fmt: skip
STATE = {i.name: i.param.detach() for i in INFOS}


def records(diagonals=None, **settings):
    cfg = QuantConfig(keep_numel=16, matrix="int4", low_rank=LowRankConfig(**settings) if settings else None)
    return {r.name: r for r in quantize_state(STATE, INFOS, cfg, diagonals=diagonals)}


def residual(record, weight=1.0):
    back = dequantize([record])[record.name].numpy().astype(np.float64)
    return (STATE[record.name].numpy() - back) * weight


PLAIN = records()


@pytest.mark.parametrize("weighted", [False, True])
def test_fp16_factors_are_the_truncated_svd(weighted):
    h = np.linspace(0.1, 5, 64).astype(np.float32)
    fixed = records({"a": torch.from_numpy(h)} if weighted else None, rank=3, top_k=1, factors="fp16", scope="a")["a"]
    assert (
        fixed.kind == "int4+lowrank" and fixed.parts["left"].shape == (3, 48) and fixed.parts["right"].shape == (3, 64)
    )
    weight = np.sqrt(h / h.mean()) if weighted else np.ones(64)
    u, s, v = np.linalg.svd(residual(PLAIN["a"], weight), full_matrices=False)
    want = (u[:, :3] * s[:3]) @ v[:3] / weight
    got = dequantize([fixed])["a"].numpy() - dequantize([PLAIN["a"]])["a"].numpy()
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())
    # the best that rank 3 can do, by Eckart and Young
    assert np.linalg.norm(residual(fixed, weight)) == pytest.approx(np.sqrt((s[3:] ** 2).sum()), rel=1e-4)


def test_a_diagonal_helps_where_it_weighs():
    h = np.where(np.arange(64) < 8, 50.0, 0.01).astype(np.float32)
    settings = {"rank": 3, "top_k": 1, "factors": "fp16", "scope": "a"}
    plain, aware = records(**settings)["a"], records({"a": torch.from_numpy(h)}, **settings)["a"]
    norm = lambda record: np.linalg.norm(residual(record, np.sqrt(h)))
    assert norm(aware) < 0.9 * norm(plain)


@pytest.mark.parametrize("factors", ["asym", "int4", "int8", "fp16"])
def test_stored_factors_are_small_and_help(factors):
    fixed = records(rank=4, top_k=9, factors=factors, group=16)
    for name in ("a", "b", "c", "t"):
        assert fixed[name].kind == PLAIN[name].kind + "+lowrank"
        assert np.linalg.norm(residual(fixed[name])) < np.linalg.norm(residual(PLAIN[name]))
        for part in ("q", "scale"):
            np.testing.assert_array_equal(fixed[name].parts[part], PLAIN[name].parts[part])
    assert fixed["v"].kind == "fp16"
    left, right = fixed["a"].parts["left"], fixed["a"].parts["right"]
    low, high = {"asym": (-2, 1), "int4": (-7, 7), "int8": (-127, 127)}.get(factors, (-np.inf, np.inf))
    assert low <= left.min() and left.max() <= high
    if factors == "asym":
        assert right.min() >= -8 and right.max() <= 7 and fixed["a"].parts["right_scale"].shape == (4 * 64 // 16,)
        assert fixed["a"].parts["left_scale"].shape == (1,)


def test_asymmetric_packing_by_loops():
    one = records(rank=2, top_k=1, factors="asym", group=32, scope="b")["b"]
    fine = records(rank=2, top_k=1, factors="fp16", scope="b")["b"]
    a, b = (fine.parts[side].astype(np.float32) for side in ("left", "right"))
    scale = np.abs(a).max() / 1.5
    assert one.parts["left_scale"][0] == pytest.approx(scale, rel=2e-3)
    got = one.parts["left"].astype(np.float32)
    want = np.clip(np.rint(a / scale), -2, 1)
    assert (got != want).mean() < 0.02  # a few lie on the edge between two integers
    for i, run in enumerate(b.reshape(-1, 32)):
        assert one.parts["right_scale"][i] == pytest.approx(np.abs(run).max() / 7.5, rel=2e-3)


def test_the_largest_errors_or_gains_are_chosen():
    assert [n for n, r in records(rank=2, top_k=2).items() if "lowrank" in r.kind] == ["b", "c"]
    # an error of rank 1 that is not the largest is what factors take away whole
    state = dict(STATE, a=STATE["a"].clone())
    rough = PLAIN["a"]
    bumped = replace(rough, parts={**rough.parts, "q": rough.parts["q"].copy()})
    bumped.parts["q"][:, 0] = 0
    cfg = QuantConfig(keep_numel=16, matrix="int4")
    for select, name in (("error", "b"), ("gain", "a")):
        low = replace(cfg, low_rank=LowRankConfig(rank=1, top_k=1, select=select, factors="fp16"))
        got = quantize_state(state, INFOS, low, {"a": bumped.parts})
        assert [r.name for r in got if "lowrank" in r.kind] == [name]


def test_the_container_carries_it_bit_for_bit():
    before = list(records(rank=4, top_k=2, group=16).values())
    after, _ = unpack(pack(before, {}, "zlib", 6))
    assert after == before
    for name, w in dequantize(after).items():
        assert torch.equal(w, dequantize(before)[name])


def test_damaged_factors_are_refused_before_they_are_multiplied():
    good = records(rank=4, top_k=1, group=16, scope="a")["a"]
    dequantize([good])

    def bad(**parts):
        return Record("a", "matrix", good.kind, good.shape, {**good.parts, **parts})

    for record in (
        bad(left=good.parts["left"][:3]),
        bad(left=np.zeros((49, 48), np.int8), right=np.zeros((49, 64), np.int8)),
        bad(left=np.zeros((0, 48), np.int8), right=np.zeros((0, 64), np.int8)),
        bad(left=good.parts["left"].astype(np.float32)),
        bad(left=good.parts["left"].reshape(-1)),
        bad(right_scale=np.ones(7, np.float16)),
        bad(right_scale=np.ones(0, np.float16)),
        bad(extra=np.zeros(3, np.int8)),
        replace(good, kind="int4+lowrank+lowrank"),
        replace(good, kind="fp16+lowrank"),
        replace(good, kind="int4"),
        replace(PLAIN["a"], kind="int4+lowrank"),
    ):
        with pytest.raises(ArtifactError, match="a:"):
            dequantize([record])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"rank": 0}, "rank=0"),
        ({"top_k": 0}, "top_k=0"),
        ({"factors": "int3"}, "factors='int3'"),
        ({"select": "x"}, "select"),
    ],
)
def test_bad_settings(settings, text):
    (problem,) = LowRankConfig(**settings).problems()
    assert text in problem
