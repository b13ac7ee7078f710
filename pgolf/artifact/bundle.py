"""The code that ships: the entry script and all of pgolf that it can import, as one Python script.

The script holds the files without comments and docstrings, lzma-compressed and base85-coded. It unpacks them to a
temporary folder of its own process, runs the entry from there as `__main__` and removes the folder at exit. Real files
in the real tree, because Triton reads the source of kernels from files and `pgolf.kernels` is a path shim. Unpacking
needs the standard library only, and the script's own bytes are the counted ones. The same sources give the same bytes
on the same Python version, and bundling what a bundle unpacked gives that bundle again: a run from one counts right.
"""

from __future__ import annotations

import ast
import base64
import lzma
from pathlib import Path

from pgolf.errors import ArtifactError

ENTRY = Path(__file__).resolve().parents[2] / "train_gpt.py"
PACKAGE = "pgolf"
SHIM = ("pgolf", "kernels")  # its modules may lie in the top-level folder kernels/
# Raw streams carry no properties, so both sides name them. pb=0: text has no 4-byte period.
FILTERS = [{"id": lzma.FILTER_LZMA1, "dict_size": 1 << 20, "lc": 3, "lp": 0, "pb": 0}]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# A spawned child imports this file under another name and must not train; it finds the folder in its parent's sys.path.
# A forked child inherits the exit handler and must not remove the folder.
BOOTSTRAP = """\
if __name__=="__main__":
 import atexit,base64,lzma,os,runpy,shutil,sys,tempfile
 d=tempfile.mkdtemp(prefix="pgolf-");o=os.getpid();sys.path.insert(0,d)
 atexit.register(lambda:os.getpid()==o and shutil.rmtree(d,1))
 s=lzma.decompress(base64.b85decode("{payload}"),lzma.FORMAT_RAW,filters={filters}).decode().split("\\0")
 for p,t in zip(s[::2],s[1::2]):
  p=os.path.join(d,p);os.makedirs(os.path.dirname(p),exist_ok=True)
  with open(p,"w",encoding="utf-8",newline="\\n")as f:f.write(t)
 runpy.run_path(os.path.join(d,"{entry}"),run_name="__main__")
"""


def bundle(entry: str | Path = ENTRY) -> bytes:
    """The self-unpacking script of `entry` (a path; the package lies beside it).

    Raises ArtifactError when a file is missing or is not Python.
    """
    entry = Path(entry).resolve()
    files = [(path.relative_to(entry.parent).as_posix(), strip(path)) for path in closure(entry)]
    text = "\0".join(part for file in sorted(files) for part in file)
    filters = [{**FILTERS[0], "preset": 9 | lzma.PRESET_EXTREME}]
    payload = base64.b85encode(lzma.compress(text.encode(), lzma.FORMAT_RAW, filters=filters)).decode()
    script = BOOTSTRAP.format(payload=payload, filters=str(FILTERS).replace(" ", ""), entry=entry.name)
    return script.encode()


def code_bytes(entry: str | Path = ENTRY) -> int:
    """Size of the bundle in bytes."""
    return len(bundle(entry))


def closure(entry: Path) -> list[Path]:
    """`entry` and every file of the package that it imports, at once or lazily, directly or not. Sorted."""
    root, found, todo = entry.parent, set(), [(entry, (entry.stem,))]
    while todo:
        path, module = todo.pop()
        if path not in found:
            found.add(path)
            todo += [item for name in _imports(_parse(path), path, module) for item in _files(root, name)]
    return sorted(found)


def strip(path: Path) -> str:
    """The file's source without comments and docstrings; otherwise the same syntax tree."""
    tree = _without_docstrings(_parse(path))
    source = ast.unparse(tree)
    if ast.dump(ast.parse(source)) != ast.dump(tree):
        raise ArtifactError(f"{path}: stripping its comments would change what it does; please report this file")
    return source


def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ArtifactError(f"cannot bundle {path}: {e.strerror}") from e
    except (SyntaxError, ValueError) as e:
        raise ArtifactError(f"cannot bundle {path}: {e}") from e


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        # all leading strings: the second of two would become the docstring, and bundling from a bundle would drop it
        while isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def _imports(tree: ast.Module, path: Path, module: tuple[str, ...]) -> list[tuple[tuple[str, ...], bool]]:
    """(dotted name, must be a module) of every import of the package in the file."""
    package = module if path.name == "__init__.py" else module[:-1]
    out = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            out += [(tuple(a.name.split(".")), True) for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            out.append((base, True))
            out += [((*base, a.name), False) for a in node.names]  # a module or a name in one
    return [item for item in out if item[0][:1] == (PACKAGE,)]


def _files(root: Path, wanted: tuple[tuple[str, ...], bool]) -> list[tuple[Path, tuple[str, ...]]]:
    """The files that importing a dotted name runs, with their module names: its packages, the shim and itself."""
    name, required = wanted
    out = [(p, name[:n]) for n in range(1, len(name) + 1) if (p := _file(root, name[:n]))]
    if required and (not out or out[-1][1] != name):
        raise ArtifactError(f"cannot bundle: no file for `import {'.'.join(name)}` below {root}")
    return out


def _file(root: Path, name: tuple[str, ...]) -> Path | None:
    bases = [root.joinpath(*name)]
    if name[:2] == SHIM and len(name) > 2:
        bases.append(root.joinpath(*name[1:]))
    candidates = [p for base in bases for p in (base / "__init__.py", base.with_name(base.name + ".py"))]
    return next((p for p in candidates if p.is_file()), None)
