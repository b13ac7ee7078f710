"""Tests 6, 7, 9 and 11: what the scorer says it did, and settings, ranks and warm-ups that must change nothing."""

from __future__ import annotations

import math

from pgolf.audit import streams
from pgolf.audit.causality import difference
from pgolf.audit.interface import Scorer, nats_of, offers
from pgolf.audit.result import Result, Sizes, Worst, judged, skipped

RANK_BITS = 1e-5  # mean bits a token; bits per byte are fewer


def ledger(scorer: Scorer, sizes: Sizes) -> Result:
    """6: by its ledger each target is scored once, nothing is learned from before its score is final, and all parts
    have one order."""
    if not offers(scorer, "ledger"):
        return skipped("it has no ledger()")
    stream = streams.text(scorer.vocab_size, sizes.length, sizes)
    told = scorer.ledger(stream)
    found = told.problems(stream.numel() - 1)
    orders = sorted({e.order for e in told.events} - {"stream"})
    warning = f"order {orders[0]}: document lengths are known before the documents are" if len(orders) == 1 else ""
    return judged(
        len(found), len(told.events), 0, "; ".join(found[:3]) or f"{len(told.events)} events in order", warning
    )


def neutral_settings(scorer: Scorer, sizes: Sizes) -> Result:
    """7: with its parts switched to no effect (weight, boost, rate 0) it scores like the plain scorer, to the bit."""
    if not offers(scorer, "neutral"):
        return skipped("it has no neutral()")
    quiet, plain = scorer.neutral()
    worst = Worst(f"{quiet.name} equals {plain.name}")
    for what, stream in (
        ("text", streams.text(scorer.vocab_size, sizes.length, sizes)),
        ("noise", streams.noise(scorer.vocab_size, sizes.length, sizes.seed)),
    ):
        off = difference(nats_of(quiet, stream), nats_of(plain, stream))
        worst.see(off, f"{quiet.name} and {plain.name} differ by up to {off:.3g} nats on {what}")
    return worst.judged(0.0)


def rank_invariance(scorer: Scorer, sizes: Sizes) -> Result:
    """9: on 1, 2 and 8 ranks the mean score agrees within 1e-5 bits a token."""
    if not offers(scorer, "ranks"):
        return skipped("it has no ranks()")
    stream = streams.text(scorer.vocab_size, sizes.length, sizes)
    bits = {1: float(nats_of(scorer, stream).mean()) / math.log(2)}
    for n in sizes.ranks:
        bits[n] = float(nats_of(scorer.ranks(n), stream).mean()) / math.log(2)
    spread = max(bits.values()) - min(bits.values())
    told = ", ".join(f"{b:.6f} on {n}" for n, b in sorted(bits.items()))
    return judged(spread, len(bits), RANK_BITS, f"bits a token: {told}")


def warm_up_isolation(scorer: Scorer, sizes: Sizes) -> Result:
    """11: a warm-up leaves the hash of all state and every score as they were, to the bit."""
    if not offers(scorer, "warm_up"):
        return skipped("it has no warm_up()")
    stream = streams.text(scorer.vocab_size, sizes.length, sizes)
    hashed = offers(scorer, "state_digest")
    before, digest = nats_of(scorer, stream), scorer.state_digest() if hashed else ""
    scorer.warm_up()
    changed = hashed and scorer.state_digest() != digest
    off = difference(nats_of(scorer, stream), before)
    if changed:
        return judged(math.inf, 1, 0, "the hash of its state is another one after the warm-up")
    warning = "" if hashed else "it has no state_digest(): only scores were compared"
    return judged(off, stream.numel() - 1 + hashed, 0, f"scores move by {off:.3g} nats at most", warning)
