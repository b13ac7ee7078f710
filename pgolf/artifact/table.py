"""The table of an artifact: which tensors there are, which stream holds which part of them. Nothing in it is trusted.

    {"meta": {...}, "tensors": [[name, role, kind, shape, {part: [dtype, shape, stream]}], ...],
     "streams": [[codec id, layout, compressed size], ...]}

A stream holds parts of one group, `role.kind.part`, and of one dtype, in the order of the tensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pgolf.artifact import codecs
from pgolf.artifact.layouts import LAYOUTS, Spec
from pgolf.errors import ArtifactError

MAX_ELEMENTS = 2**28  # over all tensors and parts: four times what 16 MB can hold at 2 bits an element
# What so few bytes can hold: a quarter of a bit an element (shape and parts count both), and a small model for nothing.
# A forged artifact of 1 KB could else ask for gigabytes
FREE_ELEMENTS, ELEMENTS_PER_BYTE = 2**22, 64
MAX_DIMS = 8
MAX_TABLE = 2**20  # bytes of raw table: 8,000 tensors; as Python objects JSON takes twenty times its size
DTYPES = {"int8": np.dtype("i1"), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


@dataclass(frozen=True)
class Item:
    """One part of one tensor, in a stream."""

    tensor: int  # index in the table
    part: str
    spec: Spec


@dataclass(frozen=True)
class Stream:
    """A run of compressed bytes. `items` are in order; their group is `role.kind.part` of all of them."""

    group: str
    codec: codecs.Codec
    layout: str
    size: int  # compressed bytes
    items: tuple[Item, ...]

    @property
    def raw_size(self) -> int:
        return sum(item.spec.nbytes for item in self.items)


def group_of(role: str, kind: str, part: str) -> str:
    """The group of a part; its dots are separators only for a reader's eye."""
    return f"{role}.{kind}.{part}"


def write(meta: dict, tensors: list, streams: list) -> bytes:
    """The table as JSON; the same input gives the same bytes. ArtifactError when it is too long or names repeat."""
    raw = json.dumps(
        {"meta": meta, "streams": streams, "tensors": tensors}, separators=(",", ":"), sort_keys=True, allow_nan=False
    ).encode()
    if len(raw) > MAX_TABLE:
        raise ArtifactError(f"artifact: {len(tensors)} tensors make a table of {len(raw)} bytes, over {MAX_TABLE}")
    return raw


def parse(raw: bytes, size: int) -> tuple[dict, list, list[Stream]]:
    """(meta, tensors, streams) of an artifact of `size` bytes; all of it checked. ArtifactError."""
    try:
        table = json.loads(raw)
        ok = table.keys() == {"meta", "streams", "tensors"} and isinstance(table["meta"], dict)
        check_density(check_tensors(table["tensors"]), size)
        streams = _streams(table["tensors"], table["streams"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ArtifactError(f"artifact: its table cannot be read ({str(e)[:200]}); it is damaged") from e
    if not ok:
        raise ArtifactError("artifact: its table is not one of this format; it is damaged")
    return table["meta"], table["tensors"], streams


def _streams(tensors: list, rows: list) -> list[Stream]:
    """Every stream with what is in it. ArtifactError unless each holds parts of one group, dtype and layout."""
    items: list[list[Item]] = [[] for _ in rows]
    groups: list[set[str]] = [set() for _ in rows]
    for i, (_, role, kind, _, parts) in enumerate(tensors):
        for part, (dtype, shape, stream) in parts.items():
            if not _is_size(stream) or stream >= len(rows):
                raise ArtifactError(f"artifact: stream {str(stream)[:20]} of {len(rows)}; its table is damaged")
            items[stream].append(Item(i, part, Spec(DTYPES[dtype], tuple(shape))))
            groups[stream].add(group_of(role, kind, part))
    out = []
    for (codec, layout, size), group, inside in zip(rows, groups, items, strict=True):
        dtypes = {item.spec.dtype for item in inside}
        if len(group) != 1 or len(dtypes) != 1 or not _is_size(codec) or not _is_size(size):
            raise ArtifactError("artifact: its streams do not match its tensors; it is damaged")
        if layout not in LAYOUTS or not LAYOUTS[layout].applies(*dtypes):
            raise ArtifactError(f"artifact: unknown layout {str(layout)[:20]!r}; it is damaged or from a newer pgolf")
        out.append(Stream(*group, codecs.known(codec), layout, size, tuple(inside)))
    return out


def check_tensors(tensors: Iterable) -> int:
    """Number of elements. Raises ArtifactError unless names are unique strings, dtypes known and sizes within
    `MAX_ELEMENTS`."""
    names, total = set(), 0
    for name, role, kind, shape, parts in tensors:
        shapes = [shape, *(s for _, s, _ in parts.values())]
        strings = all(isinstance(x, str) for x in (name, role, kind))
        if not strings or name in names or not all(map(_is_shape, shapes)):
            raise ArtifactError(f"artifact: bad or repeated tensor {str(name)[:200]!r} in its table")
        if unknown := {d for d, _, _ in parts.values()} - DTYPES.keys():
            raise ArtifactError(
                f"artifact: {name[:200]} has dtype {str(unknown)[:99]}, expected one of {', '.join(DTYPES)}"
            )
        names.add(name)
        total += sum(math.prod(max(d, 1) for d in s) for s in shapes)
    if total > MAX_ELEMENTS:
        raise ArtifactError(f"artifact: {total} elements, the format ends at {MAX_ELEMENTS}")
    return total


def check_density(elements: int, size: int) -> None:
    """ArtifactError when so many elements cannot honestly be in an artifact of `size` bytes."""
    most = FREE_ELEMENTS + ELEMENTS_PER_BYTE * size
    if elements > most:
        raise ArtifactError(
            f"artifact: {elements:,} elements in {size:,} bytes, the format holds {most:,} in so few:"
            " it is forged, or the weights are nearly all the same"
        )


def _is_shape(x: object) -> bool:
    return isinstance(x, list) and len(x) <= MAX_DIMS and all(map(_is_size, x))


def _is_size(x: object) -> bool:
    return type(x) is int and 0 <= x < 2**32
