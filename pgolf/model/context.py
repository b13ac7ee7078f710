"""What feature sites may read besides the tensor they map."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Context:
    """One forward pass: token ids, rotary tables, document segments, and what earlier sites left for later ones."""

    ids: Tensor  # (B, T) int64
    cos: Tensor  # (T, r/2) or (B, T, r/2) fp32
    sin: Tensor
    cu_seqlens: Tensor | None = None  # (n+1,) int32 document starts; None: rows are whole
    value_embed: Tensor | None = None  # (B, T, K, d), shared by all layers that add it
    first_value: Tensor | None = None  # (B, T, K, d), values of the first block
