"""Counts of a stream against dictionaries: orders, document resets, chunks, moved documents, continuation counts."""

from collections import Counter, defaultdict

import pytest
import torch
from ngram_streams import stream

from pgolf.eval.order import BOS, STREAM, Order, document_bounds
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.reference import DictCounts
from pgolf.ngram.rows import CountRows

ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16)
FIELDS = ("context_count", "pair_count", "distinct", "leader", "leader_count")


def sequential(tokens: list[int], n: int, within: bool, chunk: int) -> list[tuple[int, ...]]:
    """FIELDS before each target, by a program that inserts each chunk's targets after the chunk."""
    rows, leaders, waiting, out = defaultdict(Counter), {}, [], []
    start = 0
    for i in range(len(tokens) - 1):
        if tokens[i] == BOS:
            start = i
        if i % (chunk or 1) == 0:
            for context, x in waiting:
                rows[context][x] += 1
                if rows[context][x] > leaders.get(context, (-1, 0))[1]:
                    leaders[context] = (x, rows[context][x])
            waiting = []
        if i + 1 - n < (start if within else 0):
            out.append((0, 0, 0, -1, 0))
            continue
        context, x = tuple(tokens[i + 1 - n : i + 1]), tokens[i + 1]
        row = rows[context]
        out.append((sum(row.values()), row[x], len(+row), *leaders.get(context, (-1, 0))))
        waiting.append((context, x))
    return out


def rows_of(counts) -> list[tuple[int, ...]]:
    return list(zip(*(getattr(counts, f).tolist() for f in FIELDS), strict=True))


@pytest.mark.parametrize("vocab, size", [(2, 160), (5, 140), (50, 200)])
@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("chunk", [0, 1, 37])
def test_counts_equal_a_sequential_program(vocab, size, within, chunk):
    tokens = stream(size, vocab, seed=vocab + chunk, documents=vocab > 2)
    counts = StreamCounts(tokens, within_documents=within, chunk=chunk)
    for n in ORDERS:
        assert rows_of(counts.of(n)) == sequential(tokens.tolist(), n, within, chunk), n


def moved(tokens: torch.Tensor, documents: list[int]) -> tuple[list[int], list[int]]:
    """The stream with its documents in another order, and the target of each of its tokens but the first; -1 = none.

    A document's targets are the tokens after each of its own; the one behind its last is the next one's BOS.
    """
    bounds = document_bounds(tokens).tolist()
    out, target = [], []
    for d in documents:
        for i in range(bounds[d], bounds[d + 1]):
            out.append(tokens[i].item())
            target.append(i if i < tokens.numel() - 1 else -1)
    return [*out, BOS], target


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("within", [True, False])
def test_moved_documents(within, chunk):
    """Counts in another order of documents are those of a stream that has them so; its end is in the middle of it."""
    tokens = stream(150, 4, seed=3, documents=True)
    size = document_bounds(tokens).numel() - 1
    documents = torch.randperm(size, generator=torch.Generator().manual_seed(5))
    if documents[-1] != size - 1:  # the stream's last document, which no BOS follows, comes last here
        documents = torch.cat([documents[documents != size - 1], torch.tensor([size - 1])])
    counts = StreamCounts(tokens, Order("other", documents), within_documents=within, chunk=chunk)
    permuted, target = moved(tokens, documents.tolist())
    for n in (1, 2, 3):
        want = sequential(permuted[:-1], n, within, chunk)
        got = rows_of(counts.of(n))
        assert [got[i] for i in target[:-1]] == want
    assert counts.next_tokens().tolist() == tokens[1:].tolist()


def test_the_last_document_first():
    """Its end is followed by a BOS that is nobody's target: it is not counted."""
    tokens = torch.tensor([BOS, 5, 6, BOS, 5, 7])
    order = Order("other", torch.tensor([1, 0]))  # BOS 5 7 | BOS 5 6 | BOS
    counts = StreamCounts(tokens, order)
    # targets: 5, 6, BOS, 5, 7 by place in the stream; the second document goes first
    assert counts.of(1).context_count.tolist() == [1, 1, 0, 0, 0]
    assert counts.of(1).pair_count.tolist() == [1, 0, 0, 0, 0]
    assert counts.sequence.tolist() == [3, 4, 0, 1, 2]


def test_a_target_that_is_bos_has_the_context_that_any_other_has():
    """Else the formula that applies would tell whether the target is BOS, and the vector would not sum to one."""
    tokens = torch.tensor([BOS, 7, 8, BOS, 7, 8, BOS, 7, 8])
    for last in (BOS, 7, 9):
        tokens[6] = last
        counts = StreamCounts(tokens).of(2)
        assert counts.context_count[5] == 1 and counts.leader[5] == BOS
        assert counts.pair_count[5] == (last == BOS)


@pytest.mark.parametrize("chunk", [0, 9])
@pytest.mark.parametrize("orders", [(1, 2, 3), (1, 3, 4, 8)])
def test_continuation_counts(orders, chunk):
    tokens = stream(130, 4, seed=8, documents=True)
    counts = StreamCounts(tokens, chunk=chunk)
    found = {n: counts.continuation(n, longer) for n, longer in zip(orders, (*orders[1:], None), strict=True)}
    fewer = 0
    for i in range(tokens.numel() - 1):
        known = DictCounts(tokens[: i + 1].tolist(), orders, chunk=chunk, continuation=True)
        for n in orders:
            row, of = known.row(n) or {}, found[n]
            x = tokens[i + 1].item()
            want = (sum(row.values()), row.get(x, 0), len(row))
            assert (of.context_count[i], of.pair_count[i], of.distinct[i]) == want, (n, i)
            fewer += int(counts.of(n).context_count[i]) - want[0]
    assert fewer > 100  # they do differ from plain counts


@pytest.mark.parametrize("chunk", [0, 6])
@pytest.mark.parametrize("order", [STREAM, Order("other", torch.tensor([2, 0, 1, 3]))], ids=lambda o: o.name)
def test_rows_are_whole_vectors_of_the_counts(order, chunk):
    tokens = torch.cat([torch.tensor([BOS]), stream(60, 4, seed=2) + 2])
    tokens[[20, 33, 47]] = BOS
    counts = StreamCounts(tokens, order, chunk=chunk)
    at = torch.randperm(60, generator=torch.Generator().manual_seed(1))[:40]
    for n in (1, 2, 4):
        of = counts.of(n)
        rows = CountRows(counts, n).before(at, 6)
        i = at if counts.sequence is None else counts.sequence[at]
        assert torch.equal(rows.sum(1).int(), of.context_count[i])
        assert torch.equal((rows > 0).sum(1).int(), of.distinct[i])
        assert torch.equal(rows.gather(1, tokens[1:][i][:, None])[:, 0].int(), of.pair_count[i])
        assert torch.equal(rows.max(1).values.int(), of.leader_count[i])


def test_kept_counts_are_the_same():
    tokens = stream(100, 3, seed=1)
    kept, not_kept = StreamCounts(tokens, keep=True), StreamCounts(tokens, keep=False)
    assert kept.of(2) is kept.of(2) and not_kept.of(2) is not not_kept.of(2)
    assert all(torch.equal(a, b) for a, b in zip(kept.of(2), not_kept.of(2), strict=True))


def test_short_streams():
    for n in (1, 2):
        counts = StreamCounts(torch.full((n,), 3)).of(4)
        assert [c.tolist() for c in counts] == [[0] * (n - 1)] * 3 + [[-1] * (n - 1), [0] * (n - 1)]
