"""What several tests share. Not in conftest.py: a folder has its own, and `import conftest` finds any of them."""

from pathlib import Path

import torch

from pgolf.data.batch import Batch

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 400  # of the `shards` fixture
KERNELS = sorted(p.stem for p in ROOT.glob("kernels/[a-z]*.py"))  # every op


def random_batch(vocab: int, rows: int = 2, length: int = 32, seed: int = 0):
    """A Batch of uniform random tokens."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length + 1), generator=gen)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class ToyNeural:
    """A scorer out of a function (ids, targets) -> nats of every position, without probabilities of other tokens."""

    def __init__(self, nll):
        self.nll = nll

    def nats(self, batch, index):
        return self.nll(batch.ids, batch.targets).flatten()[index]

    def log_probs(self, batch, index):
        raise NotImplementedError("this toy knows the probability of the target alone")
