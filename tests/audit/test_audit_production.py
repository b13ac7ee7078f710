"""pgolf's own scorers pass; the same with a defect do not. docs/audit.md has the command for full sizes."""

from functools import partial

import pytest
import torch

from pgolf.audit import production
from pgolf.audit.evaluators import EvaluatorScorer, Source
from pgolf.audit.ngrams import NEUTRAL, NgramScorer
from pgolf.audit.production import PRODUCTION, TOY_NGRAMS, toy
from pgolf.audit.result import FAILED, SKIPPED, Sizes
from pgolf.audit.suite import run_tests
from pgolf.errors import PgolfError
from pgolf.eval.base import Evaluator
from pgolf.eval.spans import Span
from pgolf.eval.windowed import PlainWindows
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.scorers import SCORERS

TINY = Sizes(length=80, positions=1, substitutions=32, tails=1, noise_tokens=256, round_trip=12, ranks=(1, 3))
QUICK = ("vector", "future", "neutral", "prefix", "ledger")


def failed(found):
    return {test: r.detail for test, r in found.items() if r.status == FAILED}


@pytest.fixture(scope="module")
def source():
    return toy()


@pytest.mark.parametrize("name", ["plain", "sliding", "temperature", "documents"])
def test_evaluators_pass(name, source):
    tests = () if name == "plain" else (*QUICK, "ranks", "warm_up", "isolation")
    found = run_tests(PRODUCTION[name](source), TINY, tests)
    assert not failed(found) and found["ranks"].status != SKIPPED


@pytest.mark.parametrize("name", [n for n in SCORERS if n != "neural"])
def test_ngram_scorers_pass(name, source):
    found = run_tests(PRODUCTION[name](source), TINY, QUICK)
    assert not failed(found)
    assert (found["neutral"].status != SKIPPED) == (name in NEUTRAL)


def test_an_ngram_scorer_passes_everything_in_chunks_too(source):
    cfg = NgramConfig(scorer="dirichlet", chunk=16, **TOY_NGRAMS)
    scorer = NgramScorer(production.plain(source), cfg)
    assert not failed(run_tests(scorer, TINY))
    kinds = {e.kind for e in scorer.ledger(torch.arange(1, 31)).events if e.component == "ngram"}
    assert kinds == {"SCORE", "UPDATE"}


def test_the_toy_tells_the_scorers_apart(source):
    """Each n-gram scorer scores differently from the model alone: an audit of a part that never acts shows nothing."""
    from pgolf.audit import streams

    stream = streams.text(source.vocab_size, 160, TINY)
    plain = PRODUCTION["plain"](source).nats(stream)
    assert plain.std() > 0.5
    for name in SCORERS:
        if name != "neural":
            moved = (PRODUCTION[name](source).nats(stream) - plain).abs() > 0.01
            assert moved.float().mean() > 0.05, name


class Peeking(Evaluator):
    """Windows of 32 whose inputs are the targets."""

    def spans(self, n_targets):
        return [Span(a, min(a + 32, n_targets), a) for a in range(0, n_targets, 32)]

    def score(self, batch, neural):
        batch.batch.ids = batch.batch.targets
        return neural.nats(batch.batch, batch.index)


class Twice(PlainWindows):
    """Scores the first window twice."""

    def spans(self, n_targets):
        return [Span(0, 32, 0), *super().spans(n_targets)]


def test_a_leak_in_an_evaluator_is_flagged(source):
    scorer = EvaluatorScorer(source, partial(Peeking, 32))
    scorer.run = partial(_without_probs, scorer)
    found = run_tests(scorer, TINY, ("substitution", "vector"))
    assert failed(found).keys() == {"substitution", "vector"}


def _without_probs(scorer, tokens, reader=None):
    from pgolf.eval.stats import Collector

    return EvaluatorScorer.run(scorer, tokens, reader or (lambda: Collector(tokens.numel() - 1)))


def test_an_evaluator_that_scores_twice_is_refused(source):
    found = run_tests(EvaluatorScorer(source, partial(Twice, 32)), TINY, ("prefix", "ledger"))
    assert all("scored more than once" in text for text in failed(found).values()) and len(failed(found)) == 2


def test_what_one_rank_raises_ends_all(source):
    class Fails(PlainWindows):
        def score(self, batch, neural):
            raise PgolfError("no score here")

    with pytest.raises(PgolfError, match="no score here"):
        EvaluatorScorer(source, partial(Fails, 32), world_size=3).nats(torch.arange(1, 81) % 32)


def test_a_model_over_an_artifact(tmp_path, source):
    from pgolf.artifact.model_io import save_model
    from pgolf.model.roles import roles_of
    from pgolf.quant.config import QuantConfig

    path = tmp_path / "model.pgolf"
    path.write_bytes(
        save_model(
            source.model, roles_of(source.model), QuantConfig(codec="lzma", level=0, keep_numel=1 << 20), "0" * 64
        )
    )
    loaded = production.from_artifact(path)
    assert isinstance(loaded, Source) and not loaded.is_toy and loaded.vocab_size == source.vocab_size
    assert "model.pgolf" in PRODUCTION["plain"](loaded).name
    assert not failed(run_tests(PRODUCTION["tilt"](loaded), TINY, ("vector", "neutral")))
