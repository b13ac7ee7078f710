"""A run from the counted script is a run of the package: the same losses and the same artifact, bit for bit."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT, VOCAB

QUICK = ("train.iterations=2", "train.warmup_steps=0", "train.val_loss_every=0", "train.keep_checkpoints=0",
         "eval.max_tokens=256", "eval.sliding_max_tokens=128")  # fmt: skip
SAME = ("val_loss", "val_bpb", "val_bpb_artifact", "val_bpb_sliding", "artifact_bytes", "steps", "settings_digest")


def train(script, shards, out):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    clean |= {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
              "VOCAB_SIZE": str(VOCAB), "OMP_NUM_THREADS": "1"}  # fmt: skip
    command = [sys.executable, str(script), f"train.out_dir={out}", "train.run_id=r", "train.device=cpu", *QUICK]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, cwd=script.parent, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    events = [json.loads(line) for line in (out / "r/events.jsonl").read_text().splitlines()]
    losses = [e["train_loss"] for e in events if e["kind"] == "step"]
    return losses, json.loads((out / "r/result.json").read_text()), (out / "r/model.pgolf").read_bytes()


@pytest.mark.slow
def test_bundle_run_equals_package_run(shards, made, tmp_path):
    """In an empty folder, without the package on the path."""
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "train_gpt.py").write_bytes(made.data)
    losses, result, artifact = train(ROOT / "train_gpt.py", shards, tmp_path / "package")
    again, told, copy = train(alone / "train_gpt.py", shards, tmp_path / "bundle")
    assert len(losses) == 2 and again == losses and copy == artifact
    assert {k: told[k] for k in SAME} == {k: result[k] for k in SAME}
    assert told["code_bytes"] == len(made.data), "a run from a bundle counts that bundle"
