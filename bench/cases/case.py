"""What a case is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Size = Mapping[str, int]
# The reference shape: one GPU's share of a step of `rat_rod_green`, 48 rows of 2,048 tokens.
PRODUCTION = "production"
B, T, D, F, H, K, HEAD, V = 48, 2048, 512, 1536, 8, 4, 64, 1024


@dataclass
class Make:
    """Makes a case's inputs: on `device`, streams in `dtype`, from a seeded generator; on "meta" only shapes."""

    device: str
    dtype: torch.dtype
    seed: int = 0

    def __post_init__(self):
        self.gen = None if self.device == "meta" else torch.Generator().manual_seed(self.seed)

    def randn(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in the case's dtype, or in `dtype`."""
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return (torch.randn(shape, generator=self.gen) * scale).to(self.device, dtype or self.dtype)

    def param(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Normal numbers that stay fp32: gains, per-channel weights, master weights."""
        return self.randn(*shape, scale=scale, dtype=torch.float32)

    def ids(self, *shape: int, high: int, low: int = 0) -> Tensor:
        """int64 ids in [low, high)."""
        if self.device == "meta":
            return torch.empty(shape, dtype=torch.int64, device="meta")
        return torch.randint(low, high, shape, generator=self.gen).to(self.device)

    def tensor(self, values, dtype: torch.dtype) -> Tensor:
        """A given tensor on the device."""
        return torch.as_tensor(values, dtype=dtype).to(self.device)


@dataclass(frozen=True)
class Case:
    """One variant of an op.

    inputs(make, **size) -> keyword arguments of `fn` and `ref`, tensors and plain values. fn and ref return a tensor or
    a tuple of tensors and None. grads names the inputs that are differentiated, "terms.0" being the first tensor of a
    list. sizes: name -> keyword arguments; "production" is what is compiled ahead of time and timed, all others are
    small and tested. traffic(**size, item) -> (forward, backward) bytes of the ideal kernels at `item` bytes a number
    of the streams; flops(**size) likewise. exact: outputs equal the reference's, bit for bit.
    dtypes: what small sizes are tested in; the last is what production runs in.
    timed: (fn, ref) to time instead, where fn and ref copy what their ops write to: these write to the inputs `writes`,
    and return them first.
    slack: the error may be `2 * the reference's + slack[dtype] * max |truth|`; the default is a few roundings.
    """

    op: str
    name: str
    inputs: Callable[..., Inputs]
    fn: Callable[..., Any]
    ref: Callable[..., Any]
    sizes: dict[str, Size]
    grads: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    traffic: Callable[..., tuple[int, int]] | None = None
    flops: Callable[..., tuple[int, int]] = lambda **size: (0, 0)
    exact: bool = False
    atomics: bool = False  # integer atomics, whose order does not show
    timed: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    writes: tuple[str, ...] = ()
    slack: dict[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 4e-6, torch.bfloat16: 2.0**-8})

    @property
    def id(self) -> str:
        return f"{self.op}-{self.name}"

    def make(self, size: str, device: str, dtype: torch.dtype, seed: int = 0) -> Inputs:
        """Fresh inputs of a named size."""
        return self.inputs(Make(device, dtype, seed), **self.sizes[size])
