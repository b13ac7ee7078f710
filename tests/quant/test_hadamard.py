"""OptRot: the rotation against a matrix built by its definition; records of rotated matrices come back."""

import numpy as np
import pytest
import torch
from torch import nn

from pgolf.errors import ArtifactError
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import QuantConfig
from pgolf.quant.hadamard import can_rotate, rotate
from pgolf.quant.policy import quantize_state, rows_to_round, storage_of
from pgolf.quant.records import Record, dequantize


def sylvester(n):
    """(-1)^(number of ones in the binary i & j) / sqrt(n)."""
    return np.array([[(-1) ** bin(i & j).count("1") for j in range(n)] for i in range(n)]) / np.sqrt(n)


@pytest.mark.parametrize("rows", [2, 4, 64, 128])
def test_rotation_is_the_product_with_sylvesters_matrix_and_its_own_inverse(rows):
    w = torch.randn(rows, 5, dtype=torch.float64)
    torch.testing.assert_close(rotate(w), torch.from_numpy(sylvester(rows)) @ w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rotate(rotate(w)), w, rtol=1e-12, atol=1e-12)
    assert w.norm().item() == pytest.approx(rotate(w).norm().item())


def test_only_powers_of_two():
    assert [n for n in range(70) if can_rotate(n)] == [2, 4, 8, 16, 32, 64]
    with pytest.raises(ValueError, match="power of two"):
        rotate(torch.ones(6, 2))


def info(name, shape, role):
    w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    w[0] *= 30  # an outlier row, which the rotation spreads
    return ParamInfo(name, nn.Parameter(w), role, None)


INFOS = [info("m", (64, 48), Role.MATRIX), info("odd", (48, 64), Role.MATRIX), info("t", (64, 48), Role.EMBED)]
STATE = {i.name: i.param.detach() for i in INFOS}
CFG = QuantConfig(keep_numel=0, optrot=True, matrix="int4")


def test_matrices_are_rounded_in_the_rotated_basis_and_come_back():
    records = {r.name: r for r in quantize_state(STATE, INFOS, CFG)}
    assert {name: r.kind for name, r in records.items()} == {"m": "int4+optrot", "odd": "int4", "t": "int8"}
    parts = records["m"].parts
    q = parts["q"] * parts["scale"].astype(np.float64)[:, None]
    want = sylvester(64) @ q
    np.testing.assert_allclose(dequantize([records["m"]])["m"].numpy(), want, atol=1e-5)
    w = STATE["m"].numpy().astype(np.float64)
    steps = np.abs(sylvester(64) @ w).max(1) / 7
    np.testing.assert_allclose(parts["scale"], steps, rtol=1e-3)
    assert np.linalg.norm(want - w) < 0.2 * np.linalg.norm(w)


def test_others_round_what_rows_to_round_gives():
    table = storage_of(INFOS, CFG)
    rows = rows_to_round(STATE["m"], table["m"])
    torch.testing.assert_close(
        rows.double(), torch.from_numpy(sylvester(64)) @ STATE["m"].double(), rtol=1e-4, atol=1e-4
    )
    assert torch.equal(rows_to_round(STATE["odd"], table["odd"]), STATE["odd"])
    even = {"m": STATE["m"] / STATE["m"].norm(dim=1, keepdim=True)}
    (plain,) = quantize_state(even, INFOS[:1], QuantConfig(keep_numel=0, matrix="int4"))
    (turned,) = quantize_state(even, INFOS[:1], CFG)
    assert quantize_state(even, INFOS[:1], CFG, {"m": turned.parts}) == [turned]
    with pytest.raises(ValueError, match="m: the given parts are not of this weight's rows_to_round"):
        quantize_state(even, INFOS[:1], CFG, {"m": plain.parts})


def test_a_record_that_cannot_be_rotated_is_refused():
    bad = Record(
        "w", "matrix", "int6+optrot", (6, 4), {"q": np.zeros((6, 4), np.int8), "scale": np.ones(6, np.float16)}
    )
    with pytest.raises(ArtifactError, match="no power of two"):
        dequantize([bad])
