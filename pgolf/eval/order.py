"""The order in which targets are scored. All adaptive parts of one evaluation share one, or there is no decoder.

A long document that is scored early with n-gram counts of short documents that precede it in the stream, while those
are scored later with weights that were trained on the long one, is no code: neither could be decoded first. So an order
is one object that every part is handed, `same` refuses two, and every ledger names it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.errors import ConfigError

BOS = 1  # the challenge's; each document begins with it


@dataclass(frozen=True)
class Order:
    """Documents in the order in which they are scored; within a document targets always come in stream order.

    documents: (D,) int64 CPU, the number in the stream of the k-th document to be scored; None = stream order.
    """

    name: str = "stream"
    documents: Tensor | None = None

    @property
    def id(self) -> str:
        """Name and content: equal for equal orders, as it stands in ledgers."""
        if self.documents is None:
            return self.name
        return f"{self.name}:{hashlib.sha256(self.documents.numpy().tobytes()).hexdigest()[:16]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Order) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def permuted(self, tokens: Tensor, bos: int = BOS) -> tuple[Tensor, Tensor]:
        """The stream that a decoder of this order sees, and where in it each target's token is: (N or N + 1,) and (T,).

        tokens: (N,) integers. Document d is tokens[start_d : start_(d+1)]; its last target is the BOS that follows it,
        which in the permuted stream is the BOS of another document, the same token. Behind the stream's last document,
        which nothing follows, the permuted stream has a BOS that is no target.
        """
        targets = torch.arange(1, tokens.numel(), device=tokens.device)
        if self.documents is None:
            return tokens, targets
        starts = document_bounds(tokens, bos)
        size = starts.diff()
        chosen = self.documents.to(tokens.device)
        if chosen.numel() != size.numel():
            raise ValueError(f"order {self.name}: {chosen.numel()} documents, the stream has {size.numel()}")
        begins = torch.empty_like(size)
        begins[chosen] = size[chosen].cumsum(0) - size[chosen]
        document = torch.repeat_interleave(torch.arange(size.numel(), device=tokens.device), size)
        here = torch.arange(tokens.numel(), device=tokens.device)
        moved = begins[document] + here - starts[document]  # where each token goes
        stream = torch.full((tokens.numel() + 1,), bos, dtype=tokens.dtype, device=tokens.device)
        stream[moved] = tokens
        where = moved[:-1] + 1  # a target follows its input
        return (stream if bool((where == tokens.numel()).any()) else stream[:-1]), where


STREAM = Order()


def document_bounds(tokens: Tensor, bos: int = BOS) -> Tensor:
    """(D + 1,) int64: where each document starts, and the end. What stands before the first BOS is a document too."""
    starts = (tokens.to(torch.int32) == bos).nonzero()[:, 0]
    if starts.numel() == 0 or starts[0] != 0:
        starts = torch.cat([starts.new_zeros(1), starts])
    return torch.cat([starts, starts.new_tensor([tokens.numel()])])


def length_sorted(tokens: Tensor, bos: int = BOS) -> Order:
    """Longest documents first, as the challenge's records batch them; ties in stream order.

    It uses where the next BOS is, which a decoder does not know; records do so, and a ledger says so.
    """
    size = document_bounds(tokens.cpu(), bos).diff()
    return Order("length_sorted", torch.argsort(size, descending=True, stable=True))


def same(*orders: Order) -> Order:
    """The one order of all parts of an evaluation. Raises ConfigError when there are two."""
    names = sorted({order.id for order in orders})
    if len(names) > 1:
        raise ConfigError(
            f"evaluation: its parts have {len(names)} orders, {' and '.join(names)}; no decoder could follow both.\n"
            "Give all adaptive parts the same order (eval.order)."
        )
    return orders[0] if orders else STREAM
