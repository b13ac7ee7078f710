"""Tests 3, 4 and 8: nothing that comes later changes a score, and nothing of a target decides how it is scored."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgolf.audit import streams
from pgolf.audit.interface import BOS, Scorer, distribution_of, nats_of, offers, trace_of
from pgolf.audit.result import Result, Sizes, Worst, skipped

SAME = 1e-5  # nats, where shapes change and sums may be taken in another order; 0 where they do not
FLIPS = 6  # tokens that stand for a target when the scorer declares no classes


def future_perturbation(scorer: Scorer, sizes: Sizes) -> Result:
    """3: other tokens after target i, BOS in other places, another length: scores up to i stay, to the bit where all
    shapes stay, else within 1e-5. And with another token as target i, what trace() says of i stays."""
    documents = getattr(scorer, "order_name", "stream") == "stream"
    stream = streams.text(scorer.vocab_size, sizes.length, sizes, documents)
    plain, places = nats_of(scorer, stream), streams.targets(stream, sizes, 3)
    worst = Worst("no score depends on what follows")
    for i in places:
        for what, same_shape, other in streams.futures(stream, i + 2, scorer.vocab_size, sizes, documents):
            moved = difference(nats_of(scorer, other)[: i + 1], plain[: i + 1])
            off = max(moved, 2 * SAME) if same_shape and moved else moved
            worst.see(off, f"{what} after target {i} changes scores before it by up to {moved:.3g} nats")
    if offers(scorer, "trace"):
        _see_traces(worst, scorer, stream, places, sizes)
    return worst.judged(SAME)


def class_flip(scorer: Scorer, sizes: Sizes) -> Result:
    """4: a token of each other class in the target's place: what trace() says of the target stays, and distribution(),
    which cannot know the target, still holds what nats() claims for the token."""
    if not (offers(scorer, "trace") or offers(scorer, "distribution")):
        return skipped("it has neither trace() nor distribution(); test 1 covers gates on the target")
    documents = getattr(scorer, "order_name", "stream") == "stream"
    stream = streams.text(scorer.vocab_size, sizes.length, sizes, documents)
    places = streams.targets(stream, sizes, 4)
    worst = Worst("no decision depends on the target's class")
    if offers(scorer, "trace"):
        _see_traces(worst, scorer, stream, places, sizes)
    if offers(scorer, "distribution"):
        for i in places:
            vector = distribution_of(scorer, stream[: i + 1])
            for v, other in flips(scorer, stream, i, sizes):
                claimed, entry = math.exp(-float(nats_of(scorer, other)[i])), float(vector[v])
                off = abs(claimed - entry) / max(entry, 1e-300)
                worst.see(off, f"target {i}: as token {v} it gets {claimed:.6g}, its distribution has {entry:.6g}")
    return worst.judged(SAME)


def _see_traces(worst: Worst, scorer: Scorer, stream: Tensor, places: list[int], sizes: Sizes) -> None:
    """How far each traced decision for target i moves when the target is another token."""
    plain = trace_of(scorer, stream)
    for i in places:
        for v, other in flips(scorer, stream, i, sizes):
            for name, values in trace_of(scorer, other).items():
                off = difference(values[: i + 1].double(), plain[name][: i + 1].double())
                worst.see(off, f"target {i}: {name} changes when the target is token {v}")


def flips(scorer: Scorer, stream: Tensor, i: int, sizes: Sizes) -> list[tuple[int, Tensor]]:
    """(token, stream) with a token of each other class as target i; without classes some tokens of the vocabulary."""
    gen = streams.generator(sizes.seed, 6, i)
    now, classes = int(stream[i + 1]), getattr(scorer, "token_classes", None)
    ids = torch.randperm(scorer.vocab_size, generator=gen)
    ids = ids[(ids != now) & (ids != BOS)]
    if classes is None:
        chosen = ids[:FLIPS].tolist()
    else:
        classes = torch.as_tensor(classes)
        chosen = [int(ids[classes[ids] == c][0]) for c in classes[ids].unique().tolist()]
    out = []
    for v in chosen:
        other = stream.clone()
        other[i + 1] = v
        out.append((v, other))
    return out


def prefix_equivalence(scorer: Scorer, sizes: Sizes) -> Result:
    """8: the first m targets alone get the scores that they have in the whole stream, within 1e-5; the whole stream
    once more gets the same to the bit, so that nothing is left over from one stream to the next."""
    documents = getattr(scorer, "order_name", "stream") == "stream"
    stream = streams.text(scorer.vocab_size, sizes.length, sizes, documents)
    whole = nats_of(scorer, stream)
    worst = Worst("prefixes score as in the whole stream")
    for cut in sorted({2, *streams.targets(stream, sizes, 8)}):
        off = difference(nats_of(scorer, stream[: cut + 1]), whole[:cut])
        worst.see(off, f"the first {cut} targets alone score up to {off:.3g} nats differently")
    again = difference(nats_of(scorer, stream), whole)
    off = max(again, 2 * SAME) if again else 0.0
    worst.see(off, f"the same stream scores {again:.3g} nats differently a second time")
    return worst.judged(SAME, "" if documents else f"order {scorer.order_name}: looked at within one document only")


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; 0 for equal infinities, inf where one of them is NaN or they differ."""
    if a.shape != b.shape:
        return math.inf
    off = torch.where(a == b, torch.zeros_like(a), (a - b).abs())
    return float(off.nan_to_num(nan=math.inf).max()) if off.numel() else 0.0
