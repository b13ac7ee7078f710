"""A model as evaluation sees it: nats or log-probabilities of the positions that count, and of no others.

The head and its softmax run on the scored positions only: with windows of 2,048 and a stride of 64 that is 1 in 32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pgolf.data.batch import Batch
from pgolf.kernels.cross_entropy import cross_entropy, softcap
from pgolf.model.gpt import GPT


@dataclass(frozen=True)
class Temperature:
    """softmax(z / t) of the capped logits z; chosen on training data, it is part of the artifact.

    adaptive: t depends on the entropy H of softmax(z): clamp(1 - (1 - value) (1 - H / ln V), 0.9, 1.05), after PR #834.
    """

    value: float = 1.0
    adaptive: bool = False

    @property
    def neutral(self) -> bool:
        return self.value == 1.0

    def log_probs(self, logits: Tensor) -> Tensor:
        """(n, V) fp32 capped logits -> log-probabilities."""
        if self.neutral:
            return logits.log_softmax(-1)
        if not self.adaptive:
            return (logits / self.value).log_softmax(-1)
        plain = logits.log_softmax(-1)
        entropy = -(plain.exp() * plain).sum(-1, keepdim=True)
        t = 1 - (1 - self.value) * (1 - entropy / math.log(logits.shape[-1]))
        return (logits / t.clamp(0.9, 1.05)).log_softmax(-1)


class Neural:
    """nats and log_probs of a model's predictions.

    index: (n,) int64 flat positions of the (B, T) batch whose targets are scored. compiled: wraps the forward up to the
    head, for example with torch.compile; (B, T) should then stay the same from call to call. The head is not in it: its
    n differs between passes, and it is one product and one kernel.
    """

    def __init__(
        self, model: GPT, temperature: Temperature | None = None, compiled: Callable[[Callable], Callable] = lambda f: f
    ):
        self.model, self.temperature = model, temperature or Temperature()
        self.vocab_size = model.cfg.embed.vocab_size
        self.device = model.embed.weight.device
        self._hidden = compiled(model.hidden)

    def nats(self, batch: Batch, index: Tensor) -> Tensor:
        """(n,) fp32: -ln p of the scored targets."""
        targets = batch.targets.flatten()[index]
        if not self.temperature.neutral:
            return -self.log_probs(batch, index).gather(-1, targets[:, None])[:, 0]
        return cross_entropy(self._logits(batch, index), targets, cap=self.model.cfg.softcap)[0]

    def log_probs(self, batch: Batch, index: Tensor) -> Tensor:
        """(n, V) fp32."""
        return self.temperature.log_probs(softcap(self._logits(batch, index), self.model.cfg.softcap))

    def _logits(self, batch: Batch, index: Tensor) -> Tensor:
        """(n, V), before the cap. Per-document adapters need whole rows; evaluators that attach them score those."""
        return self.model.logits(self._hidden(batch).flatten(0, 1)[index])
