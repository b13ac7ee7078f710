"""Negative controls: scorers that claim more than any code can do. Each must be flagged, or the audit is worth nothing.

All have been in submissions or proposals of the challenge, but for those that show that a test can fail at all. They
are small, over 64 ids unless told otherwise. `CONTROLS` says which tests must flag each; none is a scorer to use.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.audit.interface import BOS, BlockScorer
from pgolf.audit.valid import Bigram, Uniform
from pgolf.eval.ledger import Ledger
from pgolf.eval.order import length_sorted
from pgolf.kernels._ngram_legacy import ORDERS, legacy_lookup, legacy_tables, legacy_update

BLOCK = 16


class Control(NamedTuple):
    make: Callable[[int], Any]  # vocab_size -> scorer
    must: tuple[str, ...]  # tests that flag it
    why: str


def _log(p: np.ndarray | Tensor) -> Tensor:
    """-ln p. By numpy: torch wakes its threads for a logarithm, which on a busy machine takes longer than all else."""
    return torch.from_numpy(-np.log(np.maximum(np.asarray(p, dtype=np.float64), 1e-12)))


class _OfVectors:
    """A block's scores as entries of what it claims for every token: `claims(before (n,)) -> (n, V)`."""

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size
        self.counts = Bigram(vocab_size)

    def reset(self) -> None:
        self.counts.reset()

    def update(self, tokens: Tensor, start: int, end: int) -> None:
        self.counts.update(tokens, start, end)

    def claims(self, before: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def score(self, tokens: Tensor, start: int, end: int) -> Tensor:
        claims = self.claims(tokens[start:end].numpy())
        return _log(claims[np.arange(end - start), tokens[start + 1 : end + 1].numpy()])

    def distribution(self, tokens: Tensor) -> Tensor:
        return torch.from_numpy(self.claims(tokens[-1:].numpy())[0])

    def leader(self, before: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n,) the most frequent follower of each token, and whether it was seen twice."""
        rows = self.counts.counts[before]
        return rows.argmax(-1), rows.max(-1) >= 2


# -- not normalised ----------------------------------------------------------------------------------------------------


class LegacyHashed:
    """The hashed n-gram scorer of #659 and #702 over a uniform base: kernels/_ngram_legacy.py's tables, back-off to the
    longest context seen twice, weights by the base's entropy. See docs/why_hashed_scores_are_no_code_lengths.md"""

    MULTIPLIERS = (0.3, 0.3, 0.97, 2.0, 2.0, 2.0, 2.0, 2.0)  # of orders 2 to 9

    def __init__(self, vocab_size: int, buckets: int):
        self.vocab_size, self.buckets = vocab_size, buckets
        # the base is uniform, so its entropy is ln V everywhere
        centers = torch.tensor([3.0 - 0.25 * (n - 2) for n in ORDERS], dtype=torch.float64)
        alpha = 0.05 + 0.55 * torch.sigmoid(2.0 * (math.log(vocab_size) - centers))
        self.alpha = (alpha * torch.tensor(self.MULTIPLIERS, dtype=torch.float64)).clamp(0, 0.95)
        self.reset()

    def reset(self) -> None:
        self.tables = legacy_tables(self.buckets)

    def update(self, tokens: Tensor, start: int, end: int) -> None:
        legacy_update(self.tables, tokens, start + 1, end + 1)

    def score(self, tokens: Tensor, start: int, end: int) -> Tensor:
        return _log(self._mix(*legacy_lookup(self.tables, tokens, start + 1, end + 1)))

    def hashed(self, contexts: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """(8, n) counts -> (n,) min(F, C) / C of the longest order with C >= 2, and its weight; 0 without one."""
        q = torch.minimum(pairs, contexts).double() / contexts.clamp(min=1)
        longest = torch.where(contexts >= 2, torch.arange(1, len(ORDERS) + 1)[:, None], 0).amax(0)
        at = (longest - 1).clamp(min=0)
        return q.gather(0, at[None])[0], torch.where(longest > 0, self.alpha[at], 0.0)

    def _mix(self, contexts: Tensor, pairs: Tensor) -> Tensor:
        q, alpha = self.hashed(contexts, pairs)
        return (1 - alpha) / self.vocab_size + alpha * q

    def lookup_all(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(8, V) counts of contexts and pairs with every token in the place after `tokens`."""
        context = tokens[-8:]
        width = context.numel() + 1
        every = torch.cat([context.expand(self.vocab_size, -1), torch.arange(self.vocab_size)[:, None]], 1).flatten()
        found = legacy_lookup(self.tables, every, 0, every.numel())
        known = torch.tensor([order <= width for order in ORDERS])[:, None]
        return tuple(x[:, width - 1 :: width] * known for x in found)

    def distribution(self, tokens: Tensor) -> Tensor:
        return self._mix(*self.lookup_all(tokens))


class OracleMin(_OfVectors):
    """The smaller loss of two models, token by token (#573, first form of #659): max(p, q) for every token."""

    def claims(self, before: np.ndarray) -> np.ndarray:
        return np.maximum(self.counts.rows(before), 1 / self.vocab_size)


class EntropyExpert(_OfVectors):
    """A mixture in which one "expert" gives e^-H to whatever token comes (#688, #909): it adds up to V e^-H."""

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        noise = np.random.default_rng(7).normal(0, 4, (vocab_size, vocab_size))
        self.base = np.exp(noise) / np.exp(noise).sum(-1, keepdims=True)  # a confident model of something else

    def claims(self, before: np.ndarray) -> np.ndarray:
        p = self.base[before]
        entropy = -(p * np.log(p)).sum(-1, keepdims=True)
        return 0.3 * p + 0.7 * np.exp(-entropy)


class ByteSpreading(_OfVectors):
    """A token's probability spread evenly over its three bytes, p^(1/3) each, and mixed byte by byte with a byte model
    (#1872, #1905). The byte model may be right: for a given byte the spread values add up to more than 1."""

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        ids = np.arange(vocab_size)
        digits = np.stack([ids // 4, ids % 4, ids % 4], -1)  # the later bytes of a token follow from the earlier ones
        self.claimed = np.ones(vocab_size)
        for k in range(3):
            same = (digits[:, None, :k] == digits[None, :, :k]).all(-1)  # (V, V) tokens that begin alike
            both = same & (digits[:, None, k] == digits[None, :, k])
            conditional = both.sum(-1) / same.sum(-1)
            weight = 0.05 if k == 0 else 0.95  # of the byte model; known before the byte is
            self.claimed *= (1 - weight) * vocab_size ** (-1 / 3) + weight * conditional

    def claims(self, before: np.ndarray) -> np.ndarray:
        return np.tile(self.claimed, (before.size, 1))


class TargetBackoff(_OfVectors):
    """Backs off to the base where *the target* was not seen after the context; no other token pays for it."""

    def claims(self, before: np.ndarray) -> np.ndarray:
        counts = self.counts.counts[before]
        seen = 0.9 * counts / np.maximum(counts.sum(-1, keepdims=True), 1) + 0.1 / self.vocab_size
        return np.where(counts > 0, seen, 1 / self.vocab_size)


class TiltWithoutNormaliser(_OfVectors):
    """p e^beta for a hinted token and p for the others: Z = 1 + p(h) (e^beta - 1) is left out."""

    def claims(self, before: np.ndarray) -> np.ndarray:
        p = self.counts.rows(before)
        hint, sure = self.leader(before)
        p[np.arange(before.size), hint] *= np.where(sure, math.exp(1.5), 1.0)
        return p


class ClassGate(_OfVectors):
    """A normalised tilt that is used only where *the target* is of the hint's class: the leak of #1420 and #1967."""

    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.token_classes = torch.arange(vocab_size) % 2

    def claims(self, before: np.ndarray) -> np.ndarray:
        p = self.counts.rows(before)
        hint, sure = self.leader(before)
        at, boost = np.arange(before.size), np.where(sure, math.exp(2.0), 1.0)
        normaliser = 1 + p[at, hint] * (boost - 1)
        tilted = p.copy()
        tilted[at, hint] *= boost
        alike = self.token_classes.numpy()[None] == self.token_classes.numpy()[hint][:, None]
        return np.where(alike, tilted / normaliser[:, None], p)

    def trace(self, tokens: Tensor, start: int, end: int) -> dict[str, Tensor]:
        hint, sure = self.leader(tokens[start:end].numpy())
        targets = self.token_classes[tokens[start + 1 : end + 1]]
        return {"hint": torch.from_numpy(hint), "gate": torch.from_numpy(sure) & (targets == self.token_classes[hint])}


# -- out of order ------------------------------------------------------------------------------------------------------


class UpdateBeforeScore(BlockScorer):
    """Learns from a block and then scores it."""

    def __init__(self, vocab_size: int):
        super().__init__(Bigram(vocab_size), vocab_size, BLOCK, "update before score")
        del self.distribution, self.warm_up, self.state_digest

    def nats(self, tokens: Tensor) -> Tensor:
        self.inner.reset()
        out = []
        for start, end in self.blocks(tokens.numel() - 1):
            self.inner.update(tokens, start, end)
            out.append(self.inner.score(tokens, start, end))
        return torch.from_numpy(np.concatenate(out))

    def ledger(self, tokens: Tensor) -> Ledger:
        out = Ledger()
        for block in self.blocks(tokens.numel() - 1):
            out.update(self.name, [block])
            out.score(self.name, [block])
        return out


class TwoPass(BlockScorer):
    """Scores the stream, learns all of it, and scores it again with what it knows now (#959)."""

    def __init__(self, vocab_size: int):
        super().__init__(Bigram(vocab_size), vocab_size, BLOCK, "two-pass rescoring")
        del self.distribution, self.warm_up, self.state_digest

    def nats(self, tokens: Tensor) -> np.ndarray:
        super().nats(tokens)
        return self.inner.score(tokens, 0, tokens.numel() - 1)

    def ledger(self, tokens: Tensor) -> Ledger:
        out = super().ledger(tokens)
        out.score(self.name, [(0, tokens.numel() - 1)])
        return out


class RankLocal(BlockScorer):
    """Each rank learns from its own share only: the score depends on how many there are (Cubric)."""

    def __init__(self, vocab_size: int, world_size: int = 1):
        super().__init__(_OwnShare(vocab_size), vocab_size, BLOCK, "rank-local adaptation", world_size)

    def ranks(self, n: int) -> RankLocal:
        return RankLocal(self.vocab_size, n)


class _OwnShare(Bigram):
    """Bigram that learns only from what it has scored itself."""

    def reset(self) -> None:
        super().reset()
        self.mine: tuple[int, int] | None = None

    def score(self, tokens: Tensor, start: int, end: int) -> np.ndarray:
        self.mine = (start, end)
        return super().score(tokens, start, end)

    def update(self, tokens: Tensor, start: int, end: int) -> None:
        if self.mine:
            super().update(tokens, *self.mine)

    distribution = None


class MixedOrders:
    """Half a unigram that follows documents by length, half a bigram that follows the stream: no decoder could."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.name = vocab_size, "mixed orders"
        self.bigram = BlockScorer(Bigram(vocab_size), vocab_size, BLOCK)

    def nats(self, tokens: Tensor) -> Tensor:
        stream, where = length_sorted(tokens).permuted(tokens)
        counts, p = np.ones(self.vocab_size), np.zeros(stream.numel())
        for t in range(1, stream.numel()):
            counts[stream[t - 1]] += 1
            p[t] = counts[stream[t]] / counts.sum()
        return _log(0.5 * torch.from_numpy(p)[where] + 0.5 * torch.exp(-self.bigram.nats(tokens)))

    def ledger(self, tokens: Tensor) -> Ledger:
        parts = Ledger(), Ledger(order=length_sorted(tokens))
        for part, name in zip(parts, ("bigram", "unigram"), strict=True):
            part.each(name, [(0, tokens.numel() - 1)])
        out = Ledger()
        out.events = [event for part in parts for event in part.events]
        return out


class DocumentLength:
    """Weights by how long the document will be, which its reader knows only at its end."""

    def __init__(self, vocab_size: int):
        self.vocab_size, self.name = vocab_size, "document length"
        self.bigram = BlockScorer(Bigram(vocab_size), vocab_size, BLOCK)

    def nats(self, tokens: Tensor) -> Tensor:
        document = (tokens == BOS).cumsum(0)
        weight = (torch.bincount(document)[document][:-1] / 100.0).clamp(max=0.9).double()
        return _log((1 - weight) / self.vocab_size + weight * torch.exp(-self.bigram.nats(tokens)))


# -- what shows that the other tests can fail --------------------------------------------------------------------------


class DirtyWarmUp(Bigram):
    """Keeps what its warm-up has taught it."""

    def reset(self) -> None:
        if not hasattr(self, "taught"):
            self.taught = np.zeros((self.vocab_size, self.vocab_size))
        self.counts = self.taught.copy()

    def warm_up(self) -> None:
        self.taught += 1.0
        self.counts = self.taught.copy()


class NotNeutral(Uniform):
    """Its weight of 0 leaves a floor under the probabilities."""

    def neutral(self) -> tuple[Any, Uniform]:
        return _Floored(self.vocab_size), Uniform(self.vocab_size)


class _Floored(Uniform):
    def nats(self, tokens: Tensor) -> Tensor:
        return -torch.log(torch.exp(-super().nats(tokens)) + 1e-9)


class ReadsTrainingData(Uniform):
    """Opens a shard of training data while it scores."""

    def nats(self, tokens: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory() as folder:
            shard = Path(folder) / "fineweb_train_000000.bin"
            shard.write_bytes(bytes(16))
            shard.read_bytes()
        return super().nats(tokens)


class _Undecodable(Uniform):
    """Claims one bit for every token, and has a proper distribution to show."""

    def nats(self, tokens: Tensor) -> Tensor:
        return super().nats(tokens) / math.log2(self.vocab_size)


def _blocks(inner: Callable[[int], Any], name: str) -> Callable[[int], BlockScorer]:
    return lambda vocab_size: BlockScorer(inner(vocab_size), vocab_size, BLOCK, name)


def legacy(vocab_size: int, buckets: int = 128, block: int = 64) -> BlockScorer:
    """The hashed legacy scorer. The default buckets suit short streams: 128 for 192 tokens."""
    return BlockScorer(LegacyHashed(vocab_size, buckets), vocab_size, block, f"hashed legacy, {buckets} buckets")


SUM, VECTOR, CODED = "substitution", "vector", "round_trip"
CONTROLS = {
    "legacy_hashed_unsafe": Control(legacy, (SUM, VECTOR, "noise"), "pairs and contexts collide independently"),
    "oracle_min": Control(_blocks(OracleMin, "oracle-min gating"), (SUM, VECTOR, CODED), "the better by hindsight"),
    "class_gate": Control(_blocks(ClassGate, "target-class gate"), (SUM, "class_flip", "future"), "it knows the class"),
    "update_before_score": Control(UpdateBeforeScore, (SUM, "future", "ledger"), "it has learned what it scores"),
    "two_pass": Control(TwoPass, ("future", "prefix", "ledger"), "it has learned everything it scores"),
    "entropy_expert": Control(_blocks(EntropyExpert, "entropy expert"), (SUM, VECTOR, "noise"), "e^-H for all tokens"),
    "byte_spreading": Control(_blocks(ByteSpreading, "byte spreading"), (SUM, VECTOR, "noise"), "p^(1/n) a byte"),
    "target_backoff": Control(_blocks(TargetBackoff, "back-off by the target"), (SUM, VECTOR), "mass is given twice"),
    "tilt_without_normaliser": Control(_blocks(TiltWithoutNormaliser, "tilt without Z"), (SUM, VECTOR), "no Z"),
    "rank_local": Control(RankLocal, ("ranks",), "its score depends on the number of ranks"),
    "mixed_orders": Control(MixedOrders, ("prefix", "ledger"), "parts follow different orders"),
    "document_length": Control(DocumentLength, ("future", "prefix"), "the length of a document is its future"),
    "dirty_warm_up": Control(_blocks(DirtyWarmUp, "a warm-up that stays"), ("warm_up",), "it enters evaluation taught"),
    "not_neutral": Control(NotNeutral, ("neutral",), "weight 0 changes scores"),
    "reads_training_data": Control(ReadsTrainingData, ("isolation",), "training data at evaluation"),
    "undecodable": Control(_Undecodable, (SUM, "noise", CODED), "nats are not of its distribution"),
}
