"""The training objective: cross-entropy, its per-token weights and the regularising terms. Evaluation never sees it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from pgolf.data.batch import Batch
from pgolf.kernels.cross_entropy import softcap
from pgolf.model.config import LossConfig, MileConfig
from pgolf.model.gpt import GPT


def mile_gamma(cfg: MileConfig, progress: float) -> float:
    """Triangle over progress in [0, 1]: 0 -> gamma at peak_frac -> 0."""
    if progress < cfg.peak_frac:
        return cfg.gamma * progress / cfg.peak_frac
    return cfg.gamma * (1 - progress) / (1 - cfg.peak_frac)


def head_diversity(cfg: LossConfig, model: GPT, logits: Tensor) -> Tensor:
    """coef * mean((S - I)^2) over the Gram matrix S of block 0's output projection, cut into one group a head."""
    weight = model.blocks[0].attn.out.weight
    if cfg.head_diversity.groups == "columns":
        weight = weight.T
    groups = weight.reshape(model.cfg.attn.num_heads, -1)
    unit = groups / (groups.norm(dim=1, keepdim=True) + 1e-8)
    gram = unit @ unit.T
    return cfg.head_diversity.coef * (gram - torch.eye(len(gram), device=gram.device)).square().mean()


def z_loss(cfg: LossConfig, model: GPT, logits: Tensor) -> Tensor:
    """coef * mean(logsumexp(z)^2), z softcapped."""
    return cfg.z_loss.coef * torch.logsumexp(softcap(logits, model.cfg.softcap), -1).square().mean()


def logit_penalty(cfg: LossConfig, model: GPT, logits: Tensor) -> Tensor:
    """coef * mean(z^2) over all tokens and entries."""
    return cfg.logit_penalty.coef * softcap(logits, model.cfg.softcap).square().mean()


REGULARIZERS: dict[str, Callable[[LossConfig, GPT, Tensor], Tensor]] = {
    "head_diversity": head_diversity,
    "z_loss": z_loss,
    "logit_penalty": logit_penalty,
}


class Objective:
    """loss = mean(weight * nll) + regularisers. Call with a batch; `set_progress` moves scheduled terms.

    Scheduled values live in 0-D tensors on the model's device: changing one recompiles nothing.
    """

    def __init__(self, cfg: LossConfig, model: GPT, device: torch.device | str = "cpu"):
        self.cfg, self.model = cfg, model
        self.gamma = torch.zeros((), device=device)
        self.terms = [fn for name, fn in REGULARIZERS.items() if getattr(cfg, name) is not None]

    def set_progress(self, progress: float) -> None:
        """progress: share of the training budget used, 0 to 1."""
        if self.cfg.mile:
            self.gamma.fill_(mile_gamma(self.cfg.mile, min(max(progress, 0.0), 1.0)))

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(loss to differentiate, plain mean cross-entropy for the log), both 0-D fp32."""
        nll, logits, entropy = self.model(batch, entropy=self.cfg.mile is not None)
        plain = nll.mean()
        loss = plain
        if self.cfg.mile:
            weight = (1 - torch.exp(-entropy)).clamp_min(1e-8) ** self.gamma
            loss = (weight.clamp_min(self.cfg.mile.clamp_min) * nll).mean()
        elif self.cfg.focal_gamma:
            loss = ((1 - torch.exp(-nll)).clamp_min(1e-8) ** self.cfg.focal_gamma * nll).mean()
        elif self.cfg.label_smooth:
            z = softcap(logits, self.model.cfg.softcap).flatten(0, 1)
            loss = F.cross_entropy(z, batch.targets.flatten(), label_smoothing=self.cfg.label_smooth)
        for term in self.terms:
            loss = loss + term(self.cfg, self.model, logits)
        return loss, plain.detach()
