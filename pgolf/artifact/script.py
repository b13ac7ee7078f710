"""One self-unpacking script out of many files, and back again without running it.

The script is Python in Latin-1, so that the compressed bytes stand in a string literal as they are: base85 would cost a
quarter. It unpacks to a temporary folder of its own process, runs the entry from there as `__main__` and removes the
folder at exit. Real files in the real tree, because Triton reads the source of kernels from files and `pgolf.kernels`
is a path shim. Unpacking needs the standard library only. The same sources give the same bytes on the same versions of
Python and python-minifier.
"""

from __future__ import annotations

import ast
import base64
import io
import lzma
import platform
import re
import tokenize
import warnings
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pgolf.artifact import minify
from pgolf.artifact.bundle import COPY, ENTRY
from pgolf.artifact.closure import SHIM, closure
from pgolf.errors import ArtifactError

# Raw streams carry no properties, so both sides name them. pb=0: text has no 4-byte period.
FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]
MAX_TEXT = 1 << 24  # bytes of unpacked source: forty times pgolf's own
# A literal keeps every byte but these; a newline would also be lost to editors and to git's autocrlf
ESCAPES = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\0": "\\0"})

# A spawned child imports this file under another name and must not train; it finds the folder in its parent's sys.path.
# A forked child inherits the exit handler and must not remove the folder.
BOOTSTRAP = """\
# coding:latin-1
if __name__=="__main__":
 import atexit,lzma,os,runpy,shutil,sys,tempfile
 d=tempfile.mkdtemp(prefix="pgolf-");o=os.getpid();sys.path.insert(0,d)
 atexit.register(lambda:os.getpid()==o and shutil.rmtree(d,1))
 s=lzma.decompress("{payload}".encode("latin-1"),lzma.FORMAT_RAW,filters={filters}).decode().split("\\0")
 for p,t in zip(s[::2],s[1::2]):
  p=os.path.join(d,p);os.makedirs(os.path.dirname(p),exist_ok=True)
  with open(p,"w",encoding="utf-8",newline="\\n")as f:f.write(t)
 shutil.copy(__file__,os.path.join(d,"{copy}"))
 runpy.run_path(os.path.join(d,"{entry}"),run_name="__main__")
"""


@dataclass(frozen=True)
class Script:
    """data: the bytes that ship. sources, files: {path: text} before and after minifying; sources are empty where a
    script was only read."""

    data: bytes
    files: dict[str, str]
    sources: dict[str, str] = field(default_factory=dict)
    made_by: str = ""


def make(entry: str | Path = ENTRY) -> Script:
    """The script of `entry` (a path; the package lies beside it).

    Raises ArtifactError when a file is missing, is not Python or would change its meaning.
    """
    entry = Path(entry).resolve()
    paths = {path.relative_to(entry.parent).as_posix(): path for path in closure(entry)}
    files = {name: minify.small(paths[name], literal=name.startswith(SHIM[1] + "/")) for name in sorted(paths)}
    sources = {name: paths[name].read_text(encoding="utf-8") for name in files}
    return Script(compose(files, entry.name), files, sources, made_by())


def made_by() -> str:
    """The programs whose versions the bytes depend on."""
    return ", ".join(filter(None, (f"Python {platform.python_version()}", minify.tool())))


def compose(files: dict[str, str], entry: str) -> bytes:
    """The script that unpacks `files` and runs the one called `entry`."""
    text = "\0".join(part for file in files.items() for part in file)
    filters = [{**FILTERS[0], "preset": 9 | lzma.PRESET_EXTREME}]
    packed = lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=filters).decode("latin-1")
    packed = re.sub(
        "\0(?=[0-7])", "\0" + "00", packed
    )  # "\01" would be read as one octal number, "\0001" as two characters
    shown = str(FILTERS).replace(" ", "")
    script = BOOTSTRAP.format(payload=packed.translate(ESCAPES), filters=shown, copy=COPY, entry=entry)
    return script.encode("latin-1")


def read(data: bytes) -> Script:
    """The files of a script, without running it: a bundle's, the one that a common wrapper hides (a compressed literal
    that is executed), or the script itself. Raises ArtifactError when it is no Python or unpacks to too much.
    """
    try:
        with warnings.catch_warnings():  # of invalid escapes, which are the script's business
            warnings.simplefilter("ignore")
            tree, source = ast.parse(data), _source(data)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as err:
        raise ArtifactError(f"the script is no Python: {err}") from err
    literals = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, (str, bytes))]
    longest = max(literals, key=len, default=b"")
    # the longest literal of a plain script is a text, which decodes to nothing
    found = next(filter(None, map(_text, _decoded(longest))), None) if len(longest) > 200 else None
    if found is None:
        return Script(data, {ENTRY.name: source})
    parts = found.split("\0")
    files = {ENTRY.name: found} if len(parts) == 1 else dict(zip(parts[::2], parts[1::2], strict=False))
    for name in files:
        path = PurePosixPath(name)
        odd = not name.isprintable() or {"\\", ":"} & set(name)
        if odd or not path.name or path.is_absolute() or ".." in path.parts:
            raise ArtifactError(f"the script would write outside of its folder: {name!r}")
    if len(parts) > 1 and (len(parts) % 2 or len(files) < len(parts) // 2):
        raise ArtifactError(f"the script's files are damaged: {len(parts)} parts, {len(files)} names")
    return Script(data, files)


def _decoded(literal: str | bytes) -> Iterator[bytes]:
    """What the compressed bytes may be: the literal as it stands, or its base85 or base64."""
    with suppress(UnicodeEncodeError):
        raw = literal if isinstance(literal, bytes) else literal.encode("latin-1")
        yield raw
        for decode in (base64.b85decode, base64.b64decode, base64.a85decode):
            with suppress(ValueError):
                yield decode(raw)


def _text(packed: bytes) -> str | None:
    """The text that the bytes unpack to with one of the usual compressors; None when they do not."""
    lzmas = [(lzma.FORMAT_RAW, FILTERS), (lzma.FORMAT_RAW, [{"id": lzma.FILTER_LZMA2}]), (lzma.FORMAT_AUTO, None)]
    openers = [*(lzma.LZMADecompressor(form, filters=f) for form, f in lzmas), zlib.decompressobj()]
    for opener in openers:
        with suppress(lzma.LZMAError, zlib.error, ValueError):
            text = opener.decompress(packed, MAX_TEXT + 1)
            if len(text) > MAX_TEXT:
                raise ArtifactError(f"the script unpacks to more than {MAX_TEXT:,} bytes")
            if text:
                return text.decode()
    return None


def _source(data: bytes) -> str:
    encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
    return data.decode(encoding)
