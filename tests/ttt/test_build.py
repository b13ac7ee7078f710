"""Settings: what they refuse, the records among them, and the evaluators that they become."""

from dataclasses import replace

import pytest
import torch
from ttt_helpers import VOCAB, WIDTH, byte_counts, run

from pgolf import tree
from pgolf.errors import ConfigError
from pgolf.eval.ledger import UPDATE
from pgolf.eval.order import length_sorted
from pgolf.ttt.build import EVALUATORS, Frame, build, order_of, warm_up_tokens
from pgolf.ttt.chunked import ChunkTtt
from pgolf.ttt.config import KINDS, RECORDS, LoraConfig, PhasesConfig, SgdConfig, TttConfig
from pgolf.ttt.documents import DocumentTtt
from pgolf.ttt.phased import PhasedTtt


def problems(cfg):
    return tree.problems(cfg)


def test_defaults_and_records_are_settings():
    assert not problems(TttConfig())
    for name, cfg in RECORDS.items():
        assert not problems(cfg), name
        assert tree.from_dict(TttConfig, tree.to_dict(cfg)) == cfg
    assert len(set(RECORDS.values())) == len(RECORDS)
    assert set(EVALUATORS) == set(KINDS)


@pytest.mark.parametrize(
    "cfg, text",
    [
        (SgdConfig(chunk=0), "chunk=0 must be at least 1"),
        (SgdConfig(lr=-1.0), "lr=-1.0"),
        (SgdConfig(momentum=1.0), "momentum=1.0 must be in"),
        (SgdConfig(lr_floor=2.0), "lr_floor"),
        (SgdConfig(optimizer="muon"), "optimizer='muon' must be one of sgd, adamw"),
        (SgdConfig(trained="head"), "trained='head'"),
        (LoraConfig(targets="q,w"), "targets='q,w'"),
        (LoraConfig(targets=""), "targets=''"),
        (LoraConfig(rank=0), "rank=0"),
        (LoraConfig(alpha=0.0), "alpha=0.0"),
        (LoraConfig(length_chunks="256"), "must read like"),
        (LoraConfig(length_chunks="256:x"), "must read like"),
        (PhasesConfig(count=0), "count=0"),
        (PhasesConfig(documents=2, count=3), "count=3 must be in 1..2"),
        (TttConfig(kind="muon"), "kind='muon'"),
        (TttConfig(order="length_sorted"), "set order=stream"),
        (TttConfig(kind="lora", lora=LoraConfig(length_chunks="9:3")), "set order=length_sorted"),
    ],
)
def test_what_is_refused(cfg, text):
    assert any(text in line for line in problems(cfg))


def test_other_settings_have_another_name():
    """A saved evaluation is known by it."""
    build_ = lambda **kw: build(replace(SMALL, **kw), Frame(WIDTH, 4))
    names = [build_(kind=kind).name for kind in KINDS]
    names += [build_(sgd=replace(SMALL.sgd, lr=0.1)).name]
    names += [build_(kind=k, lora=replace(SMALL.lora, lr=0.1)).name for k in ("lora", "phased")]
    names += [build_(kind="phased", phases=replace(SMALL.phases, lr=0.1)).name]
    assert len(set(names)) == 7


def test_chunks_by_length():
    cfg = RECORDS["phased_2014"].lora
    assert [cfg.chunk_of(n) for n in (1, 256, 257, 2000, 2001)] == [8, 8, 24, 24, 48] and cfg.widest_chunk == 48
    assert LoraConfig().chunk_of(5) == 48


SMALL = TttConfig(
    sgd=SgdConfig(chunk=32, epochs=1),
    lora=LoraConfig(rank=2, chunk=6, slots=2),
    phases=PhasesConfig(documents=4, count=2, chunk=16),
)


@pytest.mark.parametrize("kind, cls", [("sgd", ChunkTtt), ("lora", DocumentTtt), ("phased", PhasedTtt)])
def test_warm_up_runs_everything_on_synthetic_tokens(kind, cls):
    cfg = replace(SMALL, kind=kind)
    tokens = warm_up_tokens(cfg, WIDTH, VOCAB)
    evaluator = build(cfg, Frame(WIDTH, 4, 64, byte_counts=byte_counts))
    assert type(evaluator) is cls and evaluator.seq_len == WIDTH
    assert int(tokens.min()) >= 1 and int(tokens.max()) < VOCAB
    result, _ = run(evaluator, tokens)  # which asserts that the model is as before
    updates = [e for e in result.ledger.events if e.kind == UPDATE]
    assert updates and (kind == "lora" or any(e.epoch for e in updates))


def test_one_order_for_all():
    tokens = warm_up_tokens(replace(SMALL, kind="lora"), WIDTH, VOCAB)
    sorted_ = replace(SMALL, kind="lora", order="length_sorted")
    assert order_of(sorted_, tokens) == length_sorted(tokens) and order_of(SMALL, tokens).name == "stream"
    with pytest.raises(ConfigError, match="they must agree"):
        build(sorted_, Frame(WIDTH))
    result, _ = run(build(sorted_, Frame(WIDTH, order=order_of(sorted_, tokens))), tokens)
    assert result.order.startswith("length_sorted:")


def test_a_window_must_fit_the_model():
    with pytest.raises(ConfigError, match="at most 16 tokens"):
        run(build(replace(SMALL, kind="lora", seq_len=32), Frame(WIDTH)), torch.ones(9, dtype=torch.int64))
