"""The hashed legacy scorer on uniform noise, where no code can need less than 10 bits a token of 1,024 ids.

`python -m pytest tests/audit/test_audit_noise.py -s` prints the rows of docs/why_hashed_scores_are_no_code_lengths.md.
"""

import itertools
import math

import pytest
import torch

from pgolf.audit import streams
from pgolf.audit.controls import legacy
from pgolf.audit.interface import BlockScorer
from pgolf.audit.normalisation import noise
from pgolf.audit.result import FAILED, PASSED, Sizes
from pgolf.audit.valid import Bigram

VOCAB, TOKENS, CHUNKS = 1024, 8192, 60


def mass(scorer, contexts=16):
    """Mean over contexts of what min(F, C) / C adds up to over the vocabulary, tables as they are."""
    sums = []
    for i in range(contexts):
        q, _ = scorer.inner.hashed(*scorer.inner.lookup_all(streams.noise(VOCAB, 9, 100 + i)))
        sums.append(float(q.sum()))
    return sum(sums) / contexts


def poisson_mass(load):
    """V E[min(X, Y) / Y] of independent Poisson X, Y with Y >= 2: two tables that collide independently."""
    k = torch.arange(0, 200, dtype=torch.float64)
    p = torch.exp(k * math.log(load) - load - torch.lgamma(k + 1))
    share = torch.minimum(k[:, None], k[None, 2:]) / k[None, 2:]
    return VOCAB * float((p[:, None] * p[None, 2:] * share).sum() / p[2:].sum())


@pytest.mark.parametrize("load, at_most", [(8, 2.6), (32, 1.0), (1, 9.0)])
def test_fewer_buckets_claim_more_where_nothing_can_be_gained(load, at_most):
    scorer = legacy(VOCAB, TOKENS // load, TOKENS // CHUNKS)
    found = noise(scorer, Sizes(noise_tokens=TOKENS))
    scorer.nats(streams.noise(VOCAB, TOKENS, 0))
    z, bits = mass(scorer), found.values["noise_bits"]
    print(f"\n| {load} | {bits:.2f} | {found.values['noise_bits_last']:.2f} | {z:.0f} | {poisson_mass(load):.0f} |")
    assert found.status == FAILED and bits < at_most and found.values["noise_floor"] == 10.0
    assert z > 100
    if load >= 8:  # else the longest context is seldom seen twice, and shorter ones count
        assert z == pytest.approx(poisson_mass(load), rel=0.03)


def test_exact_counts_claim_nothing():
    scorer = BlockScorer(Bigram(VOCAB, strength=5.0), VOCAB, TOKENS // CHUNKS, "exact bigrams")
    found = noise(scorer, Sizes(noise_tokens=TOKENS))
    print(f"\n| exact bigrams | {found.values['noise_bits']:.2f} | {found.values['noise_bits_last']:.2f} | 1 | |")
    assert found.status == PASSED and found.values["noise_bits"] > 10.0


def test_the_bound_is_that_of_chance():
    """A scorer that guesses the stream's luck by 65 bits fails, one that does by 60 passes, to the bit."""

    class Lucky:
        name, vocab_size, gift = "lucky", 64, 0.0

        def nats(self, tokens):
            out = torch.full((tokens.numel() - 1,), math.log(64), dtype=torch.float64)
            out[0] -= self.gift * math.log(2)
            return out

    scorer = Lucky()
    for scorer.gift, expected in ((60.0, PASSED), (65.0, FAILED)):
        sizes = Sizes(noise_tokens=512)
        found = noise(scorer, sizes)
        assert found.status == expected or found.detail.startswith("shuffled")
        assert found.values["noise_floor"] == 6.0


def test_orders_of_a_stream_are_counted_exactly():
    tokens = torch.tensor([1, 4, 4, 2, 5, 2, 4])
    orders = len(set(itertools.permutations(tokens[1:].tolist())))
    assert streams.shuffle_bits(tokens) == pytest.approx(math.log2(orders))
    assert sorted(streams.shuffled(tokens, 3).tolist()) == sorted(tokens.tolist())
