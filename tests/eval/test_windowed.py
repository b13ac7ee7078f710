"""Windows and the evaluation loop against brute force with a toy causal model."""

import math

import numpy as np
import pytest
import torch
from helpers import ToyNeural
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks

from pgolf.dist import Dist
from pgolf.errors import ConfigError, DataError, NumericalError
from pgolf.eval.base import CoverageError, evaluate
from pgolf.eval.spans import Span
from pgolf.eval.windowed import PlainWindows, SlidingWindows

SIZES = [1, 2, 3, 5, 8, 9, 16, 17, 31, 40, 64, 100]
SHAPES = [(n, length, stride) for n in SIZES for length in (1, 2, 3, 8, 16) for stride in range(1, length + 1)]


def nll_fn(ids, targets):
    """Toy causal model: the nats of target i depend on it and, position by position, on the row's inputs up to i."""
    weight = 0.5 ** torch.arange(ids.shape[1]).float()
    past = torch.cumsum(ids.float() * weight, 1)
    return 1.0 + torch.sin(past + 0.1 * targets.float()).abs()


TOY = ToyNeural(nll_fn)


def byte_counts(ids, targets):
    return (targets % 5) + (ids % 2)


def tokens_of(n_targets, seed=0):
    return np.random.default_rng(seed).integers(0, 97, n_targets + 1).astype(np.uint16)


def brute_force(tokens, length, stride, n=None):
    """(nats, targets, bytes), one target at a time: each belongs to the first window that reaches it."""
    ids = tokens.astype(np.int64)
    n = len(ids) - 1 if n is None else n
    nats = nbytes = 0
    for i in range(n):
        start = 0
        while i >= start + length:
            start += stride
        row = torch.from_numpy(ids[start : i + 1])[None]
        target = torch.from_numpy(ids[start + 1 : i + 2])[None]
        nats += nll_fn(row, target)[0, -1].item()
        nbytes += byte_counts(int(ids[i]), int(ids[i + 1]))
    return nats, n, nbytes


@pytest.mark.parametrize("n, length, stride", SHAPES)
def test_sliding_windows_partition_the_targets(n, length, stride):
    spans = list(SlidingWindows(length, stride).spans(n))
    owner = [[j for j, s in enumerate(spans) if s.score_from <= i < s.end] for i in range(n)]
    assert all(len(o) == 1 for o in owner)
    # exactly the windows that the definition names, found by trying every start
    wanted = [j * stride for j in range(n + 1) if j == 0 or j * stride + length - stride < n]
    assert [s.start for s in spans] == wanted
    assert all(s.end == min(s.start + length, n) and s.start <= s.score_from < s.end for s in spans)
    # at least length - stride tokens of context before every target but the first window's
    assert all(spans[o[0]].start <= i - (length - stride) for i, o in enumerate(owner) if i >= length)


@pytest.mark.parametrize("n, count", [(62_021_632, 969_057), (40_540_160, 633_409)])
def test_published_window_counts(n, count):
    spans = SlidingWindows(2048, 64).spans(n)
    assert len(spans) == count and spans[count - 1].end == n  # without making a million objects


def check(result, expected):
    nats, n, nbytes = expected
    assert (result.targets, result.bytes) == (n, nbytes)
    assert result.val_loss == pytest.approx(nats / n, rel=1e-6)
    assert result.val_bpb == pytest.approx(nats / nbytes / math.log(2), rel=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 60), st.integers(1, 12), st.data(), st.integers(1, 64))
def test_sliding_score_equals_brute_force(n, length, data, batch_tokens):
    stride = data.draw(st.integers(1, length))
    tokens = tokens_of(n, seed=n)
    result = evaluate(SlidingWindows(length, stride, batch_tokens), TOY, tokens, byte_counts, Dist())
    check(result, brute_force(tokens, length, stride))


@pytest.mark.parametrize("n", [1, 5, 8, 9, 40])
def test_plain_is_sliding_with_stride_of_a_window(n):
    tokens = tokens_of(n, seed=3)
    check(evaluate(PlainWindows(8), TOY, tokens, byte_counts, Dist()), brute_force(tokens, 8, 8))


def test_truncated_drops_the_tail_as_the_baseline_does():
    tokens = tokens_of(29)
    result = evaluate(PlainWindows(8, truncated=True), TOY, tokens, byte_counts, Dist())
    check(result, brute_force(tokens, 8, 8, n=24))
    assert result.subset == "first 24 of 29 targets of the val split"
    with pytest.raises(DataError, match="no target to score"):
        evaluate(PlainWindows(8, truncated=True), TOY, tokens[:8], byte_counts, Dist())


def test_subset_and_padding_are_reported():
    tokens, shapes = tokens_of(1999), []

    def spying(ids, targets):
        shapes.append(tuple(ids.shape))
        return nll_fn(ids, targets)

    seen = []
    result = evaluate(
        SlidingWindows(16, 4, batch_tokens=160),
        ToyNeural(spying), tokens, byte_counts, Dist(), limit_tokens=1234, progress=lambda *a: seen.append(a),
    )  # fmt: skip
    check(result, brute_force(tokens, 16, 4, n=1234))
    assert result.subset == "first 1,234 of 1,999 targets of the val split"
    assert len(set(shapes)) == 1  # one shape: a compiled model compiles once
    assert result.tokens_forwarded == len(shapes) * math.prod(shapes[0])
    assert seen == [(i + 1, len(shapes)) for i in range(len(shapes))]
    whole = evaluate(PlainWindows(16), TOY, tokens, byte_counts, Dist(), limit_tokens=10**9)
    assert whole.subset == "all 1,999 targets of the val split"


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.int64])
def test_tokens_of_any_integer_type_array_memmap_or_tensor(kind, tmp_path):
    tokens = tokens_of(50)
    expected = brute_force(tokens, 8, 3)
    tokens.astype(kind).tofile(tmp_path / "val.bin")
    mapped = np.memmap(tmp_path / "val.bin", dtype=kind, mode="r")
    for stream in (tokens.astype(kind), torch.from_numpy(tokens.astype(kind)), mapped):
        check(evaluate(SlidingWindows(8, 3), TOY, stream, byte_counts, Dist()), expected)


@pytest.mark.parametrize("world", [2, 3, 8])
@pytest.mark.parametrize("n", [5, 200])  # 5: ranks without a span
def test_any_number_of_ranks_gives_the_sums_of_one(world, n):
    tokens = tokens_of(n)
    expected = brute_force(tokens, 16, 5)
    results = on_ranks(world, lambda d: evaluate(SlidingWindows(16, 5, 64), TOY, tokens, byte_counts, d))
    for result in results:
        check(result, expected)
    assert len({(r.val_loss, r.val_bpb) for r in results}) == 1


class Broken(PlainWindows):
    """Windows with one defect."""

    def __init__(self, spoil):
        super().__init__(8)
        self.spoil = spoil

    def spans(self, n_targets):
        return self.spoil(list(super().spans(n_targets)))


DEFECTS = {
    "gap": lambda s: s[:2] + s[3:],
    "twice": lambda s: [*s, s[0]],
    "257 times": lambda s: s + [s[0]] * 256,  # wraps a uint8 count to 1
    "swapped": lambda s: [s[0], s[0], *s[2:]],  # as many scores as targets
    "overlap": lambda s: [s[0], Span(0, 16, 7), *s[2:]],
}


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("world", [1, 2])
def test_wrong_coverage_is_caught_on_every_rank(defect, world):
    def work(dist):
        evaluator = Broken(DEFECTS[defect])
        evaluator.seq_len = 16
        return evaluate(evaluator, TOY, tokens_of(40), byte_counts, dist)

    errors = on_ranks(world, work)
    assert all(isinstance(e, CoverageError) and "exactly once" in str(e) for e in errors)


def test_scores_come_before_adaptation():
    """An evaluator that learns lowers all later scores by what it learned, and no earlier one."""

    class Learner(PlainWindows):
        learned, log = 0, []

        def score(self, batch, neural):
            self.log.append(("score", batch.spans[0].start))
            assert not torch.is_grad_enabled()
            return super().score(batch, neural) + self.learned

        def adapt(self, batch, neural):
            self.log.append(("adapt", batch.spans[0].start))
            assert torch.is_grad_enabled()
            self.learned += 1
            return batch.intervals

    tokens, learner = tokens_of(40), Learner(8, batch_tokens=8)
    result = evaluate(learner, TOY, tokens, byte_counts, Dist())
    assert learner.log == [(what, start) for start in range(0, 40, 8) for what in ("score", "adapt")]
    nats, n, _ = brute_force(tokens, 8, 8)
    assert result.val_loss == pytest.approx((nats + 8 * (0 + 1 + 2 + 3 + 4)) / n, rel=1e-6)


def test_a_future_token_cannot_change_a_score_that_is_past():
    tokens = tokens_of(60)
    changed = tokens.copy()
    changed[41:] = (changed[41:] + 1) % 97  # targets 40 and later
    for evaluator in (SlidingWindows(16, 4), PlainWindows(16)):
        a, b = (evaluate(evaluator, TOY, t, byte_counts, Dist(), limit_tokens=40) for t in (tokens, changed))
        assert (a.val_loss, a.val_bpb) == (b.val_loss, b.val_bpb)


def test_bad_requests_are_errors():
    with pytest.raises(ConfigError, match="1 <= stride <= seq_len"):
        SlidingWindows(8, 9)
    with pytest.raises(ConfigError):
        SlidingWindows(8, 0)
    with pytest.raises(DataError, match="at least 2 tokens"):
        evaluate(PlainWindows(8), TOY, tokens_of(0), byte_counts, Dist())
    with pytest.raises(NumericalError):
        evaluate(PlainWindows(8), ToyNeural(lambda i, t: i / torch.zeros(1)), tokens_of(9), byte_counts, Dist())
