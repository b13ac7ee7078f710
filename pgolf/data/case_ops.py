"""The lossless case operators of PR #1729: capital ASCII letters become lower-case ones behind an operator.

Over every maximal run of ASCII letters: all lower stays; all upper (two or more) is ALLCAPS + the lower-cased run;
first upper and the rest lower (or one upper letter alone) is TITLE + the lower-cased run; otherwise TITLE if the first
is upper, and CAPNEXT before each later upper letter. A control that the text itself holds is written ESC + control.

`decode(encode(s)) == s` for every str, lone surrogates included: they are no letters and pass through. Bytes of text
exist for what UTF-8 can encode only, so `surface_bytes` takes UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pgolf.data import wire
from pgolf.errors import DataError

TITLE, ALLCAPS, CAPNEXT, ESC = CONTROLS = "\ue001\ue002\ue003\ue004"
NAMES = dict(zip(CONTROLS, ("TITLE", "ALLCAPS", "CAPNEXT", "ESC"), strict=True))
_RUN = re.compile(f"[A-Za-z]+|[{CONTROLS}]")
_WORD, _CAPS = "word", "caps"  # modes of the decoder inside a run of letters


def encode(text: str) -> str:
    """The text with operators; every str has exactly one encoding."""
    return _RUN.sub(lambda match: _encode_run(match[0]), text)


def _encode_run(run: str) -> str:
    if run in NAMES:
        return ESC + run
    lower = run.lower()
    if run == lower:
        return run
    if len(run) > 1 and run.isupper():
        return ALLCAPS + lower
    rest = (CAPNEXT + c.lower() if c.isupper() else c for c in run[1:])
    return (TITLE if run[0].isupper() else "") + lower[0] + "".join(rest)


class Decoder:
    """The inverse as a machine fed with one character at a time.

    State: an operator that waits for its letter (or ESC for its control), and the mode of the word. A word ends at the
    first character that is no ASCII letter.
    """

    def __init__(self):
        self.waiting, self.word, self.position = "", "", 0

    def feed(self, char: str) -> str:
        """What the original text has for it: one character, or "" for an operator. DataError with the position."""
        out = self._step(char)
        self.position += 1
        return out

    def _step(self, char: str) -> str:
        if self.waiting == ESC:
            if char not in CONTROLS:
                raise self._wrong(f"ESC before {char!r}, which needs none")
            self.waiting = self.word = ""
            return char
        letter = char.isascii() and char.isalpha()
        if self.waiting and not letter:
            raise self._wrong(f"{NAMES[self.waiting]} before {char!r}, which is no ASCII letter")
        if char in (TITLE, ALLCAPS) and self.word:
            raise self._wrong(f"{NAMES[char]} inside a word")
        if char in CONTROLS:
            self.waiting = char
            return ""
        if not letter:
            self.word = ""
            return char
        self.word = self.word or (_CAPS if self.waiting == ALLCAPS else _WORD)
        upper = self.waiting or self.word == _CAPS
        self.waiting = ""
        return char.upper() if upper else char

    def finish(self) -> None:
        """DataError when the text ended behind an operator."""
        if self.waiting:
            raise self._wrong(f"the text ends behind {NAMES[self.waiting]}")

    def _wrong(self, what: str) -> DataError:
        return DataError(
            f"invalid case operators at character {self.position:,}: {what}\n"
            "fix: make the data again with pgolf.data.case_ops.encode, or give the tokenizer that made it"
        )


def decode(text: str) -> str:
    """The original of an encoded text. DataError with the position where no encoded text has such an operator."""
    machine = Decoder()
    out = [machine.feed(char) for char in text]
    machine.finish()
    return "".join(out)


def surface_bytes(surfaces: Iterable[bytes]) -> list[int]:
    """Bytes of the original text that each token of one document accounts for.

    surfaces: UTF-8 of the part of the encoded text that each token stands for, whole characters. Operators count 0,
    letters 1, another character its UTF-8 length; an escaped control counts where it stands and not at its ESC. The
    decoder's state runs on from token to token. DataError on operators that no encoded text has.
    """
    machine, counts = Decoder(), []
    for surface in surfaces:
        counts.append(sum(len(machine.feed(char).encode()) for char in surface.decode()))
    machine.finish()
    return counts


def operator_pieces(sp) -> dict[str, int]:
    """{control: id} of the tokenizer's pieces that are case operators; empty for a tokenizer of plain text.

    Only user-defined symbols count: a piece that training found in the text by chance is a character like others.
    """
    return {piece: i for piece, i in wire.user_defined(sp).items() if piece in NAMES}
