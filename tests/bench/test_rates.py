"""The table of rates: known values of theory come out, for every case a row."""

import math

import torch

from bench import rates


def test_rates_of_a_normal_matrix_are_those_of_theory():
    """At step k sd / 31 the error is step^2 / 12 and the entropy 2.047 - log2(step / sd) bits."""
    w = torch.randn(512, 256, generator=torch.Generator().manual_seed(1)) * 0.02
    error, bits = rates.rate(w, {"matrix_clip": "12sd"})
    step = 12 / 31
    assert abs(error / (step**2 / 12) - 1) < 0.02
    assert 0 < bits - (2.047 - math.log2(step)) < 0.2  # brotli is not an ideal coder, and steps cost 16 bits a row


def test_every_case_has_a_row():
    small = {name: w[:64, :64].contiguous() for name, w in rates.matrices().items()}
    lines = list(rates.table(small, rates.CASES))
    assert len(lines) == 2 + len(rates.CASES) and all(line.count("|") == 6 for line in lines)
