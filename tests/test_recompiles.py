"""What is compiled again after warm-up is counted and named; it warns once, or ends the run if that was asked for."""

import json

import pytest
import torch

from pgolf import cli
from pgolf.data.batch import Batch
from pgolf.recompiles import Recompiles
from pgolf.train import Trainer


@pytest.fixture
def dynamo_only(monkeypatch):
    """torch.compile without its compiler: tracing and guards are the real ones, at a hundredth of the time."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda fn, **how: compiled(fn, backend="eager", **how))
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def half_batches(monkeypatch):
    """[steps] whose micro-batches have half the rows and so another shape than those of warm-up."""
    steps, take_step = [], Trainer.step

    def step(self, lr_scale, n):
        if self.step_number == n and n in steps:
            whole = self.loader.next_batch

            def half():
                batch = whole()
                rows = len(batch.ids) // 2
                return Batch(batch.ids[:rows].contiguous(), batch.targets[:rows].contiguous())

            self.loader.next_batch = half
            try:
                return take_step(self, lr_scale, n)
            finally:
                self.loader.next_batch = whole
        return take_step(self, lr_scale, n)

    monkeypatch.setattr(Trainer, "step", step)
    return steps


def command(out, *overrides):
    """(exit code, run directory) of a small compiled run."""
    common = ["train.device=cpu", f"train.out_dir={out}", "train.run_id=r", "train.iterations=5", "quant.late_qat=none"]
    return cli.main([*common, "train.compile=on", *overrides], {"PRESET": "smoke"}), out / "r"


def events(path, kind):
    return [e for e in map(json.loads, (path / "events.jsonl").read_text().splitlines()) if e["kind"] == kind]


def test_late_qat_is_warmed_up_for_steps(tmp_path, dynamo_only):
    """Without a weight cast it is a second graph, of which warm-up makes both; that of the validation is noted."""
    code, path = command(tmp_path, "quant.late_qat=on", "quant.late_qat.threshold=0.6", "schedule.warmdown_iters=4")
    found = json.loads((path / "result.json").read_text())
    assert code == 0 and len(events(path, "phase")) == 1
    assert "train" not in found["recompiles_by_phase"]
    assert "warning: compiled again" not in (path / "train.log").read_text()


def test_a_recompile_is_counted_named_and_warned_of_once(tmp_path, dynamo_only, half_batches):
    half_batches += [2]
    code, path = command(tmp_path)
    found = json.loads((path / "result.json").read_text())
    assert code == 0 and found["recompiles"] == found["recompiles_by_phase"]["train"] == 1
    (event,) = events(path, "recompile")
    assert event["step"] == 3 and "size mismatch" in event["guard"] and "ids" in event["guard"]
    assert "__call__" in event["function"] and "objective.py:" in event["function"]
    log = (path / "train.log").read_text()
    assert log.count("warning: compiled again in phase train, step 3: ") == 1 and event["guard"] in log


def test_a_recompile_ends_the_run_where_asked_for(tmp_path, dynamo_only, half_batches, capsys):
    half_batches += [2]
    code, path = command(tmp_path, "train.fail_on_recompile=true")
    err = capsys.readouterr().err
    assert code == 5 and "step 3 compiled again" in err and "size mismatch" in err and "Traceback" not in err
    assert not (path / "result.json").exists()


def test_without_compiling_nothing_is_counted(tmp_path, half_batches):
    half_batches += [2]
    code, path = command(tmp_path, "--no-compile", "train.fail_on_recompile=true")
    found = json.loads((path / "result.json").read_text())
    assert code == 0 and found["recompiles"] == 0 and found["recompiles_by_phase"] == {}


@pytest.mark.slow
def test_with_the_real_compiler():
    torch._dynamo.reset()

    def double(x):
        return (2 * x).sum()

    compiled = torch.compile(double, fullgraph=True, dynamic=False)
    compiled(torch.ones(3, requires_grad=True)).backward()
    counted = Recompiles()
    compiled(torch.ones(3, requires_grad=True)).backward()
    assert counted.new("train") == []
    compiled(torch.ones(4, requires_grad=True)).backward()
    (one,) = counted.new("train")
    assert one.function.startswith("double (") and "expected 3, actual 4" in one.guard
    assert counted.new("evaluate") == [] and counted.by_phase() == {"train": 1}
    torch._dynamo.reset()
