"""What the README's first command runs, as a user runs it: no settings, no data, no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pgolf import aliases

ROOT = Path(__file__).resolve().parent.parent
REQUIRED = {
    "preset", "seed", "world_size", "device", "parameters", "steps", "tokens", "train_seconds", "total_seconds",
    "val_loss", "val_bpb", "val_bpb_artifact", "val_bpb_sliding", "artifact_bytes", "code_bytes", "total_bytes",
    "tokens_per_second",
}  # fmt: skip


@pytest.mark.alone
@pytest.mark.slow
def test_main_job(tmp_path):
    """Within 4 minutes on 2 cores, at most 1.65 bits per byte from the reloaded bytes with the sliding window."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU the default is rat_rod_green on FineWeb shards, a ten-minute job")
    clean = {k: v for k, v in os.environ.items() if k not in aliases.KNOWN and not k.startswith("OMP_")}
    command = [sys.executable, str(ROOT / "train_gpt.py"), f"train.out_dir={tmp_path}"]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.iterdir()
    result = json.loads((path / "result.json").read_text())
    assert result.keys() >= REQUIRED and result["preset"] == "cpu"
    assert result["total_seconds"] < 240
    assert result["val_bpb_sliding"] <= 1.65
    assert result["val_bpb_artifact"] - result["val_bpb"] < 0.01
    assert result["total_bytes"] <= 16_000_000
    for part in ("Bits per byte", "quantisation gap", "Bytes", "Time", "of the val split"):
        assert part in done.stdout
