"""Which files a script needs: all of the package that it can import, at once or lazily, directly or not."""

from __future__ import annotations

import ast
from pathlib import Path

from pgolf.artifact.minify import parse
from pgolf.errors import ArtifactError

PACKAGE = "pgolf"
SHIM = ("pgolf", "kernels")  # its modules may lie in the top-level folder kernels/
# Makes bundles. One that runs hands on its own bytes instead (bundle.py).
LEFT_OUT = ("pgolf", "artifact", "script")

Name = tuple[str, ...]


def closure(entry: Path) -> list[Path]:
    """`entry` and every file of the package that it imports. Sorted. Raises ArtifactError."""
    root, found, todo = entry.parent, set(), [(entry, (entry.stem,))]
    while todo:
        path, module = todo.pop()
        if path not in found:
            found.add(path)
            todo += [item for name in _imports(parse(path), path, module) for item in _files(root, name)]
    return sorted(found)


def _imports(tree: ast.Module, path: Path, module: Name) -> list[tuple[Name, bool]]:
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
    return [item for item in out if item[0][:1] == (PACKAGE,) and item[0] != LEFT_OUT]


def _files(root: Path, wanted: tuple[Name, bool]) -> list[tuple[Path, Name]]:
    """The files that importing a dotted name runs, with their module names: its packages, the shim and itself."""
    name, required = wanted
    out = [(p, name[:n]) for n in range(1, len(name) + 1) if (p := _file(root, name[:n]))]
    if required and (not out or out[-1][1] != name):
        raise ArtifactError(f"cannot bundle: no file for `import {'.'.join(name)}` below {root}")
    return out


def _file(root: Path, name: Name) -> Path | None:
    bases = [root.joinpath(*name)]
    if name[:2] == SHIM and len(name) > 2:
        bases.append(root.joinpath(*name[1:]))
    candidates = [p for base in bases for p in (base / "__init__.py", base.with_name(base.name + ".py"))]
    return next((p for p in candidates if p.is_file()), None)
