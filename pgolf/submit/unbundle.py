"""`pgolf unbundle`: what a packed script holds, without running it, and whether its manifest holds."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgolf.artifact import script
from pgolf.artifact.script import Script
from pgolf.doctor.rows import ascii_only
from pgolf.errors import ArtifactError, ConfigError
from pgolf.result import write_file
from pgolf.submit.bundling import rebuilt, verify
from pgolf.submit.folder import MANIFEST, SCRIPT, TWIN


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """`pgolf unbundle`: 0 when what could be verified holds, ArtifactError's code when not."""
    parser = argparse.ArgumentParser(
        prog="pgolf unbundle",
        description="Shows what a packed script holds, without running it: a bundle of pgolf, or a common wrapper "
        f"around compressed code. Beside a {MANIFEST} it verifies script and twin.",
    )
    parser.add_argument("script", help="the script, or a folder that has it")
    parser.add_argument("--out", metavar="DIR", help="folder to unpack to; must be new or empty")
    parser.add_argument("--show", metavar="FILE", help="print one of its files")
    parser.add_argument("--rebuild", action="store_true", help="also make the script anew from the twin, and compare")
    args = parser.parse_args(argv)
    path = Path(args.script) / SCRIPT if Path(args.script).is_dir() else Path(args.script)
    read = script.read(_bytes(path))
    if args.show:
        if args.show not in read.files:
            raise ConfigError(f"{path} holds no {args.show}; it has: {', '.join(read.files)}")
        print(ascii_only(read.files[args.show]))
        return 0
    for name, text in read.files.items():
        print(f"{len(text.encode('utf-8', 'replace')):>9,}  {ascii_only(name)}")
    print(f"{len(read.data):>9,}  {path.name} as it ships: {len(read.files)} files")
    if args.out:
        _unpack(read, Path(args.out))
    _report(read, path.parent, args.rebuild)
    return 0


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as err:
        raise ConfigError(f"{path}: {err.strerror}; expected a script, or a folder with {SCRIPT}") from err


def _unpack(read: Script, out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is not empty; choose a new folder")
    for name, text in read.files.items():  # names were checked: none leads outside
        write_file(out / name, text.encode("utf-8", "replace"))
    print(f"unpacked to {out}")


def _report(read: Script, folder: Path, rebuild: bool) -> None:
    """Prints what was verified; raises ArtifactError on what does not hold."""
    if not (folder / MANIFEST).is_file():
        print(f"not verified: there is no {MANIFEST} beside it")
        return
    try:
        told = json.loads(_bytes(folder / MANIFEST))
        text = (folder / TWIN).read_text(encoding="utf-8") if (folder / TWIN).is_file() else None
    except (ValueError, RecursionError, OSError) as err:
        raise ArtifactError(f"{folder}: manifest or twin cannot be read: {err}") from err
    faults = verify(read, told, text) if isinstance(told, dict) else [f"{MANIFEST} is no object"]
    if faults:
        raise ArtifactError(f"{folder / MANIFEST} does not hold:\n  " + "\n  ".join(faults))
    print(f"verified: script, {len(read.files)} files and twin are those of {MANIFEST}")
    if rebuild:
        told_by = str(told.get("made_by"))
        said = rebuilt(text or "", told_by, read.data)
        if said.startswith("the twin"):
            raise ArtifactError(said)
        print(said or f"rebuilt: the twin's sources give the script again, byte for byte ({told_by})")
