"""`from pgolf.kernels.mlp import mlp` works from a checkout, under pytest, from an editable install and from a wheel,
with the PyPI package `kernels` on the same path; and an installed torch stays as it is."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = "import kernels, pgolf.kernels.mlp as m; print(m.__file__); print(kernels.WHO)"


def python(*args, cwd, path=()):
    environ = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    environ |= {"PYTHONPATH": os.pathsep.join(map(str, path)), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run([sys.executable, *args], cwd=cwd, env=environ, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout.split("\n")


@pytest.fixture
def rival(tmp_path):
    """A folder holding a package named `kernels`, as FlashAttention users have."""
    folder = tmp_path / "rival"
    (folder / "kernels").mkdir(parents=True)
    (folder / "kernels" / "__init__.py").write_text("WHO = 'the other one'\n")
    return folder


def test_checkout_without_installation(rival):
    where, who = python("-c", PROBE, cwd=ROOT, path=[rival, ROOT])[:2]
    assert where == str(ROOT / "kernels" / "mlp.py") and who == "the other one"


def test_pytest_uses_the_checkout():
    import pgolf.kernels.mlp

    assert pgolf.kernels.mlp.__file__ == str(ROOT / "kernels" / "mlp.py")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of what is packaged, so that building leaves no trace in the checkout."""
    import shutil

    copy = tmp_path_factory.mktemp("source")
    for name in ("pgolf", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "train_gpt.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.mark.slow
def test_wheel(source, rival, tmp_path):
    python("-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(source), cwd=tmp_path)
    (wheel,) = tmp_path.glob("pgolf-*.whl")
    site = tmp_path / "site"
    python("-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    where, who = python("-c", PROBE, cwd=tmp_path, path=[rival, site])[:2]
    assert where == str(site / "pgolf" / "kernels" / "mlp.py") and who == "the other one"
    assert not (site / "kernels").exists()
    text = "\n".join(python(str(site / "train_gpt.py"), "--describe", "train.device=cpu", cwd=tmp_path, path=[site]))
    assert '"parameters"' in text
    assert (site / "bin" / "pgolf").is_file()  # the console script
    assert "doctor" in "\n".join(python("-m", "pgolf", "--help", cwd=tmp_path, path=[site]))


@pytest.mark.slow
def test_editable_install(source, rival, tmp_path):
    """Into a fresh environment that borrows this one's packages; torch is not touched."""
    python("-m", "venv", str(tmp_path / "env"), cwd=tmp_path)
    mine = tmp_path / "env" / "bin" / "python"
    site = next(p for p in map(Path, sys.path) if (p / "torch").is_dir())
    # Borrowed by a .pth file, behind the environment's own packages and without running the .pth files there: on
    # PYTHONPATH the finder of an editable pgolf in `site` would come before the one that is under test.
    (own,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    (own / "borrowed.pth").write_text(f"{site}\n")
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(rival)}
    run = lambda *a: subprocess.run([str(mine), *a], cwd=tmp_path, env=environ, capture_output=True, text=True)
    done = run("-m", "pip", "install", "-q", "--no-deps", "-e", str(source))
    assert done.returncode == 0, done.stderr[-3000:]
    done = run("-c", PROBE + "; import torch; print(torch.__file__)")
    assert done.returncode == 0, done.stderr[-3000:]
    where, who, torch_file = done.stdout.splitlines()[:3]
    assert where == str(source / "kernels" / "mlp.py") and who == "the other one"
    assert torch_file.startswith(str(site))


def test_metadata_promises_honest_ranges():
    text = (ROOT / "setup.py").read_text()
    assert "torch>=2.9" in text and "triton>=3.5" in text
    assert "==" not in text.split("install_requires")[1].split("]")[0]
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all("==" in p for p in pins)
