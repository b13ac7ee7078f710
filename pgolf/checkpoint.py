"""Checkpoints as files: written whole or not at all, trusted only after their hashes match. Knows nothing of training.

    <folder>/step-00001234/state.safetensors    every tensor, flat names
                           manifest.json        {format, version, files: {name: {bytes, sha256}}, facts, sha256}

The manifest's `sha256` is over its own canonical JSON without that key. A write goes to `.tmp-step-00001234` in the
same folder, every file and the folder are fsynced, then one rename makes it a checkpoint and the parent is fsynced. A
run that is killed at any point leaves a checkpoint that is whole, or a `.tmp-` folder, which the next write removes.
There is no pickle: a tensor file is bytes and shapes, the manifest is JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgolf.errors import ArtifactError, NumericalError, SetupError

if TYPE_CHECKING:
    from torch import Tensor

FORMAT, VERSION = "pgolf checkpoint", 1
STATE, MANIFEST = "state.safetensors", "manifest.json"
TEMP = ".tmp-"
NAME = re.compile(r"step-(\d{8,})")
MAX_MANIFEST = 64 << 20  # bytes; 8 ranks need 0.2 MB
BLOCK = 1 << 22


@dataclass(frozen=True)
class Written:
    """A finished write: where, and the bytes of all its files."""

    path: Path
    nbytes: int


def write(folder: str | Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], keep: int = 2) -> Written:
    """Writes the checkpoint of step `facts["step"]` and keeps it and the `keep` - 1 before it.

    tensors: on the CPU, contiguous, no two sharing memory. facts: JSON values. Checkpoints of later steps are removed
    too: a run that went back has left them. Raises NumericalError on a number that is not finite and SetupError when
    the disk does not take it all; both leave what was there before as it was.
    """
    folder, name = Path(folder), f"step-{facts['step']:08d}"
    _refuse_non_finite(tensors, name)
    state = _serialise(tensors)
    manifest = _manifest(facts, {STATE: _entry(state)})
    temp, need = folder / f"{TEMP}{name}", len(state) + len(manifest)
    try:
        _make_folder(folder)
        _remove_leftovers(folder)
        temp.mkdir()
        _write_file(temp / STATE, state)
        _write_file(temp / MANIFEST, manifest)
        _sync_folder(temp)
        _put_in_place(temp, folder / name)
        _sync_folder(folder)
    except OSError as err:
        shutil.rmtree(temp, ignore_errors=True)  # before the free space is measured
        raise SetupError(
            f"{folder / name}: the checkpoint cannot be written ({err.strerror or err}): it needs {need:,} bytes,"
            f" {_free(folder)} are free; earlier checkpoints are as they were\n"
            "Free some space, set train.out_dir to another disk, or keep fewer (KEEP_CHECKPOINTS)."
        ) from err
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    _prune(folder, name, keep)
    return Written(folder / name, need)


def newest(folder: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """The complete checkpoint of the highest step below `folder`, None if there is no checkpoint at all.

    Damaged ones are passed over with a line to `say` that names them and the reason. Raises ArtifactError when there
    are checkpoints and none is whole: starting over would look like going on.
    """
    names = _names(folder)
    for name in reversed(names):
        path = Path(folder) / name
        try:
            verify(path)
            return path
        except ArtifactError as err:
            say(f"checkpoint passed over: {err}")
    if names:
        raise ArtifactError(
            f"{folder}: none of its {len(names)} checkpoints is whole (the log says why)\n"
            "fix: restore one from a copy, or remove the run's folder to start over"
        )
    return None


def verify(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files have the sizes and hashes that it names. Raises ArtifactError."""
    path = Path(path)
    manifest = _read_manifest(path)
    expected = manifest["files"][STATE]
    try:
        size = (path / STATE).stat().st_size
        if size == expected["bytes"]:
            found = _file_hash(path / STATE)
    except OSError as err:
        raise ArtifactError(f"{path / STATE} cannot be read: {err.strerror}") from err
    if size != expected["bytes"]:
        raise ArtifactError(f"{path / STATE} is damaged: {size:,} bytes, its manifest says {expected['bytes']:,}")
    if found != expected["sha256"]:
        raise ArtifactError(f"{path / STATE} is damaged: sha256 {found[:12]}..., its manifest says"
                            f" {expected['sha256'][:12]}...")  # fmt: skip
    return manifest


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, facts) of a checkpoint. Raises ArtifactError unless it is whole and of this format."""
    path = Path(path)
    manifest = verify(path)
    try:
        data = (path / STATE).read_bytes()
    except OSError as err:
        raise ArtifactError(f"{path / STATE} cannot be read: {err.strerror}") from err
    if _entry(data) != manifest["files"][STATE]:
        raise ArtifactError(f"{path / STATE} changed while it was read")
    return _deserialise(data, path / STATE), manifest["facts"]


# -- writing -----------------------------------------------------------------------------------------------------


def _refuse_non_finite(tensors: Mapping[str, Tensor], name: str) -> None:
    bad = [key for key, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise NumericalError(
            f"checkpoint {name} is not written: {', '.join(bad[:3])}{more} hold NaN or infinity\n"
            "The last checkpoint is from before that: lower the learning rates or set GRAD_CLIP_NORM, and resume it."
        )


def library():
    """safetensors. Raises SetupError with the line that installs it."""
    try:
        import safetensors.torch
    except ImportError as err:
        raise SetupError(
            "checkpoints need safetensors: pip install safetensors (KEEP_CHECKPOINTS=0 does without)"
        ) from err
    return safetensors


def _serialise(tensors: Mapping[str, Tensor]) -> bytes:
    return library().torch.save(dict(tensors))


def _deserialise(data: bytes, path: Path) -> dict[str, Tensor]:
    safetensors = library()
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as err:
        raise ArtifactError(f"{path} is no tensor file that this version reads: {err}") from err


def _manifest(facts: Mapping[str, Any], files: dict) -> bytes:
    body = {"format": FORMAT, "version": VERSION, "files": files, "facts": dict(facts)}
    try:
        digest = _digest(body)
    except ValueError as err:
        raise NumericalError(f"the checkpoint is not written: a number of its facts is not finite ({err})") from err
    return json.dumps({**body, "sha256": digest}, indent=1).encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()).hexdigest()


def _entry(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_file(path: Path, data: bytes) -> None:
    view = memoryview(data)
    with open(path, "wb", buffering=0) as file:
        while view:
            view = view[file.write(view[:BLOCK]) :]
        os.fsync(file.fileno())


def _make_folder(folder: Path) -> None:
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put_in_place(temp: Path, final: Path) -> None:
    """One of this step may be there, damaged or of a run that went back, and no folder can be renamed onto another."""
    if final.exists():
        os.rename(final, final.with_name(f"{TEMP}old-{final.name}"))
    os.rename(temp, final)


def _prune(folder: Path, name: str, keep: int) -> None:
    """Each one that goes is renamed first: half removed it must not look whole. What fails waits for the next write."""
    names = _names(folder)
    here = names.index(name)
    for old in [*names[: max(here + 1 - keep, 0)], *names[here + 1 :]]:
        with suppress(OSError):
            os.rename(folder / old, folder / f"{TEMP}old-{old}")
    _remove_leftovers(folder)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{TEMP}*"):
        shutil.rmtree(path, ignore_errors=True)


def _free(folder: Path) -> str:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return f"{shutil.disk_usage(folder).free:,}"
    except OSError:
        return "an unknown number"


# -- reading -----------------------------------------------------------------------------------------------------


def _names(folder: str | Path) -> list[str]:
    """The checkpoints below `folder`, whole or not, by step."""
    folder = Path(folder)
    found = [p.name for p in folder.iterdir() if NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda name: int(name[5:]))


def _file_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest, with its own hash and every type that `verify` relies on checked."""
    where = path / MANIFEST
    try:
        size = where.stat().st_size
        if size > MAX_MANIFEST:
            raise ArtifactError(f"{where} has {size:,} bytes, a manifest ends at {MAX_MANIFEST:,}: no checkpoint")
        manifest = json.loads(where.read_bytes())
    except OSError as err:
        raise ArtifactError(f"{where} cannot be read: {err.strerror}; the checkpoint is not whole") from err
    except (ValueError, RecursionError) as err:
        raise ArtifactError(f"{where} is no JSON ({str(err)[:80]}); it is damaged") from err
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArtifactError(f"{where} is no manifest of a {FORMAT}; expected the one that a run wrote")
    if manifest.get("version") != VERSION:
        raise ArtifactError(
            f"{where} is of format version {str(manifest.get('version'))[:20]}, this pgolf reads version {VERSION}:"
            " resume with the one that wrote it"
        )
    _check_manifest(manifest, where)
    return manifest


def _check_manifest(manifest: dict, where: Path) -> None:
    try:
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        same = _digest(body) == manifest["sha256"]
        entry = manifest["files"][STATE]
        ok = manifest.keys() == {"format", "version", "files", "facts", "sha256"} and set(manifest["files"]) == {STATE}
        ok = ok and type(entry["bytes"]) is int and entry["bytes"] >= 0 and isinstance(entry["sha256"], str)
        ok = ok and isinstance(manifest["facts"], dict)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as err:
        raise ArtifactError(f"{where} is not of this format ({err!r:.80}); it is damaged") from err
    if not same:
        raise ArtifactError(f"{where}: its checksum does not match; it is damaged or was edited")
    if not ok:
        raise ArtifactError(f"{where} is not of this format; it is damaged")
