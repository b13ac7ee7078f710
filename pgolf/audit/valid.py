"""Small scorers that are valid: the audit must pass them, on every seed. They also show the interface in use."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from pgolf.audit.interface import BlockScorer
from pgolf.eval.ledger import Ledger


class Uniform:
    """1/V for every token."""

    def __init__(self, vocab_size: int = 64):
        self.vocab_size, self.name = vocab_size, "uniform"

    def nats(self, tokens: Tensor) -> Tensor:
        return -torch.log(torch.full((tokens.numel() - 1,), 1 / self.vocab_size, dtype=torch.float64))

    def distribution(self, tokens: Tensor) -> Tensor:
        return torch.full((self.vocab_size,), 1 / self.vocab_size, dtype=torch.float64)

    def ledger(self, tokens: Tensor) -> Ledger:
        out = Ledger()
        out.score(self.name, [(0, tokens.numel() - 1)])
        return out

    def ranks(self, n: int) -> Uniform:
        return self


class Unigram:
    """(c(v) + 1) / (t + V) with counts of all tokens so far: learns after each target."""

    def __init__(self, vocab_size: int = 64):
        self.vocab_size, self.name = vocab_size, "unigram add-one"

    def nats(self, tokens: Tensor) -> np.ndarray:
        counts, out, stream = np.ones(self.vocab_size), [], tokens.numpy()
        for t in range(1, stream.size):
            counts[stream[t - 1]] += 1
            out.append(counts[stream[t]] / (t + self.vocab_size))
        return -np.log(out)

    def distribution(self, tokens: Tensor) -> Tensor:
        counts = torch.bincount(tokens, minlength=self.vocab_size) + 1
        return counts.double() / counts.sum()

    def ledger(self, tokens: Tensor) -> Ledger:
        out = Ledger()
        out.each(self.name, [(0, tokens.numel() - 1)])
        return out


class Bigram:
    """Block by block: (1 - w) / V + w (c(u, v) + k / V) / (c(u) + k) with joint counts of pairs in earlier blocks.

    For `BlockScorer`. k = strength, w = weight. c(u) is the sum of c(u, v), so it adds up to 1 by construction.
    """

    def __init__(self, vocab_size: int = 64, strength: float = 2.0, weight: float = 1.0):
        self.vocab_size, self.strength, self.weight = vocab_size, strength, weight
        self.reset()

    def reset(self) -> None:
        self.counts = np.zeros((self.vocab_size, self.vocab_size))

    def rows(self, before: np.ndarray) -> np.ndarray:
        """(n, V) probabilities after each of the tokens (n,)."""
        counts = self.counts[before]
        p = (counts + self.strength / self.vocab_size) / (counts.sum(-1, keepdims=True) + self.strength)
        return (1 - self.weight) / self.vocab_size + self.weight * p

    def score(self, tokens: Tensor, start: int, end: int) -> np.ndarray:
        stream = tokens.numpy()
        return -np.log(self.rows(stream[start:end])[np.arange(end - start), stream[start + 1 : end + 1]])

    def update(self, tokens: Tensor, start: int, end: int) -> None:
        stream = tokens.numpy()
        np.add.at(self.counts, (stream[start:end], stream[start + 1 : end + 1]), 1)

    def distribution(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.rows(tokens[-1:].numpy())[0])

    def warm_up(self) -> None:
        kept = self.counts.copy()
        self.update(torch.arange(self.vocab_size), 0, self.vocab_size - 1)
        self.counts = kept

    def state_digest(self) -> str:
        return hashlib.sha256(self.counts.tobytes()).hexdigest()


class BigramScorer(BlockScorer):
    """`Bigram` in blocks of 16, with its neutral setting: weight 0 is uniform."""

    def __init__(self, vocab_size: int = 64, weight: float = 1.0):
        name = "bigram Dirichlet" if weight else "bigram Dirichlet, weight 0"
        super().__init__(Bigram(vocab_size, weight=weight), vocab_size, 16, name)

    def neutral(self) -> tuple[BigramScorer, Uniform]:
        return BigramScorer(self.vocab_size, 0.0), Uniform(self.vocab_size)


VALID = {"uniform": Uniform, "unigram": Unigram, "bigram": BigramScorer}
