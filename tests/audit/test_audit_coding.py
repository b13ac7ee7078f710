"""The arithmetic coder: what goes in comes out, at the length that the probabilities say."""

import math

import pytest
import torch

from pgolf.audit.coding import Decoder, Encoder, frequencies, round_trip
from pgolf.audit.result import FAILED, PASSED, Sizes
from pgolf.audit.valid import BigramScorer


@pytest.mark.parametrize("vocab, sharpness", [(2, 0.1), (2, 30.0), (64, 1.0), (64, 20.0), (4096, 4.0)])
def test_round_trip_of_random_distributions(vocab, sharpness):
    """From nearly uniform to p = 1 - 1e-13, where a token of nearly no probability must still get through."""
    gen = torch.Generator().manual_seed(vocab)
    vectors = (sharpness * torch.randn((300, vocab), generator=gen, dtype=torch.float64)).softmax(-1)
    tokens = torch.multinomial(vectors, 1, generator=gen)[:, 0].tolist()
    tokens[7] = int(vectors[7].argmin())
    encoder = Encoder()
    for token, p in zip(tokens, vectors, strict=True):
        encoder.put(token, frequencies(p))
    bits = encoder.finish()
    decoder = Decoder(bits)
    assert [decoder.get(frequencies(p)) for p in vectors] == tokens
    cost = sum(-math.log2(max(float(p[t]), 2**-44)) for t, p in zip(tokens, vectors, strict=True))
    assert cost - 1 <= len(bits) <= cost + 2.5


def test_a_changed_bit_changes_the_text():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)
    encoder = Encoder()
    for token in (0, 1, 2, 3) * 5:
        encoder.put(token, frequencies(p))
    bits = encoder.finish()
    bits[6] ^= 1
    decoder = Decoder(bits)
    assert [decoder.get(frequencies(p)) for _ in range(20)] != [0, 1, 2, 3] * 5


def test_frequencies_leave_no_token_out():
    p = torch.zeros(8192, dtype=torch.float64)
    p[5] = 1.0
    cumulative = frequencies(p)
    assert (cumulative[1:] > cumulative[:-1]).all() and cumulative[-1] < 2**44


def test_a_decoder_that_sees_other_probabilities_fails():
    class Unsteady(BigramScorer):
        """Its second pass over a prefix gives another distribution."""

        calls = 0

        def __init__(self):
            super().__init__()
            steady = self.distribution
            self.distribution = lambda tokens: self.vary(steady(tokens))

        def vary(self, p):
            self.calls += 1
            return p if self.calls <= 47 else p.roll(1)

    sizes = Sizes(round_trip=48)
    assert round_trip(BigramScorer(), sizes).status == PASSED
    found = round_trip(Unsteady(), sizes)
    assert found.status == FAILED and "decoded as another" in found.detail
