"""Tests 1, 2 and 5: what the scorer claims is a probability. None of them trusts what it says of itself."""

from __future__ import annotations

import math

from pgolf.audit import streams
from pgolf.audit.interface import BOS, Scorer, distribution_of, nats_of, offers
from pgolf.audit.result import Result, Sizes, Worst, judged, skipped

SUM, VECTOR_SUM = 1e-4, 1e-5
NOISE_BITS = 64.0  # a valid scorer gains more with a chance of at most 2^-64 (Ville's inequality)


def substitution_sum(scorer: Scorer, sizes: Sizes) -> Result:
    """1: puts every token of the vocabulary at a place and adds up what the scorer claims for each; at most 1 + 1e-4.

    Whatever makes the claim depend on the target alone breaks it: a gate on its class, tables that collide, the better
    of two models. The tail stays as it is. Costs V scorings a place.
    """
    documents = getattr(scorer, "order_name", "stream") == "stream"
    stream = streams.text(scorer.vocab_size, sizes.length, sizes, documents)
    places = streams.targets(stream, sizes, 1)[: max(1, sizes.substitutions // scorer.vocab_size)]
    tried = [v for v in range(scorer.vocab_size) if documents or v != BOS]
    sums = {}
    for i in places:
        total = 0.0
        for v in tried:
            other = stream.clone()
            other[i + 1] = v
            total += math.exp(min(-float(nats_of(scorer, other)[i]), 700.0))
        sums[i] = total
    worst = max(sums, key=lambda i: sums[i] if sums[i] == sums[i] else math.inf)
    low = min(sums.values())
    short = f"a sum is {low:.6f}: bits are wasted, unless there are ids that no text has" if low < 1 - SUM else ""
    detail = f"the {len(tried)} claims for target {worst} add up to {sums[worst]:.6f}"
    return judged(sums[worst] - 1, len(places) * len(tried), SUM, detail, short, largest=sums[worst], smallest=low)


def materialised_vector(scorer: Scorer, sizes: Sizes) -> Result:
    """2: distribution() has no negative entry, adds up to 1 within 1e-5, and its entry at the target is what nats()
    says within a relative 1e-5."""
    if not offers(scorer, "distribution"):
        return skipped("it has no distribution()")
    stream = streams.text(scorer.vocab_size, sizes.length, sizes)
    claimed = nats_of(scorer, stream)
    places = sorted({0, 1, *streams.targets(stream, sizes, 2)})
    worst, largest = Worst("every vector is exact"), 0.0
    for i in places:
        vector = distribution_of(scorer, stream[: i + 1])
        p = math.exp(-float(claimed[i]))
        total, entry, least = float(vector.sum()), float(vector[stream[i + 1]]), float(vector.min())
        largest = max(largest, total)
        worst.see(-least, f"target {i}: an entry is {least:.3g}")
        worst.see(abs(total - 1), f"target {i}: the vector adds up to {total:.6f}")
        off = abs(entry - p) / p if p > 0 else math.inf
        worst.see(off, f"target {i}: its entry is {entry:.6g}, nats say {p:.6g}")
    return worst.judged(VECTOR_SUM, largest=largest)


def noise(scorer: Scorer, sizes: Sizes) -> Result:
    """5: on N independent uniform tokens no code needs less than N log2 V - 64 bits but with a chance of 2^-64; on
    text in random order none less than log2 of the number of orders, less 64. Knows nothing of the scorer."""
    vocab = min(sizes.noise_vocab or scorer.vocab_size, scorer.vocab_size)
    uniform = streams.noise(vocab, sizes.noise_tokens, sizes.seed)
    mixed = streams.shuffled(streams.text(scorer.vocab_size, sizes.noise_tokens, sizes), sizes.seed)
    values, gains = {}, {}
    for name, stream, bound in (
        ("noise", uniform, (uniform.numel() - 1) * math.log2(vocab)),
        ("shuffled text", mixed, streams.shuffle_bits(mixed)),
    ):
        bits = nats_of(scorer, stream) / math.log(2)
        gains[name] = bound - float(bits.sum())
        key, last = name.partition(" ")[0], bits[-max(1, sizes.noise_tokens // 60) :]
        values |= {f"{key}_bits": float(bits.mean()), f"{key}_bits_last": float(last.mean())}
        values[f"{key}_floor"] = bound / bits.numel()
    worst = max(gains, key=lambda name: gains[name] if gains[name] == gains[name] else math.inf)
    key = worst.partition(" ")[0]
    detail = f"{worst}: {values[f'{key}_bits']:.4f} bits a token, no code needs less than {values[f'{key}_floor']:.4f}"
    return judged(gains[worst], 2 * (sizes.noise_tokens - 1), NOISE_BITS, detail, **values)
