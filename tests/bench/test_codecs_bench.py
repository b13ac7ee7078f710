"""bench.codecs: its entropies against closed forms, its models against weights whose structure is known."""

import math

import numpy as np
import pytest
import torch

from bench import codecs as bench
from pgolf.artifact.codecs import CODECS
from pgolf.artifact.pack import pack
from pgolf.quant.policy import Record


def gaussian(sd, seed=0):
    """Integers (rows, columns) of normal values with these standard deviations."""
    return np.round(np.random.default_rng(seed).normal(0, 1, sd.shape) * sd).clip(-127, 127).astype(np.int8)


def bits(sd):
    """Of a normal value, rounded: its differential entropy, exact to 1e-6 from sd 1 on."""
    return float(np.log2(sd * math.sqrt(2 * math.pi * math.e)).mean())


def test_entropy_of_known_histograms():
    assert bench.entropy(np.full(256, 10)) == pytest.approx(2560)
    assert bench.entropy(np.array([7, 0, 0])) == 0
    assert bench.histogram(np.array([-1, -1, 2], np.int8))[[255, 2]].tolist() == [2, 1]


def test_without_structure_no_model_beats_the_order_0_entropy_and_brotli_is_near_it():
    q = gaussian(np.full((400, 500), 9.0))
    zeroth, found = bench.entropy(bench.histogram(q)), bench.models(q)
    assert zeroth == pytest.approx(bits(9.0) * q.size / 8, rel=2e-3)
    assert all(zeroth * 0.9999 < n < 1.01 * zeroth for n in found.values()), found
    assert zeroth < bench.coded(q)["brotli"] < 1.02 * zeroth


def test_models_find_the_scales_of_rows_and_columns():
    rng = np.random.default_rng(1)
    sd = 6 * np.exp2(rng.uniform(-1, 1, (400, 1)) + rng.uniform(-1.5, 1.5, (1, 500)))
    q = gaussian(sd)
    true, zeroth, found = bits(sd) * q.size / 8, bench.entropy(bench.histogram(q)), bench.models(q)
    assert true < found["row+col"] < 1.015 * true
    assert found["row+col"] < found["row"] < zeroth and found["adaptive"] < found["row"]
    assert min(bench.coded(q).values()) > 1.02 * found["row+col"]  # which no byte codec finds


def test_a_mean_of_columns_is_found_by_the_model_for_it():
    q = (gaussian(np.full((400, 300), 4.0)) + np.random.default_rng(2).integers(-20, 20, (1, 300))).astype(np.int8)
    found = bench.models(q)
    assert found["+mean"] < 0.95 * found["adaptive"]


def test_table_of_a_run(tmp_path, capsys):
    q = gaussian(np.full((60, 80), 5.0))
    steps = np.ones(60, np.float16)
    (tmp_path / "model.pgolf").write_bytes(pack([Record("w", "matrix", "int6", q.shape, {"q": q, "scale": steps})], {}))
    assert bench.main([str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split()[:3] == ["tensor", "values", "order-0"] and all(name in out[0] for name in CODECS)
    assert out[1].startswith("w int6.q") and "4,800" in out[1] and len(out) == 4
    assert "less; it pays from 1%" in out[3]


def test_quantised_rows_end_on_the_grid():
    for kind, (low, high) in {"int5": (-16, 15), "int6": (-32, 31), "int8": (-127, 127)}.items():
        q = bench.quantised(torch.randn(20, 64, generator=torch.Generator().manual_seed(0)), kind)
        assert q.shape == (20, 64) and q.min() >= low and q.max() <= high and (np.abs(q).max(1) >= high).all()


def test_one_source(capsys):
    for words in ([], ["run", "--synthetic"]):
        with pytest.raises(SystemExit):
            bench.main(words)
    assert "one of the two" in capsys.readouterr().err
