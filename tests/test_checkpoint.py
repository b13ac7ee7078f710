"""Checkpoints as files: whole or absent, the newest whole one wins, nothing damaged or foreign gets in."""

import errno
import json
import os

import pytest
import torch

from pgolf import checkpoint
from pgolf.checkpoint import MANIFEST, STATE
from pgolf.errors import ArtifactError, NumericalError, SetupError


def tensors(seed=0):
    gen = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(5, 3, generator=gen),
        "model.table": torch.randn(4, 2, generator=gen).bfloat16(),
        "optim.w.step": torch.tensor(7.0),
        "model.empty": torch.zeros(0, 3),
    }


def facts(step, **more):
    return {"step": step, "elapsed_ms": 1 / 3, "rng": [{"state": 2**127 + 1}], "name": "é", **more}


def write(folder, *steps, keep=2):
    return [checkpoint.write(folder, tensors(step), facts(step), keep).path for step in steps]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def lines_of_newest(folder):
    said = []
    return checkpoint.newest(folder, said.append), said


def test_what_is_written_is_what_is_read(tmp_path):
    (path,) = write(tmp_path / "a" / "b", 12)
    assert path.name == "step-00000012" and names(path) == [MANIFEST, STATE]
    got, told = checkpoint.read(path)
    want = tensors(12)
    assert got.keys() == want.keys() and told == facts(12)
    for name, t in want.items():
        assert got[name].dtype == t.dtype and torch.equal(got[name], t), name
    got["model.w"].zero_()  # memory of its own
    assert torch.equal(checkpoint.read(path)[0]["model.w"], want["model.w"])


def test_bytes_reported_are_those_on_the_disk(tmp_path):
    written = checkpoint.write(tmp_path, tensors(), facts(1))
    assert written.nbytes == sum(p.stat().st_size for p in written.path.iterdir())


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_k_stay(tmp_path, keep):
    write(tmp_path, 1, 2, 30, 100_000_000, keep=keep)
    assert names(tmp_path) == ["step-00000001", "step-00000002", "step-00000030", "step-100000000"][-keep:]


def test_a_run_that_went_back_leaves_no_later_ones(tmp_path):
    """Else `newest` would return to the branch that was left."""
    write(tmp_path, 10, 20, 30, keep=3)
    write(tmp_path, 15, keep=3)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    assert lines_of_newest(tmp_path)[0].name == "step-00000015"


def test_nothing_there_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent") is None
    (tmp_path / "step-1").mkdir()  # not our name
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / f"{checkpoint.TEMP}step-00000001").mkdir()
    assert checkpoint.newest(tmp_path) is None


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


DAMAGE = {
    "flipped tensor byte": lambda p: flip(p / STATE, -1),
    "flipped header byte": lambda p: flip(p / STATE, 20),
    "flipped length byte": lambda p: flip(p / STATE, 5),
    "truncated tensors": lambda p: os.truncate(p / STATE, 100),
    "empty tensors": lambda p: os.truncate(p / STATE, 0),
    "longer tensors": lambda p: (p / STATE).open("ab").write(b"\0"),
    "no tensors": lambda p: (p / STATE).unlink(),
    "no manifest": lambda p: (p / MANIFEST).unlink(),
    "truncated manifest": lambda p: os.truncate(p / MANIFEST, 200),
    "empty manifest": lambda p: os.truncate(p / MANIFEST, 0),
    "edited fact": lambda p: (p / MANIFEST).write_text((p / MANIFEST).read_text().replace('"step": 2', '"step": 3')),
    "binary manifest": lambda p: (p / MANIFEST).write_bytes(b"\x80\x04pickle\xff"),
    "a list": lambda p: (p / MANIFEST).write_text("[]"),
    "deep nesting": lambda p: (p / MANIFEST).write_text("[" * 200_000),
    "tensors are a folder": lambda p: ((p / STATE).unlink(), (p / STATE).mkdir()),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, name):
    good, bad = write(tmp_path, 1, 2)
    DAMAGE[name](bad)
    with pytest.raises(ArtifactError) as caught:
        checkpoint.read(bad)
    assert caught.value.exit_code == 9 and str(bad) in str(caught.value)
    path, said = lines_of_newest(tmp_path)
    assert path == good and len(said) == 1 and str(bad) in said[0]
    checkpoint.read(path)


def test_every_flipped_bit_of_the_manifest_is_noticed(tmp_path):
    (path,) = write(tmp_path, 1)
    whole = (path / MANIFEST).read_bytes()
    spaces = {b" ", b"\n"}
    for at in range(0, len(whole), 3):
        data = bytearray(whole)
        data[at] ^= 1
        (path / MANIFEST).write_bytes(data)
        if bytes(whole[at : at + 1]) in spaces:  # between values: may still be the same JSON
            continue
        with pytest.raises(ArtifactError):
            checkpoint.read(path)


def test_none_whole_is_an_error_and_not_a_fresh_start(tmp_path):
    for path in write(tmp_path, 1, 2):
        flip(path / STATE, -1)
    with pytest.raises(ArtifactError, match="none of its 2 checkpoints is whole"):
        checkpoint.newest(tmp_path, lambda _: None)


def resealed(path, **changes):
    """A manifest of somebody who knows the format: the checksum fits."""
    manifest = json.loads((path / MANIFEST).read_text())
    body = {**{k: v for k, v in manifest.items() if k != "sha256"}, **changes}
    (path / MANIFEST).write_text(json.dumps({**body, "sha256": checkpoint._digest(body)}))


@pytest.mark.parametrize(
    "changes",
    [{"format": "other"}, {"version": 2}, {"files": {}}, {"files": {"../../x": {"bytes": 1, "sha256": ""}}},
     {"files": {STATE: {"bytes": -1, "sha256": ""}}}, {"files": {STATE: {"bytes": 2**62, "sha256": "0"}}},
     {"files": {STATE: 1}}, {"facts": []}, {"more": 1}],
    ids=str,
)  # fmt: skip
def test_foreign_manifest(tmp_path, changes):
    (path,) = write(tmp_path, 1)
    resealed(path)
    checkpoint.read(path)  # the control: sealed anew and unchanged it is read
    resealed(path, **changes)
    with pytest.raises(ArtifactError):
        checkpoint.read(path)


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", b"PK\x03\x04", b"\xff" * 8 + b"{}", b"\0" * 64,
                                  (2**40).to_bytes(8, "little") + b"{}"])  # fmt: skip
def test_foreign_tensor_file_with_a_fitting_hash(tmp_path, data):
    """Hashes say that a file is the one of the manifest, not that it is a tensor file. No size in it is trusted."""
    (path,) = write(tmp_path, 1)
    (path / STATE).write_bytes(data)
    resealed(path, files={STATE: checkpoint._entry(data)})
    with pytest.raises(ArtifactError, match="no tensor file"):
        checkpoint.read(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.w", "model.table"])
def test_non_finite_tensors_are_never_written(tmp_path, value, name):
    write(tmp_path, 1)
    bad = tensors()
    bad[name][0, 0] = value
    with pytest.raises(NumericalError, match=name):
        checkpoint.write(tmp_path, bad, facts(2))
    assert names(tmp_path) == ["step-00000001"]
    with pytest.raises(NumericalError):
        checkpoint.write(tmp_path, tensors(), facts(2, loss=value))
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("at", ["write", "fsync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failing_disk_leaves_the_last_good_one(tmp_path, monkeypatch, at, code):
    before = {p.name: p.read_bytes() for p in write(tmp_path, 1)[0].iterdir()}

    def fail(*_args):
        raise OSError(code, os.strerror(code))

    def half_written(path, data):
        path.write_bytes(data[: len(data) // 2])
        fail()

    if at == "write":
        monkeypatch.setattr(checkpoint, "_write_file", half_written)
    else:
        monkeypatch.setattr(checkpoint.os, at, fail)
    with pytest.raises(SetupError) as caught:
        checkpoint.write(tmp_path, tensors(2), facts(2))
    monkeypatch.undo()
    text = str(caught.value)
    assert os.strerror(code) in text and "are free" in text and "step-00000002" in text
    assert names(tmp_path) == ["step-00000001"]
    assert {p.name: p.read_bytes() for p in (tmp_path / "step-00000001").iterdir()} == before
    write(tmp_path, 2)  # and when there is space again
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_leftovers_of_killed_writes_go_with_the_next(tmp_path):
    for name in ("step-00000003", "old-step-00000001"):
        (tmp_path / f"{checkpoint.TEMP}{name}").mkdir()
        (tmp_path / f"{checkpoint.TEMP}{name}" / STATE).write_bytes(b"half")
    write(tmp_path, 3)
    assert names(tmp_path) == ["step-00000003"]


def test_a_damaged_one_of_the_same_step_is_replaced(tmp_path):
    _, bad = write(tmp_path, 1, 2)
    flip(bad / STATE, -1)
    write(tmp_path, 2)
    checkpoint.read(bad)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="checkpoint cannot be written"):
        write(tmp_path / "file" / "checkpoints", 1)


def test_everything_is_synced_before_the_rename(tmp_path, monkeypatch):
    """Files, their folder, the rename, the parent: after a power cut a name must not stand for less than it says."""
    seen = []
    sync, rename = os.fsync, os.rename
    monkeypatch.setattr(checkpoint.os, "fsync", lambda fd: (seen.append(os.readlink(f"/proc/self/fd/{fd}")), sync(fd)))
    monkeypatch.setattr(checkpoint.os, "rename", lambda a, b: (seen.append("rename"), rename(a, b)))
    checkpoint.write(tmp_path, tensors(), facts(1))
    short = [s if s == "rename" else os.path.relpath(s, tmp_path) for s in seen]
    temp = f"{checkpoint.TEMP}step-00000001"
    assert short == [f"{temp}/{STATE}", f"{temp}/{MANIFEST}", temp, "rename", "."]
