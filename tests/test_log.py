"""The run's log: events that parse, the challenge's lines to the letter, a console that cannot hurt."""

import errno
import io
import itertools
import json
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from pgolf.errors import SetupError
from pgolf.log import RunLog, final_lines, size_lines, step_line, val_line

# Lines of public logs of the challenge (1x and 8xH100 runs, March 2026), as their parsers expect them
PUBLISHED = {
    "step:5500/20000 train_loss:3.1159 train_time:381824ms step_avg:69.42ms": step_line(5500, 20000, 3.1159, 381824),
    "step:8635/20000 val_loss:2.9361 val_bpb:1.1367 train_time:600051ms step_avg:69.49ms":
        val_line(8635, 20000, 2.9361, 1.1367, 600051),
    "final_int8_zlib_roundtrip val_loss:2.0374 val_bpb:1.2066 eval_time:2658ms":
        final_lines("int8_zlib_roundtrip", 2.03735762, 1.20663794, 2658)[0],
    "final_int8_zlib_roundtrip_exact val_loss:2.03735762 val_bpb:1.20663794":
        final_lines("int8_zlib_roundtrip", 2.03735762, 1.20663794, 2658)[1],
    "Serialized model: 74592783 bytes": size_lines(74592783, 48738)[0],
    "Code size: 48738 bytes": size_lines(74592783, 48738)[1],
    "Total submission size: 74641521 bytes": size_lines(74592783, 48738)[2],
    "Serialized model int8+zlib: 15686654 bytes": size_lines(15686654, 48738, "int8+zlib")[0],
    "Total submission size int8+zlib: 15735392 bytes": size_lines(15686654, 48738, "int8+zlib")[2],
}  # fmt: skip
STEP = re.compile(r"step:(\d+)/(\d+) train_loss:([\d.]+) train_time:(\d+)ms step_avg:([\d.]+)ms")


def a_run(log):
    log.line("model_params:17059912")
    log.step(10, 400, 3.12341, 123.4, lr_scale=0.5, tokens_per_second=12345.6, time_left_s=65.2, grad_norm=1.0)
    log.step(20, 400, 3.0, 246.8, lr_scale=0.4, tokens_per_second=12345.6)
    log.val(20, 400, 2.9, 1.7, 246.8)
    log.stopping_early(600051, 20, 400)
    log.peak_memory(18179 << 20, 19658 << 20)
    log.sizes(15686654, 48738, "int8+zlib")
    log.final("int8_zlib_roundtrip", 2.03735762, 1.20663794, 2658)


def events(folder):
    def strict(text):
        raise ValueError(text)  # NaN and Infinity are not JSON

    return [json.loads(x, parse_constant=strict) for x in (folder / "events.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("published", PUBLISHED)
def test_lines_equal_published_ones(published):
    assert PUBLISHED[published] == published


def test_log_file_keeps_known_lines_and_console_appends(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path, stream=out) as log:
        a_run(log)
    kept = (tmp_path / "train.log").read_text().splitlines()
    assert kept[1] == "step:10/400 train_loss:3.1234 train_time:123ms step_avg:12.34ms"
    assert "stopping_early: wallclock_cap train_time:600051ms step:20/400" in kept
    assert "peak memory allocated: 18179 MiB reserved: 19658 MiB" in kept
    said = out.getvalue().splitlines()
    assert said[1] == kept[1] + " lr_scale:0.5000 tokens/s:12346 time_left:65s"
    assert [STEP.match(a).groups() for a in said[1:3]] == [STEP.fullmatch(b).groups() for b in kept[1:3]]
    assert len(said) == len(kept) and said[3:] == kept[3:]  # without a cap no time_left, nothing else differs
    assert "time_left" not in said[2]


def test_events_are_one_strict_json_object_a_line(tmp_path):
    with RunLog(tmp_path, console=False, stream=io.StringIO()) as log:
        a_run(log)
        log.event("odd", nan=float("nan"), inf=[-float("inf")], tensor=torch.tensor(2.5), scalar=np.float32(0.5),
                  path=tmp_path, text="a\nb ▁", nested={1: (1, None, True)}, flag=np.bool_(True))  # fmt: skip
    got = events(tmp_path)
    assert [e["kind"] for e in got] == ["step", "step", "val", "stopping_early", "peak_memory", "sizes", "final", "odd"]
    assert got[0]["train_loss"] == 3.12341 and got[0]["grad_norm"] == 1.0 and got[0]["time_left_s"] == 65.2
    assert (got[7]["nan"], got[7]["inf"], got[7]["tensor"], got[7]["scalar"]) == ("nan", ["-inf"], 2.5, 0.5)
    assert got[7]["text"] == "a\nb ▁" and got[7]["nested"] == {"1": [1, None, True]} and got[7]["flag"] is True
    assert all(b["t"] >= a["t"] >= 0 for a, b in itertools.pairwise(got))


def test_other_ranks_are_silent(tmp_path):
    out = io.StringIO()
    with RunLog(tmp_path / "run", rank=1, stream=out) as log:
        a_run(log)
        log.progress("sliding", 1, 2)
        with log.phase("train"):
            pass
    assert out.getvalue() == "" and not (tmp_path / "run").exists()


def test_events_are_there_before_the_run_ends_and_final_ones_on_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    log = RunLog(tmp_path, stream=io.StringIO())
    log.event("step", step=1)
    assert len(events(tmp_path)) == 1 and not synced
    log.event("final", val_bpb=1.0)
    assert len(events(tmp_path)) == 2 and len(synced) == 1
    log.close()
    log.close()


def test_a_resumed_run_continues_and_mends_a_torn_line(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"t": 1, "kind": "a"}\n{"t": 2, "ki')
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        log.event("b")
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["kind"] == "b"


@pytest.mark.alone
def test_phases_are_timed_and_failures_shown(tmp_path):
    class Ledger:
        names = []

        def phase(self, name):
            self.names.append(name)
            return io.StringIO()  # any context manager

    out = io.StringIO()
    log, ledger = RunLog(tmp_path, stream=out), Ledger()
    with log.phase("pack", ledger):
        time.sleep(0.02)
    with pytest.raises(KeyError), log.phase("evaluate"):
        raise KeyError
    got = [(e["kind"], e["name"], e.get("ok")) for e in events(tmp_path)]
    assert got == [("phase_start", "pack", None), ("phase_end", "pack", True),
                   ("phase_start", "evaluate", None), ("phase_end", "evaluate", False)]  # fmt: skip
    assert 0.02 <= events(tmp_path)[1]["seconds"] < 2 and ledger.names == ["pack"]
    assert "phase:evaluate failed" in out.getvalue()


def test_progress_is_rare_on_plain_consoles(tmp_path):
    out = io.StringIO()
    log = RunLog(tmp_path, stream=out)
    for i in range(100):
        log.progress("sliding", i, 100)
    assert out.getvalue() == "sliding 0/100 (0 %)\n"


def test_full_disk_warns_once_and_loses_no_later_line(tmp_path, capsys):
    log = RunLog(tmp_path, stream=io.StringIO())
    real = log._events._file

    class Full:
        """Takes 5 bytes, then none, as a disk that fills up."""

        left = 5

        def write(self, raw):
            if not self.left:
                raise OSError(errno.ENOSPC, "No space left on device")
            self.left = 0
            return real.write(raw[:5])

        def fileno(self):
            return real.fileno()

    log._events._file = Full()
    for i in range(3):
        log.event("step", step=i)
    log._events._file = real  # space again
    log.event("final", step=3)
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert len(lines) == 2 and json.loads(lines[1])["step"] == 3
    assert capsys.readouterr().err.count("warning") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_dev_full(tmp_path, capsys):
    os.symlink("/dev/full", tmp_path / "train.log")
    with RunLog(tmp_path, stream=io.StringIO()) as log:
        a_run(log)
    assert len(events(tmp_path)) == 7 and capsys.readouterr().err.count("No space left") == 1


def test_unwritable_folder_is_a_setup_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"train\.out_dir") as caught:
        RunLog(tmp_path / "file" / "run")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("live", [False, True])
def test_closed_stdout_warns_once(tmp_path, capsys, live):
    if live:
        pytest.importorskip("rich")
    out = io.StringIO()
    log = RunLog(tmp_path, console=live, stream=out)
    out.close()
    a_run(log)
    log.close()
    assert len(events(tmp_path)) == 7 and capsys.readouterr().err.count("console cannot be written") == 1


def test_broken_pipe_in_a_process(tmp_path):
    """`train_gpt.py | head -1` goes on to the end."""
    code = (
        "from pgolf.log import RunLog\n"
        f"log = RunLog({str(tmp_path)!r})\n"
        "for i in range(2000): log.line('x' * 1000)\n"
        "log.event('final', ok=True)\nlog.close()\n"
    )
    command = f'"{sys.executable}" -c "$CODE" | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], env={**os.environ, "CODE": code}, capture_output=True, text=True)
    assert done.returncode == 0 and events(tmp_path)[-1]["ok"] is True
    assert done.stderr.count("warning") == 1
    assert len((tmp_path / "train.log").read_text().splitlines()) == 2000


class Terminal(io.TextIOWrapper):
    """A terminal of a given encoding; errors are strict as on a real one."""

    def __init__(self, encoding):
        super().__init__(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)

    def isatty(self):
        return True

    def text(self):
        return self.buffer.getvalue().decode(self.encoding)


@pytest.mark.parametrize("encoding, bar", [("utf-8", "━"), ("ascii", "#"), ("cp1252", "#")])
def test_live_line_in_every_encoding(tmp_path, encoding, bar, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal(encoding)
    with RunLog(tmp_path, stream=terminal) as log:
        a_run(log)
        log.line("a tokenizer's mark: ▁ [not markup]")
        log.progress("sliding", 50, 200)
        log.step(300, 400, 2.0, 1000.0, lr_scale=0.25, tokens_per_second=2e6, time_left_s=61)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text())
    for piece in ("step 300/400", "loss 2.0000", "lr 0.250", "2,000,000 tok/s", "1:01 left", "val 1.7000 bpb", " 75%",
                  "sliding 50/200 (25 %)", "[not markup]", bar):  # fmt: skip
        assert piece in text, piece
    assert "▁" in text if encoding == "utf-8" else "mark: ?" in text
    assert "▁" in (tmp_path / "train.log").read_text(encoding="utf-8")


def test_live_line_stays_one_line_on_a_narrow_terminal(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", "40")
    terminal = Terminal("utf-8")
    with RunLog(tmp_path, stream=terminal) as log:
        log.step(300, 400, 2.0, 1000.0, lr_scale=0.25, tokens_per_second=2e6, time_left_s=61)
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.text())
    assert "300/400" in shown and "\n" not in shown and len(shown.split("\r")[-1]) <= 40


def test_terminal_without_rich_gets_plain_lines(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal("utf-8")
    with RunLog(tmp_path, stream=terminal) as log:
        a_run(log)
    assert STEP.match(terminal.text().splitlines()[1])
