"""Training of a model's own weights on scored tokens: any number of ranks makes the same update as one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pgolf.data.batch import Batch
from pgolf.dist import Dist
from pgolf.errors import ConfigError
from pgolf.model.gpt import GPT
from pgolf.model.roles import ParamInfo, Role, roles_of
from pgolf.ttt.config import SgdConfig

NEVER = (Role.FROZEN, Role.ADAPT_ONLY)
TABLES = (Role.EMBED, Role.SIDE_MATRIX)  # tables, and the projections that widen them
Compiled = Callable[[Callable], Callable]


def rate_at(cfg: SgdConfig, number: int, chunks: int) -> float:
    """Learning rate of chunk `number` of `chunks`: a cosine from lr to lr_floor * lr at the last one.

    With max_chunks the cosine is over those, however many there are: then no rate depends on how long the stream is,
    which a decoder does not see until its end. Constant inside a chunk.
    """
    last = (cfg.max_chunks or chunks) - 1
    cosine = 0.5 * (1 + math.cos(math.pi * min(number / max(last, 1), 1.0)))
    warm = min((number + 1) / cfg.warmup_chunks, 1.0) if cfg.warmup_chunks else 1.0
    return cfg.lr * warm * (cfg.lr_floor + (1 - cfg.lr_floor) * cosine)


def trained_params(model: GPT, cfg: SgdConfig) -> list[ParamInfo]:
    """The parameters that `cfg` trains, by role, by block and by the module that owns them."""
    queries = {id(block.attn.q.weight) for block in model.blocks}
    first_late = len(model.blocks) - cfg.late_blocks
    head = model.embed.weight if model.head is None else model.head.weight
    part: Callable[[ParamInfo], bool] = {
        "all": lambda i: True,
        "query": lambda i: id(i.param) in queries,
        "late": lambda i: i.param is head or i.role is Role.VECTOR or (i.block is not None and i.block >= first_late),
    }[cfg.trained]
    frozen = (*NEVER, *(TABLES if cfg.freeze_tables else ()))
    kept = lambda i: i.role in frozen or (i.block is not None and i.block < cfg.freeze_blocks)
    return [i for i in roles_of(model) if part(i) and not kept(i)]


def check_length(model: GPT, seq_len: int) -> None:
    """Raises ConfigError if rows of seq_len are longer than the model's rotary tables."""
    if seq_len > model.max_length:
        raise ConfigError(
            f"test-time training in windows of {seq_len}: the model was built for at most {model.max_length} tokens;"
            " build it with a larger max_length or lower ttt.seq_len"
        )


class Loan:
    """Parameters as they are now, to be put back: an evaluation leaves the model that it was given."""

    def __init__(self, model: nn.Module):
        self.kept = [(p, p.detach().clone(), p.requires_grad) for p in model.parameters()]

    @torch.no_grad()
    def put_back(self) -> None:
        for param, value, grad in self.kept:
            param.copy_(value)
            param.requires_grad_(grad)


@dataclass(frozen=True)
class Text:
    """n tokens to learn from, on the CPU.

    ids, targets: (n,) int64. weights: (n,) fp32 of the targets' losses, None = 1 each. starts: ascending int64 of the
    documents that begin in it; None = it is one piece.
    """

    ids: Tensor
    targets: Tensor
    weights: Tensor | None = None
    starts: Tensor | None = None

    def __len__(self) -> int:
        return self.ids.numel()

    def total(self, first: int, last: int) -> float:
        """Weight of tokens [first, last)."""
        return float(last - first if self.weights is None else self.weights[first:last].double().sum())


class Learner:
    """Trains the part of `model` that cfg names; weights are kept in fp32 whatever the model stores.

        loss = sum_t w_t nll_t / sum_t w_t  over the sequences of a step, split contiguously over the ranks
        SAM: the gradient is taken at theta + sam * g / |g|
        shadow <- d shadow + (1 - d) theta after each step; between chunks the model holds the shadow, if there is one

    rows, width: shape of a batch on this rank; steps of more rows accumulate. The model's other parameters get no
    gradient; `Loan` takes that back. compiled wraps the training forward, which under torch.compile is a graph of its
    own. A rank without sequences joins every step with zeros.
    """

    def __init__(self, model: GPT, cfg: SgdConfig, dist: Dist, rows: int, width: int, compiled: Compiled = lambda f: f):
        if any(getattr(module, "cast", None) is not None for module in model.modules()):
            raise ValueError("Learner: the model computes with weights cast elsewhere, which would not see a change")
        self.model, self.cfg, self.dist = model, cfg, dist
        self.rows, self.width = max(1, min(rows, -(-cfg.step_rows // dist.world_size))), width
        infos = trained_params(model, cfg)
        self.params: list[Tensor] = [i.param for i in infos]
        for param in model.parameters():
            param.requires_grad_(False)
        for param in self.params:
            param.requires_grad_(True)
        self.weights = [p.detach().to(torch.float32, copy=True) for p in self.params]
        self.shadow = [w.clone() for w in self.weights] if cfg.shadow else None
        self.optimizer = OPTIMIZERS[cfg.optimizer](self._groups(infos), cfg)
        self.segments = 1  # the most that a batch had so far
        self.loss = compiled(self._loss)

    def _groups(self, infos: Sequence[ParamInfo]) -> list[dict]:
        """Torch's parameter groups: one a block if blocks have their own rates. `share`: of the rate."""
        blocks = len(self.model.blocks)
        shares = [(i.block + 1) / blocks if self.cfg.block_rates and i.block is not None else 1.0 for i in infos]
        by_share = lambda s: [w for w, own in zip(self.weights, shares, strict=True) if own == s]
        return [{"params": by_share(s), "share": s} for s in sorted(set(shares))]

    def _loss(self, batch: Batch, weights: Tensor) -> Tensor:
        return (self.model(batch)[0] * weights).sum()

    def learn(self, text: Text, lr: float) -> None:
        """All epochs over one chunk, at one rate. A collective."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["share"]
        self._hold(self.weights)
        rows = -(-len(text) // self.width)
        for _ in range(self.cfg.epochs):
            for first in range(0, rows, self.cfg.step_rows):
                self._step(text, first, min(first + self.cfg.step_rows, rows))
        if self.shadow is not None:
            self._hold(self.shadow)

    def _step(self, text: Text, first: int, last: int) -> None:
        """One optimiser step on rows [first, last) of the text."""
        grads = self.gradient(text, first, last)
        if self.cfg.sam:
            norm = torch.stack(torch._foreach_norm(grads)).norm()
            step = torch._foreach_mul(grads, self.cfg.sam / (norm + 1e-12))
            self._hold(torch._foreach_add(self.weights, step))
            grads = self.gradient(text, first, last)
        for weight, grad in zip(self.weights, grads, strict=True):
            weight.grad = grad
        if self.cfg.clip:
            nn.utils.clip_grad_norm_(self.weights, self.cfg.clip)
        self.optimizer.step()
        if self.shadow is not None:
            torch._foreach_lerp_(self.shadow, self.weights, 1.0 - self.cfg.shadow)
        self._hold(self.weights)

    def gradient(self, text: Text, first: int, last: int) -> list[Tensor]:
        """Of the mean loss of rows [first, last), over all ranks; fp32. A collective."""
        rank, ranks, width = self.dist.rank, self.dist.world_size, self.width
        total = text.total(first * width, min(last * width, len(text)))
        scale = ranks / max(total, 1e-12)  # `mean_grads_` divides by the ranks
        sums = [torch.zeros_like(w) for w in self.weights]
        own = range(first + (last - first) * rank // ranks, first + (last - first) * (rank + 1) // ranks)
        for at in range(own.start, own.stop, self.rows):
            batch, weights = self._batch(text, at, min(at + self.rows, own.stop))
            with torch.enable_grad():
                loss = self.loss(batch, weights * scale)
                found = torch.autograd.grad(loss, self.params, allow_unused=True)
            for total_grad, grad in zip(sums, found, strict=True):
                if grad is not None:
                    total_grad += grad
        self.dist.mean_grads_(sums)
        return sums

    def _batch(self, text: Text, first: int, last: int) -> tuple[Batch, Tensor]:
        """Rows [first, last) of the text, padded to (rows, width), and their weights; padding weighs 0."""
        begin, end = first * self.width, min(last * self.width, len(text))
        shape, device = (self.rows, self.width), self.dist.device
        weights = torch.ones(end - begin) if text.weights is None else text.weights[begin:end]
        pieces = (text.ids[begin:end], text.targets[begin:end], weights)
        full = [nn.functional.pad(x, (0, shape[0] * shape[1] - (end - begin))).view(shape).to(device) for x in pieces]
        starts = None if text.starts is None else self._segments(text.starts, begin, end).to(device)
        return Batch(full[0], full[1], None, starts), full[2]

    def _segments(self, starts: Tensor, begin: int, end: int) -> Tensor:
        """(n + 1,) int32: starts of documents and of rows over the flattened batch, then its end, repeated until n is
        a power of two, the largest so far: a compiled model compiles once."""
        inside = starts[(starts >= begin) & (starts < end)] - begin
        size = self.rows * self.width
        found = torch.unique(torch.cat([inside, torch.arange(0, size, self.width)])).to(torch.int32)
        self.segments = max(self.segments, 1 << (len(found) - 1).bit_length())
        return nn.functional.pad(found, (0, self.segments + 1 - len(found)), value=size)

    @torch.no_grad()
    def _hold(self, values: Sequence[Tensor]) -> None:
        """What the model computes with from here on."""
        torch._foreach_copy_(self.params, list(values))

    def state(self) -> dict:
        """Weights, momentum and shadow; the same on every rank."""
        return {"weights": self.weights, "optimizer": self.optimizer.state_dict(), "shadow": self.shadow}

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        """The inverse of `state`."""
        torch._foreach_copy_(self.weights, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.shadow is not None:
            torch._foreach_copy_(self.shadow, state["shadow"])
        self._hold(self.weights if self.shadow is None else self.shadow)


def _sgd(groups: list[dict], cfg: SgdConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=cfg.lr, momentum=cfg.momentum, weight_decay=cfg.weight_decay)


def _adamw(groups: list[dict], cfg: SgdConfig) -> torch.optim.Optimizer:
    betas = (cfg.beta1, cfg.beta2)
    return torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, weight_decay=cfg.weight_decay)


OPTIMIZERS: dict[str, Callable[[list[dict], SgdConfig], torch.optim.Optimizer]] = {"sgd": _sgd, "adamw": _adamw}
