"""The operators come back for any text, count bytes of the original, and are refused where no encoder puts them."""

import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pgolf.data import case_ops
from pgolf.data.case_ops import ALLCAPS, CAPNEXT, CONTROLS, ESC, TITLE, decode, encode
from pgolf.data.sidecar import decoded_length
from pgolf.errors import DataError

# dense in what matters: capitals, controls, digits and accents beside letters, letters that grow when lower-cased
TEXT = st.text(st.one_of(st.sampled_from("aZbQ1 _-éÉİßǅΣ" + CONTROLS), st.characters(codec="utf-8")), max_size=40)
ANY = st.text(st.one_of(st.sampled_from("aZ" + CONTROLS + "\ud800\udfff"), st.characters()), max_size=40)
EXAMPLES = {
    "": "", "a": "a", "I": TITLE + "i", "The": TITLE + "the", "NASA": ALLCAPS + "nasa", "OK1": ALLCAPS + "ok1",
    "iPhone": f"i{CAPNEXT}phone", "McD": f"{TITLE}mc{CAPNEXT}d", "HTTPServer":
    f"{TITLE}h{CAPNEXT}t{CAPNEXT}t{CAPNEXT}p{CAPNEXT}server", "A1B": f"{TITLE}a1{TITLE}b", "ÉA": f"É{TITLE}a",
    TITLE: ESC + TITLE, f"AB{ESC}c": f"{ALLCAPS}ab{ESC}{ESC}c", "É": "É", "B2B": f"{TITLE}b2{TITLE}b",
}  # fmt: skip


@pytest.mark.parametrize(("text", "encoded"), EXAMPLES.items())
def test_by_hand(text, encoded):
    assert encode(text) == encoded
    assert decode(encoded) == text


@settings(max_examples=150, deadline=None)
@given(ANY)
@example("".join(CONTROLS) * 2)
def test_round_trip_of_any_string(text):
    encoded = encode(text)
    assert decode(encoded) == text
    assert not re.search("[A-Z]", encoded)


@settings(max_examples=150, deadline=None)
@given(TEXT, st.lists(st.integers(0, 60), max_size=6))
def test_bytes_of_surfaces_are_those_of_the_original(text, cuts):
    """Cut anywhere between characters, the counts add up to the original's UTF-8; so does the path over bytes."""
    encoded = encode(text)
    ends = sorted(min(c, len(encoded)) for c in cuts)
    parts = [encoded[a:b].encode() for a, b in zip([0, *ends], [*ends, len(encoded)], strict=True)]
    counts = case_ops.surface_bytes(parts)
    assert len(counts) == len(parts) and sum(counts) == len(text.encode())
    assert decoded_length(encoded.encode()) == len(text.encode())


def test_counts_where_the_character_stands():
    parts = [TITLE, "the", " ", ESC, TITLE, CAPNEXT + "é"[:0], "x"]
    assert case_ops.surface_bytes([p.encode() for p in parts]) == [0, 3, 1, 0, 3, 0, 1]


WRONG = {
    f"ab{TITLE}c": (2, "TITLE inside a word"), f"{ALLCAPS}ab{ALLCAPS}c": (3, "ALLCAPS inside a word"),
    f"x {TITLE}1": (3, "TITLE before '1', which is no ASCII letter"), f"{CAPNEXT}é": (1, "CAPNEXT before 'é'"),
    f"{TITLE}{ALLCAPS}a": (1, "TITLE before"), f"{TITLE}{ESC}{ESC}": (1, "TITLE before"), f"a{ESC}": (2, "behind ESC"),
    f"{ESC}a": (1, "ESC before 'a'"), f"a {TITLE}": (3, "behind TITLE"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "told"), WRONG.items())
def test_operators_in_wrong_places(text, told):
    """Both machines refuse it: the one over characters, and the one over bytes."""
    position, what = told
    for act in (decode, lambda t: case_ops.surface_bytes(c.encode() for c in t)):
        with pytest.raises(DataError, match=rf"at character {position}: .*{what}"):
            act(text)
    with pytest.raises(ValueError, match="in a wrong place, at byte"):
        decoded_length(text.encode())
    assert decoded_length(text.encode(), strict=False) == len(re.sub(f"[{CONTROLS}]", "", text.replace(
        ESC + ESC, "123")).encode())  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.text(st.sampled_from("ab1 é" + CONTROLS), max_size=8))
def test_both_machines_accept_the_same(text):
    try:
        length = len(decode(text).encode())
    except DataError:
        length = None
    try:
        found = decoded_length(text.encode())
    except ValueError:
        found = None
    assert found == length
