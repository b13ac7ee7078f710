"""Rewrites the golden losses: python -m pytest tests/test_train.py -k golden --basetemp=/tmp/golden, then
python tests/golden/write.py /tmp/golden/runs0/<run directory>."""

import json
import sys
from pathlib import Path

events = map(json.loads, (Path(sys.argv[1]) / "events.jsonl").read_text().splitlines())
losses = [round(e["train_loss"], 6) for e in events if e["kind"] == "step"]
(Path(__file__).parent / "smoke_losses.json").write_text(json.dumps(losses) + "\n")
