"""The model: embedding front, the plan's blocks, head. Training, evaluation and calibration call this one forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pgolf.data.batch import Batch
from pgolf.kernels.cross_entropy import cross_entropy
from pgolf.model import plan
from pgolf.model.attention import rope_tables
from pgolf.model.config import ModelConfig
from pgolf.model.context import Context
from pgolf.model.embed import Embed
from pgolf.model.features.value_embed import ValueTable
from pgolf.model.linear import HeadLinear
from pgolf.model.roles import Role, roles_of
from pgolf.model.stream import Stream
from pgolf.model.wiring import Backout, Block, ParallelBlock, Skips


class GPT(nn.Module):
    """A decoder-only transformer built from `cfg`.

    train_length fixes the rotary base (NTK); max_length is the longest row it will be given (default train_length).
    compute_dtype is the dtype of activations; tables that are gathered from are stored in it, all else stays fp32.
    fold_scales multiplies the blocks' output scales into weights, see `Block`. Slot `head_adapter`: None or a module
    that adds to the logits, from the normed stream; the head may be tied or not.
    Weights are uninitialised until `init_weights`.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        *,
        train_length: int,
        max_length: int = 0,
        compute_dtype: torch.dtype = torch.float32,
        fold_scales: bool = False,
    ):
        super().__init__()
        self.cfg, self.compute_dtype = cfg, compute_dtype
        self.train_length, self.max_length = train_length, max(max_length, train_length)
        self.plan = plan.build(cfg)
        block = ParallelBlock if cfg.wiring.parallel else Block
        self.embed = Embed(cfg)
        self.value_table = ValueTable(cfg) if cfg.attn.value_embed else None
        self.blocks = nn.ModuleList(block(cfg, i, fold_scales) for i in range(cfg.plan.num_layers))
        joins = sum(step.skip_from is not None for step in self.plan)
        self.skips = Skips(joins, cfg.dim, cfg.plan.skips.gated) if joins else None
        self.backout = Backout(cfg.wiring.backout.init) if cfg.wiring.backout else None
        self.head = None if cfg.embed.tied else HeadLinear(cfg.dim, cfg.embed.vocab_size)
        self.register_module("head_adapter", None)
        for name in ("cos", "sin"):
            self.register_buffer(name, torch.empty(0), persistent=False)
        self.set_rope_()
        for info in roles_of(self):
            if info.role is Role.EMBED:
                info.param.data = info.param.data.to(compute_dtype)

    def set_rope_(self) -> None:
        """(Re)computes the rotary tables on the model's device."""
        device = self.embed.weight.device
        args = (self.cfg.attn.rope, self.cfg.head_dim, self.train_length, self.max_length)
        self.cos, self.sin = rope_tables(*args, device=device)

    @torch.no_grad()
    def init_weights(self, seed: int) -> GPT:
        """Fills every parameter from one CPU generator, so that device and dtype do not change the start."""
        gen = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if hasattr(module, "init_"):
                module.init_(self.cfg.init, gen)
        return self

    def hidden(self, batch: Batch) -> Tensor:
        """Final normed stream (B, T, D)."""
        ids = batch.ids
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        if batch.positions is not None:
            cos, sin = self.cos[batch.positions], self.sin[batch.positions]
        ctx = Context(ids, cos, sin, batch.cu_seqlens)
        if self.value_table is not None:
            ctx.value_embed = self.value_table(ids, self.compute_dtype)
        x0 = self.embed(ids, self.compute_dtype, batch.cu_seqlens)
        x, owed = Stream.of(x0), None  # owed: the slot of an output that is read later and not summed yet
        kept: dict[int, Tensor] = {}
        for step, after in zip(self.plan, (*self.plan[1:], None), strict=True):
            if step.skip_from is not None:
                x = self.skips(x, kept[step.skip_from], step.skip_row)
            block = self.blocks[step.block]
            summed, u, n = block.enter(x, x0, keep=owed is not None)
            if owed is not None:
                kept[owed], owed = summed, None
            x = block(u, n, ctx)
            if step.keep and after is not None and after.skip_from is None:
                owed = step.slot
            elif step.keep:
                kept[step.slot] = x.sum()
                x = Stream.of(kept[step.slot])
        if self.backout is not None:
            x = self.backout(x, kept[self.cfg.wiring.backout.layer])
        return x.normed(self.cfg.norm_eps)[1]

    def logits(self, hidden: Tensor) -> Tensor:
        """(B, T, V), before the softcap."""
        if self.head is not None:
            logits = self.head(hidden)
        else:
            logits = F.linear(hidden, self.embed.weight.to(hidden.dtype))
        return logits if self.head_adapter is None else logits + self.head_adapter(hidden)

    def forward(self, batch: Batch, entropy: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Per-token nats (B, T) fp32, logits before the softcap (B, T, V), and per-token entropy (B, T) if asked."""
        logits = self.logits(self.hidden(batch))
        nll, h = cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), cap=self.cfg.softcap, entropy=entropy)
        shape = batch.targets.shape
        return nll.view(shape), logits, None if h is None else h.view(shape)


def parameter_count(model: nn.Module) -> int:
    """Numbers stored in parameters; works on the meta device."""
    return sum(p.numel() for p in model.parameters())
