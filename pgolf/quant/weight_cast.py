"""Compute weights: fp32 masters cast to the activations' dtype once a step, outside the compiled graph.

The graph's inputs are the casts. So late QAT is an argument of the cast, `quantize`, and never a second graph; and the
casts of all micro-batches and of forward and backward are one. The gradient of a cast is the straight-through gradient
of its master. Matrices of one shape lie in one bank, masters and casts, and are cast by one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pgolf.kernels import int6
from pgolf.model.linear import Linear
from pgolf.model.roles import ParamInfo
from pgolf.quant.config import QuantConfig
from pgolf.quant.fake_quant import names_on_grid


class Bank:
    """Linear layers of one shape (rows, cols): their weights become views of one (n, rows, cols) fp32 tensor."""

    def __init__(self, linears: Sequence[Linear], dtype: torch.dtype, on_grid: bool):
        self.linears, self.on_grid = list(linears), on_grid
        self.master = torch.stack([lin.weight.data for lin in linears])
        self.cast = torch.empty_like(self.master, dtype=dtype)
        self.grad = torch.empty_like(self.master)
        for lin, master, cast in zip(linears, self.master.unbind(), self.cast.unbind(), strict=True):
            lin.weight.data = master
            lin.cast = cast.detach().requires_grad_()  # a leaf: backward leaves the gradient in it

    @property
    def row_scale(self) -> Tensor | None:
        """(n, rows) fp32, or None."""
        scales = [scale.detach().float() for lin in self.linears for scale in lin.row_scale]
        return torch.stack(scales) if scales else None

    def collect_(self, quantize: bool, scale_floor: float) -> None:
        """Adds the casts' gradients to the masters' (and the scales'), and drops them."""
        used = [i for i, lin in enumerate(self.linears) if lin.cast.grad is not None]
        if not used:
            return
        grads = [self.linears[i].cast.grad for i in used]
        scales = self.row_scale
        if scales is not None:
            weights = self.master if not quantize else int6.int6_cast(
                self.master, quantize=True, scale_floor=scale_floor, dtype=torch.float32
            )  # fmt: skip
            for i, grad in zip(used, grads, strict=True):
                _add_grad(self.linears[i].row_scale[0], (weights[i] * grad.float()).sum(1))
            grads = [grad.float() * scales[i, :, None] for i, grad in zip(used, grads, strict=True)]
        self._accumulate_([self.linears[i] for i in used], [self.grad[i] for i in used], grads)

    def _accumulate_(self, linears: list[Linear], views: list[Tensor], grads: list[Tensor]) -> None:
        fresh = [i for i, lin in enumerate(linears) if lin.weight.grad is None]
        rest = [i for i, lin in enumerate(linears) if lin.weight.grad is not None]
        if fresh:
            torch._foreach_copy_([views[i] for i in fresh], [grads[i] for i in fresh])
        if rest:
            torch._foreach_add_([linears[i].weight.grad for i in rest], [grads[i] for i in rest])
        for i in fresh:
            linears[i].weight.grad = views[i]
        for lin in linears:
            lin.cast.grad = None


def _add_grad(param: nn.Parameter, grad: Tensor) -> None:
    param.grad = grad.to(param.dtype) if param.grad is None else param.grad.add_(grad)


class WeightCast:
    """All linear layers of `model`. `refresh_` before a forward, `collect_` after each backward.

    quantize: casts go through the export's int6 grid, where the export does.
    """

    def __init__(self, model: nn.Module, infos: list[ParamInfo], cfg: QuantConfig, dtype: torch.dtype):
        grid, groups = names_on_grid(infos, cfg), {}
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                key = (module.weight.shape, f"{name}.weight" in grid, len(module.row_scale))
                groups.setdefault(key, []).append(module)
        self.banks = [Bank(linears, dtype, on_grid) for (_, on_grid, _), linears in groups.items()]
        self.scale_floor = cfg.scale_floor
        self.quantize = False
        self.refresh_()

    @property
    def on_grid(self) -> int:
        """How many matrices `quantize` rounds."""
        return sum(len(bank.linears) for bank in self.banks if bank.on_grid)

    @torch.no_grad()
    def refresh_(self) -> None:
        """Casts the masters as they are now."""
        for bank in self.banks:
            quantize = self.quantize and bank.on_grid
            int6.int6_cast_(
                bank.cast, bank.master, quantize=quantize, row_scale=bank.row_scale, scale_floor=self.scale_floor
            )

    @torch.no_grad()
    def collect_(self) -> None:
        """Moves what backward left in the casts to the parameters' `.grad`, adding to what is there."""
        for bank in self.banks:
            bank.collect_(self.quantize and bank.on_grid, self.scale_floor)
