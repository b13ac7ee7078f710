"""An evaluator over a model as an object under audit: the production loop itself, on its windows and ranks, scaled."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgolf.audit.ranks import on_ranks
from pgolf.eval.base import EvalResult, Evaluator, evaluate
from pgolf.eval.ledger import Ledger
from pgolf.eval.neural import Neural, Temperature
from pgolf.eval.stats import Collector, TokenStats
from pgolf.eval.windowed import PlainWindows, SlidingWindows
from pgolf.model.gpt import GPT


@dataclass(frozen=True)
class Source:
    """The neural part under audit: a model, what names it, and the length of its windows."""

    model: GPT
    name: str
    seq_len: int
    is_toy: bool = False

    @property
    def vocab_size(self) -> int:
        return self.model.cfg.embed.vocab_size


class EvaluatorScorer:
    """An evaluator over a model, on n ranks, as `evaluate` runs it.

    make: a fresh evaluator. with_probs: nats out of whole distributions, as n-gram scorers have them; else the fused
    cross-entropy.
    """

    def __init__(
        self, source: Source, make: Callable[[], Evaluator], temperature: Temperature | None = None,
        world_size: int = 1, with_probs: bool = False,
    ):  # fmt: skip
        self.source, self.make, self.temperature = source, make, temperature
        self.world_size, self.with_probs = world_size, with_probs
        self.vocab_size = source.vocab_size
        self.name = f"{make().name} over {source.name}"
        told = f"{self.name} {temperature}"
        self.config_digest = hashlib.sha256(told.encode()).hexdigest()

    def run(self, tokens: Tensor, reader: Callable[[], Any] | None = None) -> tuple[EvalResult, list[Any], TokenStats]:
        """Scores the stream on all ranks: (result, the ranks' readers, merged statistics). reader: makes one a rank."""
        make_reader = reader or (lambda: Collector(tokens.numel() - 1, entropy=self.with_probs))

        def work(dist):
            model = self.source.model if dist.world_size == 1 else copy.deepcopy(self.source.model)
            evaluator, own = self.make(), make_reader()
            neural = Neural(model, self.temperature)
            ones = lambda ids, targets: torch.ones_like(targets)
            result = evaluate(evaluator, neural, tokens, ones, dist, readers=[own])
            stats = own.merged(dist, evaluator.order, self.name) if isinstance(own, Collector) else None
            return result, own, stats

        found = on_ranks(self.world_size, work)
        return found[0][0], [own for _, own, _ in found], found[0][2]

    def nats(self, tokens: Tensor) -> Tensor:
        return self.run(tokens)[2].nats.double()

    def distribution(self, tokens: Tensor) -> Tensor:
        """By the same loop, which scores one token more: id 0 stands where the next token will be."""
        last = _Last(tokens.numel() - 1)
        alone = EvaluatorScorer(self.source, self.make, self.temperature)
        alone.run(torch.cat([tokens, tokens.new_zeros(1)]), lambda: last)
        return last.log_probs.double().exp()

    def ledger(self, tokens: Tensor) -> Ledger:
        return self.run(tokens)[0].ledger

    def with_vectors(self) -> EvaluatorScorer:
        """The same with nats out of whole distributions."""
        return EvaluatorScorer(self.source, self.make, self.temperature, self.world_size, True)

    def ranks(self, n: int) -> EvaluatorScorer:
        return EvaluatorScorer(self.source, self.make, self.temperature, n, self.with_probs)

    def warm_up(self) -> None:
        """As a run does before the clock: the same shapes, on ids from a generator."""
        gen = torch.Generator().manual_seed(1)
        self.run(torch.randint(0, self.vocab_size, (4 * self.source.seq_len + 1,), generator=gen))

    def state_digest(self) -> str:
        digest = hashlib.sha256()
        for name, value in sorted(self.source.model.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class _Last:
    """A reader that keeps the whole distribution of one target."""

    needs_probs = True

    def __init__(self, target: int):
        self.target, self.log_probs = target, torch.empty(0)

    def put(self, targets: Tensor, nats: Tensor, log_probs: Tensor | None = None) -> None:
        at = (targets == self.target).nonzero()[:, 0]
        if at.numel():
            self.log_probs = log_probs[at[0].to(log_probs.device)].cpu()

    def state(self) -> dict:
        return {}

    def load_state(self, state: dict) -> None:
        pass


class WithNeutral(EvaluatorScorer):
    """Sliding windows whose stride is their length are plain windows; a temperature of 1 is none."""

    def neutral(self) -> tuple[EvaluatorScorer, EvaluatorScorer]:
        length = self.source.seq_len
        quiet = EvaluatorScorer(self.source, lambda: SlidingWindows(length, length), Temperature(1.0))
        return quiet, EvaluatorScorer(self.source, lambda: PlainWindows(length))
