"""Source without what a machine does not read: comments, docstrings, and with python-minifier spaces, annotations and
the names of locals.

Files in kernels/ keep their names and annotations: Triton and torch.library read both. Whatever was done, what other
files can see of a file is compared before and after, so a defect of the minifier is an error here and not a riddle on
eight GPUs.
"""

from __future__ import annotations

import ast
from importlib import metadata
from pathlib import Path
from types import ModuleType

from pgolf.errors import ArtifactError

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def minifier() -> ModuleType | None:
    """python-minifier, where it is installed."""
    try:
        import python_minifier
    except ImportError:
        return None
    return python_minifier


def tool() -> str | None:
    """The minifier and its version, on which the bytes depend; None without one."""
    return f"python-minifier {metadata.version('python-minifier')}" if minifier() else None


def small(path: Path, *, literal: bool) -> str:
    """The file's source, as small as can be. literal: its syntax tree must stay what it is, docstrings apart.

    Raises ArtifactError when the file is no Python, or would not do the same.
    """
    text, module = strip(path), minifier()
    if module is None:
        return text
    names = {} if literal else {"remove_annotations": _annotations(module), "rename_locals": True}
    out = module.minify(text, **{**_OFF, **names}) + "\n"
    before, after = ast.parse(text), ast.parse(out)
    same = ast.dump(before) == ast.dump(after) if literal else interface(before) == interface(after)
    if not same:
        raise ArtifactError(f"{path}: minifying would change what others see of it; please report this file")
    return out


# Each is off because it changes what code does, or saves nothing once all is compressed: docs/submission.md has numbers
_OFF = dict.fromkeys(
    ("remove_literal_statements", "combine_imports", "hoist_literals", "rename_locals", "rename_globals",
     "remove_object_base", "remove_asserts", "remove_debug", "remove_explicit_return_none", "remove_annotations",
     "remove_builtin_exception_brackets", "constant_folding", "remove_pass", "convert_posargs_to_args",
     "preserve_shebang"),
    False,
)  # fmt: skip


def _annotations(module: ModuleType):
    """Those of functions and variables. A dataclass lives by those of its class."""
    return module.RemoveAnnotationsOptions(
        remove_variable_annotations=True,
        remove_return_annotations=True,
        remove_argument_annotations=True,
        remove_class_attribute_annotations=False,
    )


def strip(path: Path) -> str:
    """The file's source without comments and docstrings; otherwise the same syntax tree."""
    tree = _without_docstrings(parse(path))
    source = ast.unparse(tree)
    if ast.dump(ast.parse(source)) != ast.dump(tree):
        raise ArtifactError(f"{path}: stripping its comments would change what it does; please report this file")
    return source


def parse(path: Path) -> ast.Module:
    """The file's syntax tree. ArtifactError when it cannot be read or is no Python."""
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ArtifactError(f"cannot bundle {path}: {e.strerror}") from e
    except (SyntaxError, ValueError) as e:
        raise ArtifactError(f"cannot bundle {path}: {e}") from e


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        # all leading strings: the second of two would become the docstring
        while isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or ([] if isinstance(node, ast.Module) else [ast.Pass()])
    return tree


def interface(tree: ast.AST, prefix: str = "") -> list[tuple]:
    """What others can see of a file: functions with their arguments and decorators, classes with their bases and
    fields, names of the module, attributes that are set, in the order of the file."""
    out: list[tuple] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, FUNCTIONS):
            out.append((prefix, node.name, _arguments(node, prefix), [ast.unparse(d) for d in node.decorator_list]))
        elif isinstance(node, ast.ClassDef):
            out.append((prefix, node.name, [ast.unparse(b) for b in node.bases]))
            out += interface(node, f"{prefix}{node.name}.")
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.For, ast.While)):
            out += interface(node, prefix)
        elif isinstance(node, ast.AnnAssign) and isinstance(tree, ast.ClassDef):
            out.append((prefix, ast.unparse(node.target), ast.unparse(node.annotation), node.value is not None))
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] * (node.value is not None)
            out += [(prefix, ast.unparse(t)) for t in targets]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            out.append((prefix, ast.unparse(node)))
    return out


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> list:
    """Names by which a caller may pass them, kinds and defaults; a method's first argument may have any name."""
    a = node.args
    names = [x.arg for x in a.args]
    if prefix and names:
        names[0] = ""
    defaults = len(a.defaults) + sum(d is not None for d in a.kw_defaults)
    return [len(a.posonlyargs), names, [x.arg for x in a.kwonlyargs], bool(a.vararg), bool(a.kwarg), defaults]
