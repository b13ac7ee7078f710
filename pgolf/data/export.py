"""Makes a data set with case operators from documents: token shards, byte sidecar, and a tokenizer if there is none.

Nothing lossy comes out: each document must survive the operators, and the tokenizer must keep its text, so that the
sidecar's counts are the UTF-8 length of the original to the byte. The first document that is not kept stops the export.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf.data import case_ops, shards, sidecar, wire
from pgolf.data.corpus import Document, train_tokenizer
from pgolf.data.official import BOS
from pgolf.data.shards import write_shard, write_synced
from pgolf.data.tokenizer import sentencepiece
from pgolf.errors import DataError

SHARD_TOKENS = 10**8  # as in the published exports


@dataclass
class Made:
    """What an export wrote, per split: documents, tokens, bytes of text, shards."""

    folder: Path
    tokenizer_path: Path
    counts: dict[str, dict[str, int]]


def read_jsonl(path: Path) -> Iterator[str]:
    """The texts of a file with a JSON object {"text": ...} a line. DataError names the line that is none."""
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError) as err:
                    raise DataError(f'{path}, line {number:,}: expected a JSON object with "text"') from err
                if not isinstance(text, str):
                    raise DataError(f'{path}, line {number:,}: "text" is a {type(text).__name__}, expected a string')
                yield text
    except (OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path} cannot be read: {err}; expected UTF-8, one JSON object a line") from err


def operator_tokenizer(documents: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model of `vocab_size` pieces trained on the encoded documents, operators at ids 4 to 7."""
    encoded = [Document(str(i), case_ops.encode(text)) for i, text in enumerate(documents)]
    try:
        return train_tokenizer(encoded, vocab_size, symbols=case_ops.CONTROLS)
    except DataError as err:
        reason = str(err).splitlines()[0].partition(" pieces: ")[2]
        raise DataError(
            f"no tokenizer of {vocab_size} pieces comes out of {len(encoded):,} training documents: {reason}\n"
            "fix: another --vocab-size, or more documents"
        ) from err


def tokenise(sp, text: str, number: int) -> tuple[list[int], list[int]]:
    """(ids, bytes of the original by id) of a document, BOS first with 0 bytes. DataError when it is not kept."""
    encoded = case_ops.encode(text)
    try:
        size = len(text.encode())
        ids, surfaces = wire.surfaces(sp, encoded)
        counts = case_ops.surface_bytes(surfaces)
    except UnicodeEncodeError as err:
        raise DataError(f"document {number:,} holds a lone surrogate, at character {err.start:,}: no UTF-8") from err
    if case_ops.decode(b"".join(surfaces).decode()) != text or sum(counts) != size:
        raise DataError(
            f"document {number:,} is not kept: its tokens stand for {sum(counts):,} bytes, the text has {size:,}\n"
            "fix: use a tokenizer that drops nothing (no removal of spaces, no NUL), or leave the document out"
        )
    return [BOS, *ids], [0, *counts]


def export(
    documents: Iterable[str],
    sp,
    folder: Path,
    val_documents: int,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, int]]:
    """Writes the first `val_documents` as val with its sidecar, all others as train; returns the counts per split.

    Splits are disjoint by construction: one pass over one list. What was written is read back and proven. Raises
    DataError when a document is not kept, when a split stays empty, and for a tokenizer that lacks an operator or has
    another BOS.
    """
    missing = [case_ops.NAMES[c] for c in case_ops.CONTROLS if c not in case_ops.operator_pieces(sp)]
    if missing or sp.bos_id() != BOS:
        what = f"no user-defined piece for {', '.join(missing)}" if missing else f"BOS {sp.bos_id()}, expected {BOS}"
        raise DataError(f"the tokenizer has {what}\nfix: train one with --vocab-size, or give one with case operators")
    folder.mkdir(parents=True, exist_ok=True)
    stream, counts = enumerate(documents), {}
    for split, part in (("val", itertools.islice(stream, val_documents)), ("train", stream)):
        counts[split] = _write_split(sp, part, folder, split, shard_tokens, progress)
        if not counts[split]["documents"]:
            raise DataError(f"no documents for the {split} split: {val_documents:,} are asked for val alone")
    files = shards.find_shards(folder, "val")
    sidecar.prove_sidecar(sp, np.concatenate([shards.read_shard(f) for f in files]), sidecar.read_sidecar(files))
    return counts


def _write_split(sp, documents, folder: Path, split: str, shard_tokens: int, progress: Callable) -> dict[str, int]:
    done = {"documents": 0, "tokens": 0, "bytes": 0, "shards": 0}
    tokens: list[np.ndarray] = []
    sizes: list[np.ndarray] = []
    held = 0

    def flush(upto: int) -> None:
        """Writes the first `upto` held tokens as a shard."""
        nonlocal tokens, sizes, held
        ids, counts = np.concatenate(tokens), np.concatenate(sizes)
        write_shard(folder / f"fineweb_{split}_{done['shards']:06d}.bin", ids[:upto])
        if split == "val":
            write_shard(folder / f"fineweb_val_bytes_{done['shards']:06d}.bin", counts[:upto])
        tokens, sizes, held = [ids[upto:]], [counts[upto:]], held - upto
        done["shards"] += 1
        progress(f"{split}: {done['documents']:,} documents, {done['tokens']:,} tokens in {done['shards']} shard(s)")

    for number, text in documents:
        ids, counts = tokenise(sp, text, number)
        tokens.append(np.array(ids, np.uint16))
        sizes.append(np.array(counts, np.uint16))
        held += len(ids)
        done["documents"] += 1
        done["tokens"] += len(ids)
        done["bytes"] += sum(counts)
        while held >= shard_tokens:
            flush(shard_tokens)
    if held:
        flush(held)
    return done


def make(
    documents: Callable[[], Iterable[str]],
    out: Path,
    val_documents: int,
    *,
    tokenizer: Path | None = None,
    vocab_size: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[str], None] = lambda line: None,
) -> Made:
    """A whole data set below `out`. documents() gives the list from its beginning, each time that it is called.

    tokenizer: a model with the operators; None: one of `vocab_size` pieces is trained on the training documents.
    """
    out.mkdir(parents=True, exist_ok=True)
    model_path = tokenizer or out / "tokenizer.model"
    if tokenizer is None:
        progress(f"training a tokenizer of {vocab_size} pieces")
        write_synced(model_path, operator_tokenizer(itertools.islice(documents(), val_documents, None), vocab_size))
    sp = sentencepiece().SentencePieceProcessor(model_proto=model_path.read_bytes())
    counts = export(documents(), sp, out, val_documents, shard_tokens, progress)
    facts = {"docs_val": counts["val"]["documents"], "text_transform": "case operators", "splits": counts}
    write_synced(out / "manifest.json", json.dumps(facts, indent=1).encode())
    return Made(out, model_path, counts)
