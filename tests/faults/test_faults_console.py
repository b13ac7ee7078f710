"""Consoles: another encoding, no terminal, a narrow one, no colours, nobody reading."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT, VOCAB
from provoke import SHORT

ODD = "donn\u00e9es \u2581\u4e2d"  # cp1252 has the first word only


def command(shards, tmp_path, *overrides, **environ):
    """(command, environment) of a short run whose folder has a name that few encodings know."""
    base = {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model"),
            "VOCAB_SIZE": str(VOCAB), "OUT_DIR": str(tmp_path / ODD), "RUN_ID": "r",
            "OMP_NUM_THREADS": "1"}  # fmt: skip
    return [sys.executable, "train_gpt.py", *SHORT, "train.iterations=2", *overrides], os.environ | base | environ


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
def test_console_that_cannot_print_unicode(shards, tmp_path, encoding):
    args, environ = command(shards, tmp_path, PYTHONIOENCODING=encoding)
    done = subprocess.run(args, env=environ, cwd=ROOT, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    said = done.stdout.decode(encoding)
    assert ("donn\u00e9es ??" if encoding == "cp1252" else "donn?es ??") in said and "\x1b" not in said
    assert ODD in (tmp_path / ODD / "r" / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("what", [["--help"], ["--describe", f"train.run_id={ODD}"], [f"{ODD}=1"]], ids=lambda w: w[0])
def test_command_line_that_cannot_print_unicode(encoding, what):
    environ = os.environ | {"PYTHONIOENCODING": encoding, "PRESET": "smoke"}
    done = subprocess.run([sys.executable, "train_gpt.py", *what], env=environ, cwd=ROOT, capture_output=True)
    assert done.returncode == (0 if what[0].startswith("--") else 2) and b"Traceback" not in done.stderr
    assert (done.stdout or done.stderr).decode(encoding)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_narrow_terminal_without_colours(shards, tmp_path):
    """A live line that fits 20 columns, no colour codes under NO_COLOR; the log is as ever."""
    pytest.importorskip("rich")
    args, environ = command(shards, tmp_path, NO_COLOR="1", COLUMNS="20", TERM="xterm")
    ours, theirs = os.openpty()
    with subprocess.Popen(args, env=environ, cwd=ROOT, stdout=theirs, stderr=subprocess.PIPE) as process:
        os.close(theirs)
        said = b""
        while block := read(ours):
            said += block
        err = process.stderr.read()
    os.close(ours)
    text = said.decode()
    assert (process.returncode, err) == (0, b"")
    assert not re.search(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])m", text), "colours"
    live = [x for x in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)) if "%  step" in x]
    assert live and all(len(x) <= 20 for x in live), live
    assert (tmp_path / ODD / "r" / "result.json").exists()


def read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except OSError:  # Linux says so when the other side is closed
        return b""
