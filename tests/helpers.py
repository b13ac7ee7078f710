"""What several tests share. Not in conftest.py: a folder has its own, and `import conftest` finds any of them."""

import dataclasses
from functools import cache
from pathlib import Path

import torch

from pgolf.artifact import script
from pgolf.data.batch import Batch
from pgolf.model.config import ModelConfig

ROOT = Path(__file__).resolve().parent.parent
VOCAB = 400  # of the `shards` fixture
KERNELS = sorted(p.stem for p in ROOT.glob("kernels/[a-z]*.py"))  # every op


def random_batch(vocab: int, rows: int = 2, length: int = 32, seed: int = 0):
    """A Batch of uniform random tokens."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab, (rows, length + 1), generator=gen)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


class ToyNeural:
    """A scorer out of a function (ids, targets) -> nats of every position, without probabilities of other tokens."""

    def __init__(self, nll):
        self.nll = nll

    def nats(self, batch, index):
        return self.nll(batch.ids, batch.targets).flatten()[index]

    def log_probs(self, batch, index):
        raise NotImplementedError("this toy knows the probability of the target alone")


def reduced(model: ModelConfig, vocab: int) -> ModelConfig:
    """The preset's features at a width that an interpreter can follow: 3 layers, heads of 8."""
    attn, embed, wiring = model.attn, model.embed, model.wiring
    heads = 2 * attn.num_heads // attn.num_kv_heads
    attn = dataclasses.replace(
        attn,
        num_heads=heads,
        num_kv_heads=2,
        rope=dataclasses.replace(attn.rope, dims=min(attn.rope.dims, 4)),
        xsa=attn.xsa and dataclasses.replace(attn.xsa, last_n=2),
        value_embed=attn.value_embed and dataclasses.replace(attn.value_embed, dim=8, layers=(1,)),
    )
    embed = dataclasses.replace(
        embed, vocab_size=vocab, bigram=embed.bigram and dataclasses.replace(embed.bigram, rows=32, dim=8)
    )
    wiring = dataclasses.replace(wiring, backout=wiring.backout and dataclasses.replace(wiring.backout, layer=1))
    plan = dataclasses.replace(model.plan, num_layers=3, encoder_layers=min(model.plan.encoder_layers, 1))
    return dataclasses.replace(model, dim=8 * heads, attn=attn, embed=embed, wiring=wiring, plan=plan)


@cache
def made() -> script.Script:
    """The script of this checkout, made once a process: minifying its files takes 5 s."""
    return script.make()
