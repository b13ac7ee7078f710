"""The ledger proves score before update, and shows every way of breaking it."""

import json

import pytest
from ranks import on_ranks

from pgolf.dist import Dist
from pgolf.eval.ledger import Ledger
from pgolf.eval.order import Order


def honest(chunks=((0, 4), (4, 8), (8, 10))):
    ledger = Ledger()
    for chunk in chunks:
        ledger.score("ttt", [chunk])
        ledger.update("ttt", [chunk])
    return ledger


def test_an_honest_ledger_has_no_problems():
    assert honest().problems(10) == []
    once = Ledger()
    once.each("ngram", [(0, 10)])
    assert once.problems(10) == []


def test_rows_that_continue_each_other_are_one():
    ledger = Ledger()
    for start in range(0, 1000, 10):
        ledger.score("neural", [(start, start + 10)])
    assert len(ledger.events) == 1 and ledger.problems(1000) == []


@pytest.mark.parametrize(
    "chunks, text",
    [
        ([(0, 4), (5, 10)], "targets 4 to 4 are never scored"),
        ([(0, 4), (3, 10)], "targets 3 to 3 are scored again"),
        ([(0, 10), (0, 10)], "targets 0 to 9 are scored again"),
        ([(0, 9)], "targets 9 to 9 are never scored"),
        ([(0, 11)], "targets up to 10 are scored, there are 10"),
        ([], "nothing was scored"),
    ],
)
def test_coverage(chunks, text):
    assert any(text in p for p in honest(chunks).problems(10))


def test_learning_before_scoring_is_seen():
    ledger = Ledger()
    ledger.update("ttt", [(0, 4)])
    ledger.score("ttt", [(0, 10)])
    assert ledger.problems(10) == ["ttt: learns from target 0 before its score is final"]
    ledger = honest()
    ledger.update("ttt", [(2, 12)])
    assert ledger.problems(10) == ["ttt: learns from target 10, which is not scored"]


def test_half_of_an_update_may_not_be_early_either():
    ledger = Ledger()
    ledger.score("ttt", [(0, 4)])
    ledger.update("ttt", [(0, 8)])
    ledger.score("ttt", [(4, 10)])
    assert ledger.problems(10) == ["ttt: learns from target 4 before its score is final"]


def ranks_that(meet):
    def work(dist):
        ledger = Ledger(dist.rank)
        ledger.score("ttt", [(0, 5)] if dist.rank == 0 else [(5, 10)])
        if meet:
            ledger.barrier()
        ledger.update("ttt", [(0, 10)])
        return ledger.merged(dist)

    return on_ranks(2, work)


def test_other_ranks_scores_count_after_a_barrier_only():
    a, b = ranks_that(meet=True)
    assert a.problems(10) == [] and a.digest() == b.digest()
    assert len(ranks_that(meet=False)[0].problems(10)) == 2


def test_two_orders_are_seen():
    ledger = honest()
    other = Ledger(order=Order("length_sorted"))
    other.each("ngram", [(0, 10)])
    ledger.events += other.events
    assert ledger.problems(10) == ["components have 2 orders: length_sorted, stream"]


def test_it_survives_a_file(tmp_path):
    ledger = honest().merged(Dist())
    ledger.write(tmp_path / "ledger.json")
    data = json.loads((tmp_path / "ledger.json").read_text())
    again = Ledger.from_rows(data["events"])
    assert again.digest() == data["digest"] == ledger.digest() and again.problems(10) == []
    assert honest(((0, 4), (4, 10))).digest() != ledger.digest()
