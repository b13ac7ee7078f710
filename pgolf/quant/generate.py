"""Text that the model writes itself, to calibrate on: no data is read. As PR #1019 does, with one difference.

There the rotary base followed the length of each call, so that a text written token by token had other angles than
training. Here the base is fixed when the model is built, and a prefix has the angles that it has in a whole row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pgolf.data.batch import Batch
from pgolf.kernels.cross_entropy import softcap
from pgolf.model.gpt import GPT
from pgolf.quant.config import GeneratedConfig

WIDTH = 64  # prefixes are padded to a multiple: causal attention does not see what follows, and shapes are few


@torch.no_grad()
def write(model: GPT, rows: int, length: int, temperature: float, seed: int) -> Tensor:
    """(rows, length) int64 on the model's device: the first token uniform, the others drawn from the model's
    distribution at `temperature`. There is no cache of keys and values: every token is a forward of its prefix."""
    device, vocab = model.embed.weight.device, model.cfg.embed.vocab_size
    gen = torch.Generator(device).manual_seed(seed)
    ids = torch.zeros(rows, length, dtype=torch.int64, device=device)
    ids[:, 0] = torch.randint(vocab, (rows,), generator=gen, device=device)
    for t in range(1, length):
        prefix = ids[:, : min(-(-t // WIDTH) * WIDTH, length)]
        last = model.hidden(Batch(prefix, prefix))[:, t - 1]
        p = torch.softmax(softcap(model.logits(last), model.cfg.softcap) / temperature, dim=-1)
        ids[:, t] = torch.multinomial(p, 1, generator=gen)[:, 0]
    return ids


def batches(model: GPT, cfg: GeneratedConfig, length: int, seed: int, rank: int, world: int) -> Iterator[Batch]:
    """This rank's batches. What is written does not depend on the number of ranks: batch i has seed `seed` + i."""
    for first in range(rank * cfg.rows, cfg.sequences, world * cfg.rows):
        rows = min(cfg.rows, cfg.sequences - first)
        ids = write(model, rows, length, cfg.temperature, seed + first // cfg.rows)
        yield Batch(ids, ids)
