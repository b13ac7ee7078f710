"""Streams that tests score, from seeds: text with repetitions and documents, noise, shuffles, other futures."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pgolf.audit.interface import BOS
from pgolf.audit.result import Sizes


def generator(seed: int, *what: int) -> torch.Generator:
    """One that differs from test to test and from position to position."""
    mixed = seed
    for part in what:
        mixed = (mixed * 1_000_003 + part + 1) % 2**62
    return torch.Generator().manual_seed(mixed)


def tokens_but_bos(vocab: int, n: int, gen: torch.Generator) -> Tensor:
    """(n,) uniform over all ids but BOS."""
    drawn = torch.randint(0, vocab - 1, (n,), generator=gen)
    return drawn + (drawn >= BOS)


def text(vocab: int, n: int, sizes: Sizes, documents: bool = True) -> Tensor:
    """(n,) of the given text, or synthetic: documents of up to 60 tokens made of few phrases, a tenth of it noise, so
    that n-gram tables of every order find something. documents: False leaves BOS at the beginning only."""
    if sizes.text is not None and sizes.text.numel() >= n:
        out = sizes.text[:n].to(torch.int64).clone()
    else:
        out = _synthetic(vocab, n, generator(sizes.seed, 1))
    if not documents:
        out[1:][out[1:] == BOS] = 2
    return out


def _synthetic(vocab: int, n: int, gen: torch.Generator) -> Tensor:
    draw = lambda high: int(torch.randint(0, high, (1,), generator=gen))
    phrases = [tokens_but_bos(vocab, 3 + draw(9), gen) for _ in range(6)]
    parts, size, left = [], 0, 0
    while size < n:
        if left <= 0:
            parts.append(torch.tensor([BOS]))
            left = 12 + draw(48)
        part = phrases[min(draw(6), draw(6))] if draw(10) else tokens_but_bos(vocab, 2, gen)
        parts.append(part)
        size, left = size + part.numel(), left - part.numel()
    return torch.cat(parts)[:n]


def noise(vocab: int, n: int, seed: int) -> Tensor:
    """(n,) independent and uniform over ids 0 to vocab - 1: no scorer can need less than log2(vocab) bits a token."""
    return torch.randint(0, vocab, (n,), generator=generator(seed, 2))


def shuffled(tokens: Tensor, seed: int) -> Tensor:
    """The same tokens, all but the first in random order."""
    order = torch.randperm(tokens.numel() - 1, generator=generator(seed, 3))
    return torch.cat([tokens[:1], tokens[1:][order]])


def shuffle_bits(tokens: Tensor) -> float:
    """log2 of the number of different orders of tokens[1:]: what a random one of them costs any code on average."""
    counts = torch.bincount(tokens[1:]).double()
    return float(torch.lgamma(counts.sum() + 1) - torch.lgamma(counts + 1).sum()) / math.log(2)


def targets(tokens: Tensor, sizes: Sizes, test: int) -> list[int]:
    """Targets to look at, the most telling first: one whose three tokens of context have occurred most often, where
    n-gram parts are surest; the last but one; others at random from the second half, where states are full."""
    n, gen = tokens.numel() - 1, generator(sizes.seed, 4, test)
    drawn = n // 2 + torch.randperm(max(n - n // 2 - 2, 1), generator=gen)
    return list(dict.fromkeys([_most_repeated(tokens), n - 2, *drawn.tolist()]))[: sizes.positions]


def _most_repeated(tokens: Tensor) -> int:
    """The target after the context of three tokens that has occurred most often before it, the latest of several."""
    seen: dict[tuple[int, ...], int] = {}
    best, most, stream = tokens.numel() - 3, 0, tokens.tolist()
    for i in range(2, len(stream) - 2):
        context = tuple(stream[i - 2 : i + 1])
        count = seen[context] = seen.get(context, 0) + 1
        if count >= most:
            best, most = i, count
    return best


def futures(tokens: Tensor, kept: int, vocab: int, sizes: Sizes, documents: bool) -> list[tuple[str, bool, Tensor]]:
    """(what, whether all shapes stay the same, stream) of streams that agree in tokens[:kept]."""
    out: list[tuple[str, bool, Tensor]] = []
    n = tokens.numel()
    for k in range(sizes.tails):
        gen = generator(sizes.seed, 5, kept, k)
        other = tokens.clone()
        other[kept:] = torch.where(tokens[kept:] == BOS, BOS, tokens_but_bos(vocab, n - kept, gen))
        out.append(("a random tail", True, other))
        if documents:
            moved = other.clone()
            moved[kept:] = tokens_but_bos(vocab, n - kept, gen)
            moved[kept + int(torch.randint(0, n - kept, (1,), generator=gen))] = BOS
            out.append(("BOS elsewhere in the tail", False, moved))
        out.append(("a longer tail", False, torch.cat([other, tokens_but_bos(vocab, 1 + n // 3, gen)])))
        out.append(("a shorter tail", False, other[: kept + (n - kept) // 2]))
    return out
