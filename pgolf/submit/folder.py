"""A submission's folder as it was found: every file, its script, its logs, its submission.json. Nothing is executed."""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pgolf.artifact import script
from pgolf.artifact.script import Script
from pgolf.errors import ArtifactError
from pgolf.submit import logs, record
from pgolf.submit.logs import Log
from pgolf.submit.record import Record

SCRIPT, TWIN, MANIFEST, README, AUDIT = (
    "train_gpt.py", "train_gpt_readable.py", "train_gpt_manifest.json", "README.md", "audit.json",
)  # fmt: skip
MAX_FILES = 1000
MAX_READ = 64 << 20  # bytes of one file; the largest logs of the challenge have under 1 MB
NON_RECORD = "non_record"


@dataclass
class Folder:
    """files: {path relative to the folder: size}, in order; links are not followed. Where a part is missing or cannot
    be read it is None, and its `..._error` says why."""

    path: Path
    files: dict[str, int]
    links: list[str]
    record: Record | None = None
    record_error: str = ""
    script: Script | None = None
    script_error: str = ""
    logs: list[Log] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    manifest_error: str = ""
    audit: dict[str, Any] | None = None
    audit_error: str = ""

    @property
    def is_record(self) -> bool:
        """Whether it claims a place on the record track, with its hardware, time limits and data."""
        track = (self.record.track if self.record else None) or ""
        return NON_RECORD not in track.replace("-", "_") and NON_RECORD not in self.path.resolve().parent.name

    @property
    def is_ours(self) -> bool:
        """Whether `pgolf submit` wrote it."""
        return bool(self.record and isinstance(self.record.raw.get("pgolf"), dict))

    def read(self, name: str) -> bytes:
        """A file's bytes. OSError, or ArtifactError on one that is too large."""
        if self.files[name] > MAX_READ:
            raise ArtifactError(f"{name}: {self.files[name]:,} bytes, too large to look at")
        return (self.path / name).read_bytes()

    def text(self, name: str) -> str:
        return self.read(name).decode("utf-8", "replace")

    @property
    def audit_tests(self) -> dict[str, Any]:
        """The tests of the audit's report by name; none where there is no report, or one of another make."""
        tests = self.audit.get("tests") if self.audit else None
        return tests if isinstance(tests, dict) else {}

    def audit_status(self, name: str) -> str | None:
        """Of one test in the audit's report, as in "passed"."""
        test = self.audit_tests.get(name)
        return test.get("status") if isinstance(test, dict) else None

    @cached_property
    def helpers(self) -> list[str]:
        """Other Python files here that the script imports or opens by name: they are part of the code."""
        found = [n for n in self.files if n.endswith(".py") and n not in (SCRIPT, TWIN)]
        if not found or self.script is None:
            return []
        used: frozenset[str] = frozenset().union(*(part for text in self._texts() for part in names(text)))
        return [n for n in found if {Path(n).stem, n, Path(n).name} & used]

    def _texts(self) -> list[str]:
        """What the script unpacks to, and the script itself where that is another text."""
        texts = list(self.script.files.values())
        return texts if len(texts) == 1 else [*texts, self.script.data.decode("latin-1")]

    def modules(self) -> frozenset[str]:
        """Top-level names of the modules that the script imports; empty without one."""
        return frozenset().union(*(names(text)[0] for text in self._texts())) if self.script else frozenset()

    def code_bytes(self) -> int | None:
        """Bytes of all code that ships; None without a script."""
        if self.script is None:
            return None
        return len(self.script.data) + sum(self.files[name] for name in self.helpers)

    def strict_bytes(self) -> int | None:
        """The same, unpacked."""
        if self.script is None:
            return None
        unpacked = sum(len(text.encode("utf-8", "replace")) for text in self.script.files.values())
        return unpacked + sum(self.files[name] for name in self.helpers)


@lru_cache(maxsize=512)
def names(text: str) -> tuple[frozenset[str], frozenset[str]]:
    """(top-level modules that a source imports, what else may name a file: imported names, literals that end in .py)"""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            nodes = list(ast.walk(ast.parse(text)))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        nodes = []
    modules, others = set(), set()
    for node in nodes:
        if isinstance(node, ast.Import):
            modules |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            others |= {alias.name for alias in node.names}
            modules |= {node.module.split(".")[0]} if node.module and not node.level else set()
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".py"):
            others.add(node.value)
    return frozenset(modules), frozenset(others)


def open_folder(path: Path) -> Folder:
    """The folder at `path`. Raises ArtifactError when it is none, or holds so many files that it is another one."""
    if not path.is_dir():
        raise ArtifactError(f"{path} is not a folder; expected a submission: {README}, {record.NAME}, {SCRIPT}, logs")
    files, links = {}, []
    for item in sorted(path.rglob("*")):
        name = item.relative_to(path).as_posix()
        if item.is_symlink():
            links.append(name)
        elif item.is_file() and not name.startswith((".git/", "__pycache__/")):
            files[name] = item.stat().st_size
        if len(files) > MAX_FILES:
            raise ArtifactError(
                f"{path} holds more than {MAX_FILES} files; a submission is one folder with about eight"
            )
    folder = Folder(path, files, links)
    _open_record(folder)
    _open_script(folder)
    folder.manifest, folder.manifest_error = _open_json(folder, MANIFEST)
    folder.audit, folder.audit_error = _open_json(folder, AUDIT)
    folder.logs = _open_logs(folder)
    return folder


def _open_record(folder: Folder) -> None:
    if record.NAME not in folder.files:
        folder.record_error = f"there is no {record.NAME}"
        return
    try:
        folder.record = record.parse(folder.read(record.NAME))
    except (OSError, ArtifactError) as err:
        folder.record_error = str(err)


def _open_script(folder: Folder) -> None:
    if SCRIPT not in folder.files:
        folder.script_error = f"there is no {SCRIPT}"
        return
    try:
        folder.script = script.read(folder.read(SCRIPT))
    except (OSError, ArtifactError) as err:
        folder.script_error = str(err)


def _open_json(folder: Folder, name: str) -> tuple[dict[str, Any] | None, str]:
    if name not in folder.files:
        return None, f"there is no {name}"
    try:
        value = json.loads(folder.read(name))
    except (OSError, ValueError, RecursionError, ArtifactError) as err:
        return None, f"{name}: no JSON: {err}"
    return (value, "") if isinstance(value, dict) else (None, f"{name}: expected an object")


def _open_logs(folder: Folder) -> list[Log]:
    """Logs of whole runs, one a seed where there are several; other texts with scores in them (ablations) stay out."""
    found = []
    for name, size in folder.files.items():
        if name.endswith((".log", ".txt", ".out")) and size <= MAX_READ:
            text = folder.text(name)
            if logs.is_log(text):
                found.append(logs.read(name, text))
    named = [log for log in found if re.search(r"seed|train", Path(log.name).name, re.I)]
    return named or found
