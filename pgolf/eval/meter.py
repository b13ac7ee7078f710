"""Sums of nats, targets and bytes, and the two scores made of them.

    val_loss = sum nats / targets          bpb = sum nats / (ln 2 * sum bytes)

Only ratios of sums: a mean over windows would weigh a short window like a long one. Targets that stand for no byte
(the start of a document) cost nats all the same.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgolf.errors import DataError, NumericalError


class Meter:
    """Accumulates in fp64 on `device`, without a host synchronisation until a score is read."""

    def __init__(self, device: torch.device | str = "cpu"):
        self._sums = torch.zeros(3, dtype=torch.float64, device=device)  # nats, targets, bytes; exact to 2**53

    def add(self, nll: Tensor, nbytes: Tensor) -> None:
        """nll: nats per target, fp32, any shape. nbytes: bytes each target stands for, integer, same shape."""
        if nll.shape != nbytes.shape:
            raise ValueError(f"nll {tuple(nll.shape)} and nbytes {tuple(nbytes.shape)} must have the same shape")
        self._sums[0] += nll.sum(dtype=torch.float64)
        self._sums[1] += nll.numel()
        self._sums[2] += nbytes.sum()

    def state(self) -> Tensor:
        """The sums, for a saved evaluation."""
        return self._sums.cpu()

    def load_state(self, state: Tensor) -> None:
        """The inverse of `state`."""
        self._sums.copy_(state)

    def all_reduce(self, dist) -> None:
        """Adds up the meters of all ranks (`pgolf.dist.Dist`); every rank then reads the same scores."""
        dist.all_reduce_sum_(self._sums)

    @property
    def nats(self) -> float:
        """Sum of the nats. Raises NumericalError unless finite."""
        nats = self._sums[0].item()
        if not math.isfinite(nats):
            raise NumericalError(
                f"evaluation: the sum of {self.targets:,} losses is {nats}, expected a finite number.\n"
                "The weights or the logits are not finite: look at the training loss, lower the learning rate."
            )
        return nats

    @property
    def targets(self) -> int:
        return int(self._sums[1].item())

    @property
    def bytes(self) -> int:
        return int(self._sums[2].item())

    @property
    def val_loss(self) -> float:
        """Nats per target. Raises DataError when nothing was scored."""
        if not self.targets:
            raise DataError("evaluation: nothing was scored; expected at least 1 target (is the val split empty?)")
        return self.nats / self.targets

    @property
    def bpb(self) -> float:
        """Bits per byte. Raises DataError when the targets stand for 0 bytes."""
        if not self.bytes:
            raise DataError(
                f"evaluation: the {self.targets:,} scored targets stand for 0 bytes, so bits per byte do not exist.\n"
                "Expected at least 1 byte: check that the tokenizer belongs to the shards, or raise eval.max_tokens."
            )
        return self.nats / (math.log(2) * self.bytes)
