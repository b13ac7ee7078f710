"""What several tests share. Not in conftest.py: a folder has its own, and `import conftest` finds any of them."""

from functools import cache
from pathlib import Path

import torch

from pgolf.artifact import script
from pgolf.data.batch import Batch

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 400  # of the `shards` fixture
KERNELS = sorted(p.stem for p in ROOT.glob("kernels/[a-z]*.py"))  # every op


def random_batch(vocab: int, rows: int = 2, length: int = 32, seed: int = 0):
    """A Batch of uniform random tokens."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length + 1), generator=gen)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


@cache
def made() -> script.Script:
    """The script of this checkout, made once a process: minifying its files takes 5 s."""
    return script.make()
