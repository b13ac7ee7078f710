"""The limits of the time ledger: what was taken, what an evaluation will take, and its end before the limit."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import ToyNeural

from pgolf import cli, limits
from pgolf.clock import TimeLedger, ledger_lines
from pgolf.dist import Dist
from pgolf.errors import BudgetError, Stopped
from pgolf.eval.base import evaluate
from pgolf.eval.windowed import PlainWindows
from pgolf.limits import OutOfTime, Watch, over_evaluation, over_training
from pgolf.schema import RunConfig
from pgolf.scoring import Scoring
from pgolf.signals import Stop


class Hand:
    """A clock moved by hand."""

    at = 50.0

    def __call__(self):
        return self.at


def scoring(seconds, rounds=100, **how) -> tuple[list[str], int, Exception | None]:
    """An evaluation of `rounds` batches of `seconds` each, the first of 5 s; (what it said, batches done, its end)."""
    hand, said = Hand(), []
    watch = Watch(Dist(), Stop(), "sliding", say=said.append, now=hand, **how)
    for done in range(1, rounds + 1):
        hand.at += 5.0 if done == 1 else seconds
        try:
            watch(done, rounds)
        except BudgetError as err:
            return said, done, err
    return said, rounds, None


def test_the_time_is_foretold_after_two_percent_if_it_is_worth_a_line():
    fits = ["sliding will take about 104 s (3 of 100 batches are done)"]
    assert scoring(1.0, limit=150.0, reserve=1.0) == (fits, 100, None)
    assert scoring(1.0) == (fits, 100, None)  # no limit
    assert scoring(0.01, limit=150.0) == ([], 100, None)


def test_what_will_not_fit_is_foretold_after_two_percent_and_stopped_before_the_limit():
    said, done, err = scoring(1.0, limit=60.0, reserve=2.0)
    assert len(said) == 1 and "sliding will take until 104 s of evaluation, the limit is 60 s" in said[0]
    assert isinstance(err, OutOfTime) and err.exit_code == 5
    # looked at after batches 1, 3, 5, ...: at 5 + 50 s another two would end at 57 s, at 57 s not before 58 s
    assert done == 53 and "after 57.0 s of evaluation with 53 of 100 batches" in str(err)


def test_the_first_batch_which_compiles_is_not_multiplied():
    hand, said = Hand(), []
    watch = Watch(Dist(), Stop(), "plain", limit=100.0, say=said.append, now=hand)
    hand.at += 60
    watch(1, 20)
    for done in range(2, 21):
        hand.at += 1
        watch(done, 20)
    assert said == ["plain will take about 79 s (2 of 20 batches are done)"]


def test_earlier_phases_count():
    _, alone, _ = scoring(1.0, limit=60.0)
    _, later, err = scoring(1.0, limit=60.0, already=30.0)
    assert err and later == alone - 30
    assert scoring(0.1, rounds=5, limit=60.0, already=59.9)[1] == 1


def test_a_stop_is_seen_after_any_batch():
    stop = Stop()
    watch = Watch(Dist(), stop, "plain")
    watch(1, 1000)
    stop.code = 143
    with pytest.raises(Stopped, match="SIGTERM during plain, at 2 of 1000 batches"):
        watch(2, 1000)


class Middle(Dist):
    """One rank of three, alone: sums stay its own."""

    world_size, rank = 3, 1

    def __init__(self):
        super().__init__()
        self.world_size, self.rank = 3, 1

    def all_reduce_sum_(self, tensor):
        return tensor


def test_every_rank_is_watched_equally_often():
    """10 windows on 3 ranks are 4, 3 and 3: with one window a batch all ranks meet 4 times."""
    calls = []
    for rank in range(3):
        dist = Middle()
        dist.rank = rank
        tokens = np.arange(41) % 7
        seen = []
        with pytest.raises(AssertionError, match="left out"):  # the other ranks' windows
            evaluate(
                PlainWindows(4, batch_tokens=12),
                ToyNeural(lambda ids, targets: torch.zeros(ids.shape)),
                tokens,
                lambda ids, targets: torch.ones_like(ids),
                dist,
                watch=lambda done, rounds, seen=seen: seen.append((done, rounds)),
            )
        calls.append(seen)
    assert calls[0] == calls[1] == calls[2] == [(i, 4) for i in range(1, 5)]


def test_training_may_end_in_a_step_but_not_later():
    assert over_training(600.2, 600.0, 0.1) == "" and over_training(900.0, 0.0, 0.1) == ""
    text = over_training(612.0, 600.0, 0.1)
    assert "612.0 s" in text and "600 s" in text and "train.reserve_ms=12000" in text
    assert over_evaluation(600.0, 600.0) == "" and over_evaluation(1e9, 0.0) == ""
    assert "601.0 s" in over_evaluation(601.0, 600.0) and "eval.max_seconds=0" in over_evaluation(601.0, 600.0)


def test_spent_adds_what_counts():
    ledger = TimeLedger(now=(hand := Hand()))
    for name, seconds in (("train", 5), ("calibrate", 2), ("pack", 100), ("evaluate", 3), ("adapt", 4)):
        with ledger.phase(name):
            hand.at += seconds
    assert limits.spent(ledger, "training") == 7 and limits.spent(ledger, "evaluation") == 7
    lines = ledger_lines(ledger.to_dict(), {"training": 600.0, "evaluation": 0.0})
    sums = [" ".join(line.split()) for line in lines if line.startswith("= ")]
    assert sums[:2] == ["= training 7.00 s of 600 s", "= evaluation 7.00 s"]


def test_the_first_exception_tells_its_phase():
    ledger = TimeLedger()
    with pytest.raises(KeyError), ledger.phase("train"), ledger.phase("validate"):
        assert ledger.current == "validate"
        raise KeyError
    assert ledger.failed_in == "validate" and ledger.current == ""


def command(out, *overrides) -> tuple[int, dict]:
    """The smoke preset with 2 steps: (exit code, result.json)."""
    common = ["train.device=cpu", f"train.out_dir={out}", "train.run_id=r", "train.iterations=2"]
    code = cli.main([*common, *overrides], {"PRESET": "smoke"})
    return code, json.loads((out / "r" / "result.json").read_text())


def test_an_evaluation_over_its_limit_keeps_the_result(tmp_path, capsys, monkeypatch):
    """The plain pass fits, the sliding one does not."""
    score = Scoring.score

    def patched(self, one, readers=()):
        if one.suffix == "sliding":
            self.cfg = replace(self.cfg, eval=replace(self.cfg.eval, max_seconds=0.2, reserve_seconds=0.1))
            one.evaluator.batch_tokens = 64
        return score(self, one, readers)

    monkeypatch.setattr(Scoring, "score", patched)
    code, found = command(tmp_path)
    err = capsys.readouterr().err
    assert code == 5 and "sliding was stopped after" in err and "The result is written all the same." in err
    assert found["val_bpb_artifact"] > 0 and found["val_bpb_sliding"] is None and found["subset_sliding"] is None


def test_a_run_that_did_not_even_score_once(tmp_path, capsys):
    code, found = command(tmp_path, "eval.max_seconds=0.002", "eval.reserve_seconds=0.001", "eval.batch_tokens=64")
    assert code == 5 and found["val_bpb_artifact"] is None and found["val_bpb"] > 0
    assert "not run" in capsys.readouterr().out


def test_training_over_its_limit(tmp_path, capsys, monkeypatch):
    """Calibration counts as training; here an unknown one takes two minutes."""
    booked = TimeLedger.seconds
    monkeypatch.setattr(TimeLedger, "seconds", lambda self, name: 120.0 if name == "calibrate" else booked(self, name))
    code, found = command(tmp_path, "train.max_wallclock_seconds=60")
    assert code == 5 and found["steps"] == 2
    # two steps take less than 10 s of their own even beside other work
    assert re.search(r"training and calibration took 12\d\.\d s, the limit is 60 s", capsys.readouterr().err)


def test_limits_are_saved_and_off_for_zero(tmp_path):
    code, found = command(tmp_path, "eval.max_seconds=0")
    assert code == 0 and found["time_limits"] == {"training": 0.0, "evaluation": 0.0}
    assert {"data", "compile", "train", "quantise", "pack", "evaluate"} <= found["ledger"].keys()
    assert RunConfig().eval.max_seconds == RunConfig().train.max_wallclock_seconds == 600.0


def test_a_reserve_as_large_as_the_limit_is_refused(tmp_path, capsys):
    assert cli.main(["eval.max_seconds=1", "eval.reserve_seconds=1"], {"PRESET": "smoke"}) == 2
    assert "reserve_seconds=1" in capsys.readouterr().err
