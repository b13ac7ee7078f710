"""Whether a run's numbers are still numbers: decided on the device before each update, read without waiting for it."""

from __future__ import annotations

import math
from collections import deque

import torch
from torch import Tensor

LAG = 2  # steps that a GPU may be ahead of what the host has read


class Health:
    """Sticky: from the first non-finite loss or gradient on, no update changes a weight.

    ok: () fp32 on `device`, 1.0 so far, then 0.0; bad = 1 - ok, which AdamW takes as its `found_inf`. bad_step: ()
    int64, the first bad step, -1 so far. The same on every rank when `update_` is given what was reduced over ranks.
    """

    def __init__(self, device: torch.device):
        self.ok = torch.ones((), device=device)
        self.bad = torch.zeros((), device=device)
        self.bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.unread: deque[Tensor] = deque()

    @torch.no_grad()
    def update_(self, step: int, value: Tensor) -> None:
        """value: () fp32, finite if and only if the loss and the whole gradient of `step` are. No host sync."""
        fine = torch.isfinite(value)
        self.bad_step.copy_(torch.where(fine | (self.bad_step >= 0), self.bad_step, step))
        self.ok.mul_(fine)
        self.bad.copy_(1.0 - self.ok)

    def post(self) -> None:
        """Queues a copy of `bad_step` to the host. On a GPU it has arrived when the work queued before it is done."""
        if self.bad_step.is_cuda:
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
            self.unread.append(host.copy_(self.bad_step, non_blocking=True))
        else:
            self.unread.append(self.bad_step.clone())

    def read(self, late: int = 0) -> int | None:
        """The first bad step, None so far. late: how many of the copies that were queued last may be missing yet."""
        found = -1
        while len(self.unread) > late:
            found = int(self.unread.popleft())
        return found if found >= 0 else None

    def reset_(self) -> None:
        """As new."""
        self.ok.fill_(1.0)
        self.bad.fill_(0.0)
        self.bad_step.fill_(-1)
        self.unread.clear()


class Divergence:
    """Warns of losses that are finite and far from where they were.

    z: (loss - mean) / standard deviation of the last `window` losses. A warning needs z > `limit` and a loss 10 % above
    the mean: late in training losses lie so close that z alone is noise.
    """

    def __init__(self, window: int = 32, limit: float = 6.0):
        self.losses: deque[float] = deque(maxlen=window)
        self.limit, self.warned = limit, False

    def note(self, loss: float) -> str | None:
        """What to warn of, once per excursion; None when all is well."""
        said = None
        if len(self.losses) >= 8:
            mean = sum(self.losses) / len(self.losses)
            spread = math.sqrt(sum((x - mean) ** 2 for x in self.losses) / len(self.losses))
            z = (loss - mean) / max(spread, 1e-6)
            far = z > self.limit and loss > 1.1 * mean
            if far and not self.warned:
                seen = f"{z:.1f} standard deviations above the mean {mean:.4f} of the last {len(self.losses)}"
                said = f"training loss {loss:.4f} is {seen}: lower the learning rates or set GRAD_CLIP_NORM"
            self.warned = far
        self.losses.append(loss)
        return said
