"""From settings to the evaluator that they describe, and a synthetic stream to warm it up with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.eval.base import ByteCounts, Evaluator
from pgolf.eval.order import BOS, STREAM, Order, length_sorted
from pgolf.ttt.chunked import ChunkTtt
from pgolf.ttt.config import TttConfig
from pgolf.ttt.documents import DocumentTtt
from pgolf.ttt.learner import Compiled
from pgolf.ttt.phased import PhasedTtt


@dataclass(frozen=True)
class Frame:
    """What an evaluation gives: its context, stride, batch size and order, and how bytes are counted.

    seq_len is used where ttt.seq_len is 0. batch_tokens: forwarded at a time, over all ranks together; per-document
    adapters have ttt.lora.slots rows instead.
    """

    seq_len: int
    stride: int = 64
    batch_tokens: int = 524288
    order: Order = STREAM
    world_size: int = 1
    byte_counts: ByteCounts | None = None
    val_bytes: Tensor | None = None
    compiled: Compiled = lambda f: f


def order_of(cfg: TttConfig, tokens: Tensor) -> Order:
    """The order of the documents of (N,) tokens, to be shared by all adaptive parts of the evaluation."""
    return length_sorted(tokens) if cfg.order == "length_sorted" else STREAM


def build(cfg: TttConfig, frame: Frame) -> Evaluator:
    """Raises ConfigError, also when the frame's order is not the one that cfg names."""
    if frame.order.name != cfg.order:
        raise ConfigError(f"ttt.order={cfg.order}, but the evaluation's order is {frame.order.name}: they must agree")
    return EVALUATORS[cfg.kind](cfg, frame, cfg.seq_len or frame.seq_len)


def _sgd(cfg: TttConfig, frame: Frame, seq_len: int) -> ChunkTtt:
    return ChunkTtt(
        cfg.sgd, seq_len, frame.stride, frame.batch_tokens,
        byte_counts=frame.byte_counts, val_bytes=frame.val_bytes, compiled=frame.compiled,
    )  # fmt: skip


def _lora(cfg: TttConfig, frame: Frame, seq_len: int) -> DocumentTtt:
    return DocumentTtt(cfg.lora, seq_len, frame.order, compiled=frame.compiled)


def _phased(cfg: TttConfig, frame: Frame, seq_len: int) -> PhasedTtt:
    rows = max(frame.batch_tokens // (frame.world_size * seq_len), 1)
    return PhasedTtt(cfg.lora, cfg.phases, seq_len, frame.order, rows=rows, compiled=frame.compiled)


def warm_up_tokens(cfg: TttConfig, seq_len: int, vocab_size: int, seed: int = 0) -> Tensor:
    """(N,) int64 random tokens in documents, short, and yet with every forward and backward that `cfg` asks for.

    To compile everything before the evaluation: evaluate them with an evaluator of the same settings, which leaves the
    model as it was, and drop the result. Validation tokens must not be used for that: they would be learned from early.
    """
    gen = torch.Generator().manual_seed(seed)
    random = lambda n: torch.randint(BOS + 1, vocab_size, (n,), generator=gen)
    if cfg.kind == "sgd":
        return torch.cat([torch.tensor([BOS]), random(cfg.sgd.chunk + (cfg.seq_len or seq_len))])
    count, size = cfg.lora.slots, cfg.lora.widest_chunk + 1  # two chunks, of which the first is learned from
    if cfg.kind == "phased":
        first = cfg.phases.ends()[0]
        count, size = first + count, max(size, -(-2 * cfg.phases.chunk // first))
    tokens = random(count * size + 1)
    tokens[::size] = BOS
    return tokens


EVALUATORS: dict[str, Callable[[TttConfig, Frame, int], Evaluator]] = {"sgd": _sgd, "lora": _lora, "phased": _phased}
