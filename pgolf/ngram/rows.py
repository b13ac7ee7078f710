"""Whole count vectors at chosen targets, from sorted pairs: for scorers that need every token of the vocabulary.

Pairs (context, token) are sorted once with their times; the count of one before a time is then a binary search. A
query costs a search a *different* follower that its context ever gets, at most V, so no more than its softmax does.
About 40 bytes a target and order stay in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pgolf.kernels._ngram_count import run_starts
from pgolf.kernels.ngram_hash import NO_CONTEXT
from pgolf.ngram.counts import StreamCounts


class CountRows:
    """Count vectors of one order."""

    def __init__(self, counts: StreamCounts, n: int):
        keys = counts.keys(n)
        self.chunk = counts.chunk
        sorted_keys, order = torch.sort(keys, stable=True)
        start = run_starts(sorted_keys)
        self.group = torch.empty_like(start).scatter_(0, order, start)  # (T,) as targets are scored
        self.group.masked_fill_(keys == NO_CONTEXT, -1)
        pairs, pair_order = torch.sort((start << 31) + counts.targets[order], stable=True)
        head = torch.ones_like(pairs, dtype=torch.bool)
        head[1:] = pairs[1:] != pairs[:-1]
        self.when = ((head.cumsum(0) - 1) << 31) + order[pair_order]  # ascending: run by run, in each by time
        self.begin = head.nonzero()[:, 0]  # (R,) where each run of equal pairs starts
        self.run_group, self.run_token = pairs[head] >> 31, pairs[head] & (2**31 - 1)

    def before(self, at: Tensor, vocab_size: int) -> Tensor:
        """at: (n,) int64, numbers of targets as they are scored -> (n, V) fp64 counts that each one's context has."""
        group = self.group[at]
        first = torch.searchsorted(self.run_group, group)
        size = torch.where(group < 0, 0, torch.searchsorted(self.run_group, group, right=True) - first)
        query = torch.repeat_interleave(torch.arange(at.numel(), device=at.device), size)
        inside = torch.arange(query.numel(), device=at.device) - (size.cumsum(0) - size)[query]
        run = first[query] + inside
        limit = (at // self.chunk * self.chunk if self.chunk else at)[query]
        count = torch.searchsorted(self.when, (run << 31) + limit) - self.begin[run]
        out = torch.zeros((at.numel(), vocab_size), dtype=torch.float64, device=at.device)
        out[query, self.run_token[run]] = count.to(torch.float64)
        return out
