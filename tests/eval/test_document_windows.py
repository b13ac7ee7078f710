"""Documents packed into rows: every target once, and each document as if it were alone."""

import itertools

import numpy as np
import pytest
import torch
from helpers import ToyNeural
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from test_windowed import byte_counts

from pgolf.dist import Dist
from pgolf.errors import ConfigError
from pgolf.eval.base import evaluate
from pgolf.eval.documents import DocumentWindows
from pgolf.eval.order import document_bounds


class Isolated(ToyNeural):
    """Nats depend on the inputs of the own segment up to the position, by cu_seqlens and nothing else."""

    def __init__(self):
        pass

    def nats(self, batch, index):
        flat, targets, out = batch.ids.flatten(), batch.targets.flatten(), torch.zeros(batch.ids.numel())
        starts = batch.cu_seqlens.tolist()
        for a, b in itertools.pairwise(starts):
            weight = 0.7 ** torch.arange(b - a).float()
            past = torch.cumsum(flat[a:b].float() * weight, 0)
            out[a:b] = 1 + torch.sin(past + 0.1 * targets[a:b]).abs()
        return out[index]


def alone(tokens, length, stride):
    """Nats of all targets, document by document, one target at a time."""
    bounds, total = document_bounds(torch.from_numpy(tokens)).tolist(), 0.0
    for a, b in itertools.pairwise(bounds):
        for i in range(a, min(b, len(tokens) - 1)):
            start = a
            while i >= start + length:
                start += stride
            past = sum(float(t) * 0.7**k for k, t in enumerate(tokens[start : i + 1]))
            total += 1 + abs(np.sin(past + 0.1 * tokens[i + 1]))
    return total


STREAMS = st.lists(st.integers(0, 5), min_size=2, max_size=80).map(lambda x: np.array(x, dtype=np.int64))


@settings(max_examples=80, deadline=None)
@given(STREAMS, st.integers(1, 9), st.data(), st.integers(1, 40))
def test_documents_score_as_if_alone(tokens, length, data, batch_tokens):
    stride = data.draw(st.integers(1, length))
    evaluator = DocumentWindows(length, stride, batch_tokens)
    got = evaluate(evaluator, Isolated(), tokens, lambda i, t: torch.ones_like(t), Dist())
    assert got.targets == len(tokens) - 1
    assert got.val_loss * got.targets == pytest.approx(alone(tokens, length, stride), rel=1e-5)


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree(world):
    tokens = np.random.default_rng(0).integers(0, 6, 200)
    one = evaluate(DocumentWindows(8, 3, 64), Isolated(), tokens, byte_counts, Dist())
    for got in on_ranks(world, lambda d: evaluate(DocumentWindows(8, 3, 64), Isolated(), tokens, byte_counts, d)):
        assert got.val_bpb == pytest.approx(one.val_bpb, abs=1e-7) and got.bytes == one.bytes


def test_shapes_stay_the_same_and_rows_are_used():
    tokens = np.random.default_rng(1).integers(0, 12, 3000)
    shapes = []

    class Spy(Isolated):
        def nats(self, batch, index):
            shapes.append((batch.ids.shape, index.shape, batch.cu_seqlens.shape))
            return super().nats(batch, index)

    got = evaluate(DocumentWindows(64, 0, 256), Spy(), tokens, lambda i, t: torch.ones_like(t), Dist())
    assert len({s[0] for s in shapes}) == 1 and len(set(shapes[3:])) == 1  # the largest has been seen by then
    assert got.tokens_forwarded < 1.35 * len(tokens)  # next fit of documents of 12 on average


def test_stride_longer_than_a_window_is_refused():
    with pytest.raises(ConfigError, match="1 <= stride <= seq_len"):
        DocumentWindows(8, 9)
