"""The optimisers as the trainer holds them: one object that sets rates, clips, steps and counts its steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.optim.adamw import make_adamw
from pgolf.optim.config import ClipConfig, MuonConfig
from pgolf.optim.groups import Group
from pgolf.optim.muon import Muon


class Optimizers:
    """Muon and AdamW over `groups`; a kind without groups has no optimiser.

    counts: per optimiser the steps that it really took, counted by a hook inside torch's own step. PR #1130's residual
    lambdas had an optimiser that nobody called; `counts` is what shows such a thing.
    """

    def __init__(self, groups: Sequence[Group], muon: MuonConfig):
        self.groups = list(groups)
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        matrices, others = self._of_kind("muon"), self._of_kind("adamw")
        if matrices:
            torch_groups = [{"params": g.params, "lr": g.lr, "weight_decay": g.weight_decay} for g in matrices]
            self.optimizers["muon"] = Muon(torch_groups, lr=muon.lr, momentum=muon.momentum, ns_steps=muon.ns_steps)
        if others:
            self.optimizers["adamw"] = make_adamw(others)
        self.counts = dict.fromkeys(self.optimizers, 0)
        for kind, optimizer in self.optimizers.items():
            optimizer.register_step_post_hook(lambda *_, kind=kind: self._count(kind))

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
        for kind, optimizer in self.optimizers.items():
            for group, torch_group in zip(self._of_kind(kind), optimizer.param_groups, strict=True):
                torch_group["lr"] = group.lr * lr_scale
                if kind == "muon":
                    torch_group["momentum"] = momentum

    @torch.no_grad()
    def clip_(self, clip: ClipConfig | None) -> Tensor:
        """L2 norm over all gradients, () fp32 on their device, before clipping; None only measures.

        Gradients are scaled by min(1, clip.norm / (norm + 1e-6)). No host sync. What `clip.scope` means is the
        caller's doing: call this after averaging gradients over ranks for "global", before it for "rank".
        """
        by_dtype: dict[torch.dtype, list[Tensor]] = {}  # foreach is one kernel only over one dtype
        for p in self.params:
            if p.grad is not None:
                by_dtype.setdefault(p.grad.dtype, []).append(p.grad)
        if not by_dtype:
            return torch.zeros(())
        # in fp32 also for bf16 tables: a bf16 norm is off by up to 0.4 %
        norms = [n for grads in by_dtype.values() for n in torch._foreach_norm(grads, 2, dtype=torch.float32)]
        total = torch.linalg.vector_norm(torch.stack(norms))
        if clip is not None:
            factor = (clip.norm / (total + 1e-6)).clamp(max=1.0)
            for grads in by_dtype.values():
                torch._foreach_mul_(grads, factor)
        return total

    def step(self) -> None:
        """One update of every optimiser."""
        for optimizer in self.optimizers.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Drops all gradients."""
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)

    def _layout(self) -> dict[str, list[str]]:
        return {g.name: [info.name for info in g.infos] for g in self.groups}

    def state_dict(self) -> dict:
        """Moments, step counts and the groups' layout. Tensors are references: deep-copy to keep them over a step."""
        state = {kind: optimizer.state_dict()["state"] for kind, optimizer in self.optimizers.items()}
        return {"state": state, "counts": dict(self.counts), "layout": self._layout()}

    def load_state_dict(self, saved: dict) -> None:
        """Restores moments and counts; rates, decay and betas stay those of this run's settings.

        Raises ConfigError when the groups are not those of the saved run.
        """
        got, expected = saved["layout"], self._layout()
        if got != expected:
            moved = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
            raise ConfigError(
                f"optimiser state does not fit: groups {', '.join(moved)} hold other parameters than in this run;"
                " resume with the model and optim settings of the saved run"
            )
        for kind, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({"state": saved["state"][kind], "param_groups": groups})
        self.counts = dict(saved["counts"])
