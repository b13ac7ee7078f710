"""Is a case right? Values and gradients against fp64, with the same-dtype reference as the yardstick.

The rule for every output and gradient: error <= 2 x the reference's error + slack x max |truth|, both as the largest
absolute difference. Tests call it at small sizes, benchmarks before they time anything.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .cases import Case
from .cases.case import Inputs

Named = dict[str, Tensor]


def find(inputs: Inputs, path: str) -> Tensor:
    """The tensor that "x" or "terms.0" names."""
    name, _, index = path.partition(".")
    return inputs[name][int(index)] if index else inputs[name]


def copies(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """Fresh detached inputs, floating ones in `dtype` if given. A tensor that is there twice stays one tensor."""
    made: dict[int, Tensor] = {}

    def one(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = t.detach().to(dtype if dtype and t.is_floating_point() else t.dtype, copy=True)
        return made[id(t)]

    return pytree.tree_map_only(Tensor, one, inputs)


def outputs(out: Any) -> list[Tensor]:
    """The tensors of what an op returned."""
    return [t for t in (out if isinstance(out, tuple | list) else (out,)) if t is not None]


def cotangents(outs: list[Tensor], seed: int = 1) -> list[Tensor | None]:
    """A random gradient for each output that has one."""
    if outs and outs[0].is_meta:
        return [torch.empty_like(o) if o.requires_grad else None for o in outs]
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(o.shape, generator=gen).to(o.device, o.dtype) if o.requires_grad else None for o in outs]


def evaluate(case: Case, fn: Any, inputs: Inputs, grad_of: list[Tensor | None] | None = None) -> Named:
    """Outputs "out.0", ... and gradients "d terms.0", ... of fn on inputs; inputs are left without gradients."""
    leaves = {path: find(inputs, path) for path in case.grads}
    for leaf in leaves.values():
        leaf.requires_grad_(True)
    outs = outputs(fn(**inputs))
    found = {f"out.{i}": o.detach() for i, o in enumerate(outs)}
    if leaves:
        grad_of = grad_of or cotangents(outs)
        pairs = [(o, g.to(o.dtype)) for o, g in zip(outs, grad_of, strict=True) if g is not None]
        got = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [g for _, g in pairs])
        found |= {f"d {path}": g for path, g in zip(leaves, got, strict=True)}
    for leaf in leaves.values():
        leaf.requires_grad_(False)
    return found


def check(case: Case, size: str, device: str, dtype: torch.dtype, seed: int = 0) -> dict[str, tuple[float, float]]:
    """{what: (error, what is allowed)}. Raises AssertionError on the first value that is wrong, missing or NaN."""
    inputs = case.make(size, device, dtype, seed)
    return judge(case, evaluate(case, case.fn, copies(inputs)), inputs, dtype)


def judge(case: Case, got: Named, inputs: Inputs, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """`check` of what `evaluate` found for `inputs`."""
    yardstick = evaluate(case, case.ref, copies(inputs, dtype if case.exact else None))
    assert got.keys() == yardstick.keys(), f"{case.id}: got {sorted(got)}, expected {sorted(yardstick)}"
    truth = yardstick if case.exact else _truth(case, inputs)
    return {what: _judge(case, what, got[what], yardstick[what], truth[what], dtype) for what in got}


def _truth(case: Case, inputs: Inputs) -> Named:
    grad_of = None
    if case.grads:  # the same cotangents, rounded as the kernel sees them
        with torch.enable_grad():
            probe = copies(inputs)
            for path in case.grads:
                find(probe, path).requires_grad_(True)
            grad_of = cotangents(outputs(case.ref(**probe)))
    return evaluate(case, case.ref, copies(inputs, torch.float64), grad_of)


def _judge(case: Case, what: str, got: Tensor, ref: Tensor, truth: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    where = f"{case.id} {what}"
    assert got.shape == ref.shape, f"{where}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    assert got.dtype == ref.dtype, f"{where}: {got.dtype}, expected {ref.dtype}"
    if not got.numel():
        return 0.0, 0.0
    if case.exact:
        wrong = int((got != ref).sum())
        assert wrong == 0, f"{where}: {wrong} of {got.numel()} values differ from the reference"
        return 0.0, 0.0
    assert torch.isfinite(got).all(), f"{where}: {int((~torch.isfinite(got)).sum())} of {got.numel()} not finite"
    error = (got.double() - truth.double()).abs().max().item()
    allowed = 2 * (ref.double() - truth.double()).abs().max().item()
    allowed += case.slack[dtype] * truth.double().abs().max().item()
    assert error <= allowed, f"{where}: error {error:.3g}, allowed {allowed:.3g}"
    return error, allowed
