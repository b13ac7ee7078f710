"""Opens the data of a run: the user's shards, or the embedded corpus without a path. All checked before the start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf.data import corpus, shards
from pgolf.data.config import DataConfig
from pgolf.data.tokenizer import ByteTable, load_tokenizer, prove_bytes
from pgolf.errors import ConfigError, DataError


@dataclass
class Data:
    """An opened data set.

    train_files: sorted shards. val: (n,) int64 tokens on the CPU. byte_counts(ids, targets): original bytes of each
    target. tokenizer_sha256 ties an artifact to the tokenizer that it was trained with.
    """

    name: str
    train_files: list[Path]
    val: Tensor
    byte_counts: Callable[[Tensor, Tensor], Tensor]
    tokenizer_sha256: str
    lines: list[str]


def open_data(cfg: DataConfig, vocab_size: int, device: torch.device, progress: Callable[[str], None]) -> Data:
    """Finds and checks shards and tokenizer, proves the byte accounting, loads the val split.

    Raises DataError on anything that is missing, damaged or does not fit together, ConfigError when a data path comes
    without its tokenizer.
    """
    if cfg.path:
        if not cfg.tokenizer_path:
            raise ConfigError(
                f"DATA_PATH={cfg.path} comes without TOKENIZER_PATH: bits per byte need the SentencePiece model"
                " that made the shards; set TOKENIZER_PATH to its .model file"
            )
        folder, tokenizer_path, name = Path(cfg.path), Path(cfg.tokenizer_path), Path(cfg.path).name
        notes = []
    else:
        if cfg.tokenizer_path:
            raise ConfigError("TOKENIZER_PATH without DATA_PATH: the embedded corpus has its own tokenizer; set both")
        paths = corpus.build_or_load(cfg.cache_dir, vocab_size, progress)
        folder, tokenizer_path, name = paths.data_dir, paths.tokenizer_path, "embedded"
        notes = [f"data: embedded corpus (Python's standard library), {folder}; set DATA_PATH for your own shards"]
    train_files = shards.check_split(folder, "train", vocab_size)
    val_files = shards.check_split(folder, "val", vocab_size)
    if set(train_files) & set(val_files):
        raise DataError(f"{folder}: the same shard serves as train and val")
    sp = load_tokenizer(tokenizer_path, vocab_size)
    val = np.concatenate([shards.read_shard(f) for f in val_files])
    if len(val) < cfg.seq_len + 1:
        raise DataError(
            f"{folder}: the val split has {len(val)} tokens, one sequence needs data.seq_len + 1 = {cfg.seq_len + 1}\n"
            f"fix: give longer val shards, or TRAIN_SEQ_LEN of at most {len(val) - 1}"
        )
    table = ByteTable.from_sentencepiece(sp, vocab_size)
    prove_bytes(sp, table, val)  # 0.1 s per million tokens
    notes += [
        f"train_shards:{len(train_files)} val_shards:{len(val_files)} val_tokens:{len(val)}",
        f"tokenizer: {tokenizer_path} ({sp.vocab_size()} pieces); bytes of all val tokens proven",
    ]
    tokens = torch.from_numpy(val.astype(np.int64))
    return Data(name, train_files, tokens, table.torch(device), shards.sha256(tokenizer_path), notes)
