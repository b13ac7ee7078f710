"""Whether a switch reaches the forward pass: the losses of fixed batches, to compare before and after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pgolf.data.batch import Batch

if TYPE_CHECKING:
    from pgolf.train import Trainer


def losses(trainer: Trainer) -> list[list[float]]:
    """Plain losses of two batches by the step's own, compiled forward, with its switches as they are now; by rank.

    Nothing is left changed. Two batches, for one loss might come out the same by chance. A collective, a host sync.
    """
    with without_zeros([info.param for info in trainer.infos]):
        if trainer.cast:
            trainer.cast.refresh_()
        found = [trainer.compute_loss(batch)[1].item() for batch in batches(trainer)]
    return trainer.dist.gather_objects(found)


def batches(trainer: Trainer) -> Iterator[Batch]:
    """Fixed tokens, laid out as the loader's micro-batches, so that no graph is compiled for them."""
    loader, cfg = trainer.loader, trainer.cfg
    rows = loader.tokens_per_step // (loader.micro_steps * trainer.dist.world_size * cfg.data.seq_len)
    at = torch.arange(rows * cfg.data.seq_len, device=trainer.device).view(rows, -1)
    for odd in (1, 31):
        yield Batch(*(torch.stack((at, at + 1)) * odd % cfg.model.embed.vocab_size).unbind())


@contextmanager
@torch.no_grad()
def without_zeros(params: list[Tensor]) -> Iterator[None]:
    """Inside, parameters that are all zero have values: projections are zero at the start, and nothing shows behind."""
    zeros = [p for p in params if not p.any()]
    for p in zeros:
        p.uniform_(-0.1, 0.1, generator=torch.Generator(p.device).manual_seed(0))
    try:
        with torch.enable_grad():  # the training graph is one with gradients
            yield
    finally:
        for p in zeros:
            p.zero_()
