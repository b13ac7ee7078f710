"""CROWN-Q (PR #692): a penalty on weights for the noise that rounding them will make.

    penalty = coef / 12 * sum over matrices, rows r, columns c of w_rc^2 step_r^2

step_r^2 / 12 is the variance of rounding to the export's steps, w^2 stands in for the curvature. The steps count as
constants, so d penalty / d w = coef / 6 * w * step^2. It is added to the gradients outside of the graph: the compiled
step and the loss that is logged stay what they are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pgolf.kernels.int6 import row_step
from pgolf.model.banks import Bank
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import QuantConfig
from pgolf.quant.grid import GRIDS
from pgolf.quant.policy import Storage, candidate_clips, storage_of


class CrownQ:
    """The penalty on what the export rounds to a grid among the matrices of `banks`. It acts while `active`."""

    def __init__(self, banks: Iterable[Bank], infos: list[ParamInfo], cfg: QuantConfig):
        storages = storage_of(infos, cfg)
        self.coef, self.floor, self.active = cfg.crown_q.coef, cfg.scale_floor, False
        self.parts: list[tuple[Bank, int, Storage]] = [
            (bank, at, storages[info.name])
            for bank in banks
            for at, info in enumerate(bank.infos)
            if info.role in (Role.MATRIX, Role.SIDE_MATRIX) and storages[info.name].kind in GRIDS
        ]

    def __len__(self) -> int:
        return len(self.parts)

    def _variances(self, w: Tensor, storage: Storage) -> Tensor:
        """w (rows, cols) fp32 -> step^2 / 12, (rows, 1) fp32."""
        clip = candidate_clips(w, storage)[-1]  # a search has not been done yet; its last candidate is the maximum
        return row_step(clip, GRIDS[storage.kind].high, self.floor).float().square()[:, None] / 12

    @torch.no_grad()
    def value(self) -> float:
        """The penalty at the weights as they are now. A host sync."""
        terms = [bank.master[at].square() * self._variances(bank.master[at], how) for bank, at, how in self.parts]
        return self.coef * sum(term.sum().item() for term in terms)

    @torch.no_grad()
    def add_grads_(self) -> None:
        """Adds the penalty's gradient to those of the parameters."""
        for bank, at, how in self.parts:
            w = bank.master[at]
            bank.add_grads_([at], [2 * self.coef * w * self._variances(w, how)])
