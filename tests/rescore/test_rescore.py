"""A run with every pass that is no adaptation, and `pgolf eval` on what it leaves."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from helpers import VOCAB
from ranks import on_ranks

from pgolf import __main__ as program
from pgolf import cli, config, extras, scoring
from pgolf.artifact.model_io import load
from pgolf.data.source import open_data
from pgolf.dist import Dist
from pgolf.eval.keep import Keeper
from pgolf.eval.ledger import Ledger
from pgolf.eval.neural import Neural, Temperature
from pgolf.ngram.config import SCORER_NAMES
from pgolf.rescore import command

TARGETS = 700
RUN = ("train.device=cpu", "train.iterations=4", "train.warmup_steps=0", f"eval.max_tokens={TARGETS}", "ngram=on",
       f"eval.sliding_max_tokens={TARGETS}", "eval.documents=on", "eval.temperature=on", "eval.temperature.targets=900",
       "ngram.scorer=mixer", "ngram.orders=1,2,3")  # fmt: skip


def environ_of(shards):
    return {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
            "VOCAB_SIZE": str(VOCAB)}  # fmt: skip


@pytest.fixture(scope="module")
def made(shards, tmp_path_factory):
    """(run's folder, its result)."""
    out = tmp_path_factory.mktemp("run")
    assert cli.main([*RUN, f"train.out_dir={out}", "train.run_id=r"], environ_of(shards)) == 0
    return out / "r", json.loads((out / "r" / "result.json").read_text())


def evaluate(made, shards, tmp_path, *words):
    """`pgolf eval` -> (exit code, eval.json)."""
    environ = {k: v for k, v in environ_of(shards).items() if k.endswith("PATH")}
    code = program.main(["eval", str(made[0]), *words, "--out", str(tmp_path)], environ)
    path = tmp_path / "eval.json"
    return code, json.loads(path.read_text()) if path.exists() else None


def test_a_run_scores_every_pass_and_the_last_is_its_score(made):
    path, result = made
    scores = {s["pass"]: s for s in result["scores"]}
    assert list(scores) == ["plain", "sliding", "documents", "ngram"]
    assert scores["plain"]["val_bpb"] == result["val_bpb_artifact"]
    assert scores["sliding"]["val_bpb"] == result["val_bpb_sliding"]
    assert scores["ngram"]["val_bpb"] == result["val_bpb_final"] and result["score_pass"] == "ngram"
    assert scores["ngram"]["val_bpb"] < scores["documents"]["val_bpb"] - 0.05  # four steps have taught it little
    assert all(s["targets"] == TARGETS and s["order"] == "stream" for s in scores.values())
    assert scores["ngram"]["name"].startswith("mixer on documents")
    log = (path / "train.log").read_text()
    assert "temperature " in log and "mixer fitted on" in log and "_ngram_exact val_loss:" in log
    assert f"ledger_digest:{result['ledger_digest']}" in log and not (path / "evaluation").exists()


def test_the_artifact_holds_what_was_chosen_on_training_data(made):
    loaded = load((made[0] / "model.pgolf").read_bytes())
    temperature = extras.temperature_of(loaded.extras)
    assert temperature == Temperature(loaded.extras["temperature"]["value"]) and 0.7 <= temperature.value <= 1.4
    mixer = extras.mixer_of(loaded.extras)
    assert {w.dtype for w in mixer.values()} == {torch.float16} and sum(w.numel() for w in mixer.values()) == 44


def test_eval_repeats_the_runs_scores(made, shards, tmp_path, capsys):
    code, found = evaluate(made, shards, tmp_path, "--passes", "plain,sliding,documents")
    assert code == 0
    scores = {s["pass"]: s["val_bpb"] for s in made[1]["scores"]}
    rows = {row["pass"]: row for row in found["rows"]}
    assert set(rows) == {"plain", "sliding", "documents"}  # the settings' scorer is on all three
    assert rows["documents"]["scorer"] == "mixer"
    assert rows["documents"]["val_bpb"] == pytest.approx(scores["ngram"], abs=1e-6)
    out = capsys.readouterr().out
    assert out.startswith("| pass") and (tmp_path / "eval.md").read_text().strip() == out.strip()
    assert (tmp_path / "eval.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_runs_the_neural_part_once_and_then_never(made, shards, tmp_path, monkeypatch, capsys):
    """All scorers at once; the second sweep has other settings and no neural pass."""
    calls = []
    score = scoring.Scoring.score
    monkeypatch.setattr(scoring.Scoring, "score", lambda self, one, r=(): calls.append(1) or score(self, one, r))
    code, found = evaluate(made, shards, tmp_path, "ngram.hint_orders=1,2", "ngram.hint_count=1", "--ngrams", "all")
    rows = {row["scorer"]: row for row in found["rows"]}
    assert code == 0 and set(rows) == {"none", *SCORER_NAMES} and len(calls) == 1
    assert rows["neural"]["val_bpb"] == pytest.approx(rows["none"]["val_bpb"], abs=1e-6)
    for name in ("dirichlet", "kneser_ney", "ppm_c", "hedge"):
        assert rows[name]["gain_bpb"] > 0.05, name
    words = ("ngram.hint_orders=1,2", "ngram.hint_count=1", "--ngrams", "dirichlet", "--grid", "ngram.concentration=1",
             "5", "50,20,8")  # fmt: skip
    _, again = evaluate(made, shards, tmp_path, *words)
    assert len(calls) == 1 and [row["neural_seconds"] for row in again["rows"]] == [0.0] * 4
    assert again["rows"][0]["val_bpb"] == rows["none"]["val_bpb"]
    assert len({row["val_bpb"] for row in again["rows"]}) == 4 and "kept" in capsys.readouterr().out
    assert again["best"] in (1, 2, 3)
    # other statistics than were kept, and distributions, which are not: the neural pass again, and it says why
    evaluate(made, shards, tmp_path, "ngram.hint_orders=3", "ngram.hint_count=1", "--ngrams", "tilt")
    evaluate(made, shards, tmp_path, "--ngrams", "ppm_c")
    err = capsys.readouterr().err
    assert len(calls) == 3 and "lack the probabilities of hints" in err and "ppm_c needs whole distributions" in err


def test_a_checkpoint_scores_like_the_float_weights(made, shards, tmp_path):
    (saved,) = (made[0] / "checkpoints").iterdir()
    code, found = evaluate((saved,), shards, tmp_path, "ngram=none", "--passes", "plain")
    assert code == 0 and found["model"].endswith("ema weights")
    assert found["rows"][0]["val_bpb"] == pytest.approx(made[1]["val_bpb"], abs=1e-6)


def test_training_text_is_there_to_choose_settings_on(made, shards, tmp_path):
    code, found = evaluate(made, shards, tmp_path, "--split", "train", "--max-tokens", "300", "--ngrams", "dirichlet")
    assert code == 0 and found["split"] == "train" and found["rows"][0]["targets"] == 300
    assert "training text of fineweb_train_000001.bin" in found["data"]


BAD = {
    "no such thing": (["--passes", "slide"], "these settings have plain, sliding, documents; did you mean sliding?"),
    "a pass that is off": (["--passes", "ttt"], "these settings have"),
    "no such scorer": (["--ngrams", "kneser"], "kneser_ney"),
    "the unsafe one": (["--ngrams", "legacy_hashed_unsafe"], "there are neural"),
    "a training setting": (["optim.muon.lr=0.1"], "optim.muon.lr: the model is trained with another value"),
    "a model setting": (["model.softcap=10"], "model.softcap: the model is trained with another value"),
    "no axis": (["--grid", "ngram.discont=0.1"], "ngram.discount"),
    "a bad value": (["--grid", "ngram.power=much"], "ngram.power=much must be"),
    "out of range": (["--grid", "ngram.power=2"], "ngram.power=2.0 must be at most 1"),
    "no targets": (["--max-tokens", "0"], "expected at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_message_and_exit_code_2(case, made, shards, tmp_path, capsys):
    words, expected = BAD[case]
    code, _ = evaluate(made, shards, tmp_path, *words)
    err = capsys.readouterr().err
    assert code == 2 and expected in err and "Traceback" not in err


def test_what_cannot_be_evaluated(made, shards, tmp_path, capsys):
    assert program.main(["eval", str(tmp_path)], {}) == 2
    assert "holds nothing to evaluate" in capsys.readouterr().err
    (tmp_path / "model.pgolf").write_bytes(b"x" * 100)
    assert program.main(["eval", str(tmp_path)], {"PRESET": "smoke", "DEVICE": "cpu"}) == 9
    assert "not a pgolf artifact" in capsys.readouterr().err


def test_another_tokenizer_is_refused(made, shards, tmp_path, monkeypatch, capsys):
    opened = command.open_subject
    monkeypatch.setattr(command, "open_subject", lambda *args: replace(opened(*args), tokenizer="0" * 64))
    assert evaluate(made, shards, tmp_path)[0] == 2
    assert "trained with another tokenizer (sha256 000000000000..." in capsys.readouterr().err


@pytest.mark.parametrize("scorer", ["hedge", "ppm_c"])
def test_ranks_agree_with_one(scorer, made, shards):
    """Statistics of two ranks, gathered, then scored in order on each."""
    words = [*RUN, f"ngram.scorer={scorer}", "eval.stride=0", "eval.documents=none", "eval.max_tokens=600"]
    cfg = config.load(words, environ_of(shards)).config
    data = open_data(cfg.data, VOCAB, torch.device("cpu"), lambda text: None)
    loaded = load((made[0] / "model.pgolf").read_bytes())

    def work(dist):
        one = scoring.Scoring(cfg, Neural(loaded.model), data, dist, label="x")
        return [score.result for score in one.run()]

    (alone,), two = [work(Dist())], on_ranks(2, work)
    assert [r.name for r in alone][-1].startswith(scorer)
    for results in two:
        for a, b in zip(alone, results, strict=True):
            assert b.val_bpb == pytest.approx(a.val_bpb, abs=1e-6) and b.targets == a.targets
    assert two[0][1].ledger.digest() == two[1][1].ledger.digest()


class Killed(BaseException):
    """As if the process had died."""


def test_a_run_that_is_killed_while_it_scores_goes_on_there(shards, tmp_path, monkeypatch):
    """RESUME=auto: no step again, the same artifact, the pass behind its last save, and the scores of a whole run."""
    words = ["train.device=cpu", "train.iterations=2", "train.warmup_steps=0", "eval.max_tokens=600", "ttt=on",
             "eval.sliding_max_tokens=600", "eval.batch_tokens=256", "eval.save_seconds=1e-9", "ttt.sgd.chunk=128",
             "ngram=on", "eval.stride=32"]  # fmt: skip
    command = lambda out, **more: cli.main(
        [*words, f"train.out_dir={out}", "train.run_id=r"], environ_of(shards) | more
    )
    result = lambda out: json.loads((out / "r" / "result.json").read_text())
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert command(whole) == 0
    with monkeypatch.context() as patch:
        maybe = Keeper.maybe

        def dying(self, done, state):
            maybe(self, done, state)
            if self.label.endswith("ttt") and done == 3:
                raise Killed

        patch.setattr(Keeper, "maybe", dying)
        with pytest.raises(Killed):
            command(cut)
    assert command(cut, RESUME="auto") == 0
    assert "_ttt: goes on behind round 3, saved " in (cut / "r" / "train.log").read_text()
    named = lambda out: [(s["pass"], s["val_bpb"], s["ledger_digest"]) for s in result(out)["scores"]]
    assert named(cut) == named(whole) and [name for name, *_ in named(cut)] == ["plain", "sliding", "ttt", "ngram"]
    assert not list((cut / "r" / "evaluation").iterdir())


@pytest.mark.dist
@pytest.mark.alone
def test_two_processes_agree_with_one(made, shards, tmp_path, root):
    """Under torchrun: chunks of the stream, one of them with a rank that has no sequence, and n-grams on top."""
    words = [str(made[0]), "ttt=on", "ttt.sgd.chunk=256", "ttt.sgd.lr=0.05", "ttt.sgd.step_rows=3", "eval.stride=16",
             "eval.documents=none", "ngram.scorer=hedge", "--passes", "ttt", "--max-tokens", "600"]  # fmt: skip
    environ = {
        **os.environ,
        **{k: v for k, v in environ_of(shards).items() if k.endswith("PATH")},
        "PYTHONPATH": str(root),
    }
    bpb = {}
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
        command = [sys.executable, *launcher, "-m", "pgolf", "eval", *words, "--out", str(out)]
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        rows = json.loads((out / "eval.json").read_text())["rows"]
        bpb[ranks] = [row["val_bpb"] for row in rows]
        assert done.stdout.count("| pass") == 1  # one rank speaks
    assert len(bpb[1]) == 1 and bpb[2] == pytest.approx(bpb[1], abs=1e-5)


def test_counts_learn_after_the_score_in_the_ledger():
    neural = Ledger()
    neural.score("neural", [(0, 100)])
    for chunk in (0, 30, 100):
        ledger = scoring.with_counts(neural, 100, chunk)
        assert ledger.problems(100) == [] and ledger.digest() != neural.digest()
    assert len(scoring.with_counts(neural, 100, 30).events) == 1 + 2 * 4


def test_damaged_extras_are_refused():
    from pgolf.errors import ArtifactError

    for bad in ({"value": "x", "adaptive": False}, {}, {"value": -1, "adaptive": False}, 7):
        with pytest.raises(ArtifactError):
            extras.temperature_of({"temperature": bad})
    for bad in (7, {"a": 3}, {"a": [[2], "AAAA"]}):
        with pytest.raises(ArtifactError):
            extras.mixer_of({"mixer": bad})


def test_the_command_line_names_its_settings():
    assert "--split train scores training text instead" in " ".join(command._parser().format_help().split())
