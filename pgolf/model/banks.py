"""Parameter banks: matrices of one shape stored as one tensor, so that a cast, an update or an exchange is one launch.

Layers keep ordinary weights: `.data` and, once collected, `.grad` of each are views into the bank. A model of 11 layers
has 68 matrices in 4 shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

import torch

from pgolf.model.roles import ParamInfo


class Bank:
    """Parameters of one shape (rows, cols) and dtype, from here on views of `master` (n, rows, cols), with gradients in
    `grad`, like master."""

    def __init__(self, infos: Iterable[ParamInfo]):
        self.infos = list(infos)
        self.params = [info.param for info in self.infos]
        self.master = torch.stack([p.data for p in self.params])
        self.grad = torch.zeros_like(self.master)
        self.grads = self.grad.unbind()
        for p, view in zip(self.params, self.master.unbind(), strict=True):
            p.data = view

    @property
    def rows(self) -> int:
        return self.master.shape[1]

    @property
    def cols(self) -> int:
        return self.master.shape[2]

    def __len__(self) -> int:
        return len(self.params)

    @torch.no_grad()
    def collect_(self) -> list[int]:
        """Moves gradients that autograd left elsewhere into `grad`; what has none is zero there.

        Returns the places of the parameters that have one.
        """
        used = [i for i, p in enumerate(self.params) if p.grad is not None]
        stray = [i for i in used if self.params[i].grad is not self.grads[i]]
        if stray:
            torch._foreach_copy_([self.grads[i] for i in stray], [self.params[i].grad for i in stray])
        for i in stray:
            self.params[i].grad = self.grads[i]
        if len(used) < len(self):
            torch._foreach_zero_([g for i, g in enumerate(self.grads) if i not in used])
        return used

    @torch.no_grad()
    def add_grads_(self, places: list[int], grads: list[torch.Tensor]) -> None:
        """Adds gradients of any dtype to those of the parameters at `places`."""
        fresh = [(i, g) for i, g in zip(places, grads, strict=True) if self.params[i].grad is None]
        rest = [(i, g) for i, g in zip(places, grads, strict=True) if self.params[i].grad is not None]
        if fresh:
            torch._foreach_copy_([self.grads[i] for i, _ in fresh], [g for _, g in fresh])
        if rest:
            torch._foreach_add_([self.params[i].grad for i, _ in rest], [g for _, g in rest])
        for i, _ in fresh:
            self.params[i].grad = self.grads[i]


def make_banks(infos: Iterable[ParamInfo], key: Callable[[ParamInfo], Hashable] = lambda info: None) -> list[Bank]:
    """Banks of the matrices `infos`: of one shape, dtype and `key`, in order of first appearance."""
    groups: dict[Hashable, list[ParamInfo]] = {}
    for info in infos:
        groups.setdefault((info.param.shape, info.param.dtype, key(info)), []).append(info)
    return [Bank(group) for group in groups.values()]
