"""Three finished smoke runs, and the folder that `pgolf submit` makes of them."""

import json
import shutil

import helpers
import pytest
from helpers import VOCAB

from pgolf import config, finish
from pgolf.artifact import script
from pgolf.run import run
from pgolf.submit import submit

SEEDS = (3, 1, 2)
# Every target is scored, as a submission must
ALL = ("train.iterations=6", "train.warmup_steps=0", "eval.max_tokens=0", "eval.sliding_max_tokens=0", "eval.stride=32",
       "train.keep_checkpoints=0")  # fmt: skip


@pytest.fixture(scope="session")
def made():
    """The script of this checkout."""
    return helpers.made()


@pytest.fixture(scope="session")
def three(shards, made, tmp_path_factory):
    """Run folders of three seeds."""
    out = tmp_path_factory.mktemp("three")
    environ = {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
               "VOCAB_SIZE": str(VOCAB)}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "bundle", lambda: made.data)
        for seed in SEEDS:
            own = [f"train.seed={seed}", f"train.run_id=s{seed}", f"train.out_dir={out}", "train.device=cpu"]
            run(config.load([*own, *ALL], environ))
    return [out / f"s{seed}" for seed in SEEDS]


@pytest.fixture(scope="session")
def arguments():
    """What `pgolf submit` is told besides runs and folder."""
    return ["--name", "Smoke", "--author", "A. U. Thor", "--github-id", "author", "--date", "2026-11-25", "--track",
            "non_record_16mb", "--tuned-on", "nothing", "--blurb", "Three smoke runs, to test the tools."]  # fmt: skip


@pytest.fixture(scope="session")
def good(three, made, arguments, tmp_path_factory):
    """The folder of the three runs, against a baseline that they beat. Not to be changed."""
    out = tmp_path_factory.mktemp("records") / "track_non_record_16mb" / "2026-11-25_Smoke"
    scores = [json.loads((path / "result.json").read_text())["val_bpb_sliding"] for path in three]
    worse = ",".join(f"{score + 0.015:.6f}" for score in scores)
    out.parent.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "make", lambda *_: made)
        code = submit.main([*map(str, three), "--out", str(out), "--baseline", f"earlier={worse}", *arguments], {})
    assert code == 0
    return out


@pytest.fixture
def folder(good, tmp_path):
    """A copy of the good folder, to be broken."""
    place = tmp_path / good.parent.name / good.name
    shutil.copytree(good, place)
    return place
