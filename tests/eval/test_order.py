"""One order for all parts: what a decoder of it would see."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgolf.errors import ConfigError
from pgolf.eval.order import STREAM, Order, document_bounds, length_sorted, same

STREAMS = st.lists(st.integers(0, 4), min_size=2, max_size=40).map(torch.tensor)


@settings(max_examples=200, deadline=None)
@given(STREAMS, st.randoms())
def test_a_permuted_stream_is_the_documents_in_that_order(tokens, random):
    """Each target's token and the tokens of its document before it stay what they were."""
    bounds = document_bounds(tokens).tolist()
    which = list(range(len(bounds) - 1))
    random.shuffle(which)
    stream, where = Order("shuffled", torch.tensor(which)).permuted(tokens)
    assert sorted(where.tolist()) == sorted(set(where.tolist())) and len(where) == len(tokens) - 1
    pieces = [tokens[bounds[d] : bounds[d + 1]].tolist() for d in which]
    assert stream[: len(tokens)].tolist() == [t for piece in pieces for t in piece]
    for start, end in itertools.pairwise(bounds):
        for target in range(start, min(end, len(tokens) - 1)):
            at = int(where[target])
            if target + 1 < end or (end < len(tokens) and bounds[0] == 0 and tokens[0] == 1):
                assert stream[at] == tokens[target + 1]
            inside = target - start
            assert stream[at - 1 - inside : at].tolist() == tokens[start : target + 1].tolist()


def test_stream_order_changes_nothing():
    tokens = torch.tensor([1, 5, 6, 1, 7])
    stream, where = STREAM.permuted(tokens)
    assert torch.equal(stream, tokens) and where.tolist() == [1, 2, 3, 4]


def test_length_sorted_puts_long_documents_first_and_keeps_ties():
    tokens = torch.tensor([1, 5, 1, 5, 6, 7, 1, 8, 1])
    order = length_sorted(tokens)
    assert order.documents.tolist() == [1, 0, 2, 3]
    assert order != STREAM and order == length_sorted(tokens.clone()) and order.id.startswith("length_sorted:")
    assert order != length_sorted(torch.tensor([1, 5, 1, 5, 6, 7, 1, 8, 9, 9, 9]))


def test_two_orders_are_refused():
    order = length_sorted(torch.tensor([1, 5, 1, 5, 6]))
    assert same(STREAM, STREAM) == STREAM and same() == STREAM
    with pytest.raises(ConfigError, match="2 orders, length_sorted"):
        same(STREAM, order)


def test_documents_that_do_not_fit_the_stream_are_refused():
    with pytest.raises(ValueError, match="3 documents, the stream has 2"):
        Order("x", torch.arange(3)).permuted(torch.tensor([1, 2, 1]))
