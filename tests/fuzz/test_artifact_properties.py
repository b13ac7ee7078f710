"""The container under hypothesis: any records come back bit for bit; a table that was tampered with and sealed again is
refused, or is a consistent artifact of its own."""

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pgolf.artifact import codecs
from pgolf.artifact.pack import HEAD, contents, measure, pack, unpack
from pgolf.artifact.table import DTYPES
from pgolf.errors import ArtifactError
from pgolf.quant.policy import Record

NAMES = st.text(max_size=12)  # any characters: dots, quotes, lone surrogates
CODECS = [*codecs.CODECS, "auto"]


@st.composite
def parts(draw):
    """An array of a dtype of the format; all bit patterns (NaN too), any strides."""
    dtype = np.dtype(draw(st.sampled_from(["i1", "<f2", "<f4", ">f2"])))
    shape = draw(arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=9))
    count = int(np.prod(shape)) * dtype.itemsize
    a = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), dtype).reshape(shape)
    return a.T if draw(st.booleans()) else a


@st.composite
def some_records(draw):
    names = draw(st.lists(NAMES, max_size=6, unique=True))
    words = st.sampled_from(["matrix", "embed", "vector", "int6", "int8+lowrank", "a.b", "", "\u2581"])
    box = st.dictionaries(st.sampled_from(["q", "scale", "value", "left", "a.b"]), parts(), max_size=3)
    shapes = st.lists(st.integers(0, 50), max_size=3).map(tuple)
    return [Record(name, draw(words), draw(words), draw(shapes), draw(box)) for name in names]


def plain(records):
    """What must come back: everything, arrays little-endian."""
    return [
        (r.name, r.role, r.kind, r.shape, {k: (a.dtype.name, a.shape, a.astype(DTYPES[a.dtype.name]).tobytes())
                                           for k, a in r.parts.items()})
        for r in records
    ]  # fmt: skip


@settings(max_examples=120, deadline=None)
@given(some_records(), st.sampled_from(CODECS), st.dictionaries(NAMES, st.integers() | NAMES | st.none(), max_size=3))
def test_any_records_come_back_bit_for_bit(records, codec, meta):
    data = pack(records, meta, codec)
    back, told = unpack(data)
    assert plain(back) == plain(records) and told == meta
    assert sum(measure(data).values()) == len(data)
    assert pack(back, told, codec) == data, "packing what was unpacked gives the same bytes"


# -- a table that lies ---------------------------------------------------------------------------------------------


def example():
    rng = np.random.default_rng(0)
    q = lambda *shape: rng.normal(0, 7, shape).astype(np.int8)
    steps = lambda n: rng.random(n).astype("<f2")
    some = [Record(f"b.{i}", "matrix", "int6", (6, 8), {"q": q(6, 8), "scale": steps(6)}) for i in range(3)]
    some += [Record("e", "embed", "int8", (9, 4), {"q": q(9, 4), "scale": steps(9)})]
    some += [Record(n, "vector", "fp16", (5,), {"value": steps(5)}) for n in ("g", "h")]
    return [*some, Record("f", "matrix", "float", (3, 2), {"value": rng.random((3, 2)).astype("<f4")})]


GOOD = [pack(example(), {"x": 1}, codec) for codec in CODECS]


def opened(data):
    """(table as JSON values, streams)."""
    _, _, codec, packed, raw, _ = HEAD.unpack_from(data)
    at = HEAD.size + packed
    return json.loads(codecs.known(codec).decompress(data[HEAD.size : at], raw)), data[at:]


def sealed(table, body):
    raw = json.dumps(table).encode()
    packed = codecs.CODECS["zlib"].compress(raw, 1)
    head = (b"PGLF", 2, codecs.CODECS["zlib"].id, len(packed), len(raw))
    return HEAD.pack(*head, hashlib.sha256(HEAD.pack(*head, b"") + packed + body).digest()) + packed + body


def tamper(draw, table, body):
    """One lie about the structure, of the kind that only somebody who knows the format can tell."""
    streams, tensors = table["streams"], table["tensors"]
    s, t = draw(st.integers(0, len(streams) - 1)), draw(st.integers(0, len(tensors) - 1))
    specs = tensors[t][4]
    part = specs[draw(st.sampled_from(sorted(specs)))] if specs else [0, [], 0]
    how = draw(st.sampled_from(["codec", "layout", "split", "swap", "stream", "shape", "dtype", "role", "kind", "part",
                                "order", "drop tensor", "drop stream", "record shape", "copy", "bytes"]))  # fmt: skip
    if how == "codec":
        streams[s][0] = draw(st.integers(-1, 6))
    elif how == "layout":
        streams[s][1] = draw(st.sampled_from(["rows", "columns", "planes", "none"]))
    elif how == "split":  # bytes move from a stream to the next
        n = draw(st.integers(-9, 9))
        streams[s][2] += n
        streams[(s + 1) % len(streams)][2] -= n
    elif how == "swap":
        other = draw(st.integers(0, len(streams) - 1))
        streams[s], streams[other] = streams[other], streams[s]
    elif how == "stream":
        part[2] = draw(st.integers(-1, len(streams)))
    elif how == "shape":
        part[1] = draw(st.sampled_from([part[1][::-1], [], [*part[1], 1], [0], [2**31, 2**31], part[1][:1]]))
    elif how == "dtype":
        part[0] = draw(st.sampled_from([*DTYPES, "float64", "object", "U9"]))
    elif how in ("role", "kind"):
        tensors[t][1 if how == "role" else 2] = draw(st.sampled_from(["matrix", "embed", "vector", "int6", "int8", ""]))
    elif how == "part" and specs:
        specs[draw(st.sampled_from(["q", "scale", "value", "more"]))] = specs.pop(draw(st.sampled_from(sorted(specs))))
    elif how == "order":
        tensors.append(tensors.pop(t))
    elif how == "drop tensor":
        del tensors[t]
    elif how == "drop stream":
        body = body[: len(body) - streams[-1][2]]
        del streams[-1]
    elif how == "record shape":
        tensors[t][3] = draw(st.sampled_from([[], [1], [2**20, 2**20], tensors[t][3][::-1]]))
    elif how == "copy":
        tensors.append([f"{tensors[t][0]}'", *tensors[t][1:]])
    elif how == "bytes" and body:
        at = draw(st.integers(0, len(body) - 1))
        body = body[:at] + bytes([body[at] ^ draw(st.integers(1, 255))]) + body[at + 1 :]
    return body


@pytest.mark.slow
@settings(max_examples=3000, deadline=None)
@given(st.data())
def test_a_table_that_lies_is_refused_or_consistent(source):
    table, body = opened(source.draw(st.sampled_from(GOOD)))
    for _ in range(source.draw(st.integers(1, 3))):
        if table["streams"] and table["tensors"]:
            body = tamper(source.draw, table, body)
    data = sealed(table, body)
    try:
        records, meta = unpack(data)
    except ArtifactError:
        return
    stated = [
        (name, role, kind, tuple(shape), {k: (dtype, tuple(size)) for k, (dtype, size, _) in parts.items()})
        for name, role, kind, shape, parts in table["tensors"]
    ]
    got = [(r.name, r.role, r.kind, r.shape, {k: (a.dtype.name, a.shape) for k, a in r.parts.items()}) for r in records]
    assert got == stated and meta == table["meta"], "a tensor that is not what the table says"
    assert sum(measure(data).values()) == len(data), "bytes that belong to nothing"
    assert sorted((i.tensor, i.part) for s in contents(data)[2] for i in s.items) == sorted(
        (n, part) for n, t in enumerate(table["tensors"]) for part in t[4]
    )
    assert unpack(pack(records, meta, "zlib"))[0] == records


def test_tampering_is_of_every_kind_and_some_of_it_is_accepted():
    """The property above has both branches to test: counted over fixed draws."""
    seen = {"accepted": 0, "refused": 0}

    @settings(max_examples=300, deadline=None, database=None, derandomize=True)
    @given(st.data())
    def count(source):
        table, body = opened(GOOD[0])
        body = tamper(source.draw, table, body)
        try:
            unpack(sealed(table, body))
            seen["accepted"] += 1
        except ArtifactError:
            seen["refused"] += 1

    count()
    assert seen["accepted"] > 20 and seen["refused"] > 60, seen
