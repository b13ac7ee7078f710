"""Chunked training of the whole model: what is scored when, with what, and what is learned."""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest
import torch
from ranks import on_ranks
from ttt_helpers import VOCAB, WIDTH, byte_counts, changed_behind, random_stream, run, small_model

from pgolf.data.batch import Batch
from pgolf.dist import Dist
from pgolf.errors import ConfigError, PgolfError
from pgolf.eval.base import CoverageError
from pgolf.eval.keep import Keeper
from pgolf.eval.ledger import UPDATE
from pgolf.eval.windowed import SlidingWindows
from pgolf.model.roles import Role, roles_of
from pgolf.ttt.chunked import ChunkTtt
from pgolf.ttt.config import SgdConfig
from pgolf.ttt.learner import Learner, Text, rate_at, trained_params

BASE = SgdConfig(chunk=32, epochs=2, lr=0.05)
STREAM = random_stream(150, documents=(40, 90))  # 149 targets: 5 chunks, the last of 21
VARIANTS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "lr": 1e-3, "weight_decay": 0.1},
    "shadow": {"shadow": 0.5, "max_chunks": 3},
    "sam": {"sam": 0.05},
    "bytes": {"byte_weighted": True},
    "late": {"trained": "late", "late_blocks": 1},
    "query": {"trained": "query", "lr": 0.5},
    "v2": {"lr_floor": 0.1, "block_rates": True, "momentum": 0.3},
    "steps": {"step_rows": 1, "epochs": 1},
}


def ttt(batch_tokens=8 * WIDTH, **kw):
    return ChunkTtt(replace(BASE, **kw), WIDTH, 4, batch_tokens, byte_counts=byte_counts)


@pytest.mark.parametrize("n", [10, 32, 33, 149])
def test_each_window_is_in_one_chunk_and_stays_in_it(n):
    blocks = ttt().blocks(n)
    assert len(blocks) == -(-n // 32)
    assert [w for b in blocks for w in b] == list(SlidingWindows(WIDTH, 4).spans(n))
    for c, block in enumerate(blocks):
        assert len(block) and all(32 * c <= w.score_from and w.end <= 32 * (c + 1) for w in block)


def test_published_chunk_counts():
    for n, chunks in ((62_021_632, 1893), (40_540_160, 1238)):
        evaluator = ChunkTtt(SgdConfig(), 2048, 64)
        assert len(evaluator.blocks(n)) == chunks


def test_rate_is_a_cosine_over_chunks():
    assert rate_at(BASE, 0, 10) == 0.05 and rate_at(BASE, 9, 10) == pytest.approx(0, abs=1e-12)
    assert rate_at(BASE, 3, 10) == pytest.approx(0.05 * 0.5 * (1 + math.cos(math.pi * 3 / 9)))
    assert rate_at(replace(BASE, max_chunks=4), 3, 10) == pytest.approx(0, abs=1e-12)
    assert rate_at(replace(BASE, lr_floor=0.1), 9, 10) == pytest.approx(0.005)
    assert rate_at(replace(BASE, warmup_chunks=2), 0, 10) == 0.025
    assert rate_at(BASE, 0, 1) == 0.05


def test_rate_zero_is_plain_sliding_to_the_bit():
    plain, nats = run(SlidingWindows(WIDTH, 4, WIDTH), STREAM)
    for variant in ("sgd", "shadow"):
        still, same = run(ttt(**{**VARIANTS[variant], "lr": 0.0}, batch_tokens=WIDTH), STREAM)
        if variant != "shadow":  # an average of equal weights rounds
            assert torch.equal(nats, same) and still.val_bpb == plain.val_bpb
        assert torch.allclose(nats, same, atol=1e-6)


@pytest.mark.parametrize("variant", ["sgd", "shadow", "bytes"])
def test_a_score_does_not_depend_on_later_tokens(variant):
    _, nats = run(ttt(**VARIANTS[variant]), STREAM)
    _, plain = run(ttt(lr=0.0), STREAM)
    assert not torch.equal(nats[32:], plain[32:])  # it does learn, and
    assert torch.equal(nats[:32], plain[:32])  # not before the first chunk is scored
    for t in (31, 100):
        _, other = run(ttt(**VARIANTS[variant]), changed_behind(STREAM, t))
        assert torch.equal(nats[: t + 1], other[: t + 1])
        assert not torch.equal(nats[t + 1 :], other[t + 1 :])


class Reversed(ChunkTtt):
    """Trains on a chunk before it is scored."""

    honest = True

    def adapt_block(self, number, neural):
        learned = super().adapt_block(number + 1, neural) if number + 2 < self.chunks else ()
        return learned if self.honest else ()


def test_training_before_scoring_is_caught():
    with pytest.raises(CoverageError, match="learns from target 32 before its score is final"):
        run(Reversed(BASE, WIDTH, 4), STREAM)
    for result in on_ranks(2, lambda d: run(Reversed(BASE, WIDTH, 4), STREAM, dist=d)):
        assert isinstance(result, CoverageError)
    liar = Reversed(BASE, WIDTH, 4)
    liar.honest = False  # then it takes a changed future to see it
    _, nats = run(liar, STREAM)
    _, other = run(liar, changed_behind(STREAM, 50))
    assert not torch.equal(nats[:51], other[:51])


def test_ledger_and_last_chunk():
    result, _ = run(ttt(), STREAM)
    learned = [(e.start, e.end) for e in result.ledger.events if e.kind == UPDATE]
    assert learned == [(0, 32), (32, 64), (64, 96), (96, 128)]  # not the last, of 21
    result, _ = run(ttt(max_chunks=2), STREAM)
    assert [(e.start, e.end) for e in result.ledger.events if e.kind == UPDATE] == [(0, 32), (32, 64)]


# 32 random tokens, over and over
TEXT = np.resize(np.random.default_rng(3).integers(2, VOCAB, 32), 230).astype(np.uint16)


@lru_cache
def plain_loss():
    return run(SlidingWindows(WIDTH, 4), TEXT)[0].val_loss


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_learns(variant):
    kw = {"epochs": 4, "lr": 0.1, **VARIANTS[variant]}
    kw |= {"lr": 0.01} if variant == "adamw" else {"max_chunks": 0} if variant == "shadow" else {}
    taught, nats = run(ttt(**kw), TEXT)
    gain = plain_loss() - taught.val_loss
    assert gain > (0.005 if variant == "query" else 0.15), f"{variant}: {plain_loss()} -> {taught.val_loss}"
    assert nats[-60:].mean() < nats[:60].mean()


@pytest.mark.parametrize("variant, worlds", [("sgd", (2, 3)), ("sam", (3,)), ("bytes", (3,))])
def test_any_number_of_ranks_learns_the_same(variant, worlds):
    """A chunk is 2 rows: with 3 ranks one has none to train on, and joins."""
    kw = VARIANTS[variant]
    one, _ = run(ttt(**kw), STREAM)
    still, _ = run(ttt(lr=0.0), STREAM)
    assert abs(one.val_bpb - still.val_bpb) > 1e-4
    for world in worlds:
        models = [small_model() for _ in range(world)]
        results = on_ranks(world, lambda d, models=models: run(ttt(**kw), STREAM, models[d.rank], d)[0])
        assert len({r.val_bpb for r in results}) == 1
        assert results[0].val_bpb == pytest.approx(one.val_bpb, abs=1e-5)


class Stop(PgolfError):
    pass


@pytest.mark.parametrize("variant", ["adamw", "shadow"])
def test_a_killed_evaluation_goes_on_to_the_same_bits(variant, tmp_path):
    whole, nats = run(ttt(**VARIANTS[variant]), STREAM)

    def killer(done, all_rounds):
        if done == 4:
            raise Stop("killed")

    keeper = lambda: Keeper(tmp_path, "ttt", {"of": "this"}, Dist(), seconds=0.0)
    with pytest.raises(Stop):
        run(ttt(**VARIANTS[variant]), STREAM, watch=killer, keep=keeper())
    rounds = []
    resumed, again = run(ttt(**VARIANTS[variant]), STREAM, keep=keeper(), progress=lambda *a: rounds.append(a))
    assert rounds[0][0] == 4  # the round in which it died was not saved
    assert resumed.val_bpb == whole.val_bpb and torch.equal(nats, again)
    assert resumed.ledger.digest() == whole.ledger.digest()


def test_parts_are_chosen_by_role_and_block():
    model = small_model()
    everything = {i.name for i in roles_of(model)}
    names = lambda **kw: {i.name for i in trained_params(model, replace(BASE, **kw))}
    assert names() == everything
    assert names(trained="query") == {
        i.name for i in roles_of(model) if i.param is model.blocks[i.block or 0].attn.q.weight
    }
    assert len(names(trained="query")) == 2
    late = names(trained="late", late_blocks=1)
    for info in roles_of(model):
        wanted = info.block == 1 or info.role is Role.VECTOR or info.param is model.embed.weight  # tied: the head
        assert (info.name in late) == wanted
    assert names(trained="late", late_blocks=9) >= {i.name for i in roles_of(model) if i.block is not None}
    assert all(i.block != 0 for i in trained_params(model, replace(BASE, freeze_blocks=1)))
    assert {i.role for i in trained_params(model, replace(BASE, freeze_tables=True))} == {Role.MATRIX, Role.VECTOR}


def test_a_step_is_the_optimisers_own():
    """Against torch's SGD on the whole batch, with momentum over two steps and with clipping."""
    model, twin = small_model(), small_model()
    learner = Learner(model, replace(BASE, epochs=2, clip=0.5), Dist(), 8, WIDTH)
    ids = torch.from_numpy(STREAM[:33].astype(np.int64))
    learner.learn(Text(ids[:-1], ids[1:]), 0.1)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        twin(Batch(ids[:-1].view(2, WIDTH), ids[1:].view(2, WIDTH)))[0].mean().backward()
        torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        optimizer.step()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_shadow_scores_and_raw_weights_train():
    model = small_model()
    start = [p.detach().clone() for p in model.parameters()]
    learner = Learner(model, replace(BASE, shadow=0.75, epochs=1), Dist(), 8, WIDTH)
    ids = torch.from_numpy(STREAM[:33].astype(np.int64))
    learner.learn(Text(ids[:-1], ids[1:]), 0.1)
    for held, raw, first in zip(model.parameters(), learner.weights, start, strict=True):
        assert torch.allclose(held, 0.75 * first + 0.25 * raw, atol=1e-6)
    assert any(not torch.equal(held, raw) for held, raw in zip(model.parameters(), learner.weights, strict=True))


def test_small_steps_are_not_lost_in_bf16_tables():
    model = small_model(compute_dtype=torch.bfloat16)
    assert model.embed.weight.dtype == torch.bfloat16
    learner = Learner(model, replace(BASE, epochs=1), Dist(), 8, WIDTH)
    before = [w.clone() for w in learner.weights]
    ids = torch.from_numpy(STREAM[:33].astype(np.int64))
    learner.learn(Text(ids[:-1], ids[1:]), 1e-6)
    assert all(w.dtype == torch.float32 for w in learner.weights)
    assert any(not torch.equal(a, b) for a, b in zip(before, learner.weights, strict=True))


def test_bad_requests_are_errors():
    for kw in ({"chunk": 8}, {"chunk": 34}):
        with pytest.raises(ConfigError, match="multiples of"):
            ttt(**kw)
    with pytest.raises(ConfigError, match="byte_counts"):
        ChunkTtt(replace(BASE, byte_weighted=True), WIDTH, 4)
