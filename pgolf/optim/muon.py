"""Muon: momentum whose step is orthogonalised (K. Jordan 2024), split over the ranks (Parallel Muon, PR #399, #549)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.dist import Dist, Pending
from pgolf.kernels.flat_update import flat_update
from pgolf.kernels.newton_schulz import newton_schulz
from pgolf.model.banks import Bank, make_banks
from pgolf.optim.config import MuonConfig
from pgolf.optim.exchange import Pool, make_pools
from pgolf.optim.groups import Group


def momentum_at(step: int, cfg: MuonConfig) -> float:
    """Momentum of step `step` (from 0): linear from momentum_start to momentum over momentum_warmup_steps."""
    done = min(step / cfg.momentum_warmup_steps, 1.0) if cfg.momentum_warmup_steps > 0 else 1.0
    return cfg.momentum_start + done * (cfg.momentum - cfg.momentum_start)


class Muon:
    """For each matrix w (rows, cols) fp32 with mean gradient g over the ranks:

        m <- mu m + g;  u = g + mu m  (Nesterov);  o = newton_schulz(u) sqrt(max(1, rows / cols))
        w <- w (1 - lr wd) - lr o

    m starts at zero, in cfg.exchange_dtype, as are g and o on their way between ranks. A parameter without gradient is
    left alone, undecayed. A step is `collect_`, `reduce` and its waits, `advance`, `apply_`; `update_` is all of them.
    groups: of kind "muon". banks: of their matrices, each within one group; None makes them.
    Raises ValueError on parameters that are not matrices, or of less than fp32: those would lose small updates.
    """

    def __init__(
        self, groups: Sequence[Group], cfg: MuonConfig, dist: Dist | None = None, banks: Sequence[Bank] | None = None
    ):
        for info in (info for g in groups for info in g.infos):
            if info.param.ndim != 2 or info.param.dtype != torch.float32:
                got = f"{tuple(info.param.shape)} {info.param.dtype}"
                raise ValueError(f"Muon: {info.name} is {got}, expected a matrix of fp32")
        self.groups, self.cfg, self.dist = list(groups), cfg, dist or Dist()
        group_of = {id(info.param): g for g in groups for info in g.infos}
        if banks is None:
            banks = [bank for g in groups for bank in make_banks(g.infos)]
        self.banks = [bank for bank in banks if id(bank.params[0]) in group_of]
        self.group_of = {id(bank): group_of[id(bank.params[0])] for bank in self.banks}
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[cfg.exchange_dtype]
        self.pools = make_pools(self.banks, self.dist, dtype, split=cfg.parallel == "shard")
        self.used: dict[int, list[int]] = {}
        self.lr_scale, self.momentum = 1.0, cfg.momentum
        device = self.banks[0].master.device if self.banks else torch.device("cpu")
        self.one = torch.ones((), device=device)
        self.decays = {g.name: torch.full((), g.weight_decay, device=device) for g in self.groups}

    # -- a step, in parts --------------------------------------------------------------------------------------------

    def collect_(self) -> None:
        """Brings all gradients into the banks."""
        self.used = {id(bank): bank.collect_() for bank in self.banks}

    @property
    def held_in_full(self) -> list[Tensor]:
        """Gradients that every rank needs whole, to be averaged before `reduce`."""
        return [bank.grad for pool in self.pools if not pool.is_split for bank in pool.banks]

    def reduce(self) -> list[Pending]:
        """Starts the exchange of gradients; pools in order."""
        return [pool.reduce() for pool in self.pools]

    def advance(self, pool: Pool) -> Pending:
        """Momentum and orthogonalisation of this rank's share, from the gradients in it; starts sending the result."""
        # A bad step changes no weight (`apply_`: lr 0), but 0 * NaN is NaN, so none may get into an update
        pool.shard.nan_to_num_(0.0, 0.0, 0.0)
        pool.momentum.mul_(self.momentum).add_(pool.shard)
        pool.shard.add_(pool.momentum, alpha=self.momentum)
        return pool.gather(newton_schulz(pool.shard, steps=self.cfg.ns_steps))

    def apply_(self, pool: Pool, ok: Tensor) -> None:
        """Updates the weights of a pool. ok: () fp32 on their device, 1; with 0 they stay as they are."""
        for bank, update in zip(pool.banks, pool.views(pool.updates), strict=True):
            group, used = self.group_of[id(bank)], self.used[id(bank)]
            rates = {"lr": ok * (group.lr * self.lr_scale), "weight_decay": self.decays[group.name]}
            rates["scale"] = math.sqrt(max(1.0, bank.rows / bank.cols))
            whole = len(used) == len(bank)
            for i in [slice(None)] if whole else used:
                flat_update(bank.master[i], update[i], **rates)

    @torch.no_grad()
    def update_(self, ok: Tensor | None = None) -> None:
        """A whole step without clipping, from gradients in place."""
        self.collect_()
        self.dist.mean_grads_(self.held_in_full)
        for pending in self.reduce():
            pending.wait()
        self.step(ok)

    @torch.no_grad()
    def step(self, ok: Tensor | None = None) -> None:
        """The step behind the exchange of gradients."""
        for pool, pending in [(pool, self.advance(pool)) for pool in self.pools]:
            pending.wait()
            self.apply_(pool, self.one if ok is None else ok)

    # -- state -------------------------------------------------------------------------------------------------------

    def reset_(self) -> None:
        """As new: no momentum."""
        for pool in self.pools:
            pool.momentum.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """{"<parameter>.momentum": (rows, cols)}, in full on every rank. A collective."""
        out = {}
        for pool in self.pools:
            for bank, momentum in zip(pool.banks, pool.full_momentum(), strict=True):
                out |= {f"{info.name}.momentum": m for info, m in zip(bank.infos, momentum, strict=True)}
        return out

    def load_tensors_(self, tensors: dict[str, Tensor]) -> None:
        """Takes what `tensors` gave, on any number of ranks."""
        for pool in self.pools:
            of_banks = [torch.stack([tensors[f"{i.name}.momentum"] for i in bank.infos]) for bank in pool.banks]
            pool.load_momentum_(of_banks)
