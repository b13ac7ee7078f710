"""Chooses the softmax's temperature on training data. On validation data it would be a second pass (PR #991)."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.eval.base import evaluate
from pgolf.eval.neural import Neural, Temperature
from pgolf.eval.windowed import SlidingWindows

CANDIDATES = tuple(round(0.70 + 0.01 * i, 2) for i in range(71))  # 0.70 to 1.40


class _Sums:
    """A reader: nats at every candidate, from the log-probabilities of one pass (they are logits of the same softmax)."""

    needs_probs = True

    def __init__(self, tokens: Tensor, adaptive: bool):
        self.temperatures = [Temperature(value, adaptive) for value in CANDIDATES]
        self.tokens, self.nats = tokens, torch.zeros(len(CANDIDATES), dtype=torch.float64)

    def put(self, targets: Tensor, nats: Tensor, log_probs: Tensor | None = None) -> None:
        token = self.tokens[targets + 1].to(log_probs.device)[:, None]
        for i, temperature in enumerate(self.temperatures):
            found = temperature.log_probs(log_probs).gather(-1, token)
            self.nats[i] -= found.sum(dtype=torch.float64).cpu()

    def state(self) -> dict:
        return {"nats": self.nats}

    def load_state(self, state: dict) -> None:
        self.nats = state["nats"]


def choose(neural: Neural, tokens: Tensor, windows: SlidingWindows, dist, adaptive: bool = False):
    """(the candidate with the smallest loss on `tokens`, what it gains in nats a target). A collective.

    tokens: (n,) int64 CPU, of the training split. windows: as the score will use them: a temperature that is right for
    short contexts is too high for long ones. neural: at temperature 1.
    """
    sums = _Sums(tokens, adaptive)
    ones = lambda ids, targets: torch.ones_like(targets)
    count = evaluate(windows, neural, tokens, ones, dist, readers=[sums]).targets
    nats = dist.all_reduce_sum_(sums.nats) / count
    best = int(nats.argmin())
    return sums.temperatures[best], float(nats[CANDIDATES.index(1.0)] - nats[best])
