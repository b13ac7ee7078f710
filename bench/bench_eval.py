"""Benchmarks of the evaluation on a CPU: windows against the bare forward passes, n-gram keys and counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from pgolf import presets
from pgolf.data.batch import Batch
from pgolf.data.tokenizer import ByteTable
from pgolf.dist import Dist
from pgolf.eval.base import EvalResult, Evaluator, evaluate
from pgolf.eval.neural import Neural
from pgolf.eval.windowed import PlainWindows, SlidingWindows
from pgolf.kernels.ngram_hash import count_before, document_starts, ngram_hash
from pgolf.model.gpt import GPT

from .fixtures import VOCAB, build, corpus, one_thread  # noqa: F401
from .ratios import CPU_TIME, gate, rates

# -- windows ---------------------------------------------------------------------------------------------------------

# Evaluators by sequence length; a window of the sliding one has its last quarter scored
WINDOWS = {"plain": PlainWindows, "sliding": lambda length, tokens: SlidingWindows(length, length // 4, tokens)}


@cache
def byte_counts() -> Callable:
    return ByteTable.from_sentencepiece(corpus().sp, VOCAB).torch()


def run(evaluator: Evaluator, neural: Neural, tokens: np.ndarray) -> EvalResult:
    """The evaluation of a token stream, as a run does it on one rank."""
    return evaluate(evaluator, neural, tokens, byte_counts(), Dist())


def naive_loss(model: GPT, tokens: np.ndarray, length: int, stride: int) -> float:
    """Mean nats a target, one forward pass a target: the tokens of its window up to it, and no others."""
    stream, nats = torch.from_numpy(tokens.astype(np.int64)), []
    for t in range(len(tokens) - 1):
        start = max(0, -(-(t + 1 - length) // stride)) * stride  # of the first window that reaches t
        ids, targets = stream[start : t + 1], stream[start + 1 : t + 2]
        with torch.no_grad():
            nats.append(model(Batch(ids[None], targets[None]))[0][0, -1].double().item())
    return sum(nats) / len(nats)


def assert_is_right(name: str) -> None:
    """A short stream: every target scored once, in the context that its window gives, and all bytes counted."""
    model, tokens = build(presets.smoke()).eval(), corpus().tokens[:300]
    length = 64
    got = run(WINDOWS[name](length, 256), Neural(model), tokens)
    expected = naive_loss(model, tokens, length, length if name == "plain" else length // 4)
    assert got.targets == len(tokens) - 1
    assert abs(got.val_loss - expected) <= 1e-5 * expected, f"{name}: {got.val_loss}, expected {expected}"


class Spy(Neural):
    """Keeps what the evaluator feeds the model."""

    def nats(self, batch: Batch, index: Tensor) -> Tensor:
        self.fed.append((batch, index))
        return super().nats(batch, index)


def kept_batches(evaluator: Evaluator, model: GPT, tokens: np.ndarray) -> list[tuple[Batch, Tensor]]:
    """What the evaluator feeds the model."""
    spy = Spy(model)
    spy.fed = []
    run(evaluator, spy, tokens)
    return spy.fed


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.benchmark(group="eval")
def test_windows(benchmark, name):
    """The cpu preset's model over a stream, against its forward passes alone, over the very same batches."""
    assert_is_right(name)
    model, tokens = build(presets.cpu()).eval(), corpus().tokens[:1025]
    neural, evaluator = Neural(model), WINDOWS[name](256, 1024)
    fed = kept_batches(evaluator, model, tokens)

    @torch.no_grad()
    def floor() -> None:
        for batch, index in fed:
            neural.nats(batch, index)

    def check(got: EvalResult) -> None:
        assert got.targets == len(tokens) - 1
        assert got.tokens_forwarded == sum(batch.ids.numel() for batch, _ in fed)

    evaluated = lambda: run(evaluator, neural, tokens)
    sides = ("evaluate", evaluated), ("forward passes", floor)
    gate(benchmark, *sides, at_most=1.15, check=check, seconds=4, clock=CPU_TIME)
    forwarded = benchmark.pedantic(evaluated, rounds=5).tokens_forwarded
    rates(benchmark, targets=len(tokens) - 1, forwarded=forwarded)


# -- n-grams ---------------------------------------------------------------------------------------------------------

ORDERS = tuple(range(2, 10))


def contexts(tokens: list[int], starts: list[int], order: int) -> list[tuple | None]:
    """The `order` tokens before each position, None where its document does not have them."""
    return [tuple(tokens[t - order : t]) if t - starts[t] >= order else None for t in range(len(tokens))]


def dict_counts(contexts: list, tokens: list[int]) -> list[tuple[int, int, int]]:
    """(context count, pair count, distinct followers) before each position, from a dict of counters."""
    seen: dict = defaultdict(Counter)
    total: Counter = Counter()
    out = []
    for context, token in zip(contexts, tokens, strict=True):
        if context is None:
            out.append((0, 0, 0))
            continue
        followers = seen[context]
        out.append((total[context], followers[token], len(followers)))
        followers[token] += 1
        total[context] += 1
    return out


def stream(n: int) -> tuple[Tensor, Tensor]:
    """(tokens int64, document starts int32), real text."""
    tokens = torch.from_numpy(corpus().tokens[:n].astype(np.int64))
    return tokens, document_starts(tokens, corpus().sp.bos_id())


def assert_keys_are_exact(key_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Two positions share a key where they share a context and nowhere else; positions without one have key -1."""
    tokens, starts = stream(6000)
    keys = key_of(tokens, starts)
    for order, row in zip(ORDERS, keys, strict=True):
        names = contexts(tokens.tolist(), starts.tolist(), order)
        pairs = set(zip(names, row.tolist(), strict=True))
        assert len(pairs) == len({name for name, _ in pairs}) == len({key for _, key in pairs})
        assert (None, -1) in pairs


@pytest.mark.benchmark(group="ngram")
def test_ngram_hash(benchmark):
    """Keys of orders 2 to 9 in one call, against a call an order."""
    key_of = lambda tokens, starts: ngram_hash(tokens, ORDERS, doc_start=starts)
    assert_keys_are_exact(key_of)
    tokens, starts = stream(1 << 15)
    one_by_one = lambda: torch.stack([ngram_hash(tokens, n, doc_start=starts) for n in ORDERS])
    expected = one_by_one()

    def check(got: Tensor) -> None:
        assert torch.equal(got, expected)

    together = lambda: key_of(tokens, starts)
    gate(benchmark, ("8 orders", together), ("order by order", one_by_one), at_most=0.8, check=check)
    benchmark(together)
    rates(benchmark, tokens=len(tokens))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.benchmark(group="ngram")
def test_ngram_counts(benchmark, order):
    """count_before of real text, against a dict of counters."""
    tokens, starts = stream(1 << 15)
    keys = ngram_hash(tokens, order, doc_start=starts)
    names, listed = contexts(tokens.tolist(), starts.tolist(), order), tokens.tolist()
    expected = torch.tensor(dict_counts(names, listed), dtype=torch.int32).T

    def check(got) -> None:
        assert torch.equal(torch.stack([got.context_count, got.pair_count, got.distinct]), expected)

    count, by_dict = lambda: count_before(keys, tokens), lambda: dict_counts(names, listed)
    gate(benchmark, ("count_before", count), ("dict", by_dict), at_most=0.25, check=check)
    benchmark(count)
    rates(benchmark, tokens=len(tokens))
