"""Inputs of the CPU benchmarks: small, built once a process in about 3 s, the same wherever the same Python is."""

from __future__ import annotations

import atexit
import shutil
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgolf.config import RunConfig
from pgolf.data import corpus as embedded
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.tokenizer import load_tokenizer
from pgolf.model.gpt import GPT

from .weights import look_trained_

VOCAB = 1024
SOURCES = 30  # of the standard library's modules


@pytest.fixture(autouse=True)
def one_thread():
    """One thread of torch, in every module that imports this: with two, each waits for the other at every op, and on a
    machine that does something else a copy of 1 MB then takes 16 ms instead of 0.05."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def scratch() -> Path:
    """A folder that lives as long as the process."""
    folder = Path(tempfile.mkdtemp(prefix="pgolf-bench-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Corpus:
    """Real text: documents, their tokenizer (SentencePiece) and the shards made of them; tokens (n,) uint16 of train.

    n_bytes: of the training documents.
    """

    folder: Path
    tokenizer_path: Path
    documents: list[embedded.Document]
    sp: Any
    tokens: np.ndarray
    n_bytes: int


@cache
def corpus() -> Corpus:
    """Part of the embedded corpus, built afresh: what is in the user's cache would make numbers differ by machine."""
    stdlib, root = Path(sysconfig.get_path("stdlib")), scratch() / "sources"
    root.mkdir()
    for path in [p for p in embedded.source_files(stdlib) if p.parent == stdlib][:SOURCES]:
        shutil.copy(path, root)
    paths = embedded.build_or_load(scratch(), VOCAB, root=root)
    documents = embedded.read_documents(root, embedded.source_files(root))
    train = [d for d in documents if embedded.split_of(d.name) == "train"]
    sp = load_tokenizer(paths.tokenizer_path, VOCAB)
    tokens = read_shard(paths.data_dir / embedded.SHARDS["train"])
    n_bytes = paths.manifest["splits"]["train"]["bytes"]
    return Corpus(paths.data_dir, paths.tokenizer_path, train, sp, tokens, n_bytes)


@cache
def random_shards(tokens: int, count: int = 8, vocab: int = 65536) -> list[Path]:
    """Shards of random ids. Over all of uint16 a few of them tell where they are from."""
    rng, folder = np.random.default_rng(0), scratch() / f"random-{tokens}-{count}-{vocab}"
    folder.mkdir()
    files = [folder / f"fineweb_train_{i:06d}.bin" for i in range(count)]
    for file in files:
        write_shard(file, rng.integers(0, vocab, tokens))
    return files


def build(cfg: RunConfig) -> GPT:
    """The preset's model with weights as after training."""
    return look_trained_(GPT(cfg.model, train_length=cfg.data.seq_len).init_weights(1))
