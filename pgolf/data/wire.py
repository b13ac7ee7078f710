"""What sentencepiece tells in serialised protocol buffers only: surfaces of pieces, and which pieces users defined.

The messages are read here, as the protobuf package is no dependency of sentencepiece, and its own reader of these
messages (`immutable_proto`) is gone since version 0.2.2. Wire format: https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

from collections.abc import Iterator

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
USER_DEFINED = 4  # ModelProto.SentencePiece.Type


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of each field, in order; numbers of fixed width come as bytes. ValueError when damaged."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == VARINT:
            value, at = _varint(message, at)
        else:
            if kind == BYTES:
                size, at = _varint(message, at)
            elif kind in (FIXED64, FIXED32):
                size = 8 if kind == FIXED64 else 4
            else:
                raise ValueError(f"wire type {kind} at byte {at}")
            value, at = message[at : at + size], at + size
            if at > len(message):
                raise ValueError("the message is cut off")
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(message):
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("the message is cut off")


def user_defined(sp) -> dict[str, int]:
    """{piece: id} of the user-defined symbols of a SentencePieceProcessor: atomic, never split or merged."""
    found: dict[str, int] = {}
    pieces = (value for number, value in fields(sp.serialized_model_proto()) if number == 1)
    for i, piece in enumerate(pieces):
        known = dict(fields(piece))
        if known.get(3) == USER_DEFINED:
            found[known[1].decode()] = i
    return found


def surfaces(sp, text: str) -> tuple[list[int], list[bytes]]:
    """(ids, surfaces) of a text: the UTF-8 of the very part of `text` that each token stands for, not normalised.

    Of the byte pieces of one character the last has the character as its surface, the others b"".
    """
    ids, parts = [], []
    for number, value in fields(sp.encode(text, out_type="serialized_proto")):
        if number == 2:
            piece = dict(fields(value))
            ids.append(piece.get(2, 0))
            parts.append(piece.get(3, b""))
    return ids, parts
