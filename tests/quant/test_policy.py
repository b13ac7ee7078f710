"""Kinds by role and size; the int8 grid against numpy; what does not fit is refused."""

import numpy as np
import pytest
import torch
from torch import nn

from pgolf.errors import ArtifactError, NumericalError
from pgolf.kernels.int6 import int6
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import QuantConfig
from pgolf.quant.policy import quantize_state, storage_of
from pgolf.quant.records import Record, dequantize


def info(name, shape, role, seed=0, spread=1.0):
    gen = torch.Generator().manual_seed(seed)
    return ParamInfo(name, nn.Parameter(torch.randn(shape, generator=gen) * spread), role, None)


def records_of(infos, cfg):
    return quantize_state({i.name: i.param.detach() for i in infos}, infos, cfg)


CFG = QuantConfig(keep_numel=64)


@pytest.mark.parametrize(
    ("role", "kind"),
    [
        (Role.MATRIX, "int6"),
        (Role.SIDE_MATRIX, "int6"),
        (Role.EMBED, "int8"),
        (Role.HEAD, "int8"),
        (Role.VECTOR, "fp16"),
        (Role.RESID_LAMBDA, "fp16"),
        (Role.FROZEN, "fp16"),
        (Role.ADAPT_ONLY, "fp16"),
    ],
)
def test_kind_by_role_and_by_element_count(role, kind):
    assert kind_of(role, 65, CFG) == kind
    assert kind_of(role, 64, CFG) == "fp16"


def kind_of(role, numel, cfg):
    return storage_of([info("w", (numel,), role)], cfg)["w"].kind


def test_every_role_has_a_kind_and_settings_name_it():
    cfg = QuantConfig(matrix="float", embed="int6", keep_numel=0)
    kinds = {role: kind_of(role, 1, cfg) for role in Role}
    assert kinds[Role.MATRIX] == "float" and kinds[Role.HEAD] == "int6" and kinds[Role.VECTOR] == "fp16"


def test_int6_is_the_fake_quantised_weight():
    for floor in (0.0, 1.0):
        cfg = QuantConfig(keep_numel=0, scale_floor=floor)
        i = info("w", (40, 24), Role.MATRIX, spread=0.05)
        back = dequantize(records_of([i], cfg))["w"]
        assert torch.equal(back, int6(i.param.detach(), scale_floor=floor))


@pytest.mark.parametrize(("clip", "floor"), [(0.9999984, 0.0), (0.95, 0.0), (0.95, 1.0), (1.0, 0.0)])
def test_int8_equals_numpy(clip, floor):
    cfg = QuantConfig(keep_numel=0, embed_clip=str(clip), scale_floor=floor)
    i = info("t", (30, 101), Role.EMBED, spread=0.3)
    record = records_of([i], cfg)[0]
    w = i.param.detach().numpy()
    c = np.quantile(np.abs(w).astype(np.float64), clip, axis=1)
    step = np.maximum(c / 127, floor / 127).astype(np.float16)
    # the quantile in fp64: its fp16 step may fall on the neighbour, nothing else may differ
    assert np.abs(record.parts["scale"].view(np.int16) - step.view(np.int16)).max() <= 1
    step = record.parts["scale"].astype(np.float32)[:, None]
    np.testing.assert_array_equal(record.parts["q"], np.clip(np.rint(w / step), -127, 127))
    np.testing.assert_array_equal(dequantize([record])["t"].numpy(), record.parts["q"] * step)


def test_int8_rows_are_clipped_in_chunks_alike(monkeypatch):
    i = info("t", (9, 50), Role.EMBED)
    cfg = QuantConfig(keep_numel=0, embed_clip="0.9")
    whole = records_of([i], cfg)
    monkeypatch.setattr("pgolf.kernels.int6.QUANTILE_LIMIT", 120)
    assert records_of([i], cfg) == whole


def test_fp16_float_and_scalars():
    infos = [info("s", (), Role.VECTOR), info("v", (70,), Role.VECTOR), info("m", (9, 9), Role.MATRIX)]
    cfg = QuantConfig(matrix="float", keep_numel=64)
    back = dequantize(records_of(infos, cfg))
    assert torch.equal(back["s"], infos[0].param.detach().half().float()) and back["s"].shape == ()
    assert torch.equal(back["v"], infos[1].param.detach().half().float())
    assert torch.equal(back["m"], infos[2].param.detach())
    assert dequantize(records_of(infos, cfg), torch.bfloat16)["m"].dtype == torch.bfloat16


def test_three_axes_have_one_step_per_first_index():
    i = info("bank", (4, 6, 5), Role.MATRIX)
    record = records_of([i], QuantConfig(keep_numel=0))[0]
    assert record.parts["q"].shape == (4, 6, 5) and record.parts["scale"].shape == (4,)
    expected = int6(i.param.detach().reshape(4, 30)).reshape(4, 6, 5)
    assert torch.equal(dequantize([record])["bank"], expected)


def test_records_do_not_alias_the_weights():
    i = info("m", (9, 9), Role.MATRIX)
    cfg = QuantConfig(matrix="float", keep_numel=0)
    record = records_of([i], cfg)[0]
    before = record.parts["value"].copy()
    with torch.no_grad():
        i.param.zero_()
    dequantize([record])["m"].zero_()
    np.testing.assert_array_equal(record.parts["value"], before)


def test_records_compare_bit_for_bit():
    a = Record("x", "vector", "fp16", (2,), {"value": np.array([0.0, np.nan], np.float16)})
    same = Record("x", "vector", "fp16", (2,), {"value": np.array([0.0, np.nan], np.float16)})
    negative_zero = Record("x", "vector", "fp16", (2,), {"value": np.array([-0.0, np.nan], np.float16)})
    assert a == same and a != negative_zero and a != "x"


def test_state_and_infos_must_agree():
    i = info("m", (3, 3), Role.MATRIX)
    with pytest.raises(ValueError, match="extra"):
        quantize_state({"m": i.param, "extra": i.param}, [i], CFG)
    with pytest.raises(ValueError, match="m"):
        quantize_state({}, [i], CFG)


@pytest.mark.parametrize(
    ("value", "role", "text"),
    [
        (float("nan"), Role.MATRIX, "inf or NaN"),
        (float("inf"), Role.VECTOR, "inf or NaN"),
        (7e4, Role.VECTOR, "65504"),
        (3e6, Role.MATRIX, "fp16 step"),
        (1e7, Role.EMBED, "fp16 step"),
    ],
)
def test_weights_that_do_not_fit_name_the_tensor(value, role, text):
    i = info("blocks.3.w", (9, 9), role)
    with torch.no_grad():
        i.param[2] = value
    with pytest.raises(NumericalError, match=r"blocks\.3\.w.*" + text):
        records_of([i], CFG)


def test_records_that_do_not_fit_their_kind_are_refused():
    q, scale = np.zeros((3, 4), np.int8), np.ones(3, np.float16)
    good = Record("w", "matrix", "int6", (3, 4), {"q": q, "scale": scale})
    dequantize([good])
    bad = [
        Record("w", "matrix", "int3", (3, 4), good.parts),
        Record("w", "matrix", "int6", (4, 3), good.parts),
        Record("w", "matrix", "int6", (3, 4), {"q": q}),
        Record("w", "matrix", "int6", (3, 4), {"q": q, "scale": scale[:2]}),
        Record("w", "matrix", "int6", (3, 4), {"q": q.astype(np.float16), "scale": scale}),
    ]
    for record in bad:
        with pytest.raises(ArtifactError, match="w:"):
            dequantize([record])
