"""Data that goes away or changes under a run, and data that does not fit together."""

import os
import shutil

import numpy as np
import pytest
from helpers import VOCAB
from provoke import at_step, launch, refused, small_bundle

from pgolf import checkpoint
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.tokenizer import ByteTable, load_tokenizer

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


def test_other_files_are_no_shards(data, tmp_path, monkeypatch):
    """A byte sidecar is no shard of tokens either: it gives the bytes of the score."""
    small_bundle(monkeypatch)
    (data / "fineweb_train_000000.bin.part").write_bytes(b"x")
    val = read_shard(data / "fineweb_val_000000.bin")
    table = ByteTable.from_sentencepiece(load_tokenizer(data / "tokenizer.model", VOCAB), VOCAB)
    write_shard(data / "fineweb_val_bytes_000000.bin", table.per_token(val))
    assert launch(data, tmp_path, "train.run_id=r") == 0
    log = (tmp_path / "r" / "train.log").read_text()
    assert f"val_tokens:{len(val)}" in log and "byte sidecar: " in log


def test_damaged_byte_sidecar(data, tmp_path, capsys):
    (data / "fineweb_val_bytes_000000.bin").write_bytes(b"x")
    assert launch(data, tmp_path) == refused(capsys, 4, "no token shard", "fineweb_val_bytes_000000.bin")


def test_val_documents_in_training(data, tmp_path, capsys):
    """As in the widely copied export of PR #2127."""
    documents = np.repeat([[1, *range(10, 150)]], 30, 0) + np.arange(30)[:, None] * ([0] + [1] * 140)
    write_shard(data / "fineweb_val_000000.bin", documents.flatten())
    write_shard(data / "fineweb_train_000000.bin", documents[10:].flatten())
    assert launch(data, tmp_path) == refused(capsys, 4, "of the first 19 documents", "stand in the val split too")
