"""What an audit asks of a scorer, and the helper that makes one of an object that scores and learns block by block.

A scorer is any object with `name`, `vocab_size` and `nats`. The five black-box tests need no more. Each further method
that it offers lets one more test be made; a test without its method is skipped, and the report says so.

Conventions: a stream is (N,) int64, its target i (0 <= i < N-1) is token i+1, predicted from tokens 0..i. Token 1 is
BOS and begins each document. nats = -ln p.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.eval.ledger import Ledger

BOS = 1


@runtime_checkable
class Scorer(Protocol):
    """The least that can be audited.

    Optional methods, each of which makes a test possible:
      distribution(tokens (N,)) -> (V,) fp64     probabilities of the token that follows; may be slow      (2, 4, 10)
      trace(tokens) -> {name: (N-1,)}            hint, gate, weight, temperature used for each target     (3, 4)
      ledger(tokens) -> Ledger                   events of scoring that stream                            (6)
      neutral() -> (scorer, scorer)              a setting that must change nothing, and the plain scorer (7)
      ranks(n) -> scorer                         the same on n ranks                                      (9)
      warm_up(), state_digest() -> str           what runs before the evaluation; a hash of all state     (11)
      data_files() -> {"val": [...], "train": [...]}   paths that test 12 watches by name                 (12)
    and optional attributes: token_classes (V,) int, what a target-dependent gate could depend on (word start or not);
    order_name, "stream" unless documents are scored in another order; config_digest, of its settings.
    """

    name: str
    vocab_size: int

    def nats(self, tokens: Tensor) -> Tensor:
        """(N,) int64 on the CPU -> (N-1,) fp64, or an array: scores a whole stream from a fresh state."""


def offers(scorer: Any, method: str) -> bool:
    """Whether the scorer has this optional method."""
    return callable(getattr(scorer, method, None))


def check(scorer: Any) -> None:
    """Raises ConfigError unless the object is a scorer."""
    missing = [n for n in ("name", "vocab_size", "nats") if not hasattr(scorer, n)]
    if missing or not callable(scorer.nats):
        raise ConfigError(
            f"{type(scorer).__name__} is no scorer: it lacks {', '.join(missing) or 'a method nats'}.\n"
            "Expected name, vocab_size and nats(tokens (N,)) -> (N-1,); see docs/audit.md"
        )
    if not isinstance(scorer.vocab_size, int) or scorer.vocab_size < 4:
        raise ConfigError(f"{scorer.name}: vocab_size is {scorer.vocab_size!r}, expected an integer of at least 4")


def nats_of(scorer: Scorer, tokens: Tensor) -> Tensor:
    """(N-1,) fp64 of a stream. Raises ConfigError when the scorer gives another shape. May hold NaN."""
    out = torch.as_tensor(scorer.nats(tokens.clone())).to("cpu", torch.float64)
    if tuple(out.shape) != (tokens.numel() - 1,):
        raise ConfigError(
            f"{scorer.name}: nats of {tokens.numel()} tokens have the shape {tuple(out.shape)}, expected"
            f" ({tokens.numel() - 1},): one number for each token but the first"
        )
    return out


def distribution_of(scorer: Any, tokens: Tensor) -> Tensor:
    """(V,) fp64 of the token that follows. Raises ConfigError when the scorer gives another shape."""
    out = torch.as_tensor(scorer.distribution(tokens.clone())).to("cpu", torch.float64)
    if tuple(out.shape) != (scorer.vocab_size,):
        raise ConfigError(f"{scorer.name}: distribution has the shape {tuple(out.shape)}, not ({scorer.vocab_size},)")
    return out


def trace_of(scorer: Any, tokens: Tensor) -> dict[str, Tensor]:
    """What was decided for each target before it was seen: arrays of length N-1 by name."""
    return {name: torch.as_tensor(x).cpu() for name, x in scorer.trace(tokens.clone()).items()}


class BlockScorer:
    """A scorer out of an object that takes a stream block by block:

        inner.reset()                                       forgets everything
        inner.score(tokens, start, end) -> nats             of targets [start, end); changes nothing
        inner.update(tokens, start, end)                    learns from targets [start, end)
        inner.distribution(tokens) -> (V,)                  optional, in the state at hand, of the token that follows
        inner.warm_up(), inner.state_digest(), inner.trace(tokens, start, end), inner.token_classes   optional

    The order is in the loop here: a block is scored, entered in the ledger, and only then learned from. The inner
    object is handed the whole stream, as in production, so that one which looks ahead can be caught. ranks(n): n
    copies, each of which scores its contiguous share of every block; after it all learn from the whole block.
    """

    def __init__(self, inner: Any, vocab_size: int, block: int, name: str = "", world_size: int = 1):
        """block: targets that are scored before the state may change."""
        self.inner, self.vocab_size, self.block, self.world_size = inner, vocab_size, block, world_size
        self.name = name or type(inner).__name__
        if hasattr(inner, "token_classes"):
            self.token_classes = inner.token_classes
        for method in ("warm_up", "state_digest"):
            if offers(inner, method):
                setattr(self, method, getattr(inner, method))
        if offers(inner, "distribution"):
            self.distribution = self._distribution
        if offers(inner, "trace"):
            self.trace = self._trace

    def blocks(self, n_targets: int) -> Sequence[tuple[int, int]]:
        """Intervals of targets, in order."""
        return [(a, min(a + self.block, n_targets)) for a in range(0, n_targets, self.block)]

    def shares(self, start: int, end: int) -> Sequence[tuple[int, int]]:
        """Contiguous parts of a block, one a rank; some may be empty."""
        cut = [start + (end - start) * r // self.world_size for r in range(self.world_size + 1)]
        return list(pairwise(cut))

    def nats(self, tokens: Tensor) -> Tensor:
        """Scores the stream from a fresh state."""
        return self._walk(tokens, lambda copy, a, b: torch.as_tensor(copy.score(tokens, a, b), dtype=torch.float64))

    def _walk(self, tokens: Tensor, ask: Callable[[Any, int, int], Tensor]) -> Tensor:
        ranks = [self.inner, *(copy.deepcopy(self.inner) for _ in range(1, self.world_size))]
        for rank in ranks:
            rank.reset()
        out = []
        for start, end in self.blocks(tokens.numel() - 1):
            shares = zip(ranks, self.shares(start, end), strict=True)
            out += [ask(rank, a, b) for rank, (a, b) in shares if a < b]
            for rank in ranks:
                rank.update(tokens, start, end)
        return torch.cat(out)

    def ledger(self, tokens: Tensor) -> Ledger:
        """The events of `nats`, in the order of its loop."""
        out = Ledger()
        for block in self.blocks(tokens.numel() - 1):
            out.score(self.name, [block])
            out.barrier()
            out.update(self.name, [block])
            out.barrier()
        return out

    def ranks(self, n: int) -> BlockScorer:
        """The same, with each block scored by n copies."""
        return BlockScorer(copy.deepcopy(self.inner), self.vocab_size, self.block, self.name, n)

    def _distribution(self, tokens: Tensor) -> Tensor:
        self.inner.reset()
        for start, end in self.blocks(tokens.numel() - 1):
            if end - start == self.block:  # the token that follows begins or continues the block after these
                self.inner.update(tokens, start, end)
        return self.inner.distribution(tokens)

    def _trace(self, tokens: Tensor) -> dict[str, Tensor]:
        found: dict[str, list[Tensor]] = {}

        def ask(rank: Any, a: int, b: int) -> Tensor:
            for name, values in rank.trace(tokens, a, b).items():
                found.setdefault(name, []).append(torch.as_tensor(values))
            return torch.zeros(0)

        self._walk(tokens, ask)
        return {name: torch.cat(parts) for name, parts in found.items()}
