"""bench.evaluators: rows of a small run, verdicts of real audits, the page."""

import json

import pytest
from helpers import VOCAB

from bench import evaluators
from pgolf import cli
from pgolf.audit.result import Sizes
from pgolf.ngram.config import SCORER_NAMES


@pytest.fixture(scope="module")
def run_dir(shards, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    environ = {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
               "VOCAB_SIZE": str(VOCAB)}  # fmt: skip
    words = ["train.device=cpu", "train.iterations=2", "train.warmup_steps=0", "eval.max_tokens=300", "eval.stride=0"]
    assert cli.main([*words, f"train.out_dir={out}", "train.run_id=r"], environ) == 0
    return out / "r"


def test_rows_and_page(run_dir, shards, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluators, "verdict", lambda name: {"text": f"verdict on {name}", "tests": {}, "seconds": 0.0})
    data = {"data.path": str(shards), "data.tokenizer_path": str(shards / "tokenizer.model")}
    monkeypatch.setattr(evaluators, "BASE", evaluators.BASE | data | {"eval.stride": "16"})
    only = f"plain;sliding;ttt, SGD on chunks;ngrams;{evaluators.UNSAFE}"
    assert evaluators.main([str(run_dir), "--targets", "400", "--only", only, "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "evaluators.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    assert {"plain", "sliding", "ttt, SGD on chunks", "mixer, trained", evaluators.UNSAFE} <= rows.keys()
    assert {name for name in SCORER_NAMES if name not in ("neural", "mixer")} <= rows.keys()
    assert all(row["targets"] == 400 and row["audit"] in data["audits"] for row in rows.values())
    assert rows["kneser_ney"]["on"] == "sliding" and rows["kneser_ney"]["val_bpb"] < rows["sliding"]["val_bpb"] - 0.05
    page = (tmp_path / "evaluators.md").read_text()
    assert f"| {evaluators.UNSAFE} | sliding |" in page and "| +0.0 |" in page and "2 steps" in page
    assert page.count("verdict on ") == len(rows)
    evaluators.main([str(run_dir), "--targets", "300", "--only", "plain", "--out", str(tmp_path)])
    again = json.loads((tmp_path / "evaluators.json").read_text())
    assert len(again["runs"]) == 2 and len(again["rows"]) == len(rows) and again["rows"][-1]["targets"] == 300


@pytest.mark.parametrize("name, text", [("plain", "passes"), (evaluators.UNSAFE, "**fails** substitution, vector")])
def test_verdicts_are_of_audits(name, text, monkeypatch):
    small = Sizes(length=96, positions=2, substitutions=64, tails=1, noise_tokens=1024, round_trip=24)
    monkeypatch.setattr(evaluators, "Sizes", lambda: small)
    assert evaluators.verdict(name)["text"].startswith(text)


def test_every_row_names_an_audit():
    known = {*evaluators.production.PRODUCTION, *evaluators.CONTROLS}
    assert {audit for _, _, audit in evaluators.EVALUATORS.values()} <= known
    assert {scorer for scorer, _ in evaluators.NGRAMS.values()} | {evaluators.UNSAFE} <= known
