"""--dry-run: what a run would hold and send, from its settings alone."""

import re

import pytest
import torch

from pgolf import cli, dry_run
from pgolf.dist import Dist
from pgolf.optim.step import Optimizers
from pgolf.presets import PRESETS

MIB = re.compile(r"^  (.+?)\s+([\d.]+) MB$")


def test_command_prints_and_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--dry-run", "preset=rat_rod_green"], {}) == 0
    out = capsys.readouterr().out
    assert "26,993,756 parameters; Muon trains 66 matrices, AdamW 1,041,500 numbers" in out
    assert "8 ranks: each orthogonalises 9 of 66 matrices a step, in 72 slots for 66 split ones" in out
    assert "22 matrices 512x1536 in 24 slots, bf16" in out
    for world in (1, 8, 64, 1024):
        assert re.search(rf"^{world} ranks?: ", out, re.M)
    assert not list(tmp_path.iterdir())


def test_replicate_and_fp32_are_counted_so(capsys):
    arguments = ["preset=rat_rod_green", "optim.muon.parallel=replicate", "optim.muon.exchange_dtype=fp32", "--dry-run"]
    assert cli.main(arguments, {}) == 0
    out = capsys.readouterr().out
    assert "reduce_scatter" not in out and "8 ranks: each orthogonalises 66 of 66" in out
    assert "26,993,756 numbers, fp32" in out


@pytest.mark.parametrize("preset", PRESETS)
def test_memory_is_that_of_the_real_things(preset):
    """Weights, gradients, exchange and moments against the tensors of real optimisers on meta parameters."""
    cfg = PRESETS[preset]()
    groups = dry_run.groups_on_paper(cfg)
    rows = {m[1]: float(m[2]) for line in dry_run.memory_lines(cfg, groups) if (m := MIB.match(line))}
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors) / 1e6
    optim = Optimizers(groups, cfg.optim, Dist())
    assert rows["weights"] == pytest.approx(size(optim.params), abs=0.06)
    pools = [t for pool in optim.muon.pools for t in (pool.buffer, pool.momentum)]
    assert rows["exchange buffers and momentum, one rank"] == pytest.approx(size(pools), abs=0.06)
    assert rows["="] == pytest.approx(sum(v for k, v in rows.items() if k != "="), abs=0.5)
    assert all(isinstance(p, torch.Tensor) and p.is_meta for p in optim.params)
