"""Disks that are full, read-only or refuse to run code: exit code 3, both numbers, and what was written stays."""

import io
import json
import os
import shutil
import sysconfig
from pathlib import Path

import pytest
from provoke import at_step, before, content, fill, free, launch, mounted, refused, remount, small_bundle

from pgolf import checkpoint, config, finish, result
from pgolf.data import corpus
from pgolf.log import RunLog
from pgolf.runtime import _load_from, check_code_caches

RUN = ("train.run_id=r", "train.checkpoint_every=2")


@pytest.fixture
def disk(tmp_path):
    """20 MB; a run of these tests writes 5."""
    with mounted(tmp_path / "disk", "size=20m") as folder:
        yield folder


def test_full_disk_at_a_checkpoint(shards, disk, undisturbed, capsys, monkeypatch):
    """The one before stays whole, and with space again the run ends as if nothing had been."""
    small_bundle(monkeypatch)
    at_step(monkeypatch, 3, lambda: fill(disk))
    assert launch(shards, disk, *RUN) == refused(capsys, 3, "checkpoint cannot be written", "No space left", "bytes")
    left = checkpoint.newest(disk / "r" / "checkpoints", pytest.fail)
    assert left.name == "step-00000002" and not list(left.parent.glob(".tmp*"))
    assert not (disk / "r" / "model.pgolf").exists()
    free(disk)
    assert launch(shards, disk, *RUN, "train.resume=auto") == 0
    assert (disk / "r" / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()


def test_full_disk_at_the_export(shards, disk, undisturbed, capsys, monkeypatch):
    """Training is over: nothing of it is lost, and the message says how to go on."""
    small_bundle(monkeypatch)
    with monkeypatch.context() as patch:
        before(patch, finish, "save_model", lambda: fill(disk))
        assert launch(shards, disk, *RUN) == refused(capsys, 3, "model.pgolf cannot be written", "are free", "RESUME=")
    assert sorted(p.name for p in (disk / "r").iterdir() if "model" in p.name or p.name.startswith(".")) == []
    free(disk)
    assert launch(shards, disk, *RUN, f"train.resume={disk / 'r'}", "train.run_id=") == 0
    assert (disk / "r" / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()


def test_full_disk_at_the_result(shards, disk, undisturbed, capsys, monkeypatch):
    small_bundle(monkeypatch)
    before(monkeypatch, result, "write_result", lambda: fill(disk))
    assert launch(shards, disk, *RUN) == refused(capsys, 3, "result.json cannot be written", "No space left")
    assert (disk / "r" / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()
    assert not (disk / "r" / "result.json").exists()


def test_full_disk_at_the_start(shards, disk, undisturbed, capsys):
    shutil.copytree(undisturbed, disk / "earlier")
    fill(disk)
    there = content(disk / "earlier")
    assert launch(shards, disk, *RUN) == refused(capsys, 3, "cannot be written", "No space left", "train.out_dir")
    assert content(disk / "earlier") == there


def test_full_disk_under_the_log(disk, capsys):
    """A log with gaps stops no run. It warns once a file, and the file is whole lines before and after the gap."""
    with RunLog(disk / "run", stream=io.StringIO()) as log:
        log.event("step", step=1)
        fill(disk)
        for i in range(500):
            log.event("step", step=i)
            log.line("x" * 100)
        free(disk)
        log.event("final", step=7)
    lines = (disk / "run" / "events.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["step"] == 1 and json.loads(lines[-1])["kind"] == "final" and len(lines) < 500
    assert capsys.readouterr().err.count("warning: ") == 2


def test_full_disk_at_the_corpus(tmp_path, capsys, monkeypatch):
    root, stdlib = tmp_path / "sources", Path(sysconfig.get_path("stdlib"))
    root.mkdir()
    for path in sorted(stdlib.glob("[a-c]*.py"))[:20]:
        (root / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(root))
    with mounted(tmp_path / "cache", "size=128k") as cache:
        at = {"DATA_PATH": "", "TOKENIZER_PATH": "", "VOCAB_SIZE": "384"}
        code = launch(tmp_path, tmp_path / "runs", f"data.cache_dir={cache}", **at)
        assert code == refused(capsys, 3, "No space left", "data.cache_dir")
        assert not list(cache.iterdir()), "nothing half-made stays"


def test_read_only_output_folder(shards, disk, undisturbed, capsys):
    shutil.copytree(undisturbed, disk / "earlier")
    remount(disk, "ro")
    there = content(disk)
    assert launch(shards, disk, *RUN) == refused(capsys, 3, "Read-only file system", "train.out_dir")
    assert content(disk) == there


def test_read_only_cache(shards, disk, tmp_path, capsys):
    remount(disk, "ro")
    at = {"DATA_PATH": "", "TOKENIZER_PATH": ""}
    code = launch(shards, tmp_path / "runs", f"data.cache_dir={disk / 'cache'}", **at)
    assert code == refused(capsys, 3, "Read-only file system", "data.cache_dir")


def test_read_only_data_is_no_fault(shards, disk, tmp_path, undisturbed, monkeypatch):
    small_bundle(monkeypatch)
    data = shutil.copytree(shards, disk / "data")
    remount(disk, "ro")
    assert launch(data, tmp_path / "runs", *RUN) == 0
    assert (tmp_path / "runs/r/model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()


def test_code_cache_on_a_noexec_disk(shards, tmp_path, capsys, monkeypatch):
    """Said before the first step, and not by the first compiled graph. Without compiling it does not matter."""
    _load_from(tmp_path / "where code may run")
    with mounted(tmp_path / "disk", "size=1m,noexec") as disk:
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(disk / "cache"))
        code = launch(shards, tmp_path / "runs", "train.compile=on", "train.run_id=r")
        assert code == refused(capsys, 3, "mounted noexec", "TORCHINDUCTOR_CACHE_DIR")
        check_code_caches(compiling=False, cuda=False)
    assert '"train"' not in (tmp_path / "runs/r/events.jsonl").read_text()


def test_code_cache_that_cannot_be_written(shards, disk, tmp_path, capsys, monkeypatch):
    remount(disk, "ro")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(disk / "cache"))
    code = launch(shards, tmp_path / "runs", "train.compile=on")
    assert code == refused(capsys, 3, "Read-only file system", "TORCHINDUCTOR_CACHE_DIR")


def test_a_file_of_a_run_is_whole_or_as_it_was(disk):
    path = config.write_file(disk / "a", b"old")
    fill(disk)
    with pytest.raises(checkpoint.SetupError, match=r"a cannot be written \(No space left.*100,000 bytes, 0 are free"):
        config.write_file(path, bytes(100_000))
    assert path.read_bytes() == b"old" and sorted(os.listdir(disk)) == ["a", "ballast"]
