"""Rewrites the golden losses from a finished smoke run's events: python tests/golden/write.py RUN_DIR."""

import json
import sys
from pathlib import Path

events = map(json.loads, (Path(sys.argv[1]) / "events.jsonl").read_text().splitlines())
losses = [round(e["train_loss"], 6) for e in events if e["kind"] == "step"]
(Path(__file__).parent / "smoke_losses.json").write_text(json.dumps(losses) + "\n")
