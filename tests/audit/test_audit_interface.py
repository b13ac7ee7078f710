"""What a scorer must have, the helper for block-wise ones, and the page's example."""

import math
import re

import pytest
import torch

from pgolf.audit import command, streams
from pgolf.audit.bookkeeping import rank_invariance
from pgolf.audit.causality import difference
from pgolf.audit.interface import BlockScorer, nats_of
from pgolf.audit.result import FAILED, PASSED, SKIPPED, Sizes
from pgolf.audit.suite import run_tests
from pgolf.audit.valid import Bigram, BigramScorer, Uniform, Unigram
from pgolf.errors import ConfigError
from pgolf.eval.ledger import Ledger
from pgolf.eval.order import length_sorted

TINY = Sizes(length=96, positions=2, substitutions=64, tails=1, noise_tokens=1024, round_trip=40)


def example(root):
    """The first Python block of docs/audit.md."""
    return re.search(r"```python\n(.*?)```", (root / "docs/audit.md").read_text(), re.S).group(1)


def test_the_example_of_the_page_passes(root, tmp_path):
    code = example(root)
    assert len(code.splitlines()) <= 20
    (tmp_path / "my_scorer.py").write_text(code)
    scorer = command.load(f"{tmp_path}/my_scorer.py:MyScorer")
    found = run_tests(scorer, TINY)
    assert not [t for t, r in found.items() if r.status == FAILED], found
    assert {t for t, r in found.items() if r.status == SKIPPED} == {"neutral", "ranks", "warm_up", "ledger"}


def test_the_example_with_its_plus_one_left_out_is_flagged(root, tmp_path):
    code = example(root)
    assert "counts.sum()" in code
    (tmp_path / "bad_scorer.py").write_text(code.replace("counts.sum()", "(counts.sum() - 5)"))
    found = run_tests(command.load(f"{tmp_path}/bad_scorer.py:MyScorer"), TINY)
    assert found["substitution"].status == FAILED and found["vector"].status == FAILED


def test_no_scorer_is_refused():
    class NoNats:
        name, vocab_size = "none", 64

    with pytest.raises(ConfigError, match="lacks nats"):
        run_tests(NoNats(), TINY)
    with pytest.raises(ConfigError, match="at least 4"):
        run_tests(Uniform(2), TINY)

    class Short(Uniform):
        def nats(self, tokens):
            return super().nats(tokens)[1:]

    with pytest.raises(ConfigError, match=r"shape \(94,\), expected \(95,\)"):
        run_tests(Short(), TINY)


def test_what_a_scorer_raises_fails_its_test():
    class Breaks(Uniform):
        def distribution(self, tokens):
            raise ZeroDivisionError("no tokens")

    found = run_tests(Breaks(), TINY)
    assert found["vector"].status == FAILED and "ZeroDivisionError: no tokens" in found["vector"].detail
    assert found["substitution"].status == PASSED


def test_a_score_that_is_nan_fails():
    class Nan(Uniform):
        def distribution(self, tokens):
            return super().distribution(tokens) * (math.nan if tokens.numel() < 3 else 1.0)

        def nats(self, tokens):
            out = super().nats(tokens)
            out[-2] = math.nan
            return out

    found = run_tests(Nan(), TINY, ("vector", "future", "noise", "prefix"))
    assert {r.status for r in found.values()} == {FAILED}


def test_blocks_by_brute_force():
    """Scores, vectors and ranks of the helper against a loop over targets."""
    stream, block = streams.text(16, 50, Sizes()), 7
    scorer = BlockScorer(Bigram(16), 16, block)
    found = nats_of(scorer, stream)
    own = Bigram(16)
    for i in range(stream.numel() - 1):
        if i and i % block == 0:
            own.update(stream, i - block, i)
        assert float(found[i]) == pytest.approx(float(own.score(stream, i, i + 1)[0]), abs=1e-12)
        assert scorer.distribution(stream[: i + 1])[stream[i + 1]] == pytest.approx(math.exp(-float(found[i])))
    for n in (2, 3, 20):
        assert difference(nats_of(scorer.ranks(n), stream), found) == 0
    assert scorer.ledger(stream).problems(49) == [] and rank_invariance(scorer, Sizes()).status == PASSED


def test_reports_of_wrong_fields_are_caught_one_by_one():
    """Mutations of a valid scorer: each is flagged, by the test that is about it."""

    class Forgets(BigramScorer):
        """Keeps its counts from one stream to the next."""

        def __init__(self):
            super().__init__()
            self.inner.reset = lambda: None

    class Misses(BigramScorer):
        """Its ledger leaves out the last block."""

        def ledger(self, tokens):
            return super().ledger(tokens[:-16])

    class LooksOn(BigramScorer):
        """The second token after the target decides a little."""

        def nats(self, tokens):
            peek = torch.cat([tokens[2:] % 2, tokens.new_zeros(1)])
            return super().nats(tokens) + 1e-4 * peek

    for make, test in ((Forgets, "prefix"), (Misses, "ledger"), (LooksOn, "future")):
        assert run_tests(make(), TINY, (test,))[test].status == FAILED, make.__doc__


class Sorted(Uniform):
    """A unigram that goes through documents by length."""

    def nats(self, tokens):
        stream, where = length_sorted(tokens).permuted(tokens)
        return Unigram(self.vocab_size).nats(stream)[where.numpy() - 1]

    def distribution(self, tokens):
        raise AssertionError("not asked for")

    def ledger(self, tokens):
        out = Ledger(order=length_sorted(tokens))
        out.each(self.name, [(0, tokens.numel() - 1)])
        return out


def test_another_order_must_be_declared():
    tests = ("substitution", "future", "prefix", "ledger")
    assert FAILED in {r.status for r in run_tests(Sorted(), TINY, tests).values()}
    declared = Sorted()
    declared.order_name = "length_sorted"
    found = run_tests(declared, TINY, tests)
    assert {r.status for r in found.values()} == {PASSED}
    assert "document lengths" in found["ledger"].warning and "one document" in found["prefix"].warning
