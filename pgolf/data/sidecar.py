"""Byte sidecars: how many bytes of the original text each token of the val split accounts for (PR #1729).

A shard `fineweb_val_bytes_000000.bin` lies beside `fineweb_val_000000.bin`, has its header and its length, and holds a
uint16 per token: the bytes of token i as a target are sidecar[i]. Data with case operators need one, since what a piece
stands for depends on the operators before it.

The numbers are proven on a second path that does not know the sidecar: a document's pieces are put together as bytes,
and its length is taken after the operators are worked off (`decoded_length`, on bytes, apart from `case_ops`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.data import case_ops
from pgolf.data.shards import check_shard, read_shard
from pgolf.data.tokenizer import SPACE_MARK, check_pieces, check_top, document_starts, document_texts, piece_bytes
from pgolf.errors import DataError

PROBE = "a  b\t\u00bd \ufb01\n\u2122 c"  # every normaliser of sentencepiece but "identity" changes it
FOLDED = 1e-4  # share of the bytes by which text and normalised text may differ; 1.6e-6 in the published export
# Share of tokens whose count must be their piece's own length. A sidecar shifted by one token has about a fifth.
ALIKE = 0.9
# Operators as UTF-8 EE 80 81..84, with what may stand around them; an escaped control is worked off as a pair.
_OPERATOR = re.compile(
    rb"\xee\x80\x84\xee\x80[\x81-\x84]"
    rb"|(?<![A-Za-z])\xee\x80[\x81\x82](?=[A-Za-z])"
    rb"|\xee\x80\x83(?=[A-Za-z])"
    rb"|(?P<wrong>\xee\x80[\x81-\x84])"
)


class Proof(NamedTuple):
    """What the two paths gave. differing: documents whose counts differ, 0 unless the tokenizer's normaliser folds."""

    bytes: int  # path (i), the sidecar: the score's denominator over all targets
    piece_bytes: int  # path (ii), of the normalised text
    documents: int
    differing: int
    first: str  # the first document that differs, with both numbers; "" if none

    def __str__(self) -> str:
        text = f"{self.bytes:,} bytes in {self.documents:,} documents"
        if not self.differing:
            return f"{text}, each the length of its pieces' text with the operators worked off"
        return (
            f"{text}; their normalised text has {self.piece_bytes:,}, and another length in {self.differing:,} of them "
            f"(first {self.first})"
        )


def sidecar_of(shard: Path) -> Path:
    """Where the sidecar of a val shard lies if there is one."""
    return shard.with_name(shard.name.replace("_val_", "_val_bytes_", 1))


def read_sidecar(val_files: list[Path]) -> np.ndarray | None:
    """The sidecar of a val split, (n,) uint16 beside its n tokens; None when there is none at all.

    Raises DataError when some shards have one and others not, when one belongs to no shard, or has another length.
    """
    expected = [sidecar_of(f) for f in val_files]
    there = sorted(val_files[0].parent.glob("*_val_bytes_*.bin"))
    if not there:
        return None
    if odd := sorted(set(expected) ^ set(there)):
        state = "is missing" if odd[0] in expected else "belongs to no val shard"
        raise DataError(
            f"byte sidecar {odd[0]} {state}: {len(val_files)} val shard(s), {len(there)} sidecar(s)\n"
            "fix: fetch shards and sidecars of one export together"
        )
    for shard, path in zip(val_files, expected, strict=True):
        tokens, counts = check_shard(shard), check_shard(path)
        if tokens != counts:
            raise DataError(
                f"byte sidecar {path} has {counts:,} entries, its shard {tokens:,} tokens; expected the same\n"
                "fix: fetch both again, from one export"
            )
    return np.concatenate([read_shard(f) for f in expected])


def keeps_text(sp) -> bool:
    """Whether the tokenizer's normaliser leaves a text as it is, so that pieces stand for its very bytes."""
    return sp.normalize(PROBE) == PROBE.replace(" ", SPACE_MARK)


def decoded_length(text: bytes, strict: bool = True) -> int:
    """Bytes of the original of one document, from its encoded bytes: no operator counts, what one applies to does.

    strict=False: operators in wrong places count 0 too. A normaliser makes such places: it joins the e of an encoded
    capital E with the accent behind it to one letter. strict=True: ValueError with the byte's position.
    """
    if b"\xee\x80" not in text:
        return len(text)
    found = 0
    for match in _OPERATOR.finditer(text):
        found += 1
        if strict and match.lastgroup:
            name = case_ops.NAMES[match[0].decode()]
            raise ValueError(f"{name} in a wrong place, at byte {match.start():,} of the document")
    return len(text) - 3 * found


def stream_bytes(sp, tokens: np.ndarray) -> np.ndarray:
    """Bytes of each token of a stream (n,) that has no sidecar, as of training text: (n,) uint16, from the pieces.

    Operators count 0, a control behind its ESC 3, other tokens their piece's bytes. Over a document this is the length
    of the text as the tokenizer's normaliser left it; byte pieces count 1 each, where a sidecar gives a character's
    bytes to its last one.
    """
    operators = case_ops.operator_pieces(sp)
    own = np.array([len(b) for b in piece_bytes(sp)], np.uint16)
    own[list(operators.values())] = 0
    counts = own[tokens]
    escape, after = operators.get(case_ops.ESC, -1), -1
    for i in np.flatnonzero(tokens == escape).tolist():  # few: the text itself has to hold a control
        if i != after and i + 1 < len(tokens):  # an ESC behind an active ESC is text
            after = i + 1
            counts[after] = len(case_ops.ESC.encode())
    return counts


def prove_sidecar(sp, tokens: np.ndarray, counts: np.ndarray) -> Proof:
    """Counts the bytes of every document on both paths. About 0.2 s per million tokens.

    tokens, counts: (n,) integers. Raises DataError when the stream does not begin with BOS; when specials or operators
    count; when most tokens have another count than their piece, as in a sidecar that is shifted; and when a document's
    counts differ by one byte. Where the tokenizer's normaliser folds text, the sidecar counts the original and the
    pieces the folded text: there the sums may differ by `FOLDED`, and the proof says in how many documents.
    """
    check_pieces(sp)
    check_top(sp, tokens)
    if len(tokens) != len(counts):
        raise DataError(f"the byte sidecar has {len(counts):,} entries for {len(tokens):,} tokens; expected the same")
    if not len(tokens) or tokens[0] != sp.bos_id():
        raise DataError(
            f"the val split begins with token {tokens[:1].tolist()}, not with BOS ({sp.bos_id()}): without BOS there "
            "are no documents to count\nfix: make the data again with BOS before each document"
        )
    operators = case_ops.operator_pieces(sp)
    _check_tokens(sp, tokens, counts, operators)
    strict = keeps_text(sp)
    starts = document_starts(sp, tokens)
    by_sidecar = np.add.reduceat(counts, starts, dtype=np.int64)
    by_hand = np.empty(len(starts), np.int64)
    for i, text in enumerate(document_texts(sp, tokens)):
        try:
            by_hand[i] = decoded_length(text, strict) if operators else len(text)
        except ValueError as err:
            raise DataError(
                f"invalid case operators in val document {i:,}, which begins at token {starts[i]:,}: {err}\n"
                "fix: make the data again, or give the tokenizer that made it"
            ) from err
    return _compare(starts, by_sidecar, by_hand, strict)


def _compare(starts: np.ndarray, by_sidecar: np.ndarray, by_hand: np.ndarray, strict: bool) -> Proof:
    differ = by_sidecar != by_hand
    total, pieces, first = int(by_sidecar.sum()), int(by_hand.sum()), ""
    if differ.any():
        i = int(np.argmax(differ))
        first = f"document {i:,}, which begins at token {starts[i]:,}: sidecar {by_sidecar[i]:,}, pieces {by_hand[i]:,}"
    if differ.any() and (strict or abs(total - pieces) > FOLDED * pieces):
        raise DataError(
            f"bytes cannot be proven: the byte sidecar counts {total:,}, the pieces' own bytes are {pieces:,} "
            f"({total - pieces:+,}), in {differ.sum():,} of {len(starts):,} documents; first in {first}\n"
            "fix: fetch tokens, sidecar and tokenizer of one export"
        )
    return Proof(total, pieces, len(starts), int(differ.sum()), first)


def _check_tokens(sp, tokens: np.ndarray, counts: np.ndarray, operators: dict[str, int]) -> None:
    """Specials and operators count 0, but for a control behind its ESC; most others count what their piece says."""
    own = np.array([len(b) for b in piece_bytes(sp)], np.int64)
    zero = np.array([sp.is_control(i) or i in operators.values() for i in range(sp.vocab_size())])
    bad = zero[tokens] & (counts != 0)
    if case_ops.ESC in operators:
        bad[1:] &= tokens[:-1] != operators[case_ops.ESC]
    if bad.any():
        i = int(np.argmax(bad))
        raise DataError(
            f"byte sidecar: token {i:,} is {sp.id_to_piece(int(tokens[i]))!r}, which is no text, and counts "
            f"{counts[i]}, expected 0\nfix: make the sidecar again; its entry i belongs to token i"
        )
    plain = ~(zero | np.array([sp.is_byte(i) for i in range(sp.vocab_size())]))[tokens]
    alike = own[tokens] == counts
    share = alike[plain].mean() if plain.any() else 1.0
    if share < ALIKE:
        raise DataError(
            f"byte sidecar: only {100 * share:.1f} % of the tokens count what their piece says, expected "
            f"{100 * ALIKE:g} % or more: it is shifted, or of other tokens\n"
            "fix: fetch tokens, sidecar and tokenizer of one export; entry i belongs to token i"
        )
