"""A killed evaluation goes on and ends with the same numbers."""

import pytest
import torch
from helpers import ToyNeural
from ranks import on_ranks
from test_windowed import byte_counts, nll_fn, tokens_of

from pgolf.dist import Dist
from pgolf.errors import PgolfError
from pgolf.eval.base import evaluate
from pgolf.eval.keep import Keeper
from pgolf.eval.stats import Collector
from pgolf.eval.windowed import SlidingWindows

WHAT = {"artifact": "a", "data": "d"}


class Killed(PgolfError):
    """As if the process had died."""


class Learner(SlidingWindows):
    """Its state changes with every batch, and shows in every later score."""

    learned = 0.0

    def start(self, tokens, n_targets, neural, dist):
        self.learned = 0.0

    def score(self, batch, neural):
        return super().score(batch, neural) + self.learned

    def adapt(self, batch, neural):
        self.learned += float(batch.scored.sum()) * 1e-4
        return batch.intervals

    def state(self):
        return {"learned": self.learned}

    def load_state(self, state):
        self.learned = state["learned"]


def run(dist, folder=None, die_at=0, what=WHAT, said=None, seconds=0.0):
    keep = (
        Keeper(folder, "sliding", what, dist, seconds=seconds, say=[].append if said is None else said.append)
        if folder
        else None
    )
    fed = []

    def watch(done, rounds):
        if done == die_at:
            raise Killed("killed")

    def nll(ids, targets):
        fed.append(1)
        return nll_fn(ids, targets)

    collector = Collector(300)
    args = (Learner(16, 4, 160), ToyNeural(nll), tokens_of(300), byte_counts, dist)
    result = evaluate(*args, readers=[collector], watch=watch, keep=keep)
    return result, collector.merged(dist, result.order, "").nats, len(fed)


@pytest.mark.parametrize("world", [1, 2])
def test_killed_and_resumed_equals_uninterrupted(world, tmp_path):
    whole = on_ranks(world, run)
    said = []
    for die_at in (2, 3, 5):
        errors = on_ranks(world, lambda d, at=die_at: run(d, tmp_path, die_at=at))
        assert all(isinstance(e, Killed) for e in errors)
    resumed = on_ranks(world, lambda d: run(d, tmp_path, said=said))
    for (a, stats_a, fed_a), (b, stats_b, fed_b) in zip(whole, resumed, strict=True):
        assert (a.val_loss, a.val_bpb, a.targets, a.tokens_forwarded) == (
            b.val_loss, b.val_bpb, b.targets, b.tokens_forwarded,
        )  # fmt: skip
        assert a.ledger.digest() == b.ledger.digest() and torch.equal(stats_a, stats_b)
        assert fed_b < fed_a  # it did not start anew
    assert any("goes on behind round" in line for line in said)
    assert not list(tmp_path.iterdir())  # nothing is left to go on from


def test_a_save_of_something_else_or_a_damaged_one_is_not_used(tmp_path):
    whole = run(Dist())
    for spoil in ("stranger", "damaged"):
        with pytest.raises(Killed):
            run(Dist(), tmp_path, die_at=3)
        (path,) = tmp_path.iterdir()
        if spoil == "damaged":
            path.write_bytes(path.read_bytes()[:-100])
        result, _, fed = run(Dist(), tmp_path, what=WHAT | {"artifact": "b" if spoil == "stranger" else "a"})
        assert result.val_loss == whole[0].val_loss and fed == whole[2]


def test_a_rank_without_its_file_makes_all_start_anew(tmp_path):
    on_ranks(2, lambda d: run(d, tmp_path, die_at=3))
    next(tmp_path.glob("*rank1*")).unlink()
    whole, again = on_ranks(2, run), on_ranks(2, lambda d: run(d, tmp_path))
    assert [r[2] for r in whole] == [r[2] for r in again] and whole[0][0].val_loss == again[0][0].val_loss


def test_it_is_saved_when_it_is_time(tmp_path):
    with pytest.raises(Killed):
        run(Dist(), tmp_path, die_at=3, seconds=1e6)
    assert not tmp_path.exists() or not list(tmp_path.iterdir())
