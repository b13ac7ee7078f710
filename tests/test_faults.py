"""Bad input as a user meets it: one clear message, the documented exit code, no traceback, earlier runs untouched."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pgolf import cli
from pgolf.data.shards import write_shard

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path):
    """Shards of 400 ids with a tokenizer path that is never reached unless the shards are good."""
    tokens = np.arange(3000) % 400
    for split in ("train", "val"):
        write_shard(tmp_path / f"fineweb_{split}_000000.bin", tokens.astype(np.uint16))
    return tmp_path


def fail(folder, capsys, *overrides, **environ) -> tuple[int, str]:
    """Runs the command line in-process; returns (exit code, message)."""
    base = {"PRESET": "smoke", "DATA_PATH": str(folder), "TOKENIZER_PATH": str(folder / "missing.model"),
            "VOCAB_SIZE": "400"}  # fmt: skip
    code = cli.main([f"train.out_dir={folder}/runs", "train.device=cpu", *overrides], base | environ)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("error: ") == 1, err
    return code, err


def corrupt(folder, data: bytes, name="fineweb_train_000000.bin"):
    (folder / name).write_bytes(data)


def good_bytes(folder) -> bytes:
    return (folder / "fineweb_train_000000.bin").read_bytes()


BROKEN = {
    "magic": (lambda d: b"\0\0\0\0" + d[4:], "20240520"),
    "version": (lambda d: d[:4] + (7).to_bytes(4, "little") + d[8:], "version"),
    "truncated": (lambda d: d[:-10], "bytes"),
    "too long": (lambda d: d + b"\0\0", "bytes"),
    "empty": (lambda d: b"", "empty"),
    "lfs pointer": (lambda d: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "LFS"),
    "html page": (lambda d: b"<!DOCTYPE html><html>404</html>" * 40, "HTML"),
    "parquet": (lambda d: b"PAR1" + d, "arquet"),
    "big id": (lambda d: d[:1024] + (400).to_bytes(2, "little") + d[1026:], "400"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_shard(folder, capsys, name):
    change, word = BROKEN[name]
    corrupt(folder, change(good_bytes(folder)))
    code, err = fail(folder, capsys)
    assert code == 4 and word in err and "fineweb_train_000000.bin" in err


def test_no_shards(folder, capsys):
    for path in folder.glob("fineweb_train_*"):
        path.unlink()
    code, err = fail(folder, capsys)
    assert code == 4 and "train" in err and str(folder) in err


def test_no_folder(folder, capsys):
    code, err = fail(folder, capsys, DATA_PATH=str(folder / "elsewhere"))
    assert code == 4 and "elsewhere" in err


def test_no_tokenizer(folder, capsys):
    code, err = fail(folder, capsys)
    assert code == 4 and "missing.model" in err


def test_data_path_without_tokenizer_path(folder, capsys):
    code, err = fail(folder, capsys, TOKENIZER_PATH="")
    assert code == 2 and "TOKENIZER_PATH" in err


def test_val_shorter_than_a_sequence(capsys, tmp_path):
    """The tokenizer is real here: that check comes first."""
    import sentencepiece as spm

    text = [" ".join(p.split()) for p in (ROOT / "LICENSE").read_text().split("\n\n") if p.strip()]
    spm.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=str(tmp_path / "t"), model_type="bpe",
                                   vocab_size=400, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
                                   add_dummy_prefix=False, minloglevel=2)  # fmt: skip
    write_shard(tmp_path / "fineweb_train_000000.bin", (np.arange(3000) % 400).astype(np.uint16))
    write_shard(tmp_path / "fineweb_val_000000.bin", (np.arange(40) % 400).astype(np.uint16))
    code, err = fail(tmp_path, capsys, TOKENIZER_PATH=str(tmp_path / "t.model"))
    assert code == 4 and "40 tokens" in err and "65" in err


def test_batch_too_small_and_other_impossible_settings_are_listed_together(folder, capsys):
    code, err = fail(folder, capsys, TRAIN_BATCH_TOKENS="32", NUM_KV_HEADS="3", MLP_ACT="tanh")
    assert code == 2
    assert "batch_tokens=32" in err and "num_kv_heads=3" in err and "tanh" in err


def test_misspelt_variable_and_override(folder, capsys):
    code, err = fail(folder, capsys, MATRX_LR="0.03")
    assert code == 2 and "MATRIX_LR" in err
    code, err = fail(folder, capsys, "optim.muon.lrr=0.03")
    assert code == 2 and "optim.muon.lr" in err


def test_cuda_asked_for_without_cuda(folder, capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here: asking for it is no fault")
    code, err = fail(folder, capsys, "train.device=cuda")
    assert code == 3 and "cuda" in err


def test_output_folder_that_cannot_be_written(folder, capsys):
    blocker = folder / "file"
    blocker.write_text("")
    code, err = fail(folder, capsys, f"train.out_dir={blocker}/runs")
    assert code == 3 and str(blocker) in err


def test_debug_shows_the_traceback(folder, capsys):
    code = cli.main(["--debug", "optim.muon.lrr=1"], {"PRESET": "smoke"})
    err = capsys.readouterr().err
    assert code == 2 and "Traceback" in err


@pytest.mark.alone
def test_help_is_quick_and_torch_free():
    """Best of three: another process may be busy."""
    environ = {k: v for k, v in os.environ.items() if k != "PRESET"}
    best = 99.0
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run([sys.executable, str(ROOT / "train_gpt.py"), "--help"], capture_output=True, env=environ)
        best = min(best, time.monotonic() - began)
        assert done.returncode == 0 and b"PRESET" in done.stdout
    assert best < 1.0


def test_reader_that_stops_reading(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "train_gpt.py", "--help"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")
