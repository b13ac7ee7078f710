"""Ten thousand damaged inputs for each reader: a right answer or a clear error, at once, in little memory.

FUZZ_SEED and FUZZ_COUNT change what is tried; a failure names the input and keeps its files.
"""

import json
import os
import time

import harness
import numpy as np
import pytest
import readers
from harness import Reader, attempt, available, fuzz
from mutate import mutant
from readers import READERS

from pgolf.artifact import codecs
from pgolf.errors import DataError

pytestmark = pytest.mark.skipif(bool(available()), reason=available())
SEED = int(os.environ.get("FUZZ_SEED", "20240520"))


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.name.replace(" ", "-"))
def test_damaged_inputs(reader, tmp_path, capsys):
    count = int(os.environ.get("FUZZ_COUNT", reader.count))
    seen = fuzz(reader, tmp_path, SEED, count)
    with capsys.disabled():
        print(f"\n{reader.name}: seed {SEED}, {count:,} inputs, {seen}", end=" ")
    assert sum(seen.values()) == count
    low, high = reader.accepts
    assert low <= seen.get("accepted", 0) / count <= high, "too few for the check to have work, or no damage done"


# -- bombs: what random damage does not find -----------------------------------------------------------------------

ZEROS = 2**27  # over the memory bound of the harness


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return readers.opened(tmp_path_factory.mktemp("artifacts"))[3]  # zlib's


def refused(files, tmp_path):
    row = next(r for r in READERS if r.name == "forged artifact")
    row.read(tmp_path, readers.opened(tmp_path)[3])  # loads what is loaded on first use
    return attempt(row, tmp_path, files)


@pytest.mark.parametrize("codec", codecs.CODECS)
@pytest.mark.parametrize("honest", [False, True], ids=["undeclared", "declared"])
def test_stream_of_zeros(artifact, tmp_path, codec, honest):
    """Kilobytes that unpack to 128 MiB: more than the table states, and as much as it states."""
    coder, table = codecs.CODECS[codec], json.loads(artifact["table.json"])
    shape = [2**13, ZEROS >> 13] if honest else [4, 4]
    table["tensors"] = [["x", "matrix", "int6", shape, {"q": ["int8", shape, 0]}]]
    stream = coder.compress(bytes(ZEROS), coder.levels[1])
    table["streams"] = [[coder.id, "rows", len(stream)]]
    files = {"head.bin": artifact["head.bin"], "table.json": json.dumps(table).encode(), "streams.bin": stream}
    assert len(stream) < 2**20 and refused(files, tmp_path) == "ArtifactError"


def test_table_of_empty_lists(artifact, tmp_path):
    """5 million Python objects out of 16 KB."""
    table = json.loads(artifact["table.json"])
    table["meta"]["more"] = "HERE"
    raw = json.dumps(table).replace('"HERE"', "[" + "[]," * 2**22 + "[]]").encode()
    assert refused({**artifact, "table.json": raw}, tmp_path) == "ArtifactError"


# -- the harness itself --------------------------------------------------------------------------------------------


def waits(folder, files):
    while True:
        time.sleep(0.01)


BAD = {
    "another error": (lambda folder, files: {}["x"], "KeyError"),
    "accepts what is wrong": (lambda folder, files: None, "a byte differs"),
    "no message": (lambda folder, files: refuse(""), "a message of 0 characters"),
    "burns": (lambda folder, files: [i for i in range(10**7) if i < 0], "of CPU time"),
    "waits": (waits, "Hang"),
    "touches memory": (lambda folder, files: bytearray(b"x" * (160 << 20)).clear(), "MiB allocated|MemoryError"),
    "reserves memory": (lambda folder, files: np.empty(1 << 30, np.uint8), "MemoryError|ArrayMemoryError"),
    "hides it": (lambda folder, files: hide(lambda: np.empty(1 << 30, np.uint8)), "over the memory bound, hidden"),
}


def refuse(text):
    raise DataError(text)


def hide(call):
    try:
        call()
    except Exception as err:
        raise DataError("damaged") from err


@pytest.mark.parametrize("name", BAD)
def test_a_bad_reader_is_caught(name, tmp_path, monkeypatch):
    read, complaint = BAD[name]
    monkeypatch.setattr(harness, "STUCK", 0.3 if name == "waits" else 20.0)
    monkeypatch.setattr(harness, "SECONDS", 0.1 if name == "burns" else 2.0)
    calls = []

    def good_at_first(folder, files):  # the valid input
        calls.append(files)
        return read(folder, files) if len(calls) > 1 else None

    def same(files, result):
        assert files["a"] == b"abc", "a byte differs"

    row = Reader("bad", lambda folder: [{"a": b"abc"}], good_at_first, same, (DataError,))
    with pytest.raises(pytest.fail.Exception, match=complaint):
        fuzz(row, tmp_path, SEED, 20)


def test_mutants_are_the_same_again_and_differ():
    valid = [{"a.json": b'{"x": [1, 2, {"y": "z"}], "n": 5}', "b.bin": bytes(range(256))}]
    made = [mutant(valid, 1, "r", i) for i in range(400)]
    assert made == [mutant(valid, 1, "r", i) for i in range(400)] and valid[0]["b.bin"] == bytes(range(256))
    assert len({tuple(sorted(files.items())) for files, _ in made}) > 330
    assert len({step.split()[0] for _, recipe in made for step in recipe.split(", ")}) >= 15, "every kind of damage"
