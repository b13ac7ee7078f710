"""Tokenizer loading, and how many bytes of text each token stands for.

BPB divides by bytes, so a wrong count is a wrong score: public attempts were up to 20 % off (PRs #897, #1143, #1545).
Bytes are therefore counted on two independent paths, a table over (previous, target) pairs that the evaluator uses, and
a plain concatenation of the pieces' bytes, and `prove_bytes` fails when they differ by one byte over a whole split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pgolf.data.shards import foreign_kind, near_names
from pgolf.errors import DataError, SetupError

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space
CHUNK = 1 << 22  # pairs per piece of a whole-split count: about 100 MB of temporaries


def sentencepiece():
    """The sentencepiece module. Raises SetupError with the line that installs it."""
    try:
        import sentencepiece
    except ImportError as err:
        raise SetupError("the tokenizer needs sentencepiece, not installed\nfix: pip install sentencepiece") from err
    return sentencepiece


def load_tokenizer(path: str | Path, vocab_size: int | None):
    """The SentencePieceProcessor stored at `path`, of exactly `vocab_size` pieces (None: any number). DataError."""
    path, spm = Path(path), sentencepiece()
    if not path.is_file():
        raise DataError(
            f"data.tokenizer_path={path} is not a file; expected a SentencePiece model (cwd {Path.cwd()})\n"
            f"fix: {near_names(path)}; or fetch it: python -m pgolf.data.download sp1024 --train-shards 0"
        )
    proto = path.read_bytes()
    try:
        processor = spm.SentencePieceProcessor(model_proto=proto)
        pieces = len(piece_bytes(processor))  # reads every piece: a damaged one is no UTF-8, or a byte without number
    except Exception as err:  # sentencepiece raises RuntimeError or TypeError, by version
        kind = foreign_kind(proto[:64]) or "something else (truncated?)"
        raise DataError(
            f"{path} is no SentencePiece model: it looks like {kind} ({len(proto):,} bytes)\n"
            "fix: fetch the tokenizer again"
        ) from err
    if vocab_size is not None and pieces != vocab_size:
        raise DataError(
            f"vocabulary sizes differ: {pieces} pieces in tokenizer {path}, {vocab_size} in model.embed.vocab_size\n"
            f"fix: set model.embed.vocab_size={pieces} (VOCAB_SIZE), or give the tokenizer of the shards"
        )
    return processor


@dataclass(frozen=True)
class ByteTable:
    """Bytes of a target y after a token x: `base[y] + (lead[y] and not boundary[x])`.

    base: (V,) int16 bytes of the piece without the space it may begin with. lead: (V,) bool, it begins with one.
    boundary: (V,) bool, no text stands before what follows this token (BOS, other specials, ids beyond the tokenizer),
    so a space that leads the next piece is none of the text's. Any other space in a piece is one byte: the published
    table would count three for it, but published vocabularies have no such piece. Specials stand for 0 bytes.
    """

    base: np.ndarray
    lead: np.ndarray
    boundary: np.ndarray

    @classmethod
    def from_sentencepiece(cls, sp, vocab_size: int) -> ByteTable:
        """The table of a SentencePieceProcessor, over max(its size, vocab_size) ids."""
        size = max(sp.vocab_size(), vocab_size)
        base, lead, boundary = np.zeros(size, np.int16), np.zeros(size, bool), np.ones(size, bool)
        for i in range(sp.vocab_size()):
            if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
                continue
            boundary[i] = False
            if sp.is_byte(i):
                base[i] = 1
                continue
            piece = sp.id_to_piece(i)
            lead[i] = piece.startswith(SPACE_MARK)
            base[i] = len(piece.removeprefix(SPACE_MARK).replace(SPACE_MARK, " ").encode())
        return cls(base, lead, boundary)

    def count(self, prev: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Bytes of each target, int64, for integer arrays of one shape."""
        return self.base[targets].astype(np.int64) + (self.lead[targets] & ~self.boundary[prev])

    def per_token(self, tokens: np.ndarray) -> np.ndarray:
        """Bytes of every token of a stream (n,) as a target: (n,) uint16; the first is no target and counts 0."""
        out = np.zeros(len(tokens), np.uint16)
        for i in range(0, len(tokens) - 1, CHUNK):
            part = tokens[i : i + CHUNK + 1]
            out[i + 1 : i + len(part)] = self.count(part[:-1], part[1:])
        return out

    def torch(self, device="cpu") -> Callable:
        """The same count on tensors: (ids, targets) integer tensors of one shape on `device` -> int64 bytes."""
        import torch

        base = torch.from_numpy(self.base.astype(np.int64)).to(device)
        lead, inner = (torch.from_numpy(a).to(device) for a in (self.lead, ~self.boundary))
        return lambda ids, targets: base[targets] + (lead[targets] & inner[ids])


def piece_bytes(sp) -> list[bytes]:
    """The bytes of text that each piece stands for: b"" for specials, a space for each space mark."""
    out = []
    for i in range(sp.vocab_size()):
        piece = sp.id_to_piece(i)
        if sp.is_byte(i):
            out.append(bytes([int(piece[3:-1], 16)]))  # "<0x0A>"
        elif sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            out.append(b"")
        else:
            out.append(piece.replace(SPACE_MARK, " ").encode())
    return out


def document_starts(sp, tokens: np.ndarray) -> np.ndarray:
    """Where documents begin in a stream (n,): each BOS, and 0 even if the rest of an earlier document stands there."""
    starts = np.flatnonzero(tokens == sp.bos_id())
    return starts if (len(starts) and starts[0] == 0) or not len(tokens) else np.concatenate([[0], starts])


def document_texts(sp, tokens: np.ndarray) -> Iterator[bytes]:
    """The concatenated bytes of the pieces of each document, without the token at its start.

    Nothing is decoded to a string, because an undecodable byte would become the three bytes of U+FFFD (PR #1271).
    """
    pieces, starts = piece_bytes(sp), document_starts(sp, tokens).tolist()
    for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        yield b"".join([pieces[t] for t in tokens[start + 1 : end].tolist()])


def document_bytes(sp, tokens: np.ndarray) -> np.ndarray:
    """Bytes of the targets of each document of tokens (n,), with no table: (documents,) int64.

    A document is put together and measured; one leading space right after BOS is free. Before the first BOS stands the
    rest of an earlier document, of which the very first token is no target.
    """
    begun = tokens[document_starts(sp, tokens)] == sp.bos_id()
    texts = document_texts(sp, tokens)
    counts = [len(text) - (bos and text.startswith(b" ")) for bos, text in zip(begun.tolist(), texts, strict=True)]
    return np.array(counts, dtype=np.int64)


def brute_force_bytes(sp, tokens: np.ndarray) -> int:
    """Bytes of the targets tokens[1:], with no table: the sum of `document_bytes`."""
    return int(document_bytes(sp, np.asarray(tokens)).sum())


def prove_bytes(sp, table: ByteTable, tokens: np.ndarray) -> int:
    """Counts the bytes of tokens[1:] on both paths, document by document. Their number. 0.1 s per million tokens.

    Raises DataError when the vocabulary has no lone space (it would cost three byte pieces, PR #897), when the table
    gives a byte piece another count than 1, when an id has no entry, or when a document's counts differ by one byte.
    """
    check_pieces(sp)
    wrong = [i for i in range(sp.vocab_size()) if sp.is_byte(i) and table.base[i] + table.lead[i] != 1]
    if wrong:
        raise DataError(
            f"bytes cannot be proven: byte piece {sp.id_to_piece(wrong[0])} (id {wrong[0]}) counts "
            f"{table.base[wrong[0]] + table.lead[wrong[0]]} bytes, expected 1\nfix: rebuild the byte table"
        )
    tokens = np.asarray(tokens)
    check_top(sp, tokens)
    starts = document_starts(sp, tokens)
    if not len(starts):
        return 0
    by_table = np.add.reduceat(table.per_token(tokens), starts, dtype=np.int64)
    by_hand = document_bytes(sp, tokens)
    if not np.array_equal(by_table, by_hand):
        raise DataError(_difference(sp, table, starts, by_table, by_hand))
    return int(by_hand.sum())


def check_pieces(sp) -> None:
    """DataError when the vocabulary has no lone space."""
    if sp.piece_to_id(SPACE_MARK) == sp.unk_id():
        raise DataError(
            f'bytes cannot be proven: the tokenizer has no lone "{SPACE_MARK}" piece, so a single space becomes byte '
            "pieces\nfix: use a tokenizer whose vocabulary has it (the published ones do)"
        )


def check_top(sp, tokens: np.ndarray) -> None:
    """DataError when an id is none of the tokenizer's."""
    top = int(tokens.max(initial=0))
    if top >= sp.vocab_size():
        raise DataError(
            f"bytes cannot be proven: token id {top} in the split, but the tokenizer has {sp.vocab_size()} pieces\n"
            "fix: give the tokenizer that made the shards (data.tokenizer_path)"
        )


def _difference(sp, table: ByteTable, starts: np.ndarray, by_table: np.ndarray, by_hand: np.ndarray) -> str:
    """The message for two different counts, with the pieces to blame where single pieces are."""
    bad = [(i, len(b)) for i, b in enumerate(piece_bytes(sp)) if table.base[i] + table.lead[i] != len(b)]
    blame = "; ".join(f"{sp.id_to_piece(i)!r} is {n} bytes, table {table.base[i] + table.lead[i]}" for i, n in bad[:3])
    first, off = int(np.argmax(by_table != by_hand)), int(by_table.sum() - by_hand.sum())
    return (
        f"bytes cannot be proven: the table counts {by_table.sum():,}, the pieces' own bytes are {by_hand.sum():,} "
        f"({off:+,}); {blame or 'single pieces agree, so a special token stands inside a document'}\n"
        f"first in document {first:,}, which begins at token {starts[first]:,}: table {by_table[first]:,}, "
        f"pieces {by_hand[first]:,}\n"
        "fix: build the table from the tokenizer that made the shards; without proof report val_loss only"
    )
