"""The search among the integers of an export."""

from dataclasses import replace

import pytest
import torch
from helpers import random_batch

from pgolf.dist import Dist
from pgolf.model.gpt import GPT
from pgolf.model.roles import roles_of
from pgolf.presets import smoke
from pgolf.quant import eggroll
from pgolf.quant.config import EggrollConfig
from pgolf.quant.grid import GRIDS
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import dequantize

CFG = EggrollConfig(probes=60, indices=8)


def toy(values=(3, -32, 31, 0), rows=2):
    """Integers of an int6 tensor of two rows with steps 0.5 and 0.25, and the parameter behind them."""
    q = torch.tensor(values, dtype=torch.int8)
    step = torch.tensor([0.5, 0.25])[:rows]
    return eggroll.Entries(q, step, GRIDS["int6"], q * step.repeat_interleave(len(q) // rows))


def forever():
    return True


def test_descends_to_the_optimum_and_the_model_follows():
    one, target = toy((10, -9, 8, 7)), torch.tensor([4.0, -5.0, 3.0, 2.0])
    loss = lambda: (one.param - target).square().sum().item()
    done = eggroll.search([one], loss, forever, EggrollConfig(probes=400, indices=1), seed=1)
    assert one.q.tolist() == [8, -10, 12, 8] and torch.equal(one.param, target)
    assert done.trials == 400 and done.after == 0.0 < done.before and 0 < done.kept < 400


def test_what_does_not_help_is_put_back_exactly():
    one = toy()
    q, param = one.q.clone(), one.param.clone()
    for loss in (lambda: 1.0, lambda: (one.param - param).abs().sum().item()):
        done = eggroll.search([one], loss, forever, CFG, seed=0)
        assert done.kept == 0 and done.before == done.after
        assert torch.equal(one.q, q) and torch.equal(one.param, param)


def test_integers_stay_in_their_own_range():
    wide, one = eggroll.Entries(torch.tensor([127, -127], dtype=torch.int8), torch.ones(1), GRIDS["int8"],
                                torch.tensor([127.0, -127.0])), toy()  # fmt: skip
    grown = lambda: -(wide.param.abs().sum() + one.param.abs().sum()).item()
    eggroll.search([wide, one], grown, forever, replace(CFG, indices=1), seed=0)
    assert wide.q.tolist() == [127, -127] and one.q[1] == -32 and one.q[2] == 31
    assert one.q[0] > 3  # the others did grow


def test_draws_are_without_replacement_and_by_seed(monkeypatch):
    drawn = []
    monkeypatch.setattr(eggroll.Entries, "put_", lambda self, places, q: drawn.append(places.tolist()))
    for seed in (1, 1, 2):
        eggroll.search([toy()], lambda: 1.0, forever, replace(CFG, probes=4, indices=3), seed)
    assert all(len(set(places)) == 3 for places in drawn)
    first, again, other = drawn[:12], drawn[12:24], drawn[24:]
    assert first == again != other


def test_ends_with_the_time():
    left = iter([True, True, False])
    assert eggroll.search([toy()], lambda: 1.0, lambda: next(left), EggrollConfig(), seed=0).trials == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_model(dtype):
    """The loss falls, and the model that was searched is the one that its records describe."""
    cfg = smoke()
    model = GPT(cfg.model, train_length=32, compute_dtype=dtype).init_weights(0)
    infos, quant = roles_of(model), replace(cfg.quant, keep_numel=0)
    records = quantize_state({i.name: i.param.detach().float() for i in infos}, infos, quant)
    found, batch = eggroll.exported(model, records), random_batch(cfg.model.embed.vocab_size)
    entries = eggroll.entries_of(found, records)
    assert {"embed.weight", "blocks.0.attn.q.weight", "blocks.2.mlp.down.weight"} <= entries.keys()
    loss = lambda: eggroll.mean_loss(found, batch, Dist())
    done = eggroll.search(list(entries.values()), loss, forever, replace(CFG, probes=40, indices=64), seed=0)
    assert done.kept > 0 and done.after < done.before
    changed = eggroll.with_integers(records, entries)
    assert loss() == done.after == eggroll.mean_loss(eggroll.exported(model, changed), batch, Dist())
    weights = dequantize(changed)
    for name, param in found.named_parameters():
        assert torch.equal(param.data, weights[name].to(param.dtype)), name
    moved = [n for n, a, b in zip(weights, records, changed, strict=True) if a != b]
    assert moved and set(moved) <= entries.keys()


def test_rows_are_taken_from_as_many_batches_as_needed():
    class Stream:
        count = 0

        def next_batch(self):
            self.count += 1
            return random_batch(50, rows=3, seed=self.count)

    stream = Stream()
    batch = eggroll.take(stream, 5)
    assert batch.ids.shape == batch.targets.shape == (5, 32) and stream.count == 2
    assert torch.equal(batch.ids[3:], random_batch(50, rows=3, seed=2).ids[:2])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seconds": 0.0}, "seconds=0.0 must be above 0"),
        ({"probes": -1}, "probes=-1"),
        ({"indices": 0}, "indices=0"),
        ({"sequences": 0}, "sequences=0"),
    ],
)
def test_settings_out_of_range_are_refused(change, said):
    assert said in "; ".join(replace(CFG, **change).problems())
