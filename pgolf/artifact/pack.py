"""The artifact's container: records <-> bytes. No pickle, nothing executable, nothing trusted before it is checked.

    magic "PGLF", version u8, codec id u8, compressed and raw table size u32 each, sha256 of all else: 46 bytes
    table    JSON (pgolf/artifact/table.py), compressed by a codec of the standard library: it can be read everywhere
             and says which packages the streams need
    streams  in the table's order, each compressed by a codec of its own

Values stay one a byte: packing int6 into bits before a byte codec costs 10-30 %. docs/artifact.md has the format and
what its choices cost and save.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import replace

import numpy as np

from pgolf.artifact import codecs, streams, table
from pgolf.artifact.layouts import LAYOUTS
from pgolf.artifact.table import DTYPES, MAX_TABLE, Stream, group_of
from pgolf.errors import ArtifactError
from pgolf.quant.policy import Record

MAGIC, VERSION = b"PGLF", 2
HEAD = struct.Struct("<4sBBII32s")


def pack(records: list[Record], meta: dict, codec: str = "brotli", level: int = -1) -> bytes:
    """`records` and `meta` (JSON values only) as an artifact; the same input gives the same bytes.

    codec: a name of `codecs.CODECS`, or "auto" for the smallest of all of them in each stream. What was written is
    unpacked and compared before it is returned.

    Raises SetupError when a codec is not installed, ConfigError on an unknown codec or level, ArtifactError on two
    records of one name, ValueError or TypeError on a `meta` that JSON cannot hold.
    """
    coders = codecs.choice(codec, level)
    records = [replace(r, parts={part: _little(a) for part, a in r.parts.items()}) for r in records]
    tensors = [
        [r.name, r.role, r.kind, list(r.shape), {part: [a.dtype.name, list(a.shape), 0] for part, a in r.parts.items()}]
        for r in records
    ]
    elements = table.check_tensors(tensors)
    groups: dict[str, list[tuple[list, np.ndarray]]] = {}  # its parts: what the table says of each, and the array
    for r, (*_, specs) in zip(records, tensors, strict=True):
        for part, a in r.parts.items():
            key = f"{group_of(r.role, r.kind, part)} {a.dtype.name}"
            groups.setdefault(key, []).append((specs[part], a))
    rows, body = [], []
    for group, packed in streams.choose({g: [a for _, a in groups[g]] for g in sorted(groups)}, coders, level).items():
        for stream in packed:
            for i in stream.members:
                groups[group][i][0][2] = len(rows)
            rows.append([stream.codec, stream.layout, len(stream.data)])
            body.append(stream.data)
    data = _seal(table.write(meta, tensors, rows), b"".join(body))
    table.check_density(elements, len(data))
    if unpack(data) != (records, json.loads(json.dumps(meta))):
        raise ArtifactError(f"artifact: what {codec} packed does not unpack to the same; please report this")
    return data


def unpack(data: bytes) -> tuple[list[Record], dict]:
    """(records, meta) of an artifact. Raises ArtifactError on bytes that are truncated, altered or no artifact, before
    anything is allocated by them; SetupError, which names every missing package, when a codec is not installed."""
    meta, tensors, found, at = _read(data)
    codecs.need(stream.codec for stream in found)
    parts: list[dict[str, np.ndarray]] = [dict.fromkeys(t[4]) for t in tensors]
    for stream in found:
        raw = stream.codec.decompress(data[at : at + stream.size], stream.raw_size)
        if len(raw) != stream.raw_size:
            raise ArtifactError(
                f"artifact: a stream of {stream.group[:200]} has {len(raw)} bytes, its tensors need {stream.raw_size}"
            )
        at, begin = at + stream.size, 0
        for item in stream.items:
            end = begin + item.spec.nbytes
            array = LAYOUTS[stream.layout].decode(raw[begin:end], item.spec)
            parts[item.tensor][item.part], begin = array.copy(order="C"), end
    rows = zip(tensors, parts, strict=True)
    return [Record(name, role, kind, tuple(shape), p) for (name, role, kind, shape, _), p in rows], meta


def measure(data: bytes) -> dict[str, int]:
    """{what: bytes} of an artifact, literal and adding up to len(data). Needs no codec's package. ArtifactError."""
    *_, found, at = _read(data)
    out = {"table": at}
    for stream in found:
        out[stream.group] = out.get(stream.group, 0) + stream.size
    return out


def contents(data: bytes) -> tuple[dict, list, list[Stream]]:
    """(meta, the table's tensors, its streams) of an artifact, without unpacking it. Raises like `measure`."""
    return _read(data)[:3]


def _little(a: np.ndarray) -> np.ndarray:
    """As the format has it; dtypes that it does not have are refused by name later."""
    return a.astype(DTYPES.get(a.dtype.name, a.dtype), copy=False)


def _seal(raw: bytes, body: bytes) -> bytes:
    """Header, the table compressed by the best codec that needs no package, body."""
    stdlib = [c for c in codecs.CODECS.values() if c.package is None]
    coder, packed = min(((c, c.compress(raw)) for c in stdlib), key=lambda found: len(found[1]))
    head = (MAGIC, VERSION, coder.id, len(packed), len(raw))
    return HEAD.pack(*head, _digest(head, packed + body)) + packed + body


def _digest(head: tuple, body: bytes) -> bytes:
    return hashlib.sha256(HEAD.pack(*head, b"") + body).digest()


def _read(data: bytes) -> tuple[dict, list, list[Stream], int]:
    """(meta, tensors, streams, offset of the first stream), all checked."""
    if len(data) < HEAD.size or data[:4] != MAGIC:
        raise ArtifactError(f"not a pgolf artifact: {len(data)} bytes that begin with {data[:4]!r}, expected {MAGIC!r}")
    *head, digest = HEAD.unpack_from(data)
    if head[1] != VERSION:
        raise ArtifactError(
            f"artifact of version {head[1]}, this pgolf reads version {VERSION}; use the one that wrote it"
        )
    if _digest(tuple(head), data[HEAD.size :]) != digest:
        raise ArtifactError("artifact: its checksum does not match; it is truncated or altered, copy it again")
    coder, packed, raw = codecs.known(head[2]), *head[3:]
    if raw > MAX_TABLE or packed > len(data) - HEAD.size or coder.package:
        raise ArtifactError(f"artifact: a table of {packed} bytes ({raw} raw) cannot be in {len(data)} bytes")
    at = HEAD.size + packed
    meta, tensors, found = table.parse(coder.decompress(data[HEAD.size : at], raw), len(data))
    if at + sum(stream.size for stream in found) != len(data):
        raise ArtifactError("artifact: the sizes of its streams do not add up to its length; it is damaged")
    return meta, tensors, found, at
