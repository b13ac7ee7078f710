"""The container: bit-exact round trip, determinism, literal byte counts, and nothing but ArtifactError on bad bytes."""

import hashlib
import json
import struct
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pgolf.artifact import streams as stream_choice
from pgolf.artifact.codecs import CODECS
from pgolf.artifact.layouts import LAYOUTS, Layout, Spec
from pgolf.artifact.pack import HEAD, contents, measure, pack, unpack
from pgolf.errors import ArtifactError, ConfigError, SetupError
from pgolf.kernels.int6 import int6
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import QuantConfig
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import Record, dequantize

META = {"dim": 8, "name": "tiny", "nested": {"layers": [1, 2], "none": None}}


def infos():
    gen = torch.Generator().manual_seed(0)
    shapes = [
        ("blocks.0.w", (24, 16), Role.MATRIX),
        ("blocks.1.w", (16, 24), Role.MATRIX),
        ("bank", (2, 10, 8), Role.MATRIX),
        ("embed", (50, 8), Role.EMBED),
        ("side", (20, 10), Role.SIDE_MATRIX),
        ("gain", (8,), Role.VECTOR),
        ("scale", (), Role.VECTOR),
        ("empty", (0, 4), Role.FROZEN),
    ]
    return [ParamInfo(n, nn.Parameter(torch.randn(s, generator=gen)), r, None) for n, s, r in shapes]


def records(**kwargs):
    some = infos()
    return quantize_state({i.name: i.param.detach() for i in some}, some, QuantConfig(keep_numel=64, **kwargs))


ARTIFACT = pack(records(), META, "zlib", 6)


@pytest.mark.parametrize("codec", [*CODECS, "auto"])
@pytest.mark.parametrize("matrix", ["int6", "int8", "fp16", "float"])
def test_round_trip_is_bit_exact(codec, matrix):
    before = records(matrix=matrix)
    data = pack(before, META, codec)
    after, meta = unpack(data)
    assert after == before and meta == META
    plain, back = dequantize(before), dequantize(after)
    assert all(torch.equal(plain[name], back[name]) for name in plain)
    assert all(a.flags.writeable and a.flags.c_contiguous for r in after for a in r.parts.values())


def test_reloaded_int6_is_what_fake_quantisation_trained():
    back = dequantize(unpack(ARTIFACT)[0])
    for info in infos()[:2]:
        assert torch.equal(back[info.name], int6(info.param.detach()))


@pytest.mark.parametrize("codec", [*CODECS, "auto"])
def test_same_input_same_bytes(codec):
    assert pack(records(), META, codec) == pack(records(), dict(reversed(META.items())), codec)


@pytest.mark.parametrize("codec", CODECS)
def test_items_are_literal_and_add_up(codec):
    data = pack(records(), META, codec)
    items = measure(data)
    assert sum(items.values()) == len(data)
    assert {"table", "matrix.int6.q", "matrix.int6.scale", "embed.int8.q", "vector.fp16.value"} <= items.keys()
    # an item counts what its tensors cost: without the matrices exactly the other streams stay
    rest = measure(pack([r for r in records() if r.role != "matrix"], META, codec))
    assert {k: v for k, v in items.items() if k in rest and k != "table"} == {
        k: v for k, v in rest.items() if k != "table"
    }


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_layouts_are_invertible_permutations_of_the_bytes(name, shape, dtype):
    a = np.random.default_rng(0).normal(0, 50, shape).astype(dtype)
    data = LAYOUTS[name].encode(a)
    assert sorted(data) == sorted(a.tobytes())
    back = LAYOUTS[name].decode(data, Spec(a.dtype, shape))
    assert back.shape == shape and back.dtype == a.dtype and back.tobytes() == a.tobytes()


def test_the_smallest_layout_is_kept():
    smooth = np.repeat(np.arange(40, dtype=np.int8)[None], 200, 0).copy()  # a column is constant
    exponents = (2.0 ** np.random.default_rng(0).uniform(-6, -5, 4000)).astype(np.float16)  # high bytes alike
    for role, kind, part, a in (("matrix", "int6", "q", smooth), ("vector", "fp16", "value", exponents)):
        size = measure(pack([Record("x", role, kind, a.shape, {part: a})], {}, "zlib"))[f"{role}.{kind}.{part}"]
        sizes = [len(CODECS["zlib"].compress(lay.encode(a))) for lay in LAYOUTS.values() if lay.applies(a.dtype)]
        assert size == min(sizes) < max(sizes)


def test_arrays_part_where_that_is_smaller_and_stay_together_where_not():
    rng = np.random.default_rng(0)
    rows = np.repeat(rng.integers(-9, 9, 300, dtype=np.int8)[:, None], 300, 1).copy()  # one layout suits it
    columns = rows.T.copy()  # the other
    apart = pack([Record(n, "matrix", "int6", a.shape, {"q": a}) for n, a in (("a", rows), ("b", columns))], {}, "auto")
    layouts = [(s.layout, len(s.items)) for s in contents(apart)[2]]
    assert sorted(layouts) == [("columns", 1), ("rows", 1)]
    alike = [Record(str(i), "vector", "fp16", (3,), {"value": np.ones(3, np.float16)}) for i in range(20)]
    assert [len(s.items) for s in contents(pack(alike, {}, "auto"))[2]] == [20]


def test_large_groups_are_not_tried_as_one_stream(monkeypatch):
    alike = [Record(str(i), "vector", "fp16", (3,), {"value": np.ones(3, np.float16)}) for i in range(20)]
    monkeypatch.setattr(stream_choice, "TOGETHER", 20 * 6 - 1)
    assert [len(s.items) for s in contents(pack(alike, {}, "zlib"))[2]] == [1] * 20
    monkeypatch.setattr(stream_choice, "TOGETHER", 20 * 6)
    assert [len(s.items) for s in contents(pack(alike, {}, "zlib"))[2]] == [20]


def test_auto_is_never_larger_than_one_codec_and_says_what_its_reader_needs(monkeypatch):
    one = {name: pack(records(), META, name) for name in CODECS}
    auto = pack(records(), META, "auto")
    assert len(auto) <= min(map(len, one.values()))
    monkeypatch.setitem(sys.modules, "brotli", None)
    assert sum(measure(one["brotli"]).values()) == len(one["brotli"])  # sizes can be told without it
    with pytest.raises(SetupError, match="needs brotli to be read; run: pip install brotli"):
        unpack(one["brotli"])
    with pytest.raises(SetupError, match="pip install brotli"):  # never a larger artifact instead
        pack(records(), META, "auto")
    assert unpack(one["lzma"])[0] == records()


def test_packing_checks_what_it_wrote(monkeypatch):
    wrong = LAYOUTS["rows"].decode
    damaged = Layout(LAYOUTS["rows"].applies, LAYOUTS["rows"].encode, lambda b, s: wrong(b, s) ^ 1)
    monkeypatch.setattr(stream_choice, "LAYOUTS", {"rows": damaged})
    monkeypatch.setitem(LAYOUTS, "rows", damaged)
    some = [r for r in records() if r.name == "embed"]
    for r in some:
        del r.parts["scale"]
    with pytest.raises(ArtifactError, match="does not unpack to the same"):
        pack(some, {}, "zlib")


def test_one_value_a_byte_beats_packed_bits():
    w = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    info = ParamInfo("w", nn.Parameter(w), Role.MATRIX, None)
    size = measure(pack(quantize_state({"w": w}, [info], QuantConfig(keep_numel=0)), {}, "brotli"))["matrix.int6.q"]
    assert size < 0.95 * w.numel() * 6 / 8


def test_no_tensors_at_all():
    assert unpack(pack([], {}, "zlib")) == ([], {})


def test_bad_input_to_pack():
    twice = [records()[0]] * 2
    with pytest.raises(ArtifactError, match="repeated"):
        pack(twice, {}, "zlib")
    with pytest.raises(TypeError):
        pack([], {"x": object()}, "zlib")
    with pytest.raises(ValueError):
        pack([], {"x": float("nan")}, "zlib")
    with pytest.raises(ConfigError):
        pack([], {}, "zlib", 77)
    with pytest.raises(ArtifactError, match="dtype"):
        pack([Record("x", "vector", "fp16", (1,), {"value": np.zeros(1)})], {}, "zlib")


def test_every_single_byte_counts():
    for at in range(0, len(ARTIFACT), 7):
        bad = bytearray(ARTIFACT)
        bad[at] ^= 0x10
        with pytest.raises(ArtifactError):
            unpack(bytes(bad))


def damaged(data, draw):
    """A random mutation of `data`; equal to it only by chance."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "drop", "splice", "noise"]))
    a, b = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
    noise = draw(st.binary(max_size=40))
    return {
        "cut": data[:a],
        "flip": data[:a] + bytes(x ^ 0xFF for x in data[a : a + 1]) + data[a + 1 :],
        "insert": data[:a] + noise + data[a:],
        "drop": data[:a] + data[b:],
        "splice": data[:a] + data[b:] + data[a:b],
        "noise": data[:a] + noise + data[a + len(noise) :],
    }[how]


def resealed(data):
    """`data` with a checksum that fits: what an attacker would send."""
    if len(data) < HEAD.size:
        return data
    head = data[: HEAD.size - 32]
    return head + hashlib.sha256(head + bytes(32) + data[HEAD.size :]).digest() + data[HEAD.size :]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_fuzz_damaged_bytes_are_refused(source):
    data = damaged(ARTIFACT, source.draw)
    for read in (unpack, measure):
        if data == ARTIFACT:
            return
        with pytest.raises(ArtifactError):
            read(data)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_fuzz_forged_bytes_raise_nothing_else(source):
    data = resealed(damaged(ARTIFACT, source.draw))
    try:
        got, _ = unpack(data)
        dequantize(got)
    except ArtifactError:
        pass


def table_of(data):
    """The raw JSON of an artifact's table."""
    _, _, codec, packed, raw, _ = HEAD.unpack_from(data)
    return {c.id: c for c in CODECS.values()}[codec].decompress(data[HEAD.size :][:packed], raw)


TABLE, TABLE_SIZE = table_of(ARTIFACT), HEAD.unpack_from(ARTIFACT)[3]


def forged(change):
    """The artifact with `change(table)` applied to its table, sealed again."""
    table = json.loads(TABLE)
    table = change(table) or table
    raw = json.dumps(table).encode() if not isinstance(table, bytes) else table
    packed = CODECS["zlib"].compress(raw)
    head = struct.pack("<4sBBII", b"PGLF", 2, CODECS["zlib"].id, len(packed), len(raw))
    return resealed(head + bytes(32) + packed + ARTIFACT[HEAD.size + TABLE_SIZE :])


def test_forging_as_such_works():
    assert unpack(forged(lambda t: None))[0] == records()


@pytest.mark.parametrize(
    "change",
    [
        lambda t: b"[" * 100_000,
        lambda t: b"\xff\xfe",
        lambda t: [1],
        lambda t: t.update(meta=3),
        lambda t: t.pop("streams") and None,
        lambda t: t["streams"].pop() and None,
        lambda t: t["streams"].append(t["streams"][0]),
        lambda t: t["streams"].append([4, "rows", 0]),
        lambda t: t["streams"].append("abc"),
        lambda t: t["streams"][0].__setitem__(0, 99),
        lambda t: t["streams"][0].__setitem__(0, "zlib"),
        lambda t: t["streams"][0].__setitem__(0, True),
        lambda t: t["streams"][0].__setitem__(1, "diagonal"),
        lambda t: t["streams"][0].__setitem__(1, "planes"),
        lambda t: t["streams"][0].__setitem__(1, []),
        lambda t: t["streams"][0].__setitem__(2, -1),
        lambda t: t["streams"][0].__setitem__(2, 2**40),
        lambda t: t["streams"][0].__setitem__(2, True),
        lambda t: t["tensors"][0][4]["q"].__setitem__(2, 99),
        lambda t: t["tensors"][0][4]["q"].__setitem__(2, -1),
        lambda t: t["tensors"][0][4]["q"].__setitem__(2, t["tensors"][0][4]["scale"][2]),
        lambda t: t["tensors"][0][4]["q"].__setitem__(2, t["tensors"][3][4]["q"][2]),
        lambda t: t["tensors"][0][4]["q"].pop() and None,
        lambda t: t["tensors"].append(t["tensors"][0]),
        lambda t: t["tensors"].append("abc"),
        lambda t: t["tensors"][0].__setitem__(0, ["x"]),
        lambda t: t["tensors"][0].__setitem__(1, "embed"),
        lambda t: t["tensors"][0].__setitem__(3, [24, -16]),
        lambda t: t["tensors"][0].__setitem__(3, [1] * 500),
        lambda t: t["tensors"][0].__setitem__(3, [24.0, 16]),
        lambda t: t["tensors"][0].__setitem__(4, []),
        lambda t: t["tensors"][0][4].update(q=["int8", [24, 17], 0]),
        lambda t: t["tensors"][0][4].update(q=["object", [24, 16], 0]),
        lambda t: t["tensors"][0][4].update(q=["float32", [24, 16], 0]),
        lambda t: t["tensors"][0][4].update(q=["int8", [0, 2**31, 2**31], 0]),
        lambda t: t["tensors"][0][4].update(q="ab"),
    ],
)
def test_forged_tables_are_refused(change):
    with pytest.raises(ArtifactError):
        unpack(forged(change))


def test_header_that_asks_for_too_much_is_refused_before_decompressing():
    def swell(table):
        for tensor in table["tensors"]:
            for spec in tensor[4].values():
                spec[1] = [2**14, 2**14]

    with pytest.raises(ArtifactError, match="elements, the format ends at"):
        unpack(forged(swell))
    with pytest.raises(ArtifactError, match="cannot be in"):
        unpack(resealed(struct.pack("<4sBBII", b"PGLF", 2, 4, 10, 2**31) + bytes(100)))


def test_bomb_in_a_stream_is_refused():
    bomb = CODECS["zlib"].compress(bytes(2**26))
    a = np.zeros((4, 4), np.int8)
    good = pack([Record("x", "matrix", "int6", a.shape, {"q": a})], {}, "zlib")
    table = json.loads(table_of(good))
    table["streams"][0][2] = len(bomb)
    raw = json.dumps(table).encode()
    packed = CODECS["zlib"].compress(raw)
    head = struct.pack("<4sBBII", b"PGLF", 2, 4, len(packed), len(raw))
    with pytest.raises(ArtifactError, match="more than the 16 bytes"):
        unpack(resealed(head + bytes(32) + packed + bomb))


@pytest.mark.parametrize("data", [b"", b"PGLF", b"\x80\x04pickle" * 9, b"PK\x03\x04" + bytes(60)])
def test_foreign_files_are_named_as_such(data):
    with pytest.raises(ArtifactError, match="not a pgolf artifact"):
        unpack(data)


def test_other_versions_are_named_as_such():
    with pytest.raises(ArtifactError, match="version 9"):
        unpack(resealed(ARTIFACT[:4] + b"\x09" + ARTIFACT[5:]))


def test_messages_do_not_quote_a_whole_table():
    with pytest.raises(ArtifactError) as caught:
        unpack(forged(lambda t: b"\xff" * 100_000))
    assert len(str(caught.value)) < 300


def test_more_elements_than_so_few_bytes_can_hold():
    """The writer refuses what the reader would: 8 million zeros pack into a few bytes."""
    zeros = np.zeros((2**11, 2**12), np.int8)
    with pytest.raises(ArtifactError, match=r"16,777,216 elements in .* the format holds"):
        pack([Record("x", "matrix", "int6", zeros.shape, {"q": zeros})], {}, "zlib", 1)
    few = zeros[: 2**8]
    assert unpack(pack([Record("x", "matrix", "int6", few.shape, {"q": few})], {}, "zlib", 1))[0][0].shape == few.shape
