"""Holds the design in place: import directions, who reads settings, shape of kernel files, soft size caps."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A package may import those to its left (and itself). Leaves may be imported by anyone above kernels.
LAYERS = [
    {"kernels"},
    {"model"},
    {"quant", "optim", "eval"},
    {"ngram", "ttt"},
    {"artifact"},
    {"schema", "not_yet"},
    {"aliases", "presets"},
    {"config"},
    {"scoring"},
    {"calibrate", "evidence", "extras"},
    {"phases", "probe", "finish", "dry_run", "diagnose", "snapshot"},
    {"resume"},
    {"train"},
    {"run"},
    {"cli", "lab"},
    {"audit", "doctor", "rescore", "size"},
    {"submit", "dataset"},
    {"__main__"},
]
LEAVES = {
    "data", "clock", "dist", "log", "errors", "node", "neighbours", "result", "runtime", "tree", "checkpoint",
    "signals", "heartbeat", "limits", "faults", "recompiles",
}  # fmt: skip
READS_ENVIRON = {"pgolf/config.py", "pgolf/dist.py", "pgolf/cli.py"}
# name: reason. Everything else keeps the caps.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}


def sources() -> list[Path]:
    return sorted([*ROOT.glob("pgolf/**/*.py"), *ROOT.glob("kernels/*.py"), ROOT / "train_gpt.py"])


def component(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    if parts[0] == "kernels":
        return "kernels"
    return parts[1].removesuffix(".py") if parts[0] == "pgolf" else "entry"


def imported(tree: ast.AST) -> set[str]:
    """Components of pgolf that a file imports, lazily or not."""
    found = set()
    typing_only = {id(n) for i in ast.walk(tree) if isinstance(i, ast.If) for n in ast.walk(i) if guards_types(i)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            parts = name.split(".")
            if parts[0] == "pgolf" and len(parts) > 1:
                found.add(parts[1])
    known = set().union(*LAYERS, LEAVES)
    return {f for f in found if f in known}


def guards_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def layer_of(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name in names)


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    here = component(path)
    if here in ("entry", "__init__"):
        return
    used = imported(ast.parse(path.read_text()))
    if here == "kernels":
        assert not used - {"kernels"}, f"{path.name} is a kernel: torch and triton only, got {used}"
    elif here in LEAVES:
        assert not used - LEAVES - {"kernels"}, f"{here} is a leaf, got {used - LEAVES}"
    else:
        level = layer_of(here)
        wrong = {u for u in used - LEAVES - {here} if layer_of(u) >= level}
        assert not wrong, f"{here} may import what lies below it only, got {wrong}"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_environment_is_read_at_the_door_only(path):
    text = path.read_text()
    if str(path.relative_to(ROOT)) not in READS_ENVIRON:
        assert "os.environ" not in text and "getenv" not in text


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_forward_is_straight_line(path):
    """No getattr/hasattr on self and no global inside a forward: decided at build time."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name == "forward":
            for inner in ast.walk(node):
                assert not isinstance(inner, ast.Global), f"{path.name}: global in forward"
                if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name):
                    assert inner.func.id not in ("getattr", "hasattr"), f"{path.name}: {inner.func.id} in forward"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/[a-z]*.py")), ids=lambda p: p.name)
def test_kernel_file_has_op_and_reference(path):
    names = {n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)}
    assert {path.stem, f"{path.stem}_ref"} <= names
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path.name} needs its contract"


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_size_caps(path):
    rel, text = str(path.relative_to(ROOT)), path.read_text()
    assert len(text.splitlines()) <= 500 or rel in LONG_FILES, f"{rel}: over 500 lines, is there a second room in it?"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= 60 or f"{rel}:{node.name}" in LONG_FUNCTIONS, f"{rel}:{node.name} has {size} lines"


def test_kernels_folder_is_no_package():
    """A PyPI package of the same name exists; an __init__.py here would collide with it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_torch_free_settings():
    """`--help` must answer in under a second, so no settings file may import torch."""
    for path in [*ROOT.glob("pgolf/*/config.py"), *(ROOT / "pgolf" / n for n in ("config.py", "aliases.py"))]:
        for node in ast.parse(path.read_text()).body:
            assert not (isinstance(node, ast.Import) and any(a.name.split(".")[0] == "torch" for a in node.names))
            assert not (isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch")
