"""Shards: the format byte by byte, and every kind of bad input."""

import errno
import os
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.data import shards
from pgolf.errors import DataError


def raw_shard(tokens, magic=20240520, version=1, count=None) -> bytes:
    """The format written independently, with struct."""
    count = len(tokens) if count is None else count
    return struct.pack("<256i", magic, version, count, *[0] * 253) + struct.pack(f"<{len(tokens)}H", *tokens)


def test_written_bytes_are_the_format(tmp_path):
    tokens = [1, 0, 65535, 258, 7]
    shards.write_shard(tmp_path / "a.bin", np.array(tokens))
    assert (tmp_path / "a.bin").read_bytes() == raw_shard(tokens)
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"], "no temporary file stays"


@settings(max_examples=30, deadline=None)
@given(tokens=st.lists(st.integers(0, 65535), max_size=300))
def test_round_trip(tmp_path_factory, tokens):
    path = tmp_path_factory.getbasetemp() / "round_trip.bin"
    shards.write_shard(path, np.array(tokens, dtype=np.int64))
    ids = shards.read_shard(path)
    assert ids.dtype == np.uint16 and ids.tolist() == tokens


@pytest.mark.parametrize("bad", [np.array([-1]), np.array([65536]), np.array([[1]]), np.array([1.0])])
def test_write_refuses_what_does_not_fit(tmp_path, bad):
    with pytest.raises(ValueError):
        shards.write_shard(tmp_path / "a.bin", bad)
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    shards.write_shard(tmp_path / "a.bin", np.array([1, 2]))
    monkeypatch.setattr(shards.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        shards.write_shard(tmp_path / "a.bin", np.array([3]))
    assert shards.read_shard(tmp_path / "a.bin").tolist() == [1, 2]
    assert len(list(tmp_path.iterdir())) == 1


FOREIGN = [
    (b"", "an empty file"),
    (b"PAR1" + b"\0" * 2000, "parquet"),
    (b"\x93NUMPY\x01\x00" + b"\0" * 2000, "npy"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 200\n", "Git-LFS pointer"),
    (b"<!DOCTYPE html><html>404</html>", "HTML"),
    (b"\n  <html>", "HTML"),
    (b'{"error": "Repository not found"}', "JSON"),
    (b"\x1f\x8b\x08" + b"\0" * 2000, "gzip"),
    (raw_shard([1], magic=20240801, version=7), "llm.c"),
    (raw_shard([1], version=2), r"\[20240520, 2\]"),
    (b"ab", r"words \[\]"),
]


@pytest.mark.parametrize("content,named", FOREIGN, ids=[n for _, n in FOREIGN])
def test_foreign_files_are_named(tmp_path, content, named):
    path = tmp_path / "fineweb_train_000000.bin"
    path.write_bytes(content)
    with pytest.raises(DataError, match=named) as err:
        shards.check_shard(path)
    assert str(path) in str(err.value) and "fix:" in str(err.value)


@pytest.mark.parametrize("delta,word", [(-1, "truncated"), (-2, "truncated"), (2, "longer than its header says")])
def test_wrong_size_shows_both_sizes(tmp_path, delta, word):
    content = raw_shard([1, 2, 3])
    (tmp_path / "a.bin").write_bytes(content[:delta] if delta < 0 else content + b"\0" * delta)
    with pytest.raises(DataError, match=f"{word}: {1030 + delta:,} bytes; .* 3 tokens, which is 1,030 bytes"):
        shards.check_shard(tmp_path / "a.bin")


def test_negative_count_and_missing_file(tmp_path):
    (tmp_path / "a.bin").write_bytes(raw_shard([], count=-512))
    with pytest.raises(DataError):
        shards.check_shard(tmp_path / "a.bin")
    with pytest.raises(DataError, match=r"did you mean, in .*: a\.bin"):
        shards.check_shard(tmp_path / "aa.bin")


def test_header_only_shard_is_empty(tmp_path):
    (tmp_path / "a.bin").write_bytes(raw_shard([]))
    assert shards.check_shard(tmp_path / "a.bin", 10) == 0 and len(shards.read_shard(tmp_path / "a.bin")) == 0


def test_find_shards_sorts_and_leaves_sidecars_out(tmp_path):
    for name in ("fineweb_val_000001.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin",
                 "fineweb_train_000000.bin", "fineweb_val_000002.bin.part"):  # fmt: skip
        (tmp_path / name).touch()
    assert [p.name for p in shards.find_shards(tmp_path, "val")] == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]


def test_missing_folder_suggests_near_names(tmp_path):
    (tmp_path / "fineweb10B_sp1024").mkdir()
    with pytest.raises(DataError, match=r"does not exist.*\n.*did you mean, in .*: fineweb10B_sp1024"):
        shards.find_shards(tmp_path / "fineweb10B_sp1042", "train")
    with pytest.raises(DataError, match=r"did you mean.*fineweb10B_sp1024"):
        shards.find_shards(tmp_path / "fineweb10B_sp1042" / "deeper", "train")


def test_file_for_a_folder_and_empty_folder(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="is a file"):
        shards.find_shards(tmp_path / "notes.txt", "train")
    with pytest.raises(DataError, match=r"\*_train_\*\.bin matches nothing in .*cwd .*there is: notes\.txt"):
        shards.find_shards(tmp_path, "train")


def test_scan_names_shard_position_id_and_vocab(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SCAN_IDS", 7)
    ids = np.arange(30) % 5
    ids[23], ids[24] = 9, 8
    shards.write_shard(tmp_path / "a.bin", ids)
    with pytest.raises(DataError, match=r"a\.bin, position 23: token id 9 but the vocabulary has 5 ids"):
        shards.scan_ids(tmp_path / "a.bin", 5)
    shards.scan_ids(tmp_path / "a.bin", 10)


def test_check_split_checks_headers_of_all_and_ids_of_first_and_last(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "QUICK_IDS", 4)
    for i in range(3):
        shards.write_shard(tmp_path / f"x_train_{i}.bin", np.arange(20) % 5)
    assert len(shards.check_split(tmp_path, "train", 5)) == 3
    late = np.arange(20) % 5
    late[19] = 77
    shards.write_shard(tmp_path / "x_train_2.bin", late)
    with pytest.raises(DataError, match=r"x_train_2\.bin, position 19"):
        shards.check_split(tmp_path, "train", 5)
    shards.write_shard(tmp_path / "x_train_2.bin", np.arange(20) % 5)
    (tmp_path / "x_train_1.bin").write_bytes((tmp_path / "x_train_1.bin").read_bytes()[:-2])
    with pytest.raises(DataError, match=r"x_train_1\.bin is truncated"):
        shards.check_split(tmp_path, "train", 5)


def test_check_split_needs_a_target(tmp_path):
    shards.write_shard(tmp_path / "x_val_0.bin", np.array([1]))
    with pytest.raises(DataError, match="1 tokens"):
        shards.check_split(tmp_path, "val", 5)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")  # FIPS 180-2, example B.1
    assert shards.sha256(tmp_path / "a").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_pipe_under_a_shards_name_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fineweb_train_000000.bin")
    with pytest.raises(DataError, match="no regular file"):
        shards.check_split(tmp_path, "train", 10)


def test_parts_of_an_opened_shard(tmp_path):
    ids = np.arange(1000) % 613
    shards.write_shard(tmp_path / "a.bin", ids)
    shard = shards.Shard(tmp_path / "a.bin")
    assert len(shard) == 1000 and shard[:].dtype == np.uint16
    for part in (slice(0, 5), slice(990, None), slice(-3, None), slice(7, 7), slice(9, 3), slice(998, 5000)):
        assert shard[part].tolist() == ids[part].tolist()


def test_removed_shard_is_read_to_the_end_and_a_cut_one_is_named(tmp_path):
    """Under a memory map the second would kill the process."""
    ids = np.arange(100_000) % 613
    for name in "ab":
        shards.write_shard(tmp_path / f"{name}.bin", ids)
    a, b = (shards.Shard(tmp_path / f"{name}.bin") for name in "ab")
    (tmp_path / "a.bin").unlink()
    assert a[50_000:].tolist() == ids[50_000:].tolist()
    os.truncate(tmp_path / "b.bin", 1024 + 2 * 60_000)
    assert b[:60_000].tolist() == ids[:60_000].tolist()
    with pytest.raises(DataError, match=r"b\.bin, tokens 59,999 to 60,001 cannot be read: the file has become shorter"):
        b[59_999:60_001]


def test_disk_that_goes_away_is_named(tmp_path):
    shards.write_shard(tmp_path / "a.bin", np.arange(10))
    shard = shards.Shard(tmp_path / "a.bin")
    shard._file.close()

    class Gone:
        def seek(self, at):
            raise OSError(errno.ESTALE, "Stale file handle")

        def close(self):
            pass

    shard._file = Gone()
    with pytest.raises(DataError, match=r"a\.bin.* Stale file handle(.|\n)*RESUME"):
        shard[:]
