"""The negative control does what the earlier program did, and is no distribution."""

import math

import pytest
import torch
from ngram_streams import model, production, stats_of, stream

from pgolf.errors import ConfigError
from pgolf.eval.order import Order
from pgolf.kernels._ngram_legacy import PRIMES
from pgolf.ngram.config import UNSAFE, NgramConfig
from pgolf.ngram.legacy import LegacyHashed, LegacySettings
from pgolf.ngram.scorers import SCORERS

SMALL = LegacySettings(buckets=64, chunk=40)


def sequential(tokens: list[int], nats: list[float], entropy: list[float], s: LegacySettings) -> list[float]:
    tables = [([0] * s.buckets, [0] * s.buckets) for _ in range(8)]

    def buckets(n: int, j: int) -> tuple[int, int]:
        h = 0
        for k in range(n - 1):
            h ^= tokens[j - (n - 1) + k] * PRIMES[k % 7]
        return h % s.buckets, (h ^ tokens[j] * PRIMES[(n - 1) % 7]) % s.buckets

    out = []
    for start in range(0, len(nats), s.chunk):
        end = min(start + s.chunk, len(nats))
        for i in range(start, end):
            j, p = i + 1, math.exp(-nats[i])
            for n in range(9, 1, -1):
                if j < n - 1:
                    continue
                context, pair = buckets(n, j)
                c, f = tables[n - 2][0][context], tables[n - 2][1][pair]
                if c >= 2:
                    middle = 3.0 - 0.25 * (n - 2)
                    a = (0.05 + 0.55 / (1 + math.exp(-2 * (entropy[i] - middle)))) * s.multipliers[n - 2]
                    a = min(a, 0.95)
                    p = (1 - a) * p + a * min(f, c) / max(c, 1)
                    break
            out.append(-math.log(max(p, 1e-12)))
        for n in range(2, 10):
            for j in range(start + n - 1, end + 1):
                context, pair = buckets(n, j)
                tables[n - 2][0][context] += 1
                tables[n - 2][1][pair] += 1
    return out


def test_it_equals_the_earlier_program():
    tokens, base = stream(150, 12, 3), model(150, 12, 3)
    got, stats = production(LegacyHashed(NgramConfig(), 12, SMALL), tokens, base)
    want = sequential(tokens.tolist(), stats.nats.double().tolist(), stats.entropy.double().tolist(), SMALL)
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert (got != stats.nats.double()).sum() > 50


def test_settings_of_the_record():
    s = LegacySettings()
    assert (s.buckets, s.chunk, s.min_count) == (2**23, 2**20, 2)


def test_it_is_marked_and_cannot_be_chosen():
    assert not LegacyHashed.valid and LegacyHashed.name == UNSAFE and UNSAFE not in SCORERS
    assert NgramConfig(scorer=UNSAFE).problems()
    with pytest.raises(ConfigError, match="in stream order only"):
        LegacyHashed(NgramConfig(), 4).prepare(stream(9, 4, 1), Order("other", torch.tensor([0])))


def test_its_numbers_sum_to_more_than_one_and_are_those_it_reports():
    tokens, base = stream(900, 50, 3), model(900, 50, 3, sharp=0.1)
    scorer = LegacyHashed(NgramConfig(), 50, LegacySettings(buckets=128, chunk=100))
    nats, stats = production(scorer, tokens, base)
    p = scorer.distribution(tokens[:851], stats.first(850), base[850])
    assert p.sum() > 10
    assert abs(p[tokens[851]].log() + nats[850]) < 1e-5


def test_it_claims_to_compress_noise_and_valid_scorers_do_not():
    n, vocab = 16_000, 256
    tokens = stream(n, vocab, 1)
    base = torch.full((1, vocab), 1 / vocab, dtype=torch.float64).expand(n, vocab)
    legacy = LegacyHashed(NgramConfig(), vocab, LegacySettings(buckets=256, chunk=250))
    claimed = legacy.nats(legacy.prepare(tokens), stats_of(tokens, base)).mean() / math.log(2)
    assert claimed < 4
    for name in ("pitman_yor", "kneser_ney", "hedge"):
        honest, _ = production(SCORERS[name](NgramConfig(), vocab), tokens, base)
        assert honest.sum() / math.log(2) > n * 8 - 64, name
