"""`pgolf bundle`: the script that ships, its readable twin, and the manifest of their hashes.

The twin holds every source with its comments, one after the other. It is for people: it cannot run and does not count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pgolf.artifact import script
from pgolf.artifact.bundle import ENTRY
from pgolf.artifact.script import Script
from pgolf.result import LIMIT, write_file
from pgolf.submit.folder import MANIFEST, SCRIPT, TWIN

HEAD = "# {} in readable form, for people: every source with its comments. It cannot run as one file.\n"
MARK = "# ======== file: {} ========\n"
SECTION = re.compile(r"^# ======== file: (\S+) ========\n", re.M)


def twin(made: Script) -> str:
    """The sources of a script as one text; those that it unpacks to where its sources are not known."""
    texts = made.sources or made.files
    return HEAD.format(SCRIPT) + "".join(MARK.format(name) + _whole(text) for name, text in texts.items())


def _whole(text: str) -> str:
    return text if text.endswith("\n") or not text else text + "\n"


def untwin(text: str) -> dict[str, str]:
    """{path: source} of a twin."""
    parts = SECTION.split(text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def manifest(made: Script) -> dict[str, Any]:
    """Sizes and SHA-256 of the script, of the files that it unpacks to, and of their sources as the twin has them."""
    sources = made.sources or made.files
    row = lambda name, text: {**_hashed(text, ""), **_hashed(_whole(sources[name]), "source_")}
    return {
        "format": 1,
        "script": SCRIPT,
        "bytes": len(made.data),
        "sha256": hashlib.sha256(made.data).hexdigest(),
        "made_by": made.made_by or "unknown: only the script was there; its twin is what it unpacks to",
        "files": {name: row(name, text) for name, text in made.files.items()},
    }


def _hashed(text: str, prefix: str) -> dict[str, Any]:
    data = text.encode()
    return {f"{prefix}bytes": len(data), f"{prefix}sha256": hashlib.sha256(data).hexdigest()}


def verify(read: Script, told: Mapping[str, Any], twin_text: str | None) -> list[str]:
    """What of a manifest does not hold for a script and its twin; empty when all does."""
    want = manifest(Script(read.data, read.files, untwin(twin_text) if twin_text is not None else {}))
    faults = [f"the script's {key} is {want[key]}, the manifest has {told.get(key)!r}"
              for key in ("bytes", "sha256") if told.get(key) != want[key]]  # fmt: skip
    files = told.get("files")
    if not isinstance(files, dict) or files.keys() != want["files"].keys():
        return [*faults, "the manifest does not list the files that the script unpacks to"]
    keys = ("sha256", "source_sha256") if twin_text is not None else ("sha256",)
    for name, row in files.items():
        for key in keys:
            if not isinstance(row, dict) or row.get(key) != want["files"][name][key]:
                faults.append(f"{name}: its {key} is not the manifest's")
    return faults if twin_text is not None else [*faults, f"there is no {TWIN}"]


def write(made: Script, folder: Path) -> list[Path]:
    """Writes script, twin and manifest; returns their paths. Raises SetupError."""
    told = json.dumps(manifest(made), indent=1) + "\n"
    items = {SCRIPT: made.data, TWIN: twin(made).encode(), MANIFEST: told.encode()}
    return [write_file(folder / name, data) for name, data in items.items()]


def rebuilt(twin_text: str, made_by: str, data: bytes) -> str:
    """Whether the twin's sources give the script's bytes: "" if so, else why not, or why that is not known."""
    if made_by != script.made_by():
        return f"not rebuilt: the script was made by {made_by}, here is {script.made_by()}"
    with TemporaryDirectory(prefix="pgolf-twin-") as name:
        for path, text in untwin(twin_text).items():
            place = Path(name) / path
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(text, encoding="utf-8")
        again = script.make(Path(name) / ENTRY.name).data
    return "" if again == data else "the twin's sources give another script: they are not what ships"


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """`pgolf bundle`."""
    parser = argparse.ArgumentParser(
        prog="pgolf bundle",
        description=f"Writes the code that counts as one script ({SCRIPT}), its sources in readable form ({TWIN}) and "
        f"the hashes of both ({MANIFEST}).",
    )
    parser.add_argument("--out", metavar="DIR", help="folder to write to; without it only the sizes are printed")
    parser.add_argument("--json", action="store_true", help="the manifest as one JSON object instead of the text")
    args = parser.parse_args(argv)
    made = script.make(ENTRY)
    paths = write(made, Path(args.out)) if args.out else []
    if args.json:
        print(json.dumps(manifest(made), indent=2))
        return 0
    sources = sum(len(text.encode()) for text in made.sources.values())
    files = sum(len(text.encode()) for text in made.files.values())
    print(f"{len(made.data):,} bytes, {len(made.data) / LIMIT:.2%} of the limit, made by {made.made_by}")
    print(f"{len(made.files)} files: {sources:,} bytes of source, {files:,} minified")
    for path in paths:
        print(f"wrote {path}")
    return 0
