"""Data that goes away or changes under a run, and data that does not fit together."""

import os
import shutil

import pytest
from provoke import at_step, launch, refused, small_bundle

from pgolf import checkpoint

RUN = ("train.run_id=r", "train.checkpoint_every=2")


def test_data_folder_removed_in_mid_run(data, tmp_path, undisturbed, capsys, monkeypatch):
    """Opened files can be read to the end: the run ends as if nothing had been. The next one is told."""
    small_bundle(monkeypatch)
    at_step(monkeypatch, 2, lambda: shutil.rmtree(data))
    assert launch(data, tmp_path / "runs", *RUN) == 0
    assert (tmp_path / "runs/r/model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()
    capsys.readouterr()
    assert launch(data, tmp_path / "runs", *RUN[1:]) == refused(capsys, 4, "does not exist", str(data))


def test_shard_cut_in_mid_run(data, tmp_path, undisturbed, capsys, monkeypatch):
    """The checkpoint before it stays, and with the file back the run ends as if nothing had been."""
    small_bundle(monkeypatch)
    whole = {path: path.read_bytes() for path in data.glob("fineweb_train_*")}

    def cut():
        for path in whole:
            os.truncate(path, 1024)

    at_step(monkeypatch, 3, cut)
    code = launch(data, tmp_path / "runs", *RUN)
    assert code == refused(capsys, 4, "fineweb_train_00000", "become shorter", "RESUME")
    run = tmp_path / "runs" / "r"
    newest = checkpoint.newest(run / "checkpoints", pytest.fail).name  # some batches had been read ahead
    assert newest in ("step-00000002", "step-00000004") and not (run / "model.pgolf").exists()
    for path, content in whole.items():
        path.write_bytes(content)
    assert launch(data, tmp_path / "runs", *RUN, "train.resume=auto") == 0
    assert (run / "model.pgolf").read_bytes() == (undisturbed / "model.pgolf").read_bytes()


def test_tokenizer_of_another_size(shards, tmp_path, capsys):
    code = launch(shards, tmp_path, VOCAB_SIZE="500")
    assert code == refused(capsys, 4, "400 pieces", "500 in model.embed.vocab_size", "tokenizer.model")


def test_tokenizer_that_is_something_else(data, tmp_path, capsys):
    (data / "tokenizer.model").write_bytes(b"<!DOCTYPE html>")
    assert launch(data, tmp_path) == refused(capsys, 4, "HTML", "tokenizer.model")


def test_pipe_under_a_shards_name(data, tmp_path, capsys):
    os.mkfifo(data / "fineweb_train_000009.bin")
    assert launch(data, tmp_path) == refused(capsys, 4, "no regular file", "fineweb_train_000009.bin")


def test_sidecar_files_are_no_shards(data, tmp_path, monkeypatch):
    small_bundle(monkeypatch)
    (data / "fineweb_val_bytes_000000.bin").write_bytes(b"x")
    (data / "fineweb_train_000000.bin.part").write_bytes(b"x")
    assert launch(data, tmp_path) == 0
