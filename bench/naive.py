"""Oracles of the CPU benchmarks: the same mathematics again, tensor by tensor, with no code in common."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pgolf.optim.groups import Group


def newton_schulz(g: Tensor, steps: int) -> Tensor:
    """The quintic iteration on one matrix (r, c), in g's dtype."""
    x = g / (g.norm() + 1e-7)
    x = x.T if g.shape[0] > g.shape[1] else x
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Optimizer:
    """Muon and AdamW as their papers write them: one parameter after the other, weights as copies in `dtype`.

    groups: name, kind, rate, decay and parameters, as pgolf.optim.groups builds them.
    """

    def __init__(self, groups: Sequence[Group], ns_steps: int, dtype: torch.dtype = torch.float64):
        self.groups, self.ns_steps, self.t = list(groups), ns_steps, 0
        self.weights = {i.name: i.param.detach().to(dtype, copy=True) for g in groups for i in g.infos}
        zeros = lambda: {name: torch.zeros_like(w) for name, w in self.weights.items()}
        self.first, self.second = zeros(), zeros()

    def step(self, grads: Mapping[str, Tensor], lr_scale: float, momentum: float) -> None:
        """One update; grads {name: gradient} in any float dtype."""
        self.t += 1
        for group in self.groups:
            lr = group.lr * lr_scale
            for name in (info.name for info in group.infos):
                w, g = self.weights[name], grads[name].to(self.weights[name].dtype)
                w.mul_(1 - lr * group.weight_decay)
                if group.kind == "muon":
                    w.sub_(lr * self._muon(name, g, momentum))
                else:
                    w.sub_(lr * self._adam(name, g, group))

    def _muon(self, name: str, g: Tensor, momentum: float) -> Tensor:
        self.first[name] = momentum * self.first[name] + g
        rows, cols = g.shape
        return newton_schulz(g + momentum * self.first[name], self.ns_steps) * math.sqrt(max(1, rows / cols))

    def _adam(self, name: str, g: Tensor, group: Group) -> Tensor:
        b1, b2 = group.betas
        self.first[name] = b1 * self.first[name] + (1 - b1) * g
        self.second[name] = b2 * self.second[name] + (1 - b2) * g * g
        mean, square = self.first[name] / (1 - b1**self.t), self.second[name] / (1 - b2**self.t)
        return mean / (square.sqrt() + group.eps)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference as a share of the largest expected value."""
    scale = expected.abs().max().item()
    return (got.double() - expected.double()).abs().max().item() / max(scale, 1e-30)
