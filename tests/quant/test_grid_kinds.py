"""Every kind and clip against explicit numpy loops; overrides; what training rounds to is what the export stores."""

import numpy as np
import pytest
import torch
from torch import nn

from pgolf.errors import ConfigError
from pgolf.model.linear import Linear
from pgolf.model.roles import ParamInfo, Role, roles_of
from pgolf.quant.config import Clip, LateQatConfig, QuantConfig, parse_clip, parse_overrides
from pgolf.quant.fake_quant import attach, roundings
from pgolf.quant.policy import Storage, candidate_clips, grid_of, quantize_state, storage_of
from pgolf.quant.records import dequantize
from pgolf.quant.weight_cast import WeightCast

RANGES = {
    "int8": (-127, 127),
    "int7": (-64, 63),
    "int6": (-32, 31),
    "int5": (-16, 15),
    "int4": (-8, 7),
    "ternary": (-1, 1),
}
CLIPS = {
    "max": lambda row: np.abs(row).max(),
    "0.95": lambda row: np.quantile(np.abs(row), 0.95),
    "3.5sd": lambda row: np.float32(3.5) * row.std(ddof=1),
    "mean": lambda row: np.abs(row).mean(),
}


def weights(rows=24, cols=40, seed=0, spread=0.1):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=gen) * spread * torch.linspace(0.2, 3, rows)[:, None]


def info(name="w", role=Role.MATRIX, w=None):
    return ParamInfo(name, nn.Parameter(weights() if w is None else w), role, None)


def record_of(one, **settings):
    return quantize_state({one.name: one.param.detach()}, [one], QuantConfig(keep_numel=0, **settings))[0]


def by_loops(w, clip, low, high, floor=0.0):
    """(integers, steps) of each row by itself."""
    q, steps = np.zeros(w.shape, np.int8), np.zeros(len(w), np.float16)
    for r, row in enumerate(w.astype(np.float32)):
        steps[r] = max(np.float32(clip(row)) / np.float32(high), np.float32(floor / high))
        for c, value in enumerate(row):
            q[r, c] = min(max(np.rint(value / np.float32(steps[r])), low), high)
    return q, steps


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("kind", RANGES)
def test_integers_and_steps_equal_loops(kind, clip):
    one = info()
    record = record_of(one, matrix=kind, matrix_clip=clip)
    low, high = RANGES[kind]
    assert grid_of(kind) == (low, high)
    q, steps = by_loops(one.param.detach().numpy(), CLIPS[clip], low, high)
    # numpy's quantiles and sums may end an ulp away, which rarely moves an fp16 step to its neighbour
    assert np.abs(record.parts["scale"].view(np.int16) - steps.view(np.int16)).max() <= 1
    same = record.parts["scale"] == steps
    assert same.mean() > 0.8
    np.testing.assert_array_equal(record.parts["q"][same], q[same])
    back = dequantize([record])["w"].numpy()
    np.testing.assert_array_equal(back, record.parts["q"] * record.parts["scale"].astype(np.float32)[:, None])
    # both ends are reached, unless the grid reaches further than the row
    ends = {record.parts["q"].min(), record.parts["q"].max()}
    assert ends <= set(range(low, high + 1)) and (clip == "3.5sd" or high in ends or -high in ends)


def test_finer_grids_are_closer():
    errors = [(dequantize([record_of(info(), matrix=kind)])["w"] - weights()).norm().item() for kind in RANGES]
    assert errors == sorted(errors) and errors[-1] > 50 * errors[0]


def test_auto_is_the_rule_of_the_kind():
    assert parse_clip("auto", "int8") == Clip("quantile", 0.9999984)
    assert parse_clip("auto", "ternary") == Clip("mean") and parse_clip("auto", "int6") == Clip("max")
    assert record_of(info(), matrix="int8") == record_of(info(), matrix="int8", matrix_clip="0.9999984")


@pytest.mark.parametrize("by", ["best", "best-row"])
def test_search_keeps_the_least_squared_error(by):
    gen = torch.Generator().manual_seed(0)
    w = torch.randn(24, 1200, generator=gen)
    w[12:] = torch.randint(-4, 5, (12, 1200), generator=gen).float()  # exact when clipped at 7
    w[12:, 0] = 7.0
    record = record_of(info(w=w), matrix="int4", matrix_clip=by)
    tried = [np.quantile(np.abs(w.numpy()), q, axis=1) for q in (0.999, 0.9995, 0.9999, 0.99999, 1.0)]
    table = []
    for clips in tried:
        clip_of = dict(zip(map(bytes, w.numpy()), clips, strict=True))
        q, steps = by_loops(w.numpy(), lambda row, clip_of=clip_of: clip_of[bytes(row)], -8, 7)
        table.append(((q * steps.astype(np.float32)[:, None] - w.numpy()) ** 2).sum(1))
    got = ((dequantize([record])["w"] - w) ** 2).sum(1).numpy()
    best = np.min(table, 0) if by == "best-row" else table[np.argmin(np.sum(table, 1))]
    np.testing.assert_allclose(got, best, rtol=2e-3, atol=1e-6)
    if by == "best-row":
        assert got.sum() < 0.999 * np.min(np.sum(table, 1))


def test_candidates_are_one_but_in_a_search():
    rows = weights()
    (only,) = candidate_clips(rows, Storage("int6", Clip("max")))
    assert torch.equal(only, rows.abs().amax(1)) and only.dtype == torch.float32
    five = candidate_clips(rows, Storage("int6", Clip("best-row")))
    assert len(five) == 5 and torch.equal(five[-1], only) and all(c.shape == (24,) for c in five)


# -- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_by_name_last_one_counts_and_small_ones_stay():
    names = ("blocks.0.attn.q.weight", "blocks.0.mlp.up.weight", "blocks.1.mlp.up.weight")
    infos = [
        *(info(name) for name in names),
        info("blocks.0.gain", Role.VECTOR, torch.ones(2000)),
        info("t", Role.EMBED),
    ]
    cfg = QuantConfig(keep_numel=64, overrides="blocks.0.*=int8, *.mlp.*=int5:12sd, *.1.mlp.*=:0.9", matrix_clip="best")
    got = storage_of(infos, cfg)
    assert got[names[0]] == Storage("int8", Clip("best"))
    assert got[names[1]] == Storage("int5", Clip("sd", 12.0))
    assert got[names[2]] == Storage("int5", Clip("quantile", 0.9))
    assert got["blocks.0.gain"].kind == "fp16" and got["t"] == Storage("int8", Clip("quantile", 0.9999984))


def test_an_override_that_fits_nothing_is_refused():
    with pytest.raises(
        ConfigError, match=r"blocks\.7\.\* fits no parameter that is quantised; such are \['blocks.0.w'\]"
    ):
        storage_of([info("blocks.0.w")], QuantConfig(keep_numel=0, overrides="blocks.7.*=int8"))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"matrix": "int3"}, "matrix='int3' must be one of int8, int7"),
        ({"embed_clip": "1.5"}, "embed_clip='1.5' must be auto, max"),
        ({"matrix_clip": "0sd"}, "matrix_clip='0sd' must be"),
        ({"matrix_clip": "nan"}, "matrix_clip='nan' must be"),
        ({"overrides": "blocks.0.*"}, "expected PATTERN=KIND"),
        ({"overrides": "a=int8:"}, "expected PATTERN=KIND"),
        ({"overrides": "a=int9"}, "int9 must be one of"),
        ({"overrides": "a=int8:7"}, "7 must be auto, max"),
        ({"matrix": "fp16", "late_qat": LateQatConfig()}, "late_qat rounds to a grid"),
        ({"matrix_clip": "12sd", "late_qat": LateQatConfig()}, "late_qat can follow max and quantiles"),
        ({"matrix": "ternary", "late_qat": LateQatConfig()}, "late_qat can follow max and quantiles"),
        ({"optrot": True, "late_qat": LateQatConfig()}, "set optrot=false"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, text):
    (problem,) = QuantConfig(**settings).problems()
    assert text in problem


def test_overrides_parse_to_rules():
    assert [tuple(rule) for rule in parse_overrides(" a*=int8:0.5 ,b=:best,")] == [
        ("a*", "int8", "0.5"),
        ("b", "", "best"),
    ]


# -- training rounds as the export does ------------------------------------------------------------------------------


class Toy(nn.Module):
    """Two shapes, so two banks, and more where kinds differ."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Linear(40, 24) for _ in range(3))
        self.wide = Linear(24, 40)
        for i, layer in enumerate((*self.layers, self.wide)):
            layer.weight.data = weights(*layer.weight.shape, seed=i)


CASES = [
    {"matrix": kind, "matrix_clip": clip, "scale_floor": floor}
    for kind in ("int8", "int7", "int6", "int5", "int4")
    for clip, floor in (("max", 0.0), ("0.9995", 0.0), ("0.9", 0.0), ("max", 1.0), ("0.9", 1.0))
] + [
    {"matrix": "ternary", "matrix_clip": "0.8"},
    {"overrides": "layers.1.*=int4:0.9,wide*=int8", "matrix_clip": "0.95"},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
def test_slot_and_bank_hold_what_the_artifact_holds(settings):
    """Bit for bit, and as separate computations: module slots, the cast of banks, and the export."""
    cfg = QuantConfig(keep_numel=0, late_qat=LateQatConfig(), **settings)
    model = Toy()
    infos = roles_of(model)
    exported = dequantize(quantize_state(model.state_dict(), infos, cfg))
    assert attach(model, infos, cfg) == 4
    for name, layer in ((f"layers.{i}.weight", layer) for i, layer in enumerate(model.layers)):
        assert torch.equal(layer.quant(layer.weight), exported[name])
        assert not torch.equal(layer.weight, exported[name])
    cast = WeightCast(model, infos, cfg, torch.float32)
    assert cast.on_grid == 4
    cast.quantize = True
    cast.refresh_()
    layers = {**{f"layers.{i}.weight": layer for i, layer in enumerate(model.layers)}, "wide.weight": model.wide}
    for name, layer in layers.items():
        assert torch.equal(layer.effective_weight(torch.float32), exported[name]), name
    cast.quantize = False
    cast.refresh_()
    assert torch.equal(model.wide.effective_weight(torch.float32), model.wide.weight)


def test_a_search_trains_on_row_maxima_and_other_clips_are_refused_by_name():
    model = Toy()
    infos = roles_of(model)
    best = roundings(infos, QuantConfig(keep_numel=0, matrix_clip="best"))
    assert best == roundings(infos, QuantConfig(keep_numel=0)) and len(best) == 4
    cfg = QuantConfig(keep_numel=0, overrides="wide*=:12sd", late_qat=LateQatConfig())
    with pytest.raises(ConfigError, match=r"cannot round wide\.weight"):
        roundings(infos, cfg)


def test_gradient_passes_straight_through_also_where_weights_are_clipped():
    layer = Linear(40, 24)
    layer.weight.data = weights()
    attach(layer, roles_of(layer), QuantConfig(keep_numel=0, matrix="int4", matrix_clip="0.5"))
    x = torch.randn(7, 40)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(24, 40))


# -- parts that were rounded elsewhere -------------------------------------------------------------------------------


def test_given_parts_are_stored_as_they_are():
    one, cfg = info(), QuantConfig(keep_numel=0)
    state = {"w": one.param.detach()}
    parts = dict(record_of(one).parts)
    parts["q"] = parts["q"].copy()
    parts["q"][3, 5] -= 1
    (record,) = quantize_state(state, [one], cfg, {"w": parts})
    np.testing.assert_array_equal(record.parts["q"], parts["q"])
    assert record.kind == "int6"
