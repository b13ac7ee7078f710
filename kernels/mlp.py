"""mlp: y = act(x @ Wup^T) @ Wdown^T, for the ungated activations.

x (..., D), Wup (F, D), Wdown (D, F), one floating dtype -> y (..., D). Products accumulate in fp32 on a GPU.
Activations (u = x @ Wup^T):
    relu2        relu(u)^2
    leaky_relu2  (u if u >= 0 else slope u)^2     derivative 2 a a', a the leaky value
    gelu2        gelu(u)^2, erf form
    silu2        silu(u)^2
Raises ValueError on an unknown activation or on shapes that do not chain.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu2": lambda u, slope: F.relu(u).square(),
    "leaky_relu2": lambda u, slope: F.leaky_relu(u, slope).square(),
    "gelu2": lambda u, slope: F.gelu(u).square(),
    "silu2": lambda u, slope: F.silu(u).square(),
}


def mlp_ref(x: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "relu2", slope: float = 0.5) -> Tensor:
    """Reference of `mlp`, in plain torch."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_up), slope), w_down)


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "relu2", slope: float = 0.5) -> Tensor:
    """See the module's contract."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if w_up.shape[1] != x.shape[-1] or w_down.shape[1] != w_up.shape[0]:
        raise ValueError(
            f"mlp: x {tuple(x.shape)}, Wup {tuple(w_up.shape)}, Wdown {tuple(w_down.shape)} do not chain:"
            f" expected (..., D), (F, D), (D, F)"
        )
    return mlp_ref(x, w_up, w_down, activation=activation, slope=slope)
