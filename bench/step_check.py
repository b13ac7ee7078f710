"""Is a training step right? Loss, gradients and update of a step, against the same in a wider dtype.

Truth is the reference model, one row at a time: fp32 for a step in bf16, fp64 for one in fp32. The yardstick is the
same in the step's own dtype: gradients may be off by twice its error and a little. An update is held to Muon and AdamW
as their papers write them, in fp64, on the step's own gradients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.config import RunConfig
from pgolf.data.batch import Batch
from pgolf.kernels._op import paths
from pgolf.model.gpt import GPT
from pgolf.model.objective import Objective
from pgolf.optim.groups import Group

from . import naive

Grads = dict[str, Tensor]
CHECKED = 2  # batches: a result that is kept from the first is not that of the second
PROGRESS = 0.4  # of the run, for scheduled losses: where kitchen_sink_v2's is strongest
WIDER = {torch.bfloat16: torch.float32, torch.float32: torch.float64}
# Shares of a gradient's length, beside twice the yardstick's: a few roundings, each 2^-9 or 2^-24, in 11 layers
SLACK = {torch.bfloat16: 2.0**-6, torch.float32: 1e-4}
FEW, SMALL = 16, "gains and scalars"
# An update's direction (cosine) and length against fp64. Newton-Schulz in bf16 leaves small singular directions noisy,
# and tables in bf16 round their steps; an optimiser that is skipped has no direction at all
ALIGNED, LENGTH = 0.9, 0.25


@dataclass(frozen=True)
class Expected:
    """Of one batch: the loss, the gradients, and by how much each may be off, as a share of its length."""

    loss: float
    grads: Grads
    allowed: dict[str, float]


class Truth:
    """What steps with these weights must give on each of the first CHECKED of `batches`."""

    def __init__(
        self, cfg: RunConfig, weights: Grads, batches: Sequence[Batch], device: torch.device, dtype: torch.dtype
    ):
        self.dtype = dtype
        self.batches = [self._expected(cfg, weights, batch, device) for batch in batches[:CHECKED]]

    def _expected(self, cfg: RunConfig, weights: Grads, batch: Batch, device: torch.device) -> Expected:
        loss, grads = by_row(cfg, weights, batch, device, WIDER[self.dtype])
        _, yardstick = by_row(cfg, weights, batch, device, self.dtype)
        slack = SLACK[self.dtype]
        allowed = {name: 2 * error + slack for name, error in errors_of(yardstick, grads).items()}
        if SMALL in allowed:  # what is left of sums that cancel differs from one order of adding to another
            allowed[SMALL] = 2 * allowed[SMALL] + 2 * slack
        return Expected(loss, grads, allowed)

    def check(self, at: int, loss: float, grads: Mapping[str, Tensor]) -> None:
        """AssertionError unless loss and gradients are those of batch `at`."""
        want = self.batches[at]
        slack = 2 * SLACK[self.dtype]
        assert abs(loss - want.loss) <= slack * abs(want.loss), f"loss {loss:.6g}, expected {want.loss:.6g}"
        missing = want.grads.keys() - grads.keys()
        assert not missing, f"no gradient for {', '.join(sorted(missing))}"
        for name, error in errors_of(grads, want.grads).items():
            allowed = want.allowed[name]
            assert error <= allowed, f"{name}: gradient off by {error:.3g} of its length, allowed {allowed:.3g}"


def by_row(
    cfg: RunConfig, weights: Grads, batch: Batch, device: torch.device, dtype: torch.dtype
) -> tuple[float, Grads]:
    """(loss, gradients by name) of the reference with activations in `dtype`, row by row, summed in that or in fp32."""
    model = GPT(cfg.model, train_length=cfg.data.seq_len, compute_dtype=dtype).to(device)
    model.load_state_dict(weights)
    objective = Objective(cfg.loss, model, device)
    objective.set_progress(PROGRESS)
    named, rows = dict(model.named_parameters()), len(batch.ids)
    sums = {name: torch.zeros_like(p, dtype=torch.promote_types(dtype, torch.float32)) for name, p in named.items()}
    total = 0.0
    with paths(**dict.fromkeys(cfg.kernels.ops(), "reference")):
        for ids, targets in zip(batch.ids.split(1), batch.targets.split(1), strict=True):
            loss, plain = objective(Batch(ids, targets))
            grads = torch.autograd.grad(loss / rows, list(named.values()), materialize_grads=True)
            for part, grad in zip(sums.values(), grads, strict=True):
                part += grad
            total += plain.item() / rows
    return total, sums


def errors_of(got: Mapping[str, Tensor], want: Grads) -> dict[str, float]:
    """Length of the difference as a share of the gradient's length, by name; of a millionth of all where it is 0.

    Gradients of at most FEW numbers are sums over all tokens that may cancel to nothing: they are judged as one.
    """
    pairs = {name: (got[name].double().flatten(), g.double().flatten()) for name, g in want.items()}
    small = [pairs.pop(name) for name, g in want.items() if g.numel() <= FEW]
    if small:
        pairs[SMALL] = tuple(torch.cat(side) for side in zip(*small, strict=True))
    whole = math.sqrt(sum(g.square().sum().item() for _, g in pairs.values()))
    return {name: (x - g).norm().item() / max(g.norm().item(), 1e-6 * whole) for name, (x, g) in pairs.items()}


def check_update(
    before: Mapping[str, Tensor],
    way: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    groups: Sequence[Group],
    ns_steps: int,
    momentum: float,
    clip: float | None = None,
) -> None:
    """AssertionError unless every weight of `groups` went the way that fp64 sends it from `before` by these gradients.

    The parameters of `groups` must be as `before`. clip: the largest length of all gradients together.
    """
    length = math.sqrt(sum(g.double().square().sum().item() for g in grads.values()))
    factor = min(1.0, clip / length) if clip else 1.0
    oracle = naive.Optimizer(groups, ns_steps)
    oracle.step({name: factor * g for name, g in grads.items()}, 1.0, momentum)
    for name, weight in oracle.weights.items():
        expected, got = weight - before[name].double(), way[name].double()
        length, cosine = got.norm() / expected.norm(), (got * expected).sum() / (got.norm() * expected.norm())
        assert cosine >= ALIGNED and abs(length - 1) <= LENGTH, (
            f"{name}: its step has {length:.3g} of the right length, and a cosine of {cosine:.3g} with the right way"
        )
