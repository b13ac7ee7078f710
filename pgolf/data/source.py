"""Opens the data of a run: the user's shards, or the embedded corpus without a path. All checked before the start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf.data import case_ops, corpus, official, overlap, shards, sidecar
from pgolf.data.config import DataConfig
from pgolf.data.tokenizer import ByteTable, load_tokenizer, prove_bytes
from pgolf.errors import ConfigError, DataError


@dataclass
class Data:
    """An opened data set.

    train_files: sorted shards. val: (n,) int64 tokens on the CPU. byte_counts(ids, targets): original bytes of each
    target; it raises DataError where they are not a matter of two tokens. There val_bytes has them: (n,) uint16 on the
    CPU, by position, so that target i, which is token i+1, stands for val_bytes[i+1]; else it is None.
    tokenizer_sha256 ties an artifact to the tokenizer that it was trained with.
    """

    name: str
    train_files: list[Path]
    val: Tensor
    byte_counts: Callable[[Tensor, Tensor], Tensor]
    tokenizer_sha256: str
    lines: list[str]
    val_bytes: Tensor | None = None

    def val_sha256(self) -> str:
        """Of the val split's tokens: what an evaluation was of."""
        return hashlib.sha256(self.val.numpy()).hexdigest()


@dataclass(frozen=True)
class Place:
    """Where a data set lies, before anything is read."""

    name: str
    folder: Path
    tokenizer_path: Path
    embedded: bool


def locate(cfg: DataConfig, vocab_size: int, progress: Callable[[str], None]) -> Place:
    """The user's folder and tokenizer, or the embedded corpus, built if need be. ConfigError when one path lacks."""
    if cfg.path:
        if not cfg.tokenizer_path:
            raise ConfigError(
                f"DATA_PATH={cfg.path} comes without TOKENIZER_PATH: bits per byte need the SentencePiece model"
                " that made the shards; set TOKENIZER_PATH to its .model file"
            )
        return Place(Path(cfg.path).name, Path(cfg.path), Path(cfg.tokenizer_path), False)
    if cfg.tokenizer_path:
        raise ConfigError("TOKENIZER_PATH without DATA_PATH: the embedded corpus has its own tokenizer; set both")
    paths = corpus.build_or_load(cfg.cache_dir, vocab_size, progress)
    return Place("embedded", paths.data_dir, paths.tokenizer_path, True)


def open_data(cfg: DataConfig, vocab_size: int, device: torch.device, progress: Callable[[str], None]) -> Data:
    """Finds and checks shards and tokenizer, proves the byte accounting, loads the val split.

    Raises DataError on anything that is missing, damaged or does not fit together, ConfigError when a data path comes
    without its tokenizer.
    """
    place = locate(cfg, vocab_size, progress)
    folder = place.folder
    train_files = shards.check_split(folder, "train", vocab_size)
    val_files = shards.check_split(folder, "val", vocab_size)
    if set(train_files) & set(val_files):
        raise DataError(f"{folder}: the same shard serves as train and val")
    sp = load_tokenizer(place.tokenizer_path, vocab_size)
    val = np.concatenate([shards.read_shard(f) for f in val_files])
    if len(val) < cfg.seq_len + 1:
        raise DataError(
            f"{folder}: the val split has {len(val)} tokens, one sequence needs data.seq_len + 1 = {cfg.seq_len + 1}\n"
            f"fix: give longer val shards, or TRAIN_SEQ_LEN of at most {len(val) - 1}"
        )
    overlap.quick(val, train_files[0], sp.bos_id())
    counted = count_bytes(sp, vocab_size, val, val_files)
    told = official.verify(split_facts(sp, vocab_size, val, val_files, counted))
    source = "data: embedded corpus (Python's standard library), {}; set DATA_PATH for your own shards"
    lines = [
        *([source.format(folder)] if place.embedded else []),
        f"train_shards:{len(train_files)} val_shards:{len(val_files)} val_tokens:{len(val)}",
        f"tokenizer: {place.tokenizer_path} ({sp.vocab_size()} pieces); bytes of all val tokens proven",
        *([f"byte sidecar: {counted.proof}"] if counted.proof else []),
        *([] if place.embedded else [told]),
    ]
    tokens = torch.from_numpy(val.astype(np.int64))
    val_bytes = torch.from_numpy(counted.per_token) if counted.proof else None
    by_pair = by_position_only if counted.proof else counted.table.torch(device)
    return Data(place.name, train_files, tokens, by_pair, shards.sha256(place.tokenizer_path), lines, val_bytes)


@dataclass(frozen=True)
class Counted:
    """Proven bytes of a val split. per_token: (n,) uint16, by position. proof: of a sidecar, None without one."""

    table: ByteTable
    per_token: np.ndarray
    operators: dict[str, int]
    proof: sidecar.Proof | None


def count_bytes(sp, vocab_size: int, val: np.ndarray, val_files: list[Path]) -> Counted:
    """Bytes of all val tokens, from the sidecar if there is one, else from the table; proven on a second path.

    Raises DataError as the proofs do, and for a tokenizer with case operators whose data have no sidecar.
    """
    table, operators = ByteTable.from_sentencepiece(sp, vocab_size), case_ops.operator_pieces(sp)
    counts = sidecar.read_sidecar(val_files)
    if counts is not None:
        return Counted(table, counts, operators, sidecar.prove_sidecar(sp, val, counts))
    if operators:
        raise DataError(
            f"the tokenizer has case operators ({', '.join(case_ops.NAMES[c] for c in operators)}), but there is no "
            f"byte sidecar {sidecar.sidecar_of(val_files[0])}: without it bytes cannot be counted\n"
            "fix: fetch the sidecar of the export, or make it: python -m pgolf data case-ops"
        )
    prove_bytes(sp, table, val)  # 0.1 s per million tokens
    return Counted(table, table.per_token(val), operators, None)


def split_facts(sp, vocab_size: int, val: np.ndarray, val_files: list[Path], counted: Counted) -> official.Split:
    """The val split in the numbers by which the published one is known."""
    return official.Split(
        vocab_size=vocab_size,
        tokens=len(val),
        documents=int((val == sp.bos_id()).sum()),
        first_token=int(val[0]),
        bytes=int(counted.per_token[1:].sum(dtype=np.int64)),
        bytes_of=lambda targets: int(counted.per_token[1 : targets + 1].sum(dtype=np.int64)),
        case_operators=bool(counted.operators),
        sidecar=counted.proof is not None,
        named=val_files[0].name.startswith("fineweb_val_"),
    )


def by_position_only(ids: Tensor, targets: Tensor) -> Tensor:
    """Stands where data with a byte sidecar have no table: a wrong denominator would be worse than none."""
    raise DataError("bytes of these data depend on the position (byte sidecar): use Data.val_bytes, not byte_counts")
