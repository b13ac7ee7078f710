"""Every scorer: a distribution, of which production reads one entry; causal; neutral where nothing is known."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ngram_streams import model, production, stats_of, stream

from pgolf.errors import ConfigError, DataError
from pgolf.eval.order import BOS, Order, document_bounds
from pgolf.ngram.config import SCORER_NAMES, NgramConfig
from pgolf.ngram.scorer import Scorer
from pgolf.ngram.scorers import SCORERS, build_scorer

# Thresholds so low that short streams have hints and known contexts
SMALL = NgramConfig(
    orders=(1, 2, 4), concentration=(2.0, 1.0, 0.5), row_bits=3, hint_orders=(1, 2, 3), hint_share=(0.5, 0.4),
    hint_count=(2, 1), hints=2, min_count=1, experts="neural,kneser_ney,tilt,calibrated_tilt,entropy_gate",
    entropy_bins=3, share=0.05, gate_entropy=1.0,
)  # fmt: skip
VARIANTS = {
    **{name: replace(SMALL, scorer=name) for name in SCORER_NAMES},
    "one hint, by p": replace(SMALL, scorer="tilt", hints=1, boost_slope=1.0, boost_by_share=False),
    "bayes": replace(SMALL, scorer="hedge", share=0.0, entropy_bins=0),
    "hedge of all": replace(SMALL, scorer="hedge", entropy_bins=0, experts="neural,dirichlet,witten_bell,hashed_rows"),
    "negative strength": replace(SMALL, scorer="pitman_yor", discount=(0.9, 0.3), strength=(-0.5, -0.2)),
    "alone": replace(SMALL, scorer="geometric", power=1.0),
    "wide mixer": replace(SMALL, scorer="mixer", mixer_hidden=5, min_count=2),
}  # fmt: skip


def scorer_of(cfg: NgramConfig, vocab: int) -> Scorer:
    scorer = build_scorer(cfg, vocab)
    if cfg.scorer == "mixer":  # weights that say something
        draw = torch.Generator().manual_seed(4)
        for w in scorer.head.parameters():
            w.data += 0.5 * torch.randn(w.shape, generator=draw, dtype=w.dtype)
    return scorer


def test_the_table_has_what_the_settings_name():
    assert tuple(SCORERS) == SCORER_NAMES
    assert all(cls.name == name and cls.valid for name, cls in SCORERS.items())
    assert build_scorer(NgramConfig(), 8).name == NgramConfig().scorer


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 2**20), vocab=st.sampled_from([2, 5, 9]), within=st.booleans(), chunk=st.sampled_from([0, 0, 5])
)
def test_target_only_is_an_entry_of_a_vector_that_sums_to_one(name, seed, vocab, within, chunk):
    cfg = replace(VARIANTS[name], within_documents=within, chunk=chunk)
    tokens, scorer = stream(28, vocab, seed, documents=vocab > 2), scorer_of(cfg, vocab)
    base = model(28, vocab, seed)
    nats, stats = production(scorer, tokens, base)
    for i in (0, 9, 17, 24, 26):
        p = scorer.distribution(tokens[: i + 1], stats.first(i), base[i])
        assert p.dtype == torch.float64 and p.shape == (vocab,) and (p >= 0).all()
        assert abs(p.sum().item() - 1) < 1e-12
        assert abs(p[tokens[i + 1]].item() / (-nats[i]).exp().item() - 1) < 1e-5, i


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk", [0, 7])
def test_reported_numbers_of_all_substitutes_sum_to_one(name, chunk):
    """From the production path alone: whatever the target is, BOS too, its number is its share of one distribution."""
    vocab, at = 5, 22
    tokens, base = stream(30, vocab, 11, documents=True), model(30, vocab, 11)
    scorer = scorer_of(replace(VARIANTS[name], chunk=chunk), vocab)
    total, hints = 0.0, set()
    for v in range(vocab):
        tokens[at] = v
        nats, stats = production(scorer, tokens, base)
        total += (-nats[at - 1]).exp().item()
        hints.add(None if stats.hints is None else tuple(stats.hints[:, at - 1].tolist()))
    assert abs(total - 1) < 1e-6  # fp32 nats of the model
    assert len(hints) == 1


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("chunk", [0, 6])
def test_the_future_does_not_show(name, chunk):
    vocab, cut = 5, 20
    tokens, scorer = stream(40, vocab, 5, documents=True), scorer_of(replace(VARIANTS[name], chunk=chunk), vocab)
    base = model(40, vocab, 5)
    before, _ = production(scorer, tokens, base)
    other, other_base = tokens.clone(), base.clone()
    other[cut:], other_base[cut - 1 :] = stream(20, vocab, 77), model(21, vocab, 99)
    after, _ = production(scorer, other, other_base)
    short, _ = production(scorer, tokens[:cut], base)
    assert torch.equal(before[: cut - 1], after[: cut - 1])
    torch.testing.assert_close(before[: cut - 1], short, rtol=1e-12, atol=1e-12)
    assert not torch.equal(before, after)


@pytest.mark.parametrize("name", VARIANTS)
def test_without_counts_the_model_stays_bit_by_bit(name):
    """No token occurs twice; and where chunks are longer than the stream."""
    tokens = torch.arange(2, 40)
    exact = replace(VARIANTS[name], row_bits=31)
    for cfg, t in ((exact, tokens), (replace(exact, chunk=64), stream(38, 40, 3))):
        nats, stats = production(scorer_of(cfg, 40), t, model(38, 40, 3))
        if cfg.scorer == "hedge":  # a mixture of equals, which rounds
            torch.testing.assert_close(nats, stats.nats.double(), rtol=1e-14, atol=1e-14)
        else:
            assert torch.equal(nats, stats.nats.double())


NEUTRAL = {
    "entropy_gate": {"alpha_min": 0.0, "alpha_max": 0.0},
    "tilt": {"boost": 0.0},
    "geometric": {"power": 0.0},
    "hedge": {"experts": "neural", "entropy_bins": 0},
    "neural": {},
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_settings_are_the_model_bit_by_bit(name):
    cfg = replace(SMALL, scorer=name, **NEUTRAL[name])
    nats, stats = production(build_scorer(cfg, 4), stream(200, 4, 1), model(200, 4, 1))
    assert torch.equal(nats, stats.nats.double())
    assert cfg.problems() == []


@pytest.mark.parametrize("name", VARIANTS)
def test_moved_documents_are_scored_as_a_stream_that_has_them_so(name):
    vocab = 5
    tokens, base = stream(60, vocab, 21, documents=True), model(60, vocab, 21)
    bounds = document_bounds(tokens)
    size = bounds.numel() - 1
    documents = torch.cat([torch.arange(size - 1).flip(0), torch.tensor([size - 1])])
    order = Order("backwards", documents)
    permuted, where = order.permuted(tokens)
    base_there = torch.empty_like(base[: tokens.numel() - 1])
    base_there[where - 1] = base[: tokens.numel() - 1]
    scorer = scorer_of(VARIANTS[name], vocab)
    there, _ = production(scorer, permuted, base_there)
    here, _ = production(scorer, tokens, base, order)
    torch.testing.assert_close(here, there[where - 1], rtol=1e-12, atol=1e-12)


def test_memory_helps_where_text_repeats():
    """A stream of one sentence: counts predict it, a model that knows nothing does not."""
    tokens = torch.tensor([BOS, 5, 3, 4, 2, 6, 7] * 30)
    base = torch.full((tokens.numel(), 8), 1 / 8, dtype=torch.float64)
    for name in SCORER_NAMES:
        nats, stats = production(build_scorer(replace(SMALL, scorer=name), 8), tokens, base)
        better = nats.mean() < (0.5 if name != "mixer" else 0.8) * stats.nats.mean()
        assert better or name == "neural", (name, nats.mean())


def test_statistics_that_do_not_fit():
    tokens, base = stream(50, 4, 2), model(50, 4, 2)
    gate, tilt = (build_scorer(replace(SMALL, scorer=name), 4) for name in ("entropy_gate", "tilt"))
    prepared = tilt.prepare(tokens)
    stats = stats_of(tokens, base, prepared.hints)
    with pytest.raises(DataError, match="statistics of 40 targets, the stream has 49"):
        tilt.nats(prepared, stats.first(40))
    with pytest.raises(DataError, match="scorer entropy_gate needs entropy, which"):
        gate.nats(gate.prepare(tokens), replace(stats, entropy=None))
    with pytest.raises(DataError, match="needs hints, which"):
        tilt.nats(prepared, stats_of(tokens, base))
    with pytest.raises(DataError, match="of other hints than these settings give"):
        tilt.nats(prepared, stats_of(tokens, base, torch.zeros_like(prepared.hints)))
    with pytest.raises(ConfigError, match="its parts have 2 orders"):
        tilt.nats(prepared, replace(stats, order=Order("other", torch.tensor([0]))))
    with pytest.raises(NotImplementedError, match="whole distribution"):
        build_scorer(replace(SMALL, scorer="ppm_c"), 4).nats(prepared, stats)


@pytest.mark.parametrize("name", [n for n, cfg in VARIANTS.items() if "vector" not in SCORERS[cfg.scorer].needs])
def test_a_model_that_is_certain_of_the_wrong_token(name):
    """Nats beyond what e^nats can hold give finite numbers, never NaN."""
    tokens, scorer = stream(60, 4, 2), scorer_of(VARIANTS[name], 4)
    prepared = scorer.prepare(tokens)
    stats = stats_of(tokens, model(60, 4, 2), prepared.hints)
    stats.nats[::7] = 2000.0
    assert scorer.nats(prepared, stats).isfinite().all()
