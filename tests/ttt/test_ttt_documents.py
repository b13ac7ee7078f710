"""Adapters per document: schedule, independence, order of scoring and learning."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import on_ranks
from ttt_helpers import VOCAB, WIDTH, changed_behind, random_stream, run, small_model

from pgolf.dist import Dist
from pgolf.errors import ConfigError, PgolfError
from pgolf.eval.base import CoverageError, Evaluator
from pgolf.eval.keep import Keeper
from pgolf.eval.ledger import SCORE, UPDATE
from pgolf.eval.neural import Temperature
from pgolf.eval.order import STREAM as STREAM_ORDER
from pgolf.eval.order import document_bounds, length_sorted
from pgolf.eval.stats import Collector
from pgolf.ttt.config import LoraConfig, PhasesConfig
from pgolf.ttt.documents import DocumentTtt
from pgolf.ttt.phased import PhasedTtt
from pgolf.ttt.schedule import Document, Schedule, admit, documents
from pgolf.ttt.slot_adam import SlotAdam

LORA = LoraConfig(
    targets="q,k,v,o,mlp,head", rank=2, alpha=4, chunk=6, slots=3, lr=0.05, beta2=0.9, weight_decay=0.1, keep_a=False
)
BOUNDS = [0, 5, 28, 40, 41, 77, 100]  # documents: of 5, 23, 12, 1, 36, 23 tokens, and 19 without their end
STREAM = random_stream(120, documents=BOUNDS[1:])
WARM = replace(LORA, keep_a=True)


def ttt(cfg=LORA, order=STREAM_ORDER):
    return DocumentTtt(cfg, WIDTH, order)


def test_documents_end_with_the_next_bos():
    docs = documents(torch.from_numpy(STREAM.astype(np.int64)), STREAM_ORDER, LORA)
    assert [(d.start, d.size) for d in docs] == [(0, 5), (5, 23), (28, 12), (40, 1), (41, 36), (77, 23), (100, 19)]
    assert sum(d.size for d in docs) == 119
    ended = documents(torch.from_numpy(STREAM[:101].astype(np.int64)), STREAM_ORDER, LORA)  # a BOS that begins nothing
    assert [(d.start, d.size) for d in ended][-1] == (77, 23)
    order = length_sorted(torch.from_numpy(STREAM.astype(np.int64)))
    by_length = documents(torch.from_numpy(STREAM.astype(np.int64)), order, replace(LORA, length_chunks="5:2,20:3"))
    assert [(d.size, d.chunk) for d in by_length] == [(36, 6), (23, 6), (23, 6), (19, 3), (12, 3), (5, 2), (1, 2)]
    with pytest.raises(ValueError, match="7 documents, the stream has 3"):
        documents(torch.from_numpy(STREAM[:35].astype(np.int64)), order, LORA)


def test_a_free_slot_admits_the_next_document():
    assert admit([3, 1, 1, 4, 1], 2) == [(0, 0), (1, 0), (1, 1), (1, 2), (0, 3)]
    docs = [Document(0, 13, 6), Document(13, 2, 6), Document(15, 7, 6)]
    both = Schedule(docs, 2, range(2), 10, strict=True)
    assert [r.rows for r in both] == [(0, 1), (0, 1), (0, 1)]
    assert [r.fresh for r in both] == [(True, True), (False, True), (False, False)]
    assert [r.last for r in both] == [(False, True), (False, False), (True, True)]
    # a window ends with its chunk; that of a last chunk where the chunk would have ended: the end is not known yet
    assert [tuple(r[0]) for r in both] == [(0, 6, 0), (2, 12, 6), (8, 13, 12)]
    assert tuple(Schedule(docs, 2, range(2), 10, strict=False)[2][0]) == (3, 13, 12)
    one = Schedule(docs, 2, range(1, 2), 10, strict=True)
    assert [r.spans for r in one] == [(r[1],) for r in both] and len(Schedule(docs, 2, range(0), 10, True)) == 0


class SameWindows(Evaluator):
    """The windows of a schedule, one document at a time, without adapters."""

    def spans(self, n_targets):
        docs = documents(torch.from_numpy(STREAM.astype(np.int64)), STREAM_ORDER, LORA)
        one = Schedule(docs, 1, range(1), WIDTH, strict=True)
        return [r[0] for r in one]


def test_rate_zero_is_the_same_windows_without_adapters():
    plain, nats = run(SameWindows(WIDTH, 3 * WIDTH), STREAM)
    still, same = run(ttt(replace(LORA, lr=0.0)), STREAM)
    assert torch.equal(nats, same) and still.val_bpb == plain.val_bpb


@pytest.mark.parametrize("cfg", [LORA, WARM], ids=["reset", "warm"])
def test_a_score_does_not_depend_on_later_tokens(cfg):
    """Not even through the length of documents, by which slots and windows are chosen."""
    _, nats = run(ttt(cfg), STREAM)
    _, plain = run(ttt(replace(cfg, lr=0.0)), STREAM)
    assert torch.equal(nats[5:11], plain[5:11]) and not torch.equal(nats[11:17], plain[11:17])
    for t in (9, 45, 70):
        _, other = run(ttt(cfg), changed_behind(STREAM, t))
        assert torch.equal(nats[: t + 1], other[: t + 1]) and not torch.equal(nats[t + 1 :], other[t + 1 :])


def test_documents_are_independent():
    changed = STREAM.copy()
    changed[45:75] = np.random.default_rng(7).integers(2, VOCAB, 30)  # inside of document 4
    (_, a), (_, b) = run(ttt(), STREAM), run(ttt(), changed)
    inside = torch.zeros(119, dtype=torch.bool)
    inside[44:77] = True
    assert torch.equal(a[~inside], b[~inside]) and not torch.equal(a[inside], b[inside])
    (_, warm), (_, cold) = run(ttt(WARM), STREAM), run(ttt(), STREAM)
    assert torch.equal(warm[:28], cold[:28]) and not torch.equal(warm[41:], cold[41:])  # keeps A of its slot's last


def test_last_chunk_is_not_learned_from_and_order_is_in_the_ledger():
    order = length_sorted(torch.from_numpy(STREAM.astype(np.int64)))
    for one in (STREAM_ORDER, order):
        result, _ = run(ttt(order=one), STREAM)
        learned = np.zeros(119, dtype=bool)
        for e in result.ledger.events:
            assert e.order == one.id
            if e.kind == UPDATE:
                learned[e.start : e.end] = True
        for start, size in [(0, 5), (5, 23), (28, 12), (40, 1), (41, 36), (77, 23), (100, 19)]:
            until = (size - 1) // 6 * 6
            assert learned[start : start + until].all() and not learned[start + until : start + size].any()
    assert result.order == order.id and order.id.startswith("length_sorted:")
    first = next(e for e in result.ledger.events if e.kind == SCORE)
    assert first.start == 41  # the longest


class Reversed(DocumentTtt):
    """Learns from a round's chunks before it says their score."""

    def score(self, batch, neural):
        super().score(batch, neural)
        with torch.enable_grad():
            super().adapt(batch, neural)
        return super().score(batch, neural)

    def adapt(self, batch, neural):
        self.scored = None
        return ()


class Ahead(DocumentTtt):
    """Says that it learns from the chunk behind the one that was scored."""

    def adapt(self, batch, neural):
        return [(end, end + 1) for _, end in super().adapt(batch, neural)]


def test_learning_before_scoring_is_caught():
    with pytest.raises(CoverageError, match="before its score is final"):
        run(Ahead(LORA, WIDTH), STREAM)
    _, nats = run(Reversed(LORA, WIDTH), STREAM)  # the ledger believes it; a changed future does not
    _, other = run(Reversed(LORA, WIDTH), changed_behind(STREAM, 13))
    assert not torch.equal(nats[:14], other[:14])


@pytest.mark.parametrize("world", [2, 3, 4])  # 4: a rank without a slot
def test_any_number_of_ranks_gives_the_scores_of_one(world):
    one, nats = run(ttt(WARM), STREAM)
    models = [small_model() for _ in range(world)]
    results = on_ranks(world, lambda d: run(ttt(WARM), STREAM, models[d.rank], d))
    assert all(r.val_bpb == pytest.approx(one.val_bpb, abs=1e-5) for r, _ in results)
    assert torch.allclose(sum(n for _, n in results), nats, atol=1e-5)


def repeating():
    """Documents of 120 tokens that repeat 10 of their own."""
    rng = np.random.default_rng(3)
    docs = [np.resize(rng.integers(2, VOCAB, 10), 120) for _ in range(3)]
    text = np.concatenate(docs).astype(np.uint16)
    text[[0, 120, 240]] = 1
    return text


def test_it_learns():
    text = repeating()
    losses = {}
    for name, cfg in {"none": replace(LORA, lr=0.0), "reset": LORA, "warm": WARM}.items():
        result, nats = run(ttt(replace(cfg, lr=cfg.lr * 0.6)), text)
        losses[name] = result.val_loss
        if name != "none":  # within each document, and anew in the next one
            assert all(nats[s + 80 : s + 118].mean() < nats[s : s + 30].mean() - 0.2 for s in (0, 120, 240))
    assert losses["reset"] < losses["none"] - 0.2 and losses["warm"] < losses["none"] - 0.2


def test_probabilities_agree_with_scores_and_temperature_counts():
    from ttt_helpers import byte_counts

    from pgolf.eval.base import evaluate
    from pgolf.eval.neural import Neural

    _, nats = run(ttt(), STREAM)
    entropies = Collector(119, entropy=True)
    evaluate(ttt(), Neural(small_model()), STREAM, byte_counts, Dist(), readers=[entropies])
    assert torch.allclose(entropies.nats, nats, atol=1e-5) and (entropies.entropy > 0).all()
    warm = evaluate(ttt(), Neural(small_model(), Temperature(1.3)), STREAM, byte_counts, Dist())
    assert abs(warm.val_loss - float(nats.double().mean())) > 1e-3


class Stop(PgolfError):
    pass


PHASES = PhasesConfig(documents=4, count=2, lr=0.05, chunk=16)


def phased(phases=PHASES, cfg=LORA, order=STREAM_ORDER):
    return PhasedTtt(cfg, phases, WIDTH, order, rows=2)


@pytest.mark.parametrize("make", [lambda: ttt(WARM), lambda: phased(cfg=WARM)], ids=["lora", "phased"])
def test_a_killed_evaluation_goes_on_to_the_same_bits(make, tmp_path):
    whole, nats = run(make(), STREAM)

    def killer(done, all_rounds):
        if done == all_rounds - 3:
            raise Stop("killed")

    keeper = lambda: Keeper(tmp_path, "ttt", {"of": "this"}, Dist(), seconds=0.0)
    with pytest.raises(Stop):
        run(make(), STREAM, watch=killer, keep=keeper())
    rounds = []
    resumed, again = run(make(), STREAM, keep=keeper(), progress=lambda *a: rounds.append(a))
    assert rounds[0][0] == rounds[0][1] - 3
    assert resumed.val_bpb == whole.val_bpb and torch.equal(nats, again)
    assert resumed.ledger.digest() == whole.ledger.digest()


def test_phase_ends():
    assert PhasesConfig(documents=2000, count=3).ends() == [666, 1333, 2000]
    evaluator = phased()
    evaluator.docs = list(range(7))
    assert evaluator.blocks(0) == [[0, 1], [2, 3], [4, 5, 6]]
    evaluator.docs = list(range(3))  # fewer than the phases ask for
    assert evaluator.blocks(0) == [[0, 1], [2]]
    evaluator.docs = list(range(4))
    assert evaluator.blocks(0) == [[0, 1], [2, 3]]


def test_phases_train_the_base_on_what_is_scored():
    none, plain = run(ttt(), STREAM)
    result, nats = run(phased(), STREAM)
    assert torch.equal(nats[:28], plain[:28]) and not torch.equal(nats[28:], plain[28:])
    # phase 1: 28 tokens in 2 chunks, the last of which is skipped; phase 2: 13 tokens, one chunk
    events = result.ledger.events
    joint = [next(e for e in events if e.epoch == epoch) for epoch in (1, 2)]
    assert (joint[0].kind, joint[0].start, joint[0].end) == (UPDATE, 0, 16) and joint[1].kind == SCORE
    still, same = run(phased(replace(PHASES, lr=0.0)), STREAM)
    assert torch.equal(same, plain) and still.val_bpb == none.val_bpb
    for t in (20, 60):
        _, other = run(phased(), changed_behind(STREAM, t))
        assert torch.equal(nats[: t + 1], other[: t + 1])


def test_phases_on_ranks():
    wide = PhasesConfig(documents=5, count=1, lr=0.05, chunk=32)
    one, nats = run(phased(wide), STREAM)
    models = [small_model() for _ in range(3)]
    results = on_ranks(3, lambda d: run(phased(wide), STREAM, models[d.rank], d))
    assert all(r.val_bpb == pytest.approx(one.val_bpb, abs=1e-5) for r, _ in results)
    assert torch.allclose(sum(n for _, n in results), nats, atol=1e-5)


def test_slot_adam_is_adamw_in_each_slot():
    gen = torch.Generator().manual_seed(0)
    cfg = replace(LORA, beta1=0.8, beta2=0.9, eps=1e-8, lr=0.1, weight_decay=0.3)
    param = torch.randn(3, 2, 5, generator=gen)
    twins = [torch.nn.Parameter(p.clone()) for p in param]
    theirs = [torch.optim.AdamW([p], lr=0.1, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.3) for p in twins]
    mine = SlotAdam([param], cfg)
    for chosen in ([1, 1, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1]):
        grad = torch.randn(3, 2, 5, generator=gen)
        mine.step([grad], torch.tensor(chosen, dtype=torch.bool))
        for slot in np.flatnonzero(chosen):
            twins[slot].grad = grad[slot].clone()
            theirs[slot].step()
        assert all(torch.allclose(param[s], twins[s], atol=1e-6) for s in range(3))
    kept = copy.deepcopy(mine.m[0][0])
    mine.reset_(torch.tensor([False, True, False]))
    assert mine.steps.tolist() == [3, 0, 2] and torch.equal(mine.m[0][0], kept) and not mine.m[0][1].any()


def test_bad_requests_are_errors():
    with pytest.raises(ConfigError, match="does not fit the window"):
        ttt(replace(LORA, chunk=WIDTH + 1))
    with pytest.raises(ConfigError, match="length is not known"):
        ttt(replace(LORA, length_chunks="9:3"))
    assert document_bounds(torch.from_numpy(STREAM.astype(np.int64))).tolist() == [*BOUNDS, 120]
