"""The pages that users read agree with the code."""

import ast
import re
from pathlib import Path

import pytest

from pgolf import cli, config, errors
from pgolf.presets import PRESETS

ROOT = Path(__file__).resolve().parent.parent


def test_levers_page_is_current():
    """Regenerate with: python -m pgolf.config --levers > docs/levers.md"""
    assert (ROOT / "docs" / "levers.md").read_text() == config.levers()


def test_errors_page_lists_every_exit_code():
    rows = dict(re.findall(r"^\| (\d+) \| (?:`(\w+)` )?\|", (ROOT / "docs" / "errors.md").read_text(), re.M))
    classes = [errors.PgolfError, *errors.PgolfError.__subclasses__()]
    assert {str(c.exit_code): c.__name__ for c in classes if c.__module__ == "pgolf.errors"}.items() <= rows.items()
    assert set(map(int, rows)) == set(cli.exit_codes())


def test_every_test_that_the_fault_table_names_exists():
    text = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
    defined = {}
    for path, name in named:
        if path not in defined:
            defined[path] = {n.name for n in ast.walk(ast.parse((ROOT / path).read_text())) if hasattr(n, "name")}
        assert name in defined[path], f"docs/reliability.md names {path}::{name}"
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| fault")]
    untested = [row for row in rows if "::" not in row and "not noticed" not in row and not row.endswith(" - |")]
    assert len(named) > 50 and not untested, untested
    assert set(re.findall(r"\| (\d+)(?:, \d+)* \|", text)) <= {*map(str, cli.exit_codes()), "137"}


@pytest.mark.parametrize(
    "page", ["README.md", "LOG.md", *(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), f"{page}: {target}"


def test_readme_names_every_preset_and_its_size():
    text = (ROOT / "README.md").read_text()
    for name, build in PRESETS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{name}`"))
        assert f"{cli.model_facts(build())['parameters']:,}" in row


def test_architecture_page_names_every_file():
    text = (ROOT / "docs" / "architecture.md").read_text()
    for path in [*ROOT.glob("pgolf/*.py"), *ROOT.glob("pgolf/*/*.py")]:
        if path.name not in ("__init__.py", "config.py"):
            assert path.name in text or path.parent.name == "features", f"docs/architecture.md misses {path.name}"


@pytest.mark.parametrize("path", sorted(ROOT.glob("kernels/[a-z]*.py")), ids=lambda p: p.stem)
def test_every_kernel_has_a_page(path):
    """Linked from docs/kernels.md, with the sections that a reader looks for; times are measured or said not to be."""
    assert f"(kernels/{path.stem}.md)" in (ROOT / "docs" / "kernels.md").read_text()
    page = (ROOT / "docs" / "kernels" / path.name).with_suffix(".md").read_text()
    for needed in ("## Data flow", "## T", "not measured yet", "H100", "H200"):
        assert needed in page, f"{path.stem}.md misses {needed!r}"
