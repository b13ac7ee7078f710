"""Where the first inf or NaN of a step came from. Runs once, when a run is lost anyway: eager, module by module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pgolf.data.batch import Batch

if TYPE_CHECKING:
    from pgolf.train import Trainer


def first_bad(trainer: Trainer, batches: Iterable[Batch]) -> str | None:
    """What of this rank is not finite first: a weight, a module's output, the loss, a gradient. None: nothing is.

    batches: the micro-batches of the step. Weights must still be those before it, which `Health` sees to. Forward
    order, so the first bad output is the layer where it began; of gradients the deepest, where backward met it.
    """
    for info in trainer.infos:
        if not finite(info.param):
            return f"weight {info.name}"
    trainer.optim.zero_grad()
    if trainer.cast:
        trainer.cast.refresh_()
    for batch in batches:
        if found := _first_output(trainer, batch):
            return found
    bad = [info.name for info in trainer.infos if info.param.grad is not None and not finite(info.param.grad)]
    trainer.optim.zero_grad()
    return f"gradient of {bad[-1]} ({len(bad)} of {len(trainer.infos)} gradients are not finite)" if bad else None


def _first_output(trainer: Trainer, batch: Batch) -> str | None:
    found: list[str] = []

    def looking(name: str):
        def hook(module, args, output):
            outputs = output if isinstance(output, tuple | list) else [output]
            if not found and not all(finite(t) for t in outputs if isinstance(t, Tensor) and t.is_floating_point()):
                found.append(f"output of {name} ({type(module).__name__})")

        return hook

    hooks = [m.register_forward_hook(looking(name)) for name, m in trainer.model.named_modules() if name]
    try:
        loss, _ = trainer.objective(batch)
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not finite(loss):
        found.append("the loss, behind the last layer")
    if not found:
        loss.backward()
        if trainer.cast:
            trainer.cast.collect_()
    return found[0] if found else None


def finite(t: Tensor) -> bool:
    """Whether all numbers of a tensor are; a host sync."""
    return bool(torch.isfinite(t.detach()).all())
