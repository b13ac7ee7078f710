"""Settings as a tree of frozen dataclasses: dotted paths, text to value, JSON, nearest names.

Driven by type hints alone; knows no section by name. A field of type `Section | None` is a switch: `None` is off.
"""

from __future__ import annotations

import ast
import inspect
import math
import types
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pgolf.errors import ConfigError

Tree = TypeVar("Tree")
TRUE = ("1", "true", "on", "yes")
FLOATS = tuple[float, ...]
FALSE = ("0", "false", "off", "no", "none")


@dataclass(frozen=True)
class Node:
    """One place in the tree: a setting, a section, or a section that can be switched off.

    kind is the annotation without `| None`; switch is the path of the nearest switchable section around it ("": none).
    """

    path: str
    kind: Any
    optional: bool
    default: Any
    switch: str
    owner: type

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.kind)

    @property
    def is_switch(self) -> bool:
        return self.is_section and self.optional


@lru_cache
def nodes(cls: type) -> dict[str, Node]:
    """Every dotted path below dataclass `cls`, in field order, switched-off sections included."""
    found: dict[str, Node] = {}

    def walk(owner: type, prefix: str, switch: str) -> None:
        hints = get_type_hints(owner)
        for f in fields(owner):
            kind, optional = _without_none(hints[f.name])
            default = f.default if f.default is not MISSING else f.default_factory()
            node = Node(prefix + f.name, kind, optional, default, switch, owner)
            found[node.path] = node
            if node.is_section:
                walk(kind, node.path + ".", node.path if optional else switch)

    walk(cls, "", "")
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    (kind,) = (a for a in get_args(hint) if a is not type(None))
    return kind, True


def type_name(node: Node) -> str:
    """The type as users write about it: int, float, text, on|none, ..."""
    if node.is_section:
        return "on|none" if node.optional else "section"
    names = {bool: "bool", int: "int", float: "float", str: "text", FLOATS: "floats, comma-separated"}
    name = names.get(node.kind, "ints, comma-separated")
    return f"{name} or none" if node.optional else name


def parse_bool(text: str) -> bool:
    """ValueError unless `text` is one of 1/true/on/yes/0/false/off/no/none."""
    low = text.strip().lower()
    if low not in (*TRUE, *FALSE):
        raise ValueError("must be 1 or 0")
    return low in TRUE


def parse(text: str, node: Node) -> Any:
    """The value that `text` stands for at `node`; a switch gives bool. ValueError says what would be right."""
    text = text.strip()
    if node.is_section:
        if not node.optional:
            raise ValueError(f"is a section: name one of its settings, e.g. {node.path}.{fields(node.kind)[0].name}")
        low = text.lower()
        if low not in (*TRUE, *FALSE):
            raise ValueError("must be on or none")
        return low in TRUE
    if node.optional and text.lower() == "none":
        return None
    if node.kind is str:
        return text
    if node.kind is bool:
        return parse_bool(text)
    try:
        return _parse_number(text, node.kind)
    except ValueError:
        names = {int: "a whole number", float: "a finite number", FLOATS: "finite numbers such as 0.5,2"}
        wanted = names.get(node.kind, "whole numbers such as 9,10")
        raise ValueError(f"must be {wanted}{' or none' if node.optional else ''}") from None


def _parse_number(text: str, kind: Any) -> Any:
    if kind is int:
        return int(text)
    if kind is float:
        value = float(text)
        if not math.isfinite(value):
            raise ValueError
        return value
    element = float if kind == FLOATS else int
    return tuple(_parse_number(part, element) for part in text.strip("()[]").replace(",", " ").split())


def is_off(text: str, off: tuple[str, ...] = ("0",)) -> bool:
    """Whether `text` is one of `off`, numbers by value; "0" stands for false, off, no and none too."""
    low = text.strip().lower()
    return low in off or ("0" in off and low in FALSE) or any(_same_number(low, o) for o in off)


def _same_number(a: str, b: str) -> bool:
    try:
        return float(a) == float(b)
    except ValueError:
        return False


def get(tree: Any, path: str) -> Any:
    """Value at `path`; None below a section that is off."""
    for name in path.split("."):
        tree = getattr(tree, name) if tree is not None else None
    return tree


def put(tree: Tree, path: str, value: Any) -> Tree:
    """A copy of `tree` with `value` at `path`. The sections on the way must be on."""
    head, _, rest = path.partition(".")
    return replace(tree, **{head: put(getattr(tree, head), rest, value) if rest else value})


def flatten(tree: Any) -> dict[str, Any]:
    """Every setting by path. A switch is "on" or "none"; nothing is listed below a switch that is off."""
    out = {}
    for path, node in nodes(type(tree)).items():
        if node.switch and get(tree, node.switch) is None:
            continue
        if node.is_switch:
            out[path] = "none" if get(tree, path) is None else "on"
        elif not node.is_section:
            out[path] = get(tree, path)
    return out


def diff(a: Any, b: Any) -> dict[str, tuple[Any, Any]]:
    """{path: (value in a, value in b)} where they differ; None stands for a setting that one of them does not have."""
    left, right = flatten(a), flatten(b)
    return {p: (left.get(p), right.get(p)) for p in {**left, **right} if left.get(p) != right.get(p)}


def problems(tree: Any, prefix: str = "") -> list[str]:
    """What each section's `problems()` says, with full paths, inner sections first."""
    out = []
    for f in fields(tree):
        if is_dataclass(getattr(tree, f.name)):
            out += problems(getattr(tree, f.name), f"{prefix}{f.name}.")
    own = getattr(tree, "problems", list)
    return out + [prefix + message for message in own()]


def to_dict(tree: Any) -> dict[str, Any]:
    """Nested plain dict that survives JSON; `from_dict` gives the same tree back."""
    return _plain(asdict(tree))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_dict(cls: type[Tree], data: dict[str, Any], prefix: str = "") -> Tree:
    """Inverse of `to_dict`. Absent settings get their default; ConfigError on an unknown name or a wrong type."""
    known = {f.name: nodes(cls)[f.name] for f in fields(cls)}
    if not isinstance(data, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'configuration'}: got {data!r}, expected a table of settings")
    for name in data:
        if name not in known:
            raise ConfigError(f"{prefix}{name} is not a setting{did_you_mean(name, known)}")
    return cls(**{name: _value(known[name], value, prefix) for name, value in data.items()})


def _value(node: Node, value: Any, prefix: str) -> Any:
    path = prefix + node.path
    if value is None and node.optional:
        return None
    if node.is_section:
        return from_dict(node.kind, value, path + ".")
    if node.kind is float and type(value) in (int, float):
        return _finite(path, value)
    if node.kind == FLOATS and isinstance(value, list | tuple) and all(type(v) in (int, float) for v in value):
        return tuple(_finite(path, v) for v in value)
    if node.kind == tuple[int, ...] and isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    if type(value) is not node.kind:
        raise ConfigError(f"{path}={value!r} must be of type {type_name(node)}")
    return value


def _finite(path: str, value: int | float) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(f"{path}={value if type(value) is float else 'a huge number'} must be a finite number")
    return number


def nearest(name: str, names: Any, count: int = 3) -> list[str]:
    """Up to `count` of `names` that `name` may have meant: those that end in it, else the most similar."""
    if tails := [n for n in names if n.endswith("." + name)]:
        return tails[:count]
    as_deep = [n for n in names if n.count(".") == name.count(".")]
    return get_close_matches(name, as_deep, count, 0.7) or get_close_matches(name, list(names), count, 0.6)


def did_you_mean(name: str, names: Any) -> str:
    """`; did you mean X or Y?`, or nothing."""
    close = nearest(name, names)
    return f"; did you mean {' or '.join(close)}?" if close else ""


@lru_cache
def docs(cls: type) -> dict[str, str]:
    """One line a field, from the comment behind it or, failing that, the comment lines above it."""
    lines = inspect.getsource(cls).splitlines()
    out = {}
    for item in ast.parse("\n".join(lines)).body[0].body:
        if not isinstance(item, ast.AnnAssign):
            continue
        behind = lines[item.end_lineno - 1].partition("  # ")[2]
        above, row = [], item.lineno - 2
        while lines[row].strip().startswith("#"):
            above.insert(0, lines[row].strip("# "))
            row -= 1
        out[item.target.id] = behind or " ".join(above)
    return out


def doc_of(node: Node) -> str:
    """The line about one setting; for a section the first line of its class's docstring, if it has one."""
    text = (node.kind.__doc__ or "").split("\n", 1)[0] if node.is_section else ""
    if not text or text.startswith(f"{node.kind.__name__}("):  # the docstring that dataclasses make up
        text = docs(node.owner).get(node.path.rsplit(".", 1)[-1], "")
    return text
