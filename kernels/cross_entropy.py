"""cross_entropy: softcapped cross-entropy per token.

    z = c tanh(logits / c);  nll_n = logsumexp(z_n) - z_n[target_n];  H_n = entropy of softmax(z_n), nats

logits (N, V) fp32 or bf16, targets (N,) int64 -> nll (N,) fp32, and H (N,) fp32, detached, when `entropy=True`.
All arithmetic in fp32. |z| <= c, so a kernel needs no running maximum. Raises ValueError on shapes that do not agree.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in fp32."""
    return cap * torch.tanh(logits.float() / cap)


def cross_entropy_ref(
    logits: Tensor, targets: Tensor, *, cap: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Reference of `cross_entropy`, in plain torch."""
    log_p = F.log_softmax(softcap(logits, cap), dim=-1)
    nll = F.nll_loss(log_p, targets, reduction="none")
    if not entropy:
        return nll, None
    detached = log_p.detach()
    return nll, -(detached.exp() * detached).sum(-1)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, cap: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See the module's contract."""
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: logits {tuple(logits.shape)}, targets {tuple(targets.shape)}: expected (N, V), (N,)"
        )
    return cross_entropy_ref(logits, targets, cap=cap, entropy=entropy)
