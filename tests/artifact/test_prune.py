"""Pruning to a size: the fewest and the cheapest integers go, and the packed bytes fit; nothing is done in vain."""

import numpy as np
import pytest
import torch
from torch import nn

from pgolf.artifact.pack import pack
from pgolf.artifact.prune import prune
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import PruneConfig, QuantConfig
from pgolf.quant.policy import quantize_state

gen = torch.Generator().manual_seed(0)
WEIGHTS = {"a": torch.randn(64, 96, generator=gen), "b": 3 * torch.randn(96, 64, generator=gen), "v": torch.ones(8)}
ROLES = {"a": Role.MATRIX, "b": Role.MATRIX, "v": Role.VECTOR}
INFOS = [ParamInfo(n, nn.Parameter(w), ROLES[n], None) for n, w in WEIGHTS.items()]
RECORDS = quantize_state(WEIGHTS, INFOS, QuantConfig(keep_numel=64, matrix="int4"))


def size(records):
    return len(pack(records, {}, "zlib", 9))


def ones(records):
    return sum(int((np.abs(r.parts["q"]) == 1).sum()) for r in records if "q" in r.parts)


def test_fits_with_as_few_as_needed():
    target = size(RECORDS) - 300
    pruned, count = prune(RECORDS, target, size)
    assert target - size(pruned) <= max(target // 10_000, 16) and size(pruned) <= target
    assert 0 < count == ones(RECORDS) - ones(pruned)
    for before, after in zip(RECORDS, pruned, strict=True):
        if "q" in before.parts:
            changed = before.parts["q"] != after.parts["q"]
            assert (np.abs(before.parts["q"][changed]) == 1).all() and (after.parts["q"][changed] == 0).all()
        for part in before.parts.keys() - {"q"}:
            np.testing.assert_array_equal(before.parts[part], after.parts[part])


def test_rows_with_the_smallest_steps_go_first():
    _, count = prune(RECORDS, size(RECORDS) - 300, size)
    pruned, _ = prune(RECORDS, size(RECORDS) - 300, size)
    steps = np.concatenate([np.repeat(r.parts["scale"], r.parts["q"].shape[1]) for r in RECORDS if "q" in r.parts])
    q, new = (np.concatenate([r.parts["q"].ravel() for r in rs if "q" in r.parts]) for rs in (RECORDS, pruned))
    gone, kept = steps[(q != new)], steps[(np.abs(q) == 1) & (q == new)]
    assert len(gone) == count and gone.max() <= kept.min()


def test_count_is_the_smallest_of_a_monotone_size():
    """With a size that falls by one byte a zero the answer is known."""
    zeros = lambda records: sum(int((r.parts["q"] == 0).sum()) for r in records if "q" in r.parts)
    start = zeros(RECORDS)
    for wanted in (1, 7, 500, ones(RECORDS)):
        pruned, count = prune(RECORDS, 5000 - wanted, lambda rs: 5000 - (zeros(rs) - start))
        assert count == wanted == zeros(pruned) - start


@pytest.mark.parametrize("target", [10**6, 10])
def test_nothing_to_do_and_nothing_that_would_do(target):
    assert prune(RECORDS, target, size) == (RECORDS, 0)


def test_settings():
    assert PruneConfig().problems() == [] and "target_mb=0" in PruneConfig(target_mb=0).problems()[0]
