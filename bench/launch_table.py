"""Reads, overrides and rewrites the launch table, `kernels/_tuned.py`.

The file is edited row by row: what is not changed, comments included, stays as it is, to the byte.
"""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch

from pgolf.kernels import _tuned
from pgolf.kernels._op import recording, tuned
from pgolf.kernels._tuned import TABLE, Launch

from .static import ARCHS

PATH = Path(_tuned.__file__)
WIDTH = 120
Key = tuple[int, str]  # (arch, shape class)
Rows = dict[Key, Launch]


# -- rows ------------------------------------------------------------------------------------------------------------


def resolve(kernel: str, arch: int, shape_class: str) -> Launch:
    """The row that a launch of `kernel` on sm_<arch> gets. KeyError if there is none."""
    with recording(arch):
        return tuned(kernel, torch.empty(0, device="meta"), shape_class)


def rows_with(kernel: str, key: Key, launch: Launch) -> Rows:
    """The rows of `kernel` with one set, such that nothing else launches differently.

    A row holds for later archs too, and (arch, "*") hides the classes of earlier ones: whoever would get another launch
    than now, on an arch of the static gate, gets a row of its own with the launch of now.
    """
    rows = dict(TABLE[kernel]) | {key: launch}
    classes = sorted({name for _, name in rows})  # "*" sorts first
    others = [(a, c) for a in sorted({key[0], *ARCHS}) if a >= key[0] > 0 for c in classes if (a, c) != key]
    for other in others:
        try:
            now = resolve(kernel, *other)
        except KeyError:  # nothing was launched there
            continue
        with forced(kernel, rows):
            then = resolve(kernel, *other)
        if then != now:
            rows[other] = now
    return rows


@contextmanager
def forced(kernel: str, rows: Mapping[Key, Launch]) -> Iterator[None]:
    """`kernel` is launched by these rows for a while; they can be changed meanwhile by `force`."""
    before = dict(TABLE[kernel])
    try:
        force(kernel, rows)
        yield
    finally:
        force(kernel, before)


def force(kernel: str, rows: Mapping[Key, Launch]) -> None:
    """Replaces the rows of `kernel` in this process."""
    rows = dict(rows)
    TABLE[kernel].clear()
    TABLE[kernel].update(rows)


# -- the file --------------------------------------------------------------------------------------------------------


def parse(text: str) -> dict[str, Rows]:
    """The table that the text of `kernels/_tuned.py` holds. ValueError if it has none."""
    return {
        kernel: {ast.literal_eval(key): _launch(value) for key, value in _items(rows)}
        for kernel, rows in _kernels(text).items()
    }


def rewritten(text: str, kernel: str, rows: Mapping[Key, Launch]) -> str:
    """The text with these rows of `kernel` set; those that it has already keep their place, others follow the last row
    of their arch or of an earlier one. KeyError for a kernel that the text does not have."""
    for key, launch in sorted(rows.items()):
        lines, found = text.splitlines(keepends=True), _items(_kernels(text)[kernel])
        at = {ast.literal_eval(k): (k.lineno - 1, value) for k, value in found}
        new = render(key, launch)
        if key in at:
            first, value = at[key]
            end = value.end_lineno
            new = new.removesuffix(",\n") + lines[end - 1][value.end_col_offset :]  # the comma, and a comment
        else:
            ends = (value.end_lineno for k, (_, value) in at.items() if k <= key)
            first = end = max(ends, default=found[0][0].lineno - 1)
        text = "".join([*lines[:first], new, *lines[end:]])
    return text


def render(key: Key, launch: Launch) -> str:
    """The source of a row, as ruff formats it."""
    parts = [str(launch.num_warps), str(launch.num_stages), json.dumps(launch.blocks)]
    parts += [json.dumps(launch.note)] * (launch.note != Launch(1, 1).note)
    head, inside = f'        ({key[0]}, "{key[1]}"): Launch(', ", ".join(parts)
    if len(head) + len(inside) + 2 <= WIDTH:
        return f"{head}{inside}),\n"
    if 12 + len(inside) > WIDTH:
        inside = ",\n            ".join(parts) + ","
    return f"{head}\n            {inside}\n        ),\n"


def save(changes: Mapping[str, Mapping[Key, Launch]], path: Path = PATH, text: str | None = None) -> None:
    """Writes a table, by default the committed one, with changed rows of kernels to `path`, in one go. AssertionError,
    and nothing is written, if the text would not say what it should."""
    text = PATH.read_text() if text is None else text
    expected = {kernel: rows | dict(changes.get(kernel, {})) for kernel, rows in parse(text).items()}
    for kernel, rows in changes.items():
        text = rewritten(text, kernel, rows)
    assert parse(text) == expected, f"{path}: the edited table is not the intended one"
    spare = path.with_name(f"{path.name}.{os.getpid()}")
    spare.write_text(text)
    os.replace(spare, path)


def _kernels(text: str) -> dict[str, ast.Dict]:
    for node in ast.parse(text).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == "TABLE":
            return {ast.literal_eval(key): rows for key, rows in _items(node.value)}
    raise ValueError("launch table: got a file without TABLE, expected the text of kernels/_tuned.py")


def _items(node: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    return list(zip(node.keys, node.values, strict=True))


def _launch(call: ast.Call) -> Launch:
    names = [f.name for f in fields(Launch)]
    given = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
    return Launch(**{name: ast.literal_eval(value) for name, value in given.items()})
