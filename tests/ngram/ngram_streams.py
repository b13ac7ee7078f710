"""Streams and a made-up model for the n-gram tests."""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.eval.order import BOS, STREAM, Order
from pgolf.eval.stats import TokenStats
from pgolf.ngram.scorer import Scorer


def stream(n: int, vocab: int, seed: int, documents: bool = False) -> Tensor:
    """(n,) int64; with documents about every twelfth token is BOS, else ids are what they are (BOS = 1 among them)."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocab, (n,), generator=draw)
    if documents:
        tokens[torch.rand(n, generator=draw) < 1 / 12] = BOS
        tokens[0] = BOS
    return tokens


def model(n: int, vocab: int, seed: int, sharp: float = 1.0) -> Tensor:
    """(n, V) fp64 distributions: row i is of the token after tokens[i]."""
    draw = torch.Generator().manual_seed(seed + 1)
    return (sharp * torch.randn(n, vocab, generator=draw, dtype=torch.float64)).softmax(1)


def stats_of(tokens: Tensor, base: Tensor, hints: Tensor | None = None, order: Order = STREAM) -> TokenStats:
    """What an evaluation would keep: base (>= T, V), row i of target i."""
    t = tokens.numel() - 1
    log_p, targets = base[:t].log(), tokens[1:]
    nats = -log_p.gather(1, targets[:, None])[:, 0]
    entropy = -(base[:t] * log_p).sum(1)
    hint_nats = None
    if hints is not None:
        found = -log_p.T.gather(0, hints.long().clamp(min=0))
        hint_nats = found.masked_fill(hints < 0, 0.0).float()
    return TokenStats(nats.float(), entropy.float(), hints, hint_nats, order, "made up")


def production(scorer: Scorer, tokens: Tensor, base: Tensor, order: Order = STREAM) -> tuple[Tensor, TokenStats]:
    """(nats (T,) of the production path, the statistics it had)."""
    prepared = scorer.prepare(tokens, order)
    stats = stats_of(tokens, base, prepared.hints, order)
    if "vector" in scorer.needs:
        t = tokens.numel() - 1
        return scorer.vector_nats(prepared, torch.arange(t), base[:t].log().float()), stats
    return scorer.nats(prepared, stats), stats
