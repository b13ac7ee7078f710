"""Compute weights: fp32 masters cast to the activations' dtype once a step, outside the compiled graph.

The graph's inputs are the casts. So late QAT is an argument of the cast, `quantize`, and never a second graph; and the
casts of all micro-batches and of forward and backward are one. The gradient of a cast is the straight-through gradient
of its master. A bank of matrices is cast by one launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from pgolf.kernels import int6
from pgolf.model.banks import Bank, make_banks
from pgolf.model.linear import Linear
from pgolf.model.roles import ParamInfo
from pgolf.quant.config import QuantConfig
from pgolf.quant.fake_quant import Rounding, roundings


def linears_of(model: nn.Module) -> dict[str, Linear]:
    """Linear layers by the name of their weight."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}


def bank_weights(
    model: nn.Module, infos: list[ParamInfo], cfg: QuantConfig, groups: Iterable[Sequence[ParamInfo]] = ()
) -> list[Bank]:
    """Banks of the weights of all linear layers; one is trained in one way and cast in one way.

    groups: what is trained alike, each group's infos; a bank lies within one. Matrices of groups that are no layer's
    weight are banked too.
    """
    how, linears = roundings(infos, cfg), linears_of(model)
    group_of = {info.name: at for at, group in enumerate(groups) for info in group}
    scales = lambda name: len(linears[name].row_scale) if name in linears else 0
    members = [info for info in infos if info.name in linears or (info.name in group_of and info.param.ndim == 2)]
    return make_banks(members, lambda i: (group_of.get(i.name), i.name in linears, how.get(i.name), scales(i.name)))


class BankCast:
    """The casts of a bank of linear layers' weights. rounding: the export's, None where it does not round to a grid."""

    def __init__(self, bank: Bank, linears: Sequence[Linear], dtype: torch.dtype, rounding: Rounding | None):
        self.bank, self.linears, self.rounding = bank, list(linears), rounding
        self.cast = torch.empty_like(bank.master, dtype=dtype)
        for lin, cast in zip(linears, self.cast.unbind(), strict=True):
            lin.cast = cast.detach().requires_grad_()  # a leaf: backward leaves the gradient in it

    @property
    def row_scale(self) -> Tensor | None:
        """(n, rows) fp32, or None."""
        scales = [scale.detach().float() for lin in self.linears for scale in lin.row_scale]
        return torch.stack(scales) if scales else None

    def how(self, quantize: bool) -> dict:
        """Arguments of `int6_cast`: on the export's grid if `quantize` and the export has one."""
        return {"quantize": True, **self.rounding._asdict()} if quantize and self.rounding else {"quantize": False}

    def refresh_(self, quantize: bool) -> None:
        """Casts the masters as they are now."""
        int6.int6_cast_(self.cast, self.bank.master, row_scale=self.row_scale, **self.how(quantize))

    def collect_(self, quantize: bool) -> None:
        """Adds the casts' gradients to the masters' (and the scales'), and drops them."""
        used = [i for i, lin in enumerate(self.linears) if lin.cast.grad is not None]
        if not used:
            return
        grads, scales, master = [self.linears[i].cast.grad for i in used], self.row_scale, self.bank.master
        if scales is not None:
            how = self.how(quantize)
            weights = int6.int6_cast(master, dtype=torch.float32, **how) if how["quantize"] else master
            for i, grad in zip(used, grads, strict=True):
                _add_grad(self.linears[i].row_scale[0], (weights[i] * grad.float()).sum(1))
            grads = [grad.float() * scales[i, :, None] for i, grad in zip(used, grads, strict=True)]
        self.bank.add_grads_(used, grads)
        for lin in self.linears:
            lin.cast.grad = None


def _add_grad(param: nn.Parameter, grad: Tensor) -> None:
    param.grad = grad.to(param.dtype) if param.grad is None else param.grad.add_(grad)


class WeightCast:
    """All linear layers of `model`. `refresh_` before a forward, `collect_` after each backward.

    banks: from `bank_weights`; None makes them. quantize: casts go through the export's grid, where it has one.
    """

    def __init__(
        self,
        model: nn.Module,
        infos: list[ParamInfo],
        cfg: QuantConfig,
        dtype: torch.dtype,
        banks: list[Bank] | None = None,
    ):
        how, linears = roundings(infos, cfg), linears_of(model)
        self.casts = [
            BankCast(bank, [linears[i.name] for i in bank.infos], dtype, how.get(bank.infos[0].name))
            for bank in (bank_weights(model, infos, cfg) if banks is None else banks)
            if bank.infos[0].name in linears
        ]
        self.quantize = False
        self.refresh_()

    @property
    def on_grid(self) -> int:
        """How many matrices `quantize` rounds."""
        return sum(len(cast.bank) for cast in self.casts if cast.rounding)

    @torch.no_grad()
    def refresh_(self) -> None:
        """Casts the masters as they are now."""
        for c in self.casts:
            c.refresh_(self.quantize)

    @torch.no_grad()
    def collect_(self) -> None:
        """Moves what backward left in the casts to the parameters' `.grad`, adding to what is there."""
        for c in self.casts:
            c.collect_(self.quantize)
