"""Each document scored with an adapter of its own, which learns from the document's chunks once they are scored.

Sources: the record of 2026-03-17 (rank 8 on head, q, v), PR #1530, #1767.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pgolf.data.batch import Batch
from pgolf.errors import ConfigError
from pgolf.eval.base import Evaluator
from pgolf.eval.ledger import Interval
from pgolf.eval.neural import Neural
from pgolf.eval.order import BOS, STREAM, Order
from pgolf.eval.spans import SpanBatch
from pgolf.kernels.cross_entropy import cross_entropy, softcap
from pgolf.model.lora import attach, detach
from pgolf.ttt.config import LoraConfig, digest
from pgolf.ttt.learner import Compiled, Loan, check_length
from pgolf.ttt.schedule import Document, Round, Schedule, documents
from pgolf.ttt.slot_adam import SlotAdam


class DocumentTtt(Evaluator):
    """Chunk i of a document, in a window of up to seq_len that ends with it: score its targets, then one AdamW step of
    the document's adapter on their mean loss. A document's last chunk is not trained on.

    Row s of every batch is slot s of this rank, with adapter s; a document starts with B = 0 and fresh moments. One
    forward gives the scores and, as its graph is kept, the gradients. Slots are numbered over all ranks, so that any
    number of ranks gives the scores of one. Raises ConfigError, also when `order` is not the one that is passed.
    """

    def __init__(
        self,
        cfg: LoraConfig,
        seq_len: int,
        order: Order = STREAM,
        *,
        bos: int = BOS,
        compiled: Compiled = lambda f: f,
    ):
        super().__init__(seq_len, cfg.slots * seq_len, order)
        if cfg.widest_chunk > seq_len:
            raise ConfigError(
                f"ttt.lora: a chunk of {cfg.widest_chunk} does not fit the window of {seq_len} (ttt.seq_len)"
            )
        if cfg.length_chunks and order.documents is None:
            raise ConfigError("ttt.lora.length_chunks: in stream order a document's length is not known; see ttt.order")
        self.cfg, self.bos = cfg, bos
        self.predict = compiled(self._predict)
        self.name = (
            f"test-time training, LoRA {cfg.rank} per document on {cfg.targets}, chunks of {cfg.chunk} in windows of"
            f" {seq_len}, settings {digest(cfg)}"
        )
        self.model = self.loan = self.scored = None

    def start(self, tokens: Tensor, n_targets: int, neural: Neural, dist) -> None:
        check_length(neural.model, self.seq_len)
        self.tokens, self.dist, self.model = tokens, dist, neural.model
        self.docs = documents(tokens, self.order, self.cfg, self.bos)
        self.least_rows = -(-self.cfg.slots // dist.world_size)
        self.loan = Loan(self.model)
        self.fresh_adapters()

    def finish(self) -> None:
        if self.loan:
            detach(self.model)
            self.loan.put_back()
        self.model = self.loan = self.scored = None

    def fresh_adapters(self) -> None:
        """Adapters that add 0, in every slot; nothing else in the model asks for a gradient."""
        detach(self.model)
        for param in self.model.parameters():
            param.requires_grad_(False)
        cfg = self.cfg
        self.adapters = attach(
            self.model, cfg.target_names, rank=cfg.rank, alpha=cfg.alpha, slots=self.least_rows, seed=cfg.seed
        )
        self.params = [p for adapter in self.adapters for p in (adapter.a, adapter.b)]
        self.adam = SlotAdam(self.params, cfg)

    def blocks(self, n_targets: int) -> Sequence[Sequence[Document]]:
        return (self.docs,)

    def batches(self, block: Sequence[Document], rank: int, world_size: int) -> Schedule:
        slots = self.cfg.slots
        own = range(slots * rank // world_size, slots * (rank + 1) // world_size)
        return Schedule(block, slots, own, self.seq_len, strict=self.order.documents is None)

    def places(self, spans: Round) -> list[tuple[int, int]]:
        return [(row, 0) for row in spans.rows]

    def score(self, batch: SpanBatch, neural: Neural) -> Tensor:
        if not neural.temperature.neutral:
            return -self.log_probs(batch, neural).gather(-1, batch.of_scored(batch.batch.targets)[:, None])[:, 0]
        self._forward(batch)
        nats, _, _, order = self.scored
        return nats.detach().flatten()[order]

    def log_probs(self, batch: SpanBatch, neural: Neural) -> Tensor:
        self._forward(batch)
        _, logits, _, order = self.scored
        return neural.temperature.log_probs(softcap(logits.detach().flatten(0, 1)[order], self.model.cfg.softcap))

    def _forward(self, batch: SpanBatch) -> None:
        """Predicts the round's chunks with their documents' adapters; keeps the graph for `adapt`."""
        spans: Round = batch.spans
        fresh = self._mask(spans, spans.fresh)
        for adapter in self.adapters:
            adapter.reset_(fresh, keep_a=self.cfg.keep_a)
        self.adam.reset_(fresh)
        columns, counts = self._columns(spans)
        with torch.enable_grad():
            nats, logits = self.predict(batch.batch, columns)
        width = columns.shape[1]
        order = [torch.arange(counts[row]) + row * width for row in spans.rows]
        self.scored = nats, logits, counts, torch.cat(order).to(nats.device)

    def _predict(self, batch: Batch, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Nats (rows, c) fp32 and logits (rows, c, V) at the columns (rows, c) of each row: the head, too, has an
        adapter a row, and sees the scored positions only."""
        hidden = self.model.hidden(batch)
        picked = hidden.gather(1, columns[..., None].expand(-1, -1, hidden.shape[-1]))
        logits, targets = self.model.logits(picked), batch.targets.gather(1, columns)
        nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), cap=self.model.cfg.softcap)[0]
        return nats.view(targets.shape), logits

    def _columns(self, spans: Round) -> tuple[Tensor, list[int]]:
        """Columns (rows, c) int64 of the scored targets, padded with 0, and how many each row has."""
        columns = torch.zeros(self.least_rows, self.cfg.widest_chunk, dtype=torch.int64)
        counts = [0] * self.least_rows
        for (start, end, score_from), row in zip(spans, spans.rows, strict=True):
            counts[row] = end - score_from
            columns[row, : counts[row]] = torch.arange(score_from - start, end - start)
        return columns.to(self.dist.device), counts

    def _mask(self, spans: Round, which: Sequence[bool]) -> Tensor:
        """(rows,) bool: the slots of those spans."""
        mask = torch.zeros(self.least_rows, dtype=torch.bool)
        mask[[row for row, yes in zip(spans.rows, which, strict=True) if yes]] = True
        return mask.to(self.dist.device)

    def adapt(self, batch: SpanBatch, neural: Neural) -> Sequence[Interval]:
        (nats, _, counts, _), self.scored = self.scored, None
        spans: Round = batch.spans
        train = [not last for last in spans.last]
        if not any(train):
            return ()
        weights = torch.zeros(nats.shape)
        for row, yes in zip(spans.rows, train, strict=True):
            weights[row, : counts[row]] = yes / counts[row]
        # The sum over slots of each chunk's mean: a slot's gradient knows nothing of the others
        grads = torch.autograd.grad((nats * weights.to(nats.device)).sum(), self.params)
        self.adam.step(grads, self._mask(spans, train))
        return [(span.score_from, span.end) for span, yes in zip(spans, train, strict=True) if yes]

    def state(self) -> dict:
        return {"adapters": self.params, "adam": self.adam.state()}

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        torch._foreach_copy_(self.params, state["adapters"])
        self.adam.load_state(state["adam"])
