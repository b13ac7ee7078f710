"""From three runs to a folder; and every reason for which runs are no submission."""

import json
import math
import shutil
from statistics import fmean, stdev

import pytest

from pgolf import __main__
from pgolf.artifact import script
from pgolf.errors import ArtifactError, BudgetError, ConfigError
from pgolf.submit import record, runs, submit


@pytest.fixture(autouse=True)
def quick(made, monkeypatch):
    monkeypatch.setattr(script, "make", lambda *_: made)


@pytest.fixture
def copies(three, tmp_path):
    """Copies of the run folders, to be changed."""
    for path in three:
        shutil.copytree(path, tmp_path / path.name)
    return [tmp_path / path.name for path in three]


def facts(path, **changes):
    """Changes facts of a run's result.json."""
    told = json.loads((path / "result.json").read_text())
    told |= {k: v for k, v in changes.items() if k != "ledger"}
    if "ledger" in changes:
        told["ledger"] |= changes["ledger"]
    (path / "result.json").write_text(json.dumps({k: v for k, v in told.items() if v is not None}))


def make(paths, tmp_path, arguments, *more):
    return submit.main([*map(str, paths), "--out", str(tmp_path / "out"), *arguments, *more], {})


def test_the_numbers_are_those_of_the_runs(good, three, made):
    told = record.load((good / "submission.json").read_bytes())
    results = {p["seed"]: p for p in (json.loads((path / "result.json").read_text()) for path in three)}
    scores = [r["val_bpb_sliding"] for r in results.values()]
    assert told.seeds == [1, 2, 3] and told.val_bpb == pytest.approx(fmean(scores), abs=1e-8)
    assert told.val_bpb_std == pytest.approx(stdev(scores))
    for seed, entry in told.seed_results.items():
        assert entry.val_bpb == results[seed]["val_bpb_sliding"] and entry.val_loss == results[seed]["val_loss_sliding"]
        assert entry.artifact_bytes == results[seed]["total_bytes"]
        assert entry.train_wallclock_ms == pytest.approx(1000 * results[seed]["ledger"]["train"]["seconds"])
        assert (good / f"train_seed{seed}.log").read_bytes() == next(
            (p / "train.log").read_bytes() for p in three if p.name == f"s{seed}"
        )
    assert (good / "train_gpt.py").read_bytes() == made.data
    compared = told.raw["comparison"]
    ratio = results[1]["target_bytes"] / results[1]["targets"] * math.log(2)
    assert compared["gain_bpb"] == pytest.approx(0.015, abs=1e-6)
    assert compared["gain_nats_per_token"] == pytest.approx(0.015 * ratio, rel=1e-4)


def test_the_readme_has_every_table_and_says_what_is_missing(good):
    text = (good / "README.md").read_text()
    told = json.loads((good / "submission.json").read_text())
    assert f"**{told['val_bpb']:.5f} bits per byte**" in text and "is **not** passed" in text
    for part in ("## Results", "## Bytes", "## Time", "## Against the baseline", "## Reproduce",
                 "**There is no audit report**", "| mean |", "| **training** |", "0.005 nats per token",
                 "0.005 nats per byte", "SEED=2 python train_gpt.py train.iterations=6"):  # fmt: skip
        assert part in text, part
    assert "/tmp" not in text and "licence" not in text


def test_the_same_runs_give_the_same_folder(good, three, arguments, tmp_path):
    told = json.loads((good / "submission.json").read_text())["comparison"]
    baseline = "earlier=" + ",".join(f"{x:.6f}" for x in told["baseline_val_bpb"])
    assert make(reversed(three), tmp_path, arguments, "--baseline", baseline) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == {
        p.name: p.read_bytes() for p in good.iterdir()
    }


def test_an_audit_goes_into_the_folder(three, made, arguments, tmp_path):
    import hashlib

    report = tmp_path / "report.json"
    report.write_text(json.dumps({"passed": True, "code_sha256": hashlib.sha256(made.data).hexdigest()}))
    assert make(three, tmp_path, arguments, "--audit", str(report)) == 0
    assert (tmp_path / "out/audit.json").read_bytes() == report.read_bytes()
    assert "An audit of the scorer is in `audit.json`" in (tmp_path / "out/README.md").read_text()


def test_what_calibration_read_is_told(copies, arguments, tmp_path):
    """By the runs' own word where they have one, else by their ledgers."""
    told = lambda: json.loads((tmp_path / "out/submission.json").read_text())["calibration"]
    for path in copies:
        facts(path, ledger={"calibrate": {"seconds": 0.1, "counted": "training"}})
    assert make(copies, tmp_path, arguments) == 0 and told() == "train"
    shutil.rmtree(tmp_path / "out")
    for path in copies:
        facts(path, calibration={"source": "generated", "tokens": 100})
    assert make(copies, tmp_path, arguments) == 0 and told() == "generated"


def test_a_checkout_that_moved_on_is_no_obstacle(three, made, arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "make", lambda *_: script.Script(b"another", {}))
    assert make(three, tmp_path, arguments) == 0
    assert (tmp_path / "out/train_gpt.py").read_bytes() == made.data
    assert "without comments" in (tmp_path / "out/README.md").read_text()


UNFIT = {
    "not finished": (lambda p: (p[0] / "result.json").unlink(), "not a finished run, result.json missing"),
    "no artifact": (lambda p: (p[0] / "model.pgolf").unlink(), "model.pgolf missing"),
    "result cut": (lambda p: (p[0] / "result.json").write_text('{"seed": 1,'), "cannot be read"),
    "an older version's": (lambda p: facts(p[0], code_sha256=None), "lacks code_sha256"),
    "no score": (lambda p: facts(p[0], targets=None), "lacks targets"),
    "a text for a number": (lambda p: facts(p[0], val_bpb="1.1"), "val_bpb is no number"),
    "artifact written again": (lambda p: (p[0] / "model.pgolf").write_bytes(b"PGLF"), "not of the size"),
    "script written again": (
        lambda p: (p[0] / "train_gpt_bundle.py").write_bytes(b"x" * (p[0] / "train_gpt_bundle.py").stat().st_size),
        "not the script that ran"),
    "other settings": (lambda p: facts(p[1], settings_digest="0" * 64), "other settings than"),
    "other code": (lambda p: facts(p[1], code_sha256="0" * 64), "is not the script that ran"),
    "another tokenizer": (lambda p: facts(p[1], tokenizer_sha256="0" * 64), "another tokenizer than"),
    "another split": (lambda p: facts(p[1], val_tokens=99), "another validation split"),
    "other bytes": (lambda p: facts(p[1], target_bytes=99), "other byte counts"),
    "the same seed": (lambda p: facts(p[1], seed=3), "seed 3 is also"),
    "a part of the split": (lambda p: facts(p[1], targets=1024), "1,024 of 1,470 targets were scored"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNFIT)
def test_unfit_runs_are_refused_and_nothing_is_written(name, copies, arguments, tmp_path):
    change, text = UNFIT[name]
    change(copies)
    with pytest.raises(ArtifactError, match=text):
        make(copies, tmp_path, arguments)
    assert not list(tmp_path.glob("*out*"))


def test_the_settings_that_differ_are_named(copies, arguments, tmp_path):
    facts(copies[1], settings_digest="0" * 64)
    told = json.loads((copies[1] / "config.json").read_text())
    told["config"]["optim"]["muon"]["lr"] = 0.5
    (copies[1] / "config.json").write_text(json.dumps(told))
    with pytest.raises(ArtifactError, match=r"optim\.muon\.lr is 0\.5 and"):
        make(copies, tmp_path, arguments)


RECORD = ["--track", "10min_16mb"]


def test_over_a_budget_is_code_5(copies, arguments, tmp_path):
    facts(copies[1], total_bytes=16_000_001)
    with pytest.raises(BudgetError, match="16,000,001 bytes, 1 too many"):
        make(copies, tmp_path, arguments)
    facts(copies[1], total_bytes=100, ledger={"evaluate": {"seconds": 612.0, "counted": "evaluation"}})
    with pytest.raises(BudgetError, match=r"612\.0 s of evaluation, the limit is 600"):
        make(copies, tmp_path, arguments, *RECORD)
    facts(copies[1], ledger={"calibrate": {"seconds": 601.5, "counted": "training"}})
    with pytest.raises(BudgetError, match="of training, the limit is 600"):
        make(copies, tmp_path, arguments, *RECORD)


def test_a_record_needs_three_seeds(three, arguments, tmp_path):
    with pytest.raises(ArtifactError, match="2 runs, 3 seeds are needed"):
        make(three[:2], tmp_path, arguments, *RECORD)
    assert make(three[:1], tmp_path, arguments) == 0, "elsewhere one is enough"


def test_a_record_on_other_data_is_written_but_fails_the_check(three, arguments, tmp_path, capsys):
    assert make(three, tmp_path, arguments, *RECORD) == 9
    out = capsys.readouterr().out
    assert "PG062" in out and "PG101" in out


def test_a_folder_with_something_in_it_is_left_alone(three, arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        make(three, tmp_path, arguments)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_baselines(good, tmp_path):
    assert submit.baseline("PR1019=1.1147") == ("PR1019", [1.1147])
    assert submit.baseline("x=1.1,1.2") == ("x", [1.1, 1.2])
    told = json.loads((good / "submission.json").read_text())
    want = ("Smoke", [s["val_bpb"] for s in told["seed_results"].values()])
    assert submit.baseline(str(good)) == submit.baseline(str(good / "submission.json")) == want
    (tmp_path / "submission.json").write_text('{"name": "old", "val_bpb": 1.2}')
    assert submit.baseline(str(tmp_path)) == ("old", [1.2])
    (tmp_path / "submission.json").write_text("{")
    for wrong in ("1.1", "x=", "x=1.1;1.2", "x=nan", "x=-1", "x=0", str(tmp_path), "no/such/folder"):
        with pytest.raises(ConfigError, match="--baseline"):
            submit.baseline(wrong)


def test_wrong_arguments(three, arguments, tmp_path, capsys):
    with pytest.raises(ConfigError, match="expected YYYY-MM-DD"):
        make(three, tmp_path, [*arguments, "--date", "25.11.2026"])
    with pytest.raises(ConfigError, match="two seeds"):
        make(three[:1], tmp_path, arguments, "--baseline", "x=1.1")
    for text in ("[]", "{"):
        (tmp_path / "audit").write_text(text)
        with pytest.raises(ConfigError, match="--audit"):
            make(three, tmp_path, arguments, "--audit", str(tmp_path / "audit"))
    assert not list(tmp_path.glob("*out*"))
    assert __main__.main(["submit", str(tmp_path / "none"), "--out", str(tmp_path / "o"), *arguments], {}) == 2


def test_a_run_folder_that_is_none():
    with pytest.raises(ConfigError, match="is not a folder"):
        runs.load(submit.Path("/nonexistent/run"))
