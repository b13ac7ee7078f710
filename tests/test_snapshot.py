"""What a snapshot holds and what comes back from it: state, schedule, budget, ranks."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT
from resuming import SHORT, assert_same_state, last, saving, text
from test_train import events, launch, make_trainer, settings

from pgolf import checkpoint, result, resume, snapshot
from pgolf.clock import Clock
from pgolf.dist import Dist
from pgolf.run import run


def moved(trainer, out):
    """A checkpoint of `trainer`, read back."""
    path = checkpoint.write(out, *snapshot.snapshot(trainer)).path
    tensors, facts = checkpoint.read(path)
    return resume.Saved(path, facts, {}, tensors)


@pytest.mark.parametrize("cast", ["on", "off"])
def test_restoring_is_exact_and_complete(shards, tmp_path, cast):
    """A fresh trainer after `restore` gives the same snapshot, and then the same steps."""
    options = ("average.swa=on", "average.swa.threshold=2", "average.swa.every=1", f"kernels.weight_cast={cast}")
    a = make_trainer(shards, tmp_path / "a", *options)
    for i in range(4):
        a.phases.apply(1.0 if i < 2 else 0.4)
        a.step(0.7, i)
        a.averager.update(i + 1, 0.7)
    a.step_number, a.tokens, a.skipped = 4, 4 * 512, (2, 1 / 3)
    a.clock.elapsed_ms = 1234.5678901234567
    random.seed(5), np.random.seed(6), torch.manual_seed(7)
    saved = moved(a, tmp_path / "c")
    b = make_trainer(shards, tmp_path / "b", *options)
    fresh = snapshot.snapshot(b)
    assert any(not torch.equal(fresh[0][n], t) for n, t in saved.tensors.items() if n in fresh[0])
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    want = dict(saved.tensors)
    resume.restore(b, saved)
    got, facts = snapshot.snapshot(b)
    assert_same_state((want, saved.facts), (got, json.loads(json.dumps(facts))))
    assert (b.skipped, b.clock.elapsed_ms) == ((2, 1 / 3), 1234.5678901234567)
    draws = [(random.random(), np.random.random(), torch.rand(()).item())]
    resume.set_rng_state(saved.facts["rng"][0], torch.device("cpu"))
    assert draws == [(random.random(), np.random.random(), torch.rand(()).item())]
    for trainer in (a, b):
        for i in range(4, 7):
            trainer.step(0.5, i)
            trainer.averager.update(i + 1, 0.5)
        trainer.loader.close()
    for name, t in snapshot.snapshot(a)[0].items():
        assert torch.equal(t, snapshot.snapshot(b)[0][name]), name


def test_a_gpus_generator_is_kept_too(monkeypatch):
    """With a stand-in for the GPU's: its state goes through JSON and comes back as bytes on the CPU."""
    held = {"state": torch.arange(16, dtype=torch.uint8)}
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: held["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: held.update(state=state, device=device))
    gpu = torch.device("cuda", 3)
    saved = json.loads(json.dumps(snapshot.rng_state(gpu)))
    held["state"] = None
    snapshot.set_rng_state(snapshot.rng_state(torch.device("cpu")), gpu)  # of a run without a GPU
    assert held["state"] is None
    snapshot.set_rng_state(saved, gpu)
    assert torch.equal(held["state"], torch.arange(16, dtype=torch.uint8)) and held["device"] == gpu


class Hand:
    def __init__(self):
        self.at = 0.0

    def __call__(self):
        return self.at


class Killed(BaseException):
    pass


def test_schedule_goes_on_with_the_elapsed_budget(shards, tmp_path):
    """The lr scale by clock of every step: interrupted as uninterrupted, with 1,000 s between the two processes."""
    options = ("train.max_wallclock_seconds=20", "train.iterations=1000", "schedule.warmdown_iters=12",
               "train.warmup_steps=0", "train.val_loss_every=0", "train.checkpoint_every=1")  # fmt: skip

    def train(name, saved=None, kill_at=None):
        """(trainer, [(step, lr scale)]) of a run whose first two steps take 3 s and the others 0.75 s."""
        trainer, hand, scales = saving(shards, tmp_path / name, *options), Hand(), []
        hand.at = 1000.0 if saved else 0.0
        trainer.clock = Clock(Dist(), trainer.clock.cap_ms, now=hand)
        step = trainer.step

        def timed_step(scale, number):
            if number == kill_at:
                raise Killed
            scales.append((number, scale))
            hand.at += 3.0 if number < 2 else 0.75
            return step(scale, number)

        trainer.step = timed_step
        if saved:
            resume.restore(trainer, saved)
        try:
            trainer.train()
        except Killed:
            assert kill_at
        trainer.loader.close()
        return trainer, scales

    whole, scales = train("whole")
    assert len({s for _, s in scales}) > 5 and whole.clock.elapsed_ms >= 20_000
    for cut in (1, 5, 13):  # 5: where the slow steps end
        _, before = train(f"first{cut}", kill_at=cut)
        path = checkpoint.newest(tmp_path / f"first{cut}" / snapshot.FOLDER)
        tensors, facts = checkpoint.read(path)
        second, after = train(f"second{cut}", saved=resume.Saved(path, facts, {}, tensors))
        assert before + after == scales, cut
        assert second.clock.elapsed_ms == whole.clock.elapsed_ms


def test_time_decides_for_all_ranks_by_rank_0s_clock(shards, tmp_path):
    """Due after `checkpoint_seconds` of training since the last one; saving takes none of it."""
    trainer, hand = saving(shards, tmp_path, "train.checkpoint_seconds=10", "train.iterations=1000"), Hand()
    trainer.clock = Clock(Dist(), None, now=hand)
    trainer.clock.start()
    due = []
    for n in range(1, 9):
        hand.at += 4.0
        trainer.step_number = n
        trainer.clock.tick()
        if trainer.saver.due:
            due.append(n)
            trainer.saver.save()
    trainer.loader.close()
    assert due == [3, 6]


def test_the_training_clock_stands_still_while_saving(shards, tmp_path, monkeypatch):
    trainer, hand = saving(shards, tmp_path), Hand()
    trainer.clock = Clock(Dist(), None, now=hand)
    trainer.clock.start()
    hand.at += 2.0
    trainer.step_number = 1
    write = checkpoint.write

    def slow(*args):
        hand.at += 100.0
        return write(*args)

    monkeypatch.setattr(checkpoint, "write", slow)
    trainer.saver.save()
    hand.at += 1.0
    trainer.loader.close()
    assert trainer.clock.tick() == 3000.0
    trainer.saver.save()  # the same step: it is there
    assert hand.at == 103.0 and trainer.ledger.seconds("checkpoint") > 0


def test_keep_none_writes_none(shards, tmp_path):
    run(settings(shards, tmp_path, "train.iterations=2", "train.keep_checkpoints=0", "train.run_id=r"))
    assert not (tmp_path / "r" / snapshot.FOLDER).exists()


def test_curves_leave_out_what_was_lost(tmp_path):
    rows = [("step", 1), ("step", 2), ("step", 3), ("val", 3), ("resume", 1), ("step", 2), ("val", 2)]
    values = ("train_loss", "lr_scale", "val_loss", "val_bpb")
    lines = [json.dumps({"kind": kind, "step": step} | dict.fromkeys(values, n)) for n, (kind, step) in enumerate(rows)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    steps, vals = result._read_curves(tmp_path / "events.jsonl")
    assert [e["train_loss"] for e in steps] == [0, 5] and [e["val_loss"] for e in vals] == [6]


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_may_change(shards, tmp_path):
    """2 ranks' snapshot is one rank's; 2 -> 2 is exact; 2 -> 1 and 1 -> 2 see the same windows, to the same losses."""
    options = (*SHORT, "train.run_id=r")
    without_fault = {"entry": ROOT / "tests" / "faulty.py"}  # train_gpt.py without its 5 s for the code's bytes
    run(settings(shards, tmp_path / "one", *options))
    two = launch(2, shards, tmp_path / "two", *options, **without_fault)
    assert two.returncode == 0, two.stderr[-2000:]
    one, two = tmp_path / "one" / "r", tmp_path / "two" / "r"
    a, b = last(one), last(two)
    assert a[0].keys() == b[0].keys() and len(b[1]["loader"]["states"]) == len(b[1]["rng"]) == 2
    assert a[1]["loader"]["states"][0] == b[1]["loader"]["states"][0] == b[1]["loader"]["states"][1]
    for name, t in a[0].items():
        torch.testing.assert_close(b[0][name].float(), t.float(), rtol=0, atol=2e-3, msg=name)
    want = {p: [e["train_loss"] for e in events(p, "step")] for p in (one, two)}
    for source, ranks in ((two, 2), (two, 1), (one, 2)):
        run_dir = tmp_path / f"{source.parent.name}_{ranks}" / "r"
        shutil.copytree(source / snapshot.FOLDER / "step-00000003", run_dir / snapshot.FOLDER / "step-00000003")
        if ranks == 1:
            run(settings(shards, run_dir.parent, *SHORT, f"train.resume={run_dir}"))
        else:
            done = launch(ranks, shards, run_dir.parent, *SHORT, f"train.resume={run_dir}", **without_fault)
            assert done.returncode == 0, done.stderr[-2000:]
        got = [e["train_loss"] for e in events(run_dir, "step")]
        if source == two and ranks == 2:
            assert got == want[two][3:]
            assert_same_state(last(two), last(run_dir))
        else:
            assert got == pytest.approx(want[source][3:], abs=2e-4)
            assert last(run_dir)[1]["loader"]["states"][0] == last(source)[1]["loader"]["states"][0]
            assert "note: ranks was" in text(run_dir)
