"""A run that was killed and taken up again is the run that was not: to the bit on one rank, for any number of kills."""

import errno
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import VOCAB
from resuming import FACTS, SHORT, assert_same_state, last, saving, text
from test_train import events, launch, settings

from pgolf import checkpoint, cli, resume, snapshot
from pgolf.checkpoint import MANIFEST, STATE
from pgolf.config import digest
from pgolf.dist import Dist
from pgolf.errors import ArtifactError, ConfigError, DataError, NumericalError, SetupError
from pgolf.run import run

ROOT = Path(__file__).resolve().parent.parent
# Averages and late QAT start between steps 10 and 20 of 60
ALL_ON = ("average.swa=on", "average.swa.every=2", "average.swa.threshold=0.85", "quant.late_qat.threshold=0.9",
          "schedule.warmdown_iters=50", "train.iterations=60", "train.warmup_steps=0")  # fmt: skip
SCORES = ("val_loss", "val_bpb", "val_bpb_artifact", "val_bpb_sliding", "steps", "tokens", "artifact_bytes")


def told(run_dir, kind, value):
    """{step: every value that was logged for it}: steps that were lost are logged again."""
    out = {}
    for line in (run_dir / "events.jsonl").read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue  # torn by a kill
        if event["kind"] == kind:
            out.setdefault(event["step"], set()).add(event[value])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("cast, loader, seed", [("off", "sequential", 1), ("on", "coprime_a", 2)])
def test_killed_and_resumed_equals_uninterrupted(shards, tmp_path, cast, loader, seed):
    environ = {**os.environ, "PRESET": "smoke", "DATA_PATH": str(shards), "VOCAB_SIZE": str(VOCAB),
               "TOKENIZER_PATH": str(shards / "tokenizer.model"), "OMP_NUM_THREADS": "1"}  # fmt: skip
    options = ["train.device=cpu", "train.checkpoint_every=1", f"kernels.weight_cast={cast}", f"data.loader={loader}"]
    command = [sys.executable, str(ROOT / "tests" / "kill_driver.py"), str(tmp_path), str(seed), *options, *ALL_ON]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout)
    assert report["kills"] >= 30 and len(report["by"]) >= 12
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    facts = last(killed)[1]
    assert facts["phases"] == ["late_qat"] and facts["swa_count"] > 5 and facts["resumes"] > 5
    resumed_at = [e["step"] for e in events(killed, "resume")]
    assert len(resumed_at) >= 20 and len(set(resumed_at)) > 10 and min(resumed_at) < 16 < max(resumed_at)
    assert_same_state(last(whole), last(killed))
    assert (whole / "model.pgolf").read_bytes() == (killed / "model.pgolf").read_bytes()
    want, got = (json.loads((p / "result.json").read_text()) for p in (whole, killed))
    assert {k: got[k] for k in SCORES} == {k: want[k] for k in SCORES}
    for kind, value in (("step", "train_loss"), ("step", "lr_scale"), ("val", "val_bpb")):
        assert told(killed, kind, value) == told(whole, kind, value)
    assert sorted(told(whole, "step", "train_loss")) == list(range(1, 61))
    assert [p.name for p in sorted((killed / snapshot.FOLDER).iterdir())] == ["step-00000059", "step-00000060"]


@pytest.fixture(scope="module")
def finished(shards, tmp_path_factory):
    """A short run that has ended, with all its checkpoints (3, 6, 8): its folder. Copy it before you touch it."""
    out = tmp_path_factory.mktemp("finished")
    run(settings(shards, out, *SHORT, "train.run_id=r"))
    return out / "r"


@pytest.fixture
def halted(finished, tmp_path):
    """The same run as a kill at step 7 would have left it: its folder, `tmp_path`/r."""
    shutil.copytree(finished, tmp_path / "r")
    shutil.rmtree(tmp_path / "r" / snapshot.FOLDER / "step-00000008")
    (tmp_path / "r" / "result.json").unlink()
    return tmp_path / "r"


def again(shards, run_dir, *overrides, allow=(), how="auto"):
    """Takes the run up."""
    chosen = settings(shards, run_dir.parent, *SHORT, f"train.run_id={run_dir.name}", f"train.resume={how}", *overrides)
    return run(replace(chosen, allow_change=tuple(allow)))


def test_checkpoints_by_steps_and_always_after_the_last(finished):
    names = sorted(p.name for p in (finished / snapshot.FOLDER).iterdir())
    assert names == ["step-00000003", "step-00000006", "step-00000008"]
    rows = events(finished, "checkpoint")
    assert [r["step"] for r in rows] == [3, 6, 8] and all(r["bytes"] > 1e5 and r["seconds"] > 0 for r in rows)
    assert json.loads((finished / "result.json").read_text())["ledger"]["checkpoint"]["counted"] is None


def test_the_last_one_is_written_before_the_last_validation(finished):
    kinds = [e["kind"] for e in map(json.loads, (finished / "events.jsonl").read_text().splitlines())]
    assert kinds.index("val") > len(kinds) - 1 - kinds[::-1].index("checkpoint")


@pytest.mark.parametrize("how", ["auto", "run", "folder", "checkpoint"])
def test_resume_goes_on_in_the_same_folder(shards, finished, halted, how):
    folder = halted / snapshot.FOLDER
    path = {"auto": "auto", "run": halted, "folder": folder, "checkpoint": folder / "step-00000003"}[how]
    before = text(halted)
    again(shards, halted, how=path)
    assert_same_state(last(finished), last(halted))
    assert text(halted).startswith(before)  # appended
    (event,) = events(halted, "resume")
    assert event["step"] == (3 if how == "checkpoint" else 6) and event["changes"] == {}
    steps = [e["step"] for e in events(halted, "step")]
    assert steps == [*range(1, 9), *range(event["step"] + 1, 9)]


def test_a_run_that_ended_goes_on_behind_the_training(shards, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "r")
    for name in ("result.json", "model.pgolf"):
        (tmp_path / "r" / name).unlink()
    got = again(shards, tmp_path / "r")
    want = json.loads((finished / "result.json").read_text())
    assert {k: got[k] for k in (*SCORES, "train_seconds")} == {k: want[k] for k in (*SCORES, "train_seconds")}
    assert got["resumes"] == 1 and want["resumes"] == 0
    for facts in (got, want):  # all processes' time
        assert facts["total_seconds"] >= sum(row["seconds"] for row in facts["ledger"].values())
    assert len(events(tmp_path / "r", "step")) == 8  # none was made again


def test_without_average_and_qat_the_last_validation_is_still_there(shards, tmp_path):
    """The float score is then the last validation's, which an ended run has to make again."""
    plain = ("average.ema=none", "quant.late_qat=none")
    want = run(settings(shards, tmp_path, "train.iterations=3", "train.run_id=r", *plain))
    (tmp_path / "r" / "result.json").unlink()
    got = run(settings(shards, tmp_path, "train.iterations=3", "train.run_id=r", "train.resume=auto", *plain))
    assert {k: got[k] for k in SCORES} == {k: want[k] for k in SCORES}


def test_auto_starts_afresh_where_nothing_is(shards, tmp_path):
    again(shards, tmp_path / "r", "train.iterations=2")
    assert "no checkpoint in" in text(tmp_path / "r") and not events(tmp_path / "r", "resume")


def test_auto_starts_afresh_in_a_run_killed_before_its_first(shards, halted):
    shutil.rmtree(halted / snapshot.FOLDER)
    again(shards, halted, "train.iterations=2")
    assert "starts from step 0" in text(halted)
    assert [e["step"] for e in events(halted, "step")] == [*range(1, 9), 1, 2]


def test_what_cannot_be_resumed(shards, finished, halted, tmp_path):
    cases = {
        r"resume=auto needs to know of which run": ("train.resume=auto",),
        r"is no folder": (f"train.resume={tmp_path}/nowhere",),
        r"has no checkpoints/": (f"train.resume={ROOT}/docs",),
        r"leave it out": (f"train.resume={halted}", "train.run_id=other"),
        r"is no run's folder": ("train.resume=auto", f"train.run_id={tmp_path.name}"),
    }
    for words, options in cases.items():
        with pytest.raises(ConfigError, match=words):
            run(settings(shards, tmp_path.parent, *options))
    (halted / "result.json").write_text("{}")
    shutil.rmtree(halted / snapshot.FOLDER)
    with pytest.raises(ConfigError, match="finished run without checkpoints"):
        again(shards, halted)
    (halted / snapshot.FOLDER).mkdir()
    with pytest.raises(ConfigError, match="there is no checkpoint in"):
        again(shards, halted, how=halted)
    assert (halted / "result.json").read_text() == "{}"


def test_an_earlier_run_without_resume_is_left_untouched(shards, halted):
    with pytest.raises(ConfigError, match=r"left untouched.*RESUME=auto"):
        run(settings(shards, halted.parent, "train.run_id=r"))


def test_two_processes_do_not_share_a_run(shards, halted):
    before = text(halted), sorted(p.name for p in (halted / snapshot.FOLDER).iterdir())
    with resume.claimed(halted, Dist()), pytest.raises(SetupError, match="another process is at work"):
        again(shards, halted)
    assert (text(halted), sorted(p.name for p in (halted / snapshot.FOLDER).iterdir())) == before
    again(shards, halted)  # the claim ended with its holder


# -- damage ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no manifest"])
def test_a_damaged_newest_one_costs_some_steps_and_nothing_else(shards, finished, halted, damage):
    bad = halted / snapshot.FOLDER / "step-00000006"
    if damage == "no manifest":
        (bad / MANIFEST).unlink()
    else:
        data = bytearray((bad / STATE).read_bytes())
        data[len(data) // 2] ^= 1
        (bad / STATE).write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    again(shards, halted)
    (event,) = events(halted, "resume")
    assert event["step"] == 3
    assert f"checkpoint passed over: {bad}" in text(halted)
    assert_same_state(last(finished), last(halted))
    checkpoint.read(bad)  # written again


def test_a_damaged_one_that_was_named_is_exit_9(shards, halted, capsys):
    bad = halted / snapshot.FOLDER / "step-00000006"
    os.truncate(bad / STATE, 1000)
    environ = {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
               "VOCAB_SIZE": str(VOCAB), "RESUME": str(bad)}  # fmt: skip
    assert cli.main(["train.device=cpu", f"train.out_dir={halted.parent}", *SHORT], environ) == 9
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and f"{bad / STATE} is damaged: 1,000 bytes" in err and "Traceback" not in err


def resealed(path, change):
    """Facts of somebody who knows the format."""
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest["facts"])
    body = {k: v for k, v in manifest.items() if k != "sha256"}
    (path / MANIFEST).write_text(json.dumps({**body, "sha256": checkpoint._digest(body)}))


@pytest.mark.parametrize("name", FACTS)
def test_facts_of_another_version(shards, halted, name):
    path = halted / snapshot.FOLDER / "step-00000006"
    told_only = {"machine", "world_size", "digest", "pgolf"}  # not needed to go on
    resealed(path, lambda facts: facts.pop(name))
    if name in told_only:
        again(shards, halted)
    else:
        with pytest.raises((ArtifactError, ConfigError)) as caught:  # data: unknown, so a difference to allow
            again(shards, halted)
        assert str(path) in str(caught.value)


def test_a_full_disk_stops_with_one_message_and_keeps_the_last_good_one(
    shards, finished, tmp_path, monkeypatch, capsys
):
    write_file, calls = checkpoint._write_file, []

    def full(path, data):
        calls.append(path)
        if len(calls) == 3:  # the second checkpoint's tensors
            path.write_bytes(data[:1000])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_file(path, data)

    monkeypatch.setattr(checkpoint, "_write_file", full)
    environ = {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
               "VOCAB_SIZE": str(VOCAB), "RUN_ID": "r", "OUT_DIR": str(tmp_path)}  # fmt: skip
    assert cli.main(["train.device=cpu", *SHORT], environ) == 3
    err = capsys.readouterr().err
    assert err.count("error: ") == 1 and "No space left on device" in err and "Traceback" not in err
    assert [p.name for p in (tmp_path / "r" / snapshot.FOLDER).iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    again(shards, tmp_path / "r")
    assert_same_state(last(finished), last(tmp_path / "r"))


def test_a_non_finite_state_is_not_written(shards, tmp_path):
    trainer = saving(shards, tmp_path)
    trainer.step(1.0, 0)
    trainer.step_number = 1
    trainer.saver.save()
    with torch.no_grad():
        trainer.optim.params[0].view(-1)[0] = float("nan")
    trainer.step_number = 2
    with pytest.raises(NumericalError, match=r"model\..*NaN"):
        trainer.saver.save()
    trainer.loader.close()
    assert [p.name for p in (tmp_path / snapshot.FOLDER).iterdir()] == ["step-00000001"]


# -- other settings ----------------------------------------------------------------------------------------------


def test_changed_settings_are_shown_and_refused(shards, halted):
    before = text(halted)
    with pytest.raises(ConfigError) as caught:
        again(shards, halted, "optim.muon.lr=0.5", "train.iterations=9", "average.swa=on")
    message = str(caught.value)
    for words in ("optim.muon.lr", "saved 0.04", "now 0.5", "train.iterations", "saved 8", "now 9",
                  "--allow-change optim.muon.lr", "--allow-change average.swa"):  # fmt: skip
        assert words in message
    assert "--allow-change average.swa.every" not in message  # the section's switch is enough
    assert not events(halted, "resume") and text(halted).startswith(before)


def test_allowed_changes_are_told(shards, halted):
    with pytest.raises(ConfigError, match=r"train\.iterations"):
        again(shards, halted, "optim.muon.lr=0.5", "train.iterations=9", allow=["optim"])
    again(shards, halted, "optim.muon.lr=0.5", "train.iterations=9", allow=["optim.muon", "train.iterations"])
    (event,) = events(halted, "resume")
    assert event["changes"] == {"optim.muon.lr": [0.04, 0.5], "train.iterations": [8, 9]}
    assert events(halted, "step")[-1]["step"] == 9
    assert "optim.muon.lr was 0.04 and is 0.5 from here on" in text(halted)


def test_settings_that_reach_no_weight_may_differ(shards, finished, halted, tmp_path):
    moved = shutil.copytree(shards, tmp_path / "moved")
    again(shards, halted, "train.val_loss_every=2", "train.train_log_every=0", "train.checkpoint_every=0",
          "train.checkpoint_seconds=0", "train.keep_checkpoints=1", "train.warmup_steps=1", f"data.path={moved}",
          f"data.tokenizer_path={moved / 'tokenizer.model'}")  # fmt: skip
    assert_same_state(last(finished), last(halted), but=("digest", "last_losses"))
    assert len(list((halted / snapshot.FOLDER).iterdir())) == 1


def test_checkpoint_settings_do_not_change_what_a_run_is(shards, tmp_path):
    plain = settings(shards, tmp_path).config
    other = settings(shards, tmp_path, "train.checkpoint_every=7", "train.keep_checkpoints=0", "train.run_id=x",
                     "train.resume=auto", "train.checkpoint_seconds=1").config  # fmt: skip
    assert digest(plain) == digest(other) != digest(settings(shards, tmp_path, "train.seed=3").config)


def test_allow_change_on_the_command_line(shards, halted, capsys):
    environ = {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
               "VOCAB_SIZE": str(VOCAB), "RESUME": "auto", "RUN_ID": "r", "OUT_DIR": str(halted.parent)}  # fmt: skip
    command = ["train.device=cpu", *SHORT, "optim.muon.lr=0.5", "loss.z_loss=on"]
    assert cli.main(command, environ) == 2
    assert "--allow-change loss.z_loss --allow-change optim.muon.lr" in capsys.readouterr().err
    for keys, words in ((["--allow-change", "optim.muonn"], "did you mean optim.muon"),
                        (["--allow-change"], "(nothing)")):  # fmt: skip
        assert cli.main([*command, *keys], environ) == 2
        assert words in capsys.readouterr().err
    assert cli.main([*command, "--allow-change", "optim", "--allow-change=loss.z_loss"], environ) == 0
    assert set(events(halted, "resume")[0]["changes"]) >= {"optim.muon.lr", "loss.z_loss"}


def test_another_model_or_optimiser_does_not_fit_even_if_allowed(shards, halted):
    with pytest.raises(ConfigError, match=r"does not fit: model: .*saved \(.*here \("):
        again(shards, halted, "model.mlp.mult=4", allow=["model"])
    with pytest.raises(ConfigError, match=r"does not fit: model: .* missing"):
        again(shards, halted, "model.plan.num_layers=4", allow=["model"])
    with pytest.raises(ConfigError, match=r"optimiser state does not fit: .*\.momentum"):
        again(shards, halted, "optim.side_matrix=adamw", allow=["optim.side_matrix"])


def test_averages_that_a_change_turns_on_or_off(shards, halted, tmp_path):
    shutil.copytree(halted, tmp_path / "off")
    again(shards, halted, "average.swa=on", "average.swa.threshold=1", "average.swa.every=1", allow=["average.swa"])
    tensors, facts = last(halted)
    assert facts["swa_count"] == 2  # steps 7 and 8
    ema = {n: t for n, t in tensors.items() if n.startswith("average.ema.")}
    assert ema and all(n.replace("ema", "swa_sum", 1) in tensors for n in ema)
    again(shards, tmp_path / "off", "average.ema=none", allow=["average"])
    assert not [n for n in last(tmp_path / "off")[0] if n.startswith("average.")]


def test_other_data_is_refused(shards, halted, tmp_path):
    other = shutil.copytree(shards, tmp_path / "other")
    shutil.copy(other / "fineweb_train_000001.bin", other / "fineweb_train_000002.bin")
    with pytest.raises(ConfigError, match=r"data.path +saved 2 shards of .* now 3 shards of"):
        again(shards, halted, f"data.path={other}")
    again(shards, halted, f"data.path={other}", allow=["data.path"])


def test_another_loader_is_refused_by_name(shards, halted):
    with pytest.raises(DataError, match=r"data\.loader"):
        again(shards, halted, "data.loader=coprime_a", allow=["data.loader"])


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_refuse_once(shards, halted):
    os.truncate(halted / snapshot.FOLDER / "step-00000006" / STATE, 10)
    named = f"train.resume={halted / snapshot.FOLDER / 'step-00000006'}"
    done = launch(2, shards, halted.parent, *SHORT, "train.run_id=r", named)
    assert done.returncode != 0 and done.stderr.count("is damaged") == 1
