"""Low-rank adapters for test-time training: one adapter a row of the batch, so that each document learns alone.

    y_s = f(x_s) + scale * (x_s A_s^T) B_s^T,  scale = alpha / rank,  s the row

A ~ U(+-1 / sqrt(in)), B = 0: a fresh adapter adds exactly 0. Every slot starts from one and the same A, drawn from the
seed, so that a document's score depends neither on its slot nor on the number of slots or ranks. Sources: the record
of 2026-03-17 (head, q, v; A and B reset for each document), PR #1530 (k, o, mlp as well), PR #1767 (alpha / rank; a
reset that keeps A).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgolf.errors import ConfigError
from pgolf.model.gpt import GPT
from pgolf.model.roles import Role


class Lora(nn.Module):
    """x (slots, T, in) -> (slots, T, out), row s through the adapter of slot s. Products in x's dtype.

    a (slots, rank, in) and b (slots, out, rank) fp32; start (rank, in) is what a is reset to.
    """

    roles = {"a": Role.ADAPT_ONLY, "b": Role.ADAPT_ONLY}

    def __init__(self, start: Tensor, out_features: int, slots: int, alpha: float):
        super().__init__()
        rank, width = start.shape
        self.scale = alpha / rank
        self.register_buffer("start", start, persistent=False)
        self.a = nn.Parameter(start.expand(slots, rank, width).clone())
        self.b = nn.Parameter(start.new_zeros(slots, out_features, rank))

    @torch.no_grad()
    def reset_(self, slots: Tensor | None = None, keep_a: bool = False) -> None:
        """Makes the adapters of `slots` (slots,) bool, or of all, add 0 again; a as drawn, or with keep_a as learned.

        A mask, so that the host waits for nothing.
        """
        chosen = torch.ones(len(self.a), dtype=torch.bool, device=self.a.device) if slots is None else slots
        if chosen.shape != self.a.shape[:1] or chosen.dtype != torch.bool:
            raise ValueError(f"slots {tuple(chosen.shape)} {chosen.dtype}, expected ({len(self.a)},) torch.bool")
        self.b.masked_fill_(chosen[:, None, None], 0)
        if not keep_a:
            self.a.copy_(torch.where(chosen[:, None, None], self.start, self.a))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != len(self.a):
            raise ValueError(f"x has {len(x)} rows, expected one for each of the {len(self.a)} slots")
        low = torch.bmm(x, self.a.to(x.dtype).transpose(1, 2)) * self.scale
        return torch.bmm(low, self.b.to(x.dtype).transpose(1, 2))


class Site(NamedTuple):
    """A slot of the model that an adapter fits."""

    owner: nn.Module
    slot: str
    in_features: int
    out_features: int


def sites(model: GPT, target: str) -> Iterator[Site]:
    """The slots that a target names, one a block or, for the head, one. A block is visited once (`pgolf.model.plan`);
    a plan that repeated it would need one adapter a visit."""
    dim, vocab = model.cfg.dim, model.cfg.embed.vocab_size
    if target == "head":
        yield Site(model, "head_adapter", dim, vocab)
        return
    for block in model.blocks:
        if target in ("q", "k", "v"):
            linear = getattr(block.attn, target)
            yield Site(linear, "adapter", dim, len(linear.weight))
        else:
            yield Site(block, {"o": "attn_adapter", "mlp": "mlp_adapter"}[target], dim, dim)


def attach(model: GPT, targets: Collection[str], *, rank: int, alpha: float, slots: int, seed: int) -> list[Lora]:
    """Fills the slots that `targets` name with fresh adapters on the model's device; returns them in TARGETS' order.

    q, k, v: on the projections. o: from the block's normed input to the attention's output. mlp: beside the MLP. head:
    to the logits. Batches must have `slots` rows from here on. Which other targets there are does not change an
    adapter's start. Raises ConfigError on what cannot work, ValueError if a slot is taken. Call it, and `detach`,
    outside of compiled code.
    """
    if unknown := sorted(set(targets) - set(TARGETS)):
        raise ConfigError(f"adapter targets {unknown}: expected some of {', '.join(TARGETS)}")
    if rank < 1 or slots < 1 or alpha <= 0:
        raise ConfigError(f"adapters: rank={rank}, slots={slots}, alpha={alpha}, expected rank, slots >= 1, alpha > 0")
    found = [(number, site) for number, t in enumerate(TARGETS) if t in targets for site in sites(model, t)]
    if taken := [site for _, site in found if getattr(site.owner, site.slot) is not None]:
        raise ValueError(f"{len(taken)} of {len(found)} slots are taken, {taken[0].slot} first: detach that first")
    gens = {number: torch.Generator().manual_seed(seed * len(TARGETS) + number) for number, _ in found}
    made = []
    for number, (owner, slot, width, out) in found:
        start = torch.empty(rank, width).uniform_(-(width**-0.5), width**-0.5, generator=gens[number])
        made.append(Lora(start.to(model.embed.weight.device), out, slots, alpha))
        setattr(owner, slot, made[-1])
    return made


def detach(model: GPT) -> None:
    """Empties every slot that `attach` filled."""
    for target in TARGETS:
        for site in sites(model, target):
            if isinstance(getattr(site.owner, site.slot), Lora):
                setattr(site.owner, site.slot, None)


TARGETS = ("q", "k", "v", "o", "mlp", "head")
