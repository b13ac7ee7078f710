"""Damage for readers: an input is {file name: bytes}, a mutation is a function of it and a numpy Generator.

Every mutant is a function of (seed, reader, index) alone, so that an assertion names it in three words.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from copy import deepcopy
from zlib import crc32

import numpy as np

Files = dict[str, bytes]
Rng = np.random.Generator

INTEGERS = (0, 1, -1, 2, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63))
FOREIGN = (
    b"", b"\0" * 2000, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", b"<!DOCTYPE html>",
    b"PAR1" + b"\0" * 100, b"PK\x03\x04" + b"\0" * 60, b"\x1f\x8b\x08" + b"\0" * 40, b"\x80\x04\x95K\x01.",
    b"[" * 60000, b'{"a":' * 30000, b"\xef\xbb\xbf{}", b"null", b"NaN", b"\xff\xfe{\0}\0", b'{"error": "not found"}',
)  # fmt: skip
VALUES = (
    None, True, False, 0, 1, -1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"),
    float("inf"), -float("inf"), "", "0", "on", "none", "x" * 2000, "\ud800", "\0", "../../etc/passwd", "/dev/zero",
    "\u2581", [], {}, [0], [[]], [1, "a"], {"": 0}, {"a": {"a": {}}},
)  # fmt: skip
TEXTS = (
    "", "0", "1", "-1", "2", "3", "7", "1e9", "1e400", "-1e400", "nan", "inf", "0x10", "1_0", "9" * 30, "9" * 5000,
    "on", "off", "none", "None", "true", "auto", "cpu", "cuda", "triton", "fp32", "1,2", "(9,10)", "0,0,0", "9,-1",
    "..", "a/b", "\u0661", "\udcff\udc80", "=", "  ", "x" * 300, "1e-400", "0.5", "1.0", "1e308", "-0",
)  # fmt: skip


def rng_of(seed: int, reader: str, index: int) -> Rng:
    """The generator of one input."""
    return np.random.default_rng([seed, crc32(reader.encode()), index])


def pick(rng: Rng, items):
    return items[int(rng.integers(len(items)))]


def span(rng: Rng, data: bytes, most: int = 0) -> tuple[int, int]:
    """(start, end) within data; short as a rule, and at most `most` bytes if given."""
    start = int(rng.integers(len(data) + 1))
    longest = pick(rng, (1, 2, 4, 16, 64, len(data)))
    return start, min(start + int(rng.integers(1, min(longest, most or longest) + 1)) if longest else start, len(data))


# -- bytes -------------------------------------------------------------------------------------------------------


def flip(data: bytes, rng: Rng) -> bytes:
    if not data:
        return b"\0"
    out = bytearray(data)
    for _ in range(pick(rng, (1, 1, 1, 2, 8))):
        out[int(rng.integers(len(out)))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def overwrite(data: bytes, rng: Rng) -> bytes:
    start, end = span(rng, data)
    return data[:start] + rng.bytes(end - start) + data[end:]


def truncate(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(len(data) + 1))] if rng.random() < 0.5 else data[: -int(rng.integers(1, 9))]


def insert(data: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 40))) + data[at:]


def drop(data: bytes, rng: Rng) -> bytes:
    start, end = span(rng, data)
    return data[:start] + data[end:]


def duplicate(data: bytes, rng: Rng) -> bytes:
    start, end = span(rng, data, 4096)
    return data[:end] + data[start:end] * pick(rng, (1, 1, 3, 50)) + data[end:]


def move(data: bytes, rng: Rng) -> bytes:
    start, end = span(rng, data)
    rest, at = data[:start] + data[end:], int(rng.integers(len(data) - (end - start) + 1))
    return rest[:at] + data[start:end] + rest[at:]


def integer(data: bytes, rng: Rng) -> bytes:
    """A field of 1, 2, 4 or 8 bytes, mostly near the beginning, set to an extreme value or moved by one."""
    size = pick(rng, (1, 2, 4, 4, 8))
    reach = pick(rng, (16, 64, len(data)))
    at = int(rng.integers(max(min(reach, len(data)) // size, 1))) * size
    if len(data) < at + size:
        return data + b"\0"
    old = int.from_bytes(data[at : at + size], "little")
    value = pick(rng, INTEGERS) if rng.random() < 0.7 else old + pick(rng, (-1, 1, 2, -16, 256))
    return data[:at] + struct.pack("<Q", value % 2**64)[:size] + data[at + size :]


def append(data: bytes, rng: Rng) -> bytes:
    return data + pick(rng, (b"\0", b"\n", b"\0" * 4096, data[:64], rng.bytes(16)))


def noise(data: bytes, rng: Rng) -> bytes:
    keep = pick(rng, (0, 0, 4, 8, 1024))  # with a header that looks right
    return data[:keep] + rng.bytes(int(rng.integers(0, 300)))


BYTES = (flip, flip, overwrite, truncate, insert, drop, duplicate, move, integer, integer, append, noise)


# -- JSON --------------------------------------------------------------------------------------------------------


def places(value, found=None) -> list[tuple[dict | list, object]]:
    """(container, key) of everything below `value`."""
    found = [] if found is None else found
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            found.append((value, key))
            places(value[key], found)
    return found


def edit(value, rng: Rng):
    """One change of structure, in place where possible; returns the new root."""
    all_places = places(value)
    if not all_places or rng.random() < 0.02:
        return deepcopy(pick(rng, VALUES))
    box, key = pick(rng, all_places)
    how = pick(rng, ("set", "set", "set", "delete", "rename", "swap", "copy", "nest", "nudge"))
    if how == "set":
        box[key] = deepcopy(pick(rng, VALUES))  # a later edit may go inside
    elif how == "delete":
        del box[key]
    elif how == "rename" and isinstance(box, dict):
        box[pick(rng, ("", "x", f"{key}s", str(key)[:-1], str(key).upper(), "\ud800"))] = box.pop(key)
    elif how == "swap":
        other, name = pick(rng, all_places)
        if not (contains(box[key], other) or contains(other[name], box)):
            box[key], other[name] = other[name], box[key]
    elif how == "copy" and isinstance(box, list):
        box += [deepcopy(box[key]) for _ in range(pick(rng, (1, 3)))]
    elif how == "nest":
        box[key] = pick(rng, ([box[key]], {"a": box[key]}, {str(key): box[key]}))
    elif how == "nudge" and type(box[key]) in (int, float):
        box[key] = pick(rng, (box[key] + 1, box[key] - 1, -box[key], box[key] * 1000, str(box[key])))
    return value


def contains(outer, inner) -> bool:
    return outer is inner or any(box[key] is inner for box, key in places(outer))


def edit_json(data: bytes, rng: Rng) -> bytes:
    """`data` as JSON with 1 to 3 edits. Written as Python does: NaN, long integers and lone surrogates pass."""
    value = json.loads(data)
    for _ in range(pick(rng, (1, 1, 2, 3))):
        value = edit(value, rng)
    return json.dumps(value).encode()


# -- lines of NAME=value -----------------------------------------------------------------------------------------


def edit_lines(data: bytes, rng: Rng) -> bytes:
    lines = data.decode("utf-8", "surrogateescape").split("\n")
    for _ in range(pick(rng, (1, 1, 2, 4))):
        i, j = (int(rng.integers(len(lines))) for _ in range(2))
        name, _, value = lines[i].partition("=")
        how = pick(rng, ("value", "value", "value", "name", "drop", "copy", "swap"))
        if how == "value":
            lines[i] = f"{name}={pick(rng, TEXTS)}"
        elif how == "name":
            at = int(rng.integers(len(name) + 1))
            lines[i] = pick(rng, (name[:at] + name[at + 1 :], name[:at] + "X" + name[at:], name.lower())) + "=" + value
        elif how == "drop" and len(lines) > 1:
            del lines[i]
        elif how == "copy":
            lines.insert(j, lines[i])
        elif how == "swap":
            lines[i] = f"{name}={lines[j].partition('=')[2]}"
    return "\n".join(lines).encode("utf-8", "surrogateescape")


# -- files -------------------------------------------------------------------------------------------------------


def how_to_edit(name: str) -> Callable[[bytes, Rng], bytes] | None:
    return {"json": edit_json, "jsonl": None, "txt": edit_lines}.get(name.rpartition(".")[2])


def mutant(valid: list[Files], seed: int, reader: str, index: int) -> tuple[Files, str]:
    """(files, recipe) of input `index`: one of `valid`, changed in 1 to 3 ways."""
    rng = rng_of(seed, reader, index)
    start = int(rng.integers(len(valid)))
    files, steps = dict(valid[start]), [f"valid[{start}]"]
    structured = True  # an edit needs text that parses: bytes are damaged after it, not before
    for _ in range(pick(rng, (1, 1, 1, 2, 3))):
        name, other = pick(rng, sorted(files)), pick(rng, sorted(files))
        parsed_edit = how_to_edit(name)
        roll = rng.random()
        if structured and parsed_edit and roll < 0.7:
            files[name] = parsed_edit(files[name], rng)
            steps.append(f"{parsed_edit.__name__} {name}")
            continue
        structured = False
        if roll > 0.97:
            files[name] = pick(rng, FOREIGN)
            steps.append(f"foreign {name}")
        elif roll > 0.95 and name != other:
            files[name], files[other] = files[other], files[name]
            steps.append(f"swap {name} {other}")
        elif roll > 0.93:
            files[name] = pick(rng, valid)[pick(rng, sorted(valid[0]))] if rng.random() < 0.9 else b""
            steps.append(f"from another input {name}")
        elif roll > 0.92 and len(files) > 1:
            del files[name]
            steps.append(f"remove {name}")
        else:
            change = pick(rng, BYTES)
            files[name] = change(files[name], rng)
            steps.append(f"{change.__name__} {name}")
    return files, ", ".join(steps)
