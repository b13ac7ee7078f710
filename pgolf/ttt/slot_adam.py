"""AdamW for parameters with a slot dimension: every slot is an optimiser of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.ttt.config import LoraConfig


class SlotAdam:
    """For each slot s of each parameter p (slots, ...) fp32, t = how many steps the slot has taken:

        m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
        p <- p (1 - lr wd) - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    A step moves the chosen slots only: no moment, count or weight of another changes.
    """

    def __init__(self, params: Sequence[Tensor], cfg: LoraConfig):
        self.params, self.cfg = list(params), cfg
        self.m, self.v = ([torch.zeros_like(p, requires_grad=False) for p in self.params] for _ in range(2))
        slots, device = len(self.params[0]), self.params[0].device
        self.steps = torch.zeros(slots, device=device)

    @torch.no_grad()
    def reset_(self, slots: Tensor) -> None:
        """slots: (slots,) bool, those that start anew."""
        self.steps.masked_fill_(slots, 0.0)
        for moment in (*self.m, *self.v):
            moment.masked_fill_(slots[:, None, None], 0.0)

    @torch.no_grad()
    def step(self, grads: Sequence[Tensor], slots: Tensor) -> None:
        """grads: like the parameters. slots: (slots,) bool, those that take the step."""
        cfg, chosen = self.cfg, slots.float()
        self.steps += chosen
        steps, chosen = self.steps.clamp(min=1.0)[:, None, None], chosen[:, None, None]  # 0 steps would divide by 0
        first, second = 1 - cfg.beta1**steps, 1 - cfg.beta2**steps
        for p, m, v, g in zip(self.params, self.m, self.v, grads, strict=True):
            m.lerp_(g, (1 - cfg.beta1) * chosen)
            v.lerp_(g.square(), (1 - cfg.beta2) * chosen)
            update = (m / first) / ((v / second).sqrt_() + cfg.eps)
            p -= cfg.lr * chosen * (update + cfg.weight_decay * p)

    def state(self) -> dict:
        return {"m": self.m, "v": self.v, "steps": self.steps}

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        torch._foreach_copy_([*self.m, *self.v, self.steps], [*state["m"], *state["v"], state["steps"]])
