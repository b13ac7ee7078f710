"""The code that ships with an artifact, as literal bytes: `bundle()` makes the script, or hands on the one that runs.

A run from a bundle ships that very bundle. So what makes one (closure.py, minify.py, script.py) is not in it, and what
counts cannot depend on the machine that the run happens on.
"""

from __future__ import annotations

from pathlib import Path

ENTRY = Path(__file__).resolve().parents[2] / "train_gpt.py"
COPY = "bundle.py"  # the running script, beside the entry that it has unpacked


def bundle(entry: str | Path = ENTRY) -> bytes:
    """The self-unpacking script of `entry` (a path; the package lies beside it).

    Raises ArtifactError when a file is missing, is not Python or would change its meaning.
    """
    own = Path(entry).resolve().parent / COPY
    if own.is_file():
        return own.read_bytes()
    from pgolf.artifact import script

    return script.make(entry).data


def made_by(entry: str | Path = ENTRY) -> str:
    """The programs that the bytes depend on, for the log; what would make them fewer where it is missing."""
    if (Path(entry).resolve().parent / COPY).is_file():
        return "handed on: this run is from a bundle"
    from pgolf.artifact import script

    hint = "" if script.minify.minifier() else "; about a tenth smaller with: pip install python-minifier"
    return script.made_by() + hint


def code_bytes(entry: str | Path = ENTRY) -> int:
    """Size of the bundle in bytes."""
    return len(bundle(entry))
