"""Muon: momentum whose step is orthogonalised (K. Jordan 2024), as in Parameter Golf's baseline and PR #401."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from pgolf.kernels.newton_schulz import newton_schulz
from pgolf.optim.config import MuonConfig


def momentum_at(step: int, cfg: MuonConfig) -> float:
    """Momentum of step `step` (from 0): linear from momentum_start to momentum over momentum_warmup_steps."""
    done = min(step / cfg.momentum_warmup_steps, 1.0) if cfg.momentum_warmup_steps > 0 else 1.0
    return cfg.momentum_start + done * (cfg.momentum - cfg.momentum_start)


class Muon(torch.optim.Optimizer):
    """For each matrix w (rows, cols) fp32 with gradient g:

        m <- mu m + g;  u = g + mu m  (Nesterov);  o = newton_schulz(u) sqrt(max(1, rows / cols))
        w <- w (1 - lr wd) - lr o

    m starts at zero, in w's dtype. Matrices of one shape within a group are orthogonalised as one batch: a model of 11
    layers has 68 of them in 4 shapes. A parameter without gradient is left alone, undecayed.
    Raises ValueError on parameters that are not matrices, or of less than fp32: those would lose small updates.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        ns_steps: int = 5,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "ns_steps": ns_steps})
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2 or p.dtype not in (torch.float32, torch.float64):
                raise ValueError(f"Muon: parameter is {tuple(p.shape)} {p.dtype}, expected a matrix of fp32")

    @torch.no_grad()
    def step(self) -> None:
        """One update from the gradients in place."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault(p.shape, []).append(p)
            for (rows, cols), params in by_shape.items():
                directions = self._directions(params, group["momentum"], group["ns_steps"])
                if group["weight_decay"]:
                    torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, directions, alpha=-group["lr"] * math.sqrt(max(1.0, rows / cols)))

    def _directions(self, params: list[Tensor], momentum: float, ns_steps: int) -> list[Tensor]:
        """Advances the momenta of matrices of one shape and returns their orthogonalised Nesterov steps."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
        grads = [p.grad for p in params]
        momenta = [self.state[p]["momentum"] for p in params]
        torch._foreach_mul_(momenta, momentum)
        torch._foreach_add_(momenta, grads)
        steps = torch._foreach_add(grads, momenta, alpha=momentum)
        return list(newton_schulz(torch.stack(steps), steps=ns_steps).unbind())
