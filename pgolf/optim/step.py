"""The optimisers as the trainer holds them: rates, the exchange of gradients, clipping, steps, and their counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pgolf.dist import Dist
from pgolf.errors import ConfigError
from pgolf.model.banks import Bank
from pgolf.optim.adamw import make_adamw
from pgolf.optim.config import ClipConfig, OptimConfig
from pgolf.optim.groups import Group
from pgolf.optim.health import Health
from pgolf.optim.muon import Muon


class Optimizers:
    """Muon and AdamW over `groups`; a kind without groups has no optimiser.

    A step is `reduce_`, `step`, `zero_grad`. dist: the ranks that share a step; None = this one alone. banks: where
    Muon's matrices lie; None makes them.
    counts: per optimiser the steps that it really took, counted where it takes them. PR #1130's residual lambdas had an
    optimiser that nobody called; `counts` is what shows such a thing.
    """

    def __init__(
        self, groups: Sequence[Group], cfg: OptimConfig, dist: Dist | None = None, banks: Sequence[Bank] | None = None
    ):
        self.groups, self.clip, self.dist = list(groups), cfg.clip, dist or Dist()
        matrices, others = self._of_kind("muon"), self._of_kind("adamw")
        self.muon = Muon(matrices, cfg.muon, self.dist, banks) if matrices else None
        self.adamw = make_adamw(others) if others else None
        self.health = Health(self.params[0].device)
        self.counts = {kind: 0 for kind in ("muon", "adamw") if self._of_kind(kind)}
        if self.adamw:
            self.adamw.found_inf = self.health.bad  # as a gradient scaler does: 1 and the fused step changes nothing
            self.adamw.register_step_post_hook(lambda *_: self._count("adamw"))

    def _of_kind(self, kind: str) -> list[Group]:
        return [g for g in self.groups if g.kind == kind]

    def _count(self, kind: str) -> None:
        self.counts[kind] += 1

    @property
    def params(self) -> list[Tensor]:
        """Every trained parameter, in group order."""
        return [p for g in self.groups for p in g.params]

    def set(self, lr_scale: float, momentum: float) -> None:
        """Every group's rate = its base rate * lr_scale; Muon's momentum = momentum."""
        if self.adamw:
            for group, torch_group in zip(self._of_kind("adamw"), self.adamw.param_groups, strict=True):
                torch_group["lr"] = group.lr * lr_scale
        if self.muon:
            self.muon.lr_scale, self.muon.momentum = lr_scale, momentum

    # -- a step ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reduce_(self, loss: Tensor, step: int = 0) -> Tensor:
        """Averages gradients over the ranks, clips them and looks whether they are finite. No host sync.

        Every exchange is started before any is waited for. Each rank then has the mean gradient of its share of the
        matrices and of all that is not shared out. loss: () of this rank. Returns the mean loss over the ranks.
        """
        muon, others = self.muon, [p.grad for g in self._of_kind("adamw") for p in g.params if p.grad is not None]
        if muon:
            muon.collect_()
        if self.clip and self.clip.scope == "rank":
            local = [*others, *(bank.grad for bank in (muon.banks if muon else ()))]
            clip_(local, sum_of_squares(local), self.clip)
        in_full = muon.held_in_full if muon else []
        mean = self.dist.start_mean_([*others, *in_full])
        if in_full:
            mean.wait()  # these go on into pools
        pending = [mean] * (not in_full) + (muon.reduce() if muon else [])
        for exchange in pending:
            exchange.wait()
        return self._clip_and_judge(loss, step, others)

    def _clip_and_judge(self, loss: Tensor, step: int, others: list[Tensor]) -> Tensor:
        """From here on gradients are averaged: pools' shards, and `others` of AdamW."""
        pools = self.muon.pools if self.muon else []
        shared, whole = ([pool.shard for pool in pools if pool.is_split is split] for split in (True, False))
        sums = torch.stack([sum_of_squares(shared, like=loss), loss.detach().float()])
        squares, total_loss = self.dist.all_reduce_sum_(sums).unbind()
        squares = squares + sum_of_squares([*others, *whole], like=loss)
        self.grad_norm = squares.sqrt()
        self.health.update_(step, self.grad_norm + total_loss)
        if self.clip and self.clip.scope == "global":
            clip_([*others, *shared, *whole], squares, self.clip)
        return total_loss / self.dist.world_size

    @torch.no_grad()
    def step(self) -> None:
        """One update of every optimiser, after `reduce_`. AdamW runs while Muon's updates travel."""
        ok = self.health.ok
        under_way = [(pool, self.muon.advance(pool)) for pool in self.muon.pools] if self.muon else []
        if self.adamw:
            self.adamw.step()
        for pool, pending in under_way:
            pending.wait()
            self.muon.apply_(pool, ok)
        if self.muon:
            self._count("muon")

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for p in self.params:
            p.grad = None

    # -- state -------------------------------------------------------------------------------------------------------

    def reset_(self) -> None:
        """As new: no moments, no counts."""
        if self.muon:
            self.muon.reset_()
        if self.adamw:
            self.adamw.state.clear()
        self.health.reset_()
        self.counts = dict.fromkeys(self.counts, 0)

    def _adamw_names(self) -> list[str]:
        return [info.name for g in self._of_kind("adamw") for info in g.infos]

    def tensors(self) -> dict[str, Tensor]:
        """{"<parameter>.<slot>": tensor}: momentum of Muon; exp_avg, exp_avg_sq and step of AdamW. In full on every
        rank, whatever their number; partly references. A collective."""
        out = self.muon.tensors() if self.muon else {}
        if self.adamw:
            params = [p for group in self.adamw.param_groups for p in group["params"]]
            for name, p in zip(self._adamw_names(), params, strict=True):
                out |= {f"{name}.{slot}": value for slot, value in self.adamw.state[p].items()}
        return out

    def load_tensors_(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `tensors` gave, on any number of ranks; rates, decay and betas stay those of this run.

        Raises ConfigError when the state is that of other parameters.
        """
        slots = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq", "step")}
        expected = {
            kind: {f"{info.name}.{s}" for g in self._of_kind(kind) for info in g.infos for s in slots[kind]}
            for kind in slots
        }
        here = {kind: names & tensors.keys() for kind, names in expected.items()}
        missing = {n for kind in slots if here[kind] for n in expected[kind] - here[kind]}  # none: it had not stepped
        if unknown := sorted(missing | (tensors.keys() - expected["muon"] - expected["adamw"])):
            raise ConfigError(
                f"optimiser state does not fit: {', '.join(unknown[:4])}{', ...' if len(unknown) > 4 else ''} in one of"
                " the saved run and this one only; resume with the model and optim settings of the saved run"
            )
        self.reset_()
        if here["muon"]:
            self.muon.load_tensors_(tensors)
        if here["adamw"]:
            params = [p for group in self.adamw.param_groups for p in group["params"]]
            for name, p in zip(self._adamw_names(), params, strict=True):
                like = {"exp_avg": p, "exp_avg_sq": p, "step": torch.zeros((), device=p.device)}
                self.adamw.state[p] = {
                    slot: tensors[f"{name}.{slot}"].to(t.device, t.dtype, copy=True) for slot, t in like.items()
                }


def sum_of_squares(tensors: Iterable[Tensor], like: Tensor | None = None) -> Tensor:
    """() fp32 on the tensors' device, or on that of `like` where there are none."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}  # foreach is one kernel only over one dtype
    for t in tensors:
        by_dtype.setdefault(t.dtype, []).append(t)
    # in fp32 also for bf16 tables: a bf16 norm is off by up to 0.4 %
    norms = [n for group in by_dtype.values() for n in torch._foreach_norm(group, 2, dtype=torch.float32)]
    return (
        torch.stack(norms).square().sum()
        if norms
        else torch.zeros((), device=like.device if like is not None else None)
    )


def clip_(grads: Iterable[Tensor], squares: Tensor, clip: ClipConfig) -> None:
    """Scales gradients by min(1, clip.norm / (norm + 1e-6)); squares: the norm's. No host sync."""
    factor = (clip.norm / (squares.sqrt() + 1e-6)).clamp(max=1.0)
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for g in grads:
        by_dtype.setdefault(g.dtype, []).append(g)
    for group in by_dtype.values():
        torch._foreach_mul_(group, factor)
