"""The artifact's container: records <-> bytes. No pickle, nothing executable, nothing trusted before it is checked.

    magic "PGLF", version u8, codec id u8, compressed and raw table size u32 each, sha256 of all else: 46 bytes
    table    JSON, compressed: {"meta": ..., "tensors": [[name, role, kind, shape, {part: [dtype, shape]}], ...],
             "streams": [[group, layout, compressed size], ...]}
    streams  one per group, compressed, in the table's order

A group holds one part of all tensors of a role, as int8 values of the matrices together and their steps together: a
byte codec models one kind of byte at a time, and the bytes of each group are literal. Values stay one a byte: packing
int6 into bits before a byte codec costs 10-30 %. Each group is compressed in every layout that applies; the smallest is
kept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pgolf.artifact import codecs
from pgolf.errors import ArtifactError
from pgolf.quant.policy import Record

MAGIC, VERSION = b"PGLF", 1
HEAD = struct.Struct("<4sBBII32s")
MAX_ELEMENTS = 2**28  # over all tensors and parts: four times what 16 MB can hold at 2 bits an element
# What so few bytes can hold: a quarter of a bit an element (shape and parts count both), and a small model for nothing.
# A forged artifact of 1 KB could else ask for gigabytes
FREE_ELEMENTS, ELEMENTS_PER_BYTE = 2**22, 64
MAX_DIMS = 8
MAX_TABLE = 2**20  # bytes of raw table: 8,000 tensors; as Python objects JSON takes twenty times its size
DTYPES = {"int8": np.dtype("i1"), "float16": np.dtype("<f2"), "float32": np.dtype("<f4")}


@dataclass(frozen=True)
class Spec:
    """What the table says about one part of one tensor."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """An order of one part's bytes. `applies(dtype)`; `encode` and `decode` are each other's inverse."""

    applies: Callable[[np.dtype], bool]
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, Spec], np.ndarray]


def _from_columns(data: bytes, spec: Spec) -> np.ndarray:
    return np.frombuffer(data, spec.dtype).reshape(spec.shape[::-1]).T


def _to_planes(a: np.ndarray) -> bytes:
    return np.frombuffer(a.tobytes(), np.uint8).reshape(-1, a.dtype.itemsize).T.tobytes()


def _from_planes(data: bytes, spec: Spec) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(spec.dtype.itemsize, -1)
    return np.frombuffer(planes.T.tobytes(), spec.dtype).reshape(spec.shape)


LAYOUTS = {
    "rows": Layout(lambda d: True, lambda a: a.tobytes(), lambda b, s: np.frombuffer(b, s.dtype).reshape(s.shape)),
    "columns": Layout(lambda d: d.itemsize == 1, lambda a: a.T.tobytes(), _from_columns),
    "planes": Layout(lambda d: d.itemsize > 1, _to_planes, _from_planes),  # all low bytes, then all high bytes
}


def pack(records: list[Record], meta: dict, codec: str = "brotli", level: int = -1) -> bytes:
    """`records` and `meta` (JSON values only) as an artifact; the same input gives the same bytes.

    Raises SetupError when the codec is not installed, ConfigError on an unknown codec or level, ArtifactError on two
    records of one name, ValueError or TypeError on a `meta` that JSON cannot hold.
    """
    coder = codecs.get(codec)
    groups: dict[str, list[np.ndarray]] = {}
    tensors = []
    for r in records:
        parts = {name: [a.dtype.name, list(a.shape)] for name, a in r.parts.items()}
        tensors.append([r.name, r.role, r.kind, list(r.shape), parts])
        for name, a in r.parts.items():
            groups.setdefault(_group(r.role, name, a.dtype), []).append(a)
    elements = _check_tensors(tensors)
    streams = _compress(groups, coder, level)
    table = {"meta": meta, "streams": [[g, lay, len(s)] for g, (lay, s) in streams.items()], "tensors": tensors}
    raw = json.dumps(table, separators=(",", ":"), sort_keys=True, allow_nan=False).encode()
    packed = coder.compress(raw, level)
    body = packed + b"".join(s for _, s in streams.values())
    if len(raw) > MAX_TABLE:
        raise ArtifactError(f"artifact: {len(tensors)} tensors make a table of {len(raw)} bytes, over {MAX_TABLE}")
    head = (MAGIC, VERSION, coder.id, len(packed), len(raw))
    _check_density(elements, HEAD.size + len(body))
    return HEAD.pack(*head, _digest(head, body)) + body


def unpack(data: bytes) -> tuple[list[Record], dict]:
    """(records, meta) of an artifact. Raises ArtifactError on bytes that are truncated, altered or no artifact, before
    anything is allocated by them; SetupError when its codec is not installed."""
    coder, table, at = _read(data)
    specs: dict[str, list[tuple[int, str, Spec]]] = {}
    for i, (_, role, _, _, parts) in enumerate(table["tensors"]):
        for part, (dtype, shape) in parts.items():
            spec = Spec(DTYPES[dtype], tuple(shape))
            specs.setdefault(_group(role, part, spec.dtype), []).append((i, part, spec))
    if sorted(specs) != sorted(group for group, _, _ in table["streams"]):
        raise ArtifactError("artifact: the table's streams do not match its tensors; it is damaged")
    parts = [dict.fromkeys(t[4]) for t in table["tensors"]]
    for group, layout, size in table["streams"]:
        total = sum(spec.nbytes for _, _, spec in specs[group])
        raw = coder.decompress(data[at : at + size], total)
        if len(raw) != total:
            raise ArtifactError(f"artifact: group {group} has {len(raw)} bytes, its tensors need {total}")
        at, begin = at + size, 0
        for i, part, spec in specs[group]:
            parts[i][part] = LAYOUTS[layout].decode(raw[begin : begin + spec.nbytes], spec).copy(order="C")
            begin += spec.nbytes
    tensors = zip(table["tensors"], parts, strict=True)
    return [Record(n, role, kind, tuple(shape), p) for (n, role, kind, shape, _), p in tensors], table["meta"]


def measure(data: bytes) -> dict[str, int]:
    """{what: bytes} of an artifact, literal and adding up to len(data). Raises like `unpack`."""
    _, table, at = _read(data)
    return {"table": at, **{group: size for group, _, size in table["streams"]}}


def _group(role: str, part: str, dtype: np.dtype) -> str:
    return f"{role}.{part}.{dtype.name}"


def _digest(head: tuple, body: bytes) -> bytes:
    return hashlib.sha256(HEAD.pack(*head, b"") + body).digest()


def _compress(groups: dict[str, list[np.ndarray]], coder: codecs.Codec, level: int) -> dict[str, tuple[str, bytes]]:
    """{group: (layout, stream)}, the smallest of the layouts. Codecs release the GIL, so threads share the work."""
    little = {g: [a.astype(DTYPES[a.dtype.name], copy=False) for a in arrays] for g, arrays in sorted(groups.items())}
    jobs = [(g, name) for g, arrays in little.items() for name, lay in LAYOUTS.items() if lay.applies(arrays[0].dtype)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        encode = lambda job: coder.compress(b"".join(LAYOUTS[job[1]].encode(a) for a in little[job[0]]), level)
        best: dict[str, tuple[str, bytes]] = {}
        for (group, name), stream in zip(jobs, pool.map(encode, jobs), strict=True):
            if group not in best or len(stream) < len(best[group][1]):
                best[group] = name, stream
    return best


def _read(data: bytes) -> tuple[codecs.Codec, dict, int]:
    """(codec, checked table, offset of the first stream)."""
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise ArtifactError(f"not a pgolf artifact: {len(data)} bytes that begin with {data[:4]!r}, expected {MAGIC!r}")
    *head, digest = HEAD.unpack_from(data)
    if head[1] != VERSION:
        raise ArtifactError(
            f"artifact of version {head[1]}, this pgolf reads version {VERSION}; use the one that wrote it"
        )
    if _digest(tuple(head), data[HEAD.size :]) != digest:
        raise ArtifactError("artifact: its checksum does not match; it is truncated or altered, copy it again")
    coder, packed, raw = codecs.by_id(head[2]), *head[3:]
    if raw > MAX_TABLE or packed > len(data) - HEAD.size:
        raise ArtifactError(f"artifact: a table of {packed} bytes ({raw} raw) cannot be in {len(data)} bytes")
    at = HEAD.size + packed
    table = _parse(coder.decompress(data[HEAD.size : at], raw), len(data))
    if at + sum(size for _, _, size in table["streams"]) != len(data):
        raise ArtifactError("artifact: the sizes of its streams do not add up to its length; it is damaged")
    return coder, table, at


def _parse(raw: bytes, size: int) -> dict:
    """The table of an artifact of `size` bytes, with every type and size in it checked."""
    try:
        table = json.loads(raw)
        ok = table.keys() == {"meta", "streams", "tensors"} and isinstance(table["meta"], dict)
        groups = [group for group, _, _ in table["streams"]]
        ok = ok and len(set(groups)) == len(groups) and all(isinstance(group, str) for group in groups)
        ok = ok and all(layout in LAYOUTS and _is_size(size) for _, layout, size in table["streams"])
        _check_density(_check_tensors(table["tensors"]), size)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise ArtifactError(f"artifact: its table cannot be read ({str(e)[:200]}); it is damaged") from e
    if not ok:
        raise ArtifactError("artifact: its table is not one of this format; it is damaged")
    return table


def _check_tensors(tensors: list) -> int:
    """Number of elements. Raises ArtifactError unless names are unique strings, dtypes known and sizes within
    `MAX_ELEMENTS`."""
    names, total = set(), 0
    for name, role, kind, shape, parts in tensors:
        shapes = [shape, *(s for _, s in parts.values())]
        strings = all(isinstance(x, str) for x in (name, role, kind))
        if not strings or name in names or not all(map(_is_shape, shapes)):
            raise ArtifactError(f"artifact: bad or repeated tensor {name!r} in its table")
        if unknown := {d for d, _ in parts.values()} - DTYPES.keys():
            raise ArtifactError(f"artifact: {name} has dtype {unknown}, expected one of {', '.join(DTYPES)}")
        names.add(name)
        total += sum(math.prod(max(d, 1) for d in s) for s in shapes)
    if total > MAX_ELEMENTS:
        raise ArtifactError(f"artifact: {total} elements, the format ends at {MAX_ELEMENTS}")
    return total


def _check_density(elements: int, size: int) -> None:
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
