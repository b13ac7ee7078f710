"""What the neural part said of every target, kept: n-gram scorers are functions of counts and of this.

So a grid of scorers costs no second neural pass, and where several ranks have scored, the scorers that go through the
stream in order see all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pgolf.errors import DataError
from pgolf.eval.order import STREAM, Order

VERSION = 1


@dataclass
class TokenStats:
    """Per target i (token i + 1), on the CPU. T targets, K hints.

    nats: (T,) fp32, -ln p(x). entropy: (T,) fp32 nats, of the whole distribution; None if it was not asked for. hints:
    (K, T) int32 tokens, -1 where there is none. hint_nats: (K, T) fp32, -ln p(hint); 0 where there is none. order: in
    which targets were scored. neural: what scored them.
    """

    nats: Tensor
    entropy: Tensor | None = None
    hints: Tensor | None = None
    hint_nats: Tensor | None = None
    order: Order = STREAM
    neural: str = ""

    def __len__(self) -> int:
        return self.nats.numel()

    def first(self, n: int) -> TokenStats:
        """Of the first n targets."""
        cut = lambda x: None if x is None else x[..., :n]
        return TokenStats(self.nats[:n], *map(cut, (self.entropy, self.hints, self.hint_nats)), self.order, self.neural)

    def save(self, path: Path, what: dict[str, str]) -> None:
        """As one file. what: names of what the numbers belong to (artifact, data), checked by `load`."""
        data = {"version": VERSION, "what": what, "neural": self.neural, "order": self.order.name}
        data |= {"documents": self.order.documents, "nats": self.nats, "entropy": self.entropy}
        data |= {"hints": self.hints, "hint_nats": self.hint_nats}
        path.parent.mkdir(parents=True, exist_ok=True)
        temp = path.with_name(path.name + ".part")
        torch.save(data, temp)
        temp.replace(path)

    @classmethod
    def load(cls, path: Path, what: dict[str, str]) -> TokenStats:
        """Raises DataError when the file is damaged, of another version, or belongs to something else."""
        try:
            data = torch.load(path, weights_only=True)
            version, found = data["version"], data["what"]
            stats = cls(
                data["nats"], data["entropy"], data["hints"], data["hint_nats"],
                Order(data["order"], data["documents"]), data["neural"],
            )  # fmt: skip
        except Exception as err:  # torch.load raises what its pickle's bytes make it raise
            raise DataError(
                f"{path} cannot be read as per-token statistics ({type(err).__name__}): remove it, it is made again"
            ) from err
        wrong = [f"{k} is {found.get(k)}, expected {v}" for k, v in what.items() if found.get(k) != v]
        if version != VERSION or wrong:
            raise DataError(f"{path} belongs to another evaluation: {'; '.join(wrong) or 'another version'}")
        return stats


class Collector:
    """Fills a `TokenStats` while ranks score their shares."""

    def __init__(self, n_targets: int, *, entropy: bool = False, hints: Tensor | None = None):
        """hints: (K, T) int32 on the CPU, tokens whose probability is wanted; -1 = none."""
        self.nats = torch.zeros(n_targets)
        self.entropy = torch.zeros(n_targets) if entropy else None
        self.hints = hints
        self.hint_nats = None if hints is None else torch.zeros(hints.shape)

    @property
    def needs_probs(self) -> bool:
        """Whether nats alone are not enough."""
        return self.entropy is not None or self.hints is not None

    def put(self, targets: Tensor, nats: Tensor, log_probs: Tensor | None = None) -> None:
        """targets: (n,) int64 CPU, global positions. nats: (n,). log_probs: (n, V) fp32; needed if `needs_probs`."""
        self.nats[targets] = nats.cpu()
        if self.entropy is not None:
            self.entropy[targets] = -(log_probs.exp() * log_probs).nan_to_num(0.0).sum(-1).cpu()
        if self.hints is not None:
            wanted = self.hints[:, targets].to(log_probs.device, torch.int64)
            found = -log_probs.T.gather(0, wanted.clamp(min=0))
            self.hint_nats[:, targets] = found.masked_fill(wanted < 0, 0.0).cpu()

    def state(self) -> dict[str, Tensor | None]:
        """For a saved evaluation."""
        return {"nats": self.nats, "entropy": self.entropy, "hint_nats": self.hint_nats}

    def load_state(self, state: dict[str, Tensor | None]) -> None:
        """The inverse of `state`."""
        self.nats, self.entropy, self.hint_nats = state["nats"], state["entropy"], state["hint_nats"]

    def merged(self, dist, order: Order, neural: str) -> TokenStats:
        """Of all ranks, on every rank: each has zeros where another has scored. A collective."""
        for part in (self.nats, self.entropy, self.hint_nats):
            if part is not None:
                dist.all_reduce_sum_(part)
        return TokenStats(self.nats, self.entropy, self.hints, self.hint_nats, order, neural)
