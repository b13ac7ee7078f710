"""Test 10: a file is made of the text with the scorer's probabilities, and the text is made of the file again.

An integer arithmetic coder after Witten, Neal and Cleary ("Arithmetic coding for data compression", 1987), with a state
of 62 bits and frequencies of 44. That a decoder exists is what a score in bits claims; other tests are cheaper signs.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from pgolf.audit import streams
from pgolf.audit.interface import Scorer, distribution_of, nats_of, offers
from pgolf.audit.result import Result, Sizes, judged, skipped

STATE_BITS, TOTAL_BITS = 62, 44
TOP, HALF, QUARTER = 1 << STATE_BITS, 1 << STATE_BITS - 1, 1 << STATE_BITS - 2
SLACK, SLACK_PER_TOKEN = 2.0, 1e-3  # bits: the coder's end; rounding, and nats that agree to a relative 1e-5


def frequencies(p: Tensor) -> np.ndarray:
    """(V,) probabilities, which need not add up to 1 -> (V+1,) int64 cumulative frequencies, each token at least 1."""
    share = p.clamp(min=0).nan_to_num(0.0) / p.clamp(min=0).nan_to_num(0.0).sum().clamp(min=1e-300)
    counts = np.floor(share.numpy() * ((1 << TOTAL_BITS) - 2 * p.numel())).astype(np.int64) + 1
    return np.concatenate([[0], np.cumsum(counts)])


class Encoder:
    """Tokens to bits. `finish` gives them."""

    def __init__(self):
        self.low, self.high, self.pending = 0, TOP - 1, 0
        self.bits: list[int] = []

    def put(self, token: int, cumulative: np.ndarray) -> None:
        """Narrows the interval to the token's part of it, and writes the bits that are now certain."""
        span, total = self.high - self.low + 1, int(cumulative[-1])
        self.high = self.low + span * int(cumulative[token + 1]) // total - 1
        self.low += span * int(cumulative[token]) // total
        while True:
            if self.high < HALF:
                self._emit(0)
            elif self.low >= HALF:
                self._emit(1)
                self.low, self.high = self.low - HALF, self.high - HALF
            elif self.low >= QUARTER and self.high < HALF + QUARTER:
                self.pending += 1
                self.low, self.high = self.low - QUARTER, self.high - QUARTER
            else:
                break
            self.low, self.high = 2 * self.low, 2 * self.high + 1

    def _emit(self, bit: int) -> None:
        self.bits += [bit] + [1 - bit] * self.pending
        self.pending = 0

    def finish(self) -> list[int]:
        """All bits; the last two name a quarter that lies in the interval."""
        self.pending += 1
        self._emit(int(self.low >= QUARTER))
        return self.bits


class Decoder:
    """Bits to tokens. What follows the last bit counts as zeros."""

    def __init__(self, bits: list[int]):
        self.bits, self.low, self.high = iter(bits), 0, TOP - 1
        self.value = 0
        for _ in range(STATE_BITS):
            self.value = 2 * self.value + next(self.bits, 0)

    def get(self, cumulative: np.ndarray) -> int:
        """The next token; the same steps as the encoder's."""
        span, total = self.high - self.low + 1, int(cumulative[-1])
        at = ((self.value - self.low + 1) * total - 1) // span
        token = int(np.searchsorted(cumulative, at, side="right")) - 1
        self.high = self.low + span * int(cumulative[token + 1]) // total - 1
        self.low += span * int(cumulative[token]) // total
        while True:
            if self.high < HALF:
                shift = 0
            elif self.low >= HALF:
                shift = HALF
            elif self.low >= QUARTER and self.high < HALF + QUARTER:
                shift = QUARTER
            else:
                return token
            self.low, self.high = 2 * (self.low - shift), 2 * (self.high - shift) + 1
            self.value = 2 * (self.value - shift) + next(self.bits, 0)


def round_trip(scorer: Scorer, sizes: Sizes) -> Result:
    """10: text -> bits -> text by distribution(); the text comes back, and the bits are those that nats() claims,
    within 2 and a rounding of 0.001 a token. The first token is given to the decoder."""
    if not offers(scorer, "distribution"):
        return skipped("it has no distribution(), which a decoder needs")
    documents = getattr(scorer, "order_name", "stream") == "stream"
    stream = streams.text(scorer.vocab_size, sizes.round_trip, sizes, documents)
    encoder = Encoder()
    for t in range(1, stream.numel()):
        encoder.put(int(stream[t]), frequencies(distribution_of(scorer, stream[:t])))
    bits = encoder.finish()
    decoder, decoded = Decoder(bits), stream[:1]
    while decoded.numel() < stream.numel():
        token = decoder.get(frequencies(distribution_of(scorer, decoded)))
        if token != int(stream[decoded.numel()]):
            return judged(math.inf, stream.numel() - 1, SLACK, f"token {decoded.numel()} is decoded as another one")
        decoded = torch.cat([decoded, torch.tensor([token])])
    claimed = float(nats_of(scorer, stream).sum()) / math.log(2)
    allowed = SLACK + SLACK_PER_TOKEN * stream.numel()
    detail = f"decoded from {len(bits)} bits; the claim is {claimed:.2f}"
    return judged(abs(len(bits) - claimed), stream.numel() - 1, allowed, detail, bits=len(bits), claimed=claimed)
