"""What a model is fed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Batch:
    """One micro-batch of B rows of T tokens.

    ids, targets: (B, T) int64, targets[b, t] is the token after ids[b, t].
    positions: (B, T) int64 position of each token in its sequence; None = 0..T-1 in every row.
    cu_seqlens: (n+1,) int32 starts of packed documents over the flattened B*T tokens, and B*T; None = rows are whole.
    Nothing looks across a start or the end of a row. To keep one length for all batches, so that a compiled model
    compiles once, repeat B*T at the end: documents of no token.
    """

    ids: Tensor
    targets: Tensor
    positions: Tensor | None = None
    cu_seqlens: Tensor | None = None

    def to(self, device, non_blocking: bool = False) -> Batch:
        """The same batch on `device`."""
        fields = (self.ids, self.targets, self.positions, self.cu_seqlens)
        return Batch(*(None if f is None else f.to(device, non_blocking=non_blocking) for f in fields))
