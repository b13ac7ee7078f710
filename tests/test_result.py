"""result.json, its text and its curves."""

import json
import os
import subprocess
import sys

import pytest

from pgolf.errors import NumericalError, PgolfError, SetupError
from pgolf.result import LIMIT, REQUIRED, _read_curves, plot_curves, print_result, result_lines, write_result

RESULT = {
    "preset": "cpu", "seed": 1337, "world_size": 1, "device": "cpu", "parameters": 1234567, "steps": 400,
    "tokens": 819200, "train_seconds": 150.0, "total_seconds": 201.5, "val_loss": 2.5, "val_bpb": 1.5,
    "val_bpb_artifact": 1.5123, "val_bpb_sliding": 1.4321, "artifact_bytes": 900000, "code_bytes": 60000,
    "total_bytes": 960000, "tokens_per_second": 5461.3,
}  # fmt: skip


def test_round_trip_and_nothing_left_behind(tmp_path):
    path = write_result(tmp_path / "new" / "run", RESULT)
    assert json.loads(path.read_text()) == RESULT
    write_result(path.parent, {**RESULT, "steps": 401})
    assert json.loads(path.read_text())["steps"] == 401 and os.listdir(path.parent) == ["result.json"]


@pytest.mark.parametrize("key", REQUIRED)
def test_each_required_key_is_required(key, tmp_path):
    with pytest.raises(PgolfError, match=f"keys missing: {key};"):
        write_result(tmp_path, {k: v for k, v in RESULT.items() if k != key})
    assert not os.listdir(tmp_path)


def test_non_finite_numbers_and_unwritable_folders(tmp_path):
    with pytest.raises(NumericalError, match="not finite"):
        write_result(tmp_path, {**RESULT, "val_loss": float("nan")})
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"train\.out_dir"):
        write_result(tmp_path / "file" / "run", RESULT)


def test_a_failed_write_keeps_the_old_result(tmp_path, monkeypatch):
    path = write_result(tmp_path, RESULT)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(SetupError, match="No space left"):
        write_result(tmp_path, {**RESULT, "steps": 1})
    assert json.loads(path.read_text()) == RESULT and os.listdir(tmp_path) == ["result.json"]


def test_lines_say_the_numbers():
    ledger = {"train": {"seconds": 150.0, "counted": "training"}, "pack": {"seconds": 1.5, "counted": None}}
    full = {**RESULT, "bytes_by_group": {"int6": 800000, "scales": 100000}, "ledger": ledger,
            "subset": "first 4,096 of 187,000 targets of the val split"}  # fmt: skip
    said = []
    print_result(full, said.append)
    text = "\n".join(said)
    for piece in ("1.5000", "1.5123", "1.4321", "+0.0123", "15,040,000", "16,000,000", "800,000", "960,000",
                  "150.00 s  training", "= all", "1,234,567 parameters", "first 4,096 of 187,000"):  # fmt: skip
        assert piece in text, piece
    assert all(len(line) <= 120 and "\n" not in line for line in said)
    assert any("OVER" in line and line.split()[-1] == "1" for line in result_lines({**full, "total_bytes": 16_000_001}))
    assert not any("OVER" in line for line in result_lines({**full, "total_bytes": 16_000_000}))


def test_lines_of_a_run_without_artifact_or_sliding_pass():
    none = dict.fromkeys(("val_bpb_artifact", "val_bpb_sliding", "artifact_bytes", "total_bytes"))
    text = "\n".join(result_lines({**RESULT, **none}))
    assert text.count("not run") == 2 and "no artifact was written" in text and "gap" not in text


EVENTS = [
    *({"t": i, "kind": "step", "step": i, "train_loss": 7 - i / 10, "lr_scale": 1 - i / 40} for i in range(1, 41)),
    {"t": 99, "kind": "val", "step": 40, "val_loss": 3.1, "val_bpb": 1.9},
    {"t": 100, "kind": "final", "name": "x"},
]


def test_curves_are_drawn_and_torn_lines_skipped(tmp_path):
    pytest.importorskip("matplotlib")
    lines = [json.dumps(e) for e in EVENTS]
    lines.insert(3, '{"t": 1, "kind": "st')
    lines.insert(9, json.dumps({"kind": "step", "step": 9, "train_loss": "nan", "lr_scale": 1.0}))
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    png = plot_curves(tmp_path / "events.jsonl", tmp_path / "curves.png")
    data = png.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(data[16:20], "big") >= 800


def test_no_matplotlib_no_events_no_file_are_one_line_each(tmp_path, monkeypatch):
    said = []
    assert plot_curves(tmp_path / "missing", tmp_path / "a.png", said.append) is None
    (tmp_path / "events.jsonl").write_text('{"kind": "final"}\n')
    assert plot_curves(tmp_path / "events.jsonl", tmp_path / "a.png", said.append) is None
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, EVENTS)))
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if not installed
    assert plot_curves(tmp_path / "events.jsonl", tmp_path / "a.png", said.append) is None
    assert len(said) == 3 and "pip install matplotlib" in said[2] and "has no steps" in said[1]
    assert not (tmp_path / "a.png").exists()


def test_the_limit_is_the_budgets():
    from pgolf.artifact import budget

    assert LIMIT == budget.LIMIT == 16_000_000


def test_importing_it_is_light():
    code = "import sys, pgolf.result, pgolf.log; print({'torch', 'matplotlib', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_events_without_their_numbers_are_left_out(tmp_path):
    lines = [json.dumps({"kind": "step", "step": 1, "train_loss": 2.0, "lr_scale": 1.0})]
    good = dict(json.loads(lines[0]))
    for change in ({"step": None}, {"train_loss": "abc"}, {"lr_scale": [1]}, {"kind": ["step"]}, {"step": 10**400}):
        lines.append(json.dumps({**good, **change}))
    lines += ["[" * 100_000, "7", '{"kind": "resume"}', '{"kind": "step"}']
    (tmp_path / "events.jsonl").write_text("\n".join(lines))
    assert _read_curves(tmp_path / "events.jsonl") == ([{"step": 1.0, "train_loss": 2.0, "lr_scale": 1.0}], [])
