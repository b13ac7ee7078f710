"""Shared by the tests of faults: a run from the command line, in this process; what must stay; small disks."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import VOCAB

from pgolf import cli, finish
from pgolf.data.batch import Batch
from pgolf.train import Trainer

# 6 steps and the shortest way to the end
SHORT = (
    "train.device=cpu", "train.iterations=6", "train.warmup_steps=0", "train.val_loss_every=0", "eval.stride=0",
    "eval.max_tokens=512",
)  # fmt: skip


def launch(shards: Path, out: Path, *overrides: str, **environ: str) -> int:
    """Exit code of `train_gpt.py` with the smoke preset, `shards` as data and `out` for its runs."""
    base = {"PRESET": "smoke", "DATA_PATH": str(shards), "TOKENIZER_PATH": str(shards / "tokenizer.model")}
    base |= {"VOCAB_SIZE": str(VOCAB), "OUT_DIR": str(out)}
    return cli.main([*SHORT, *overrides], base | environ)


def refused(capsys, code: int, *words: str):
    """The last launch's message: one, for people, with these words."""
    err = capsys.readouterr().err
    assert "Traceback" not in err and err.count("error: ") == 1, err
    message = err[err.index("error: ") :]
    missing = [w for w in words if w not in message]
    assert not missing, f"{missing} not in {message!r}"
    return code


def content(folder: Path) -> dict[str, str]:
    """{path: sha256} of every file below `folder`."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def at_step(monkeypatch, number: int, action) -> None:
    """Calls `action()` before step `number` (the first is 0), once."""
    original, done = Trainer.step, []

    def step(self, lr_scale, step_number) -> Batch:
        if step_number == number and not done:
            done.append(action())
        return original(self, lr_scale, step_number)

    monkeypatch.setattr(Trainer, "step", step)


def before(monkeypatch, module, name: str, action) -> None:
    """Calls `action()` before `module.name`."""
    original = getattr(module, name)

    def wrapper(*args, **kwargs):
        action()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapper)


def small_bundle(monkeypatch) -> None:
    """The code is not what is asked here, and bundling it takes 1.4 s."""
    monkeypatch.setattr(finish, "bundle", lambda: b"code")


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A file system of its own at `folder`, in memory; skips where this user may mount none."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no small disk to fill: mounting a tmpfs needs root ({done.stderr.strip()})")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", folder], check=True)


def fill(folder: Path) -> None:
    """Takes every free byte."""
    with open(folder / "ballast", "wb", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def free(folder: Path) -> None:
    (folder / "ballast").unlink()
