"""Documents with adapters, in phases: between two phases all ranks train the base weights on what the last one scored.

Sources: PR #1610 (one phase), #1626 (several).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from pgolf.eval.ledger import Interval
from pgolf.eval.neural import Neural
from pgolf.eval.order import BOS, STREAM, Order
from pgolf.model.lora import detach
from pgolf.ttt.config import LoraConfig, PhasesConfig, digest
from pgolf.ttt.documents import DocumentTtt
from pgolf.ttt.learner import Compiled, Learner, Text, rate_at
from pgolf.ttt.schedule import Document


class PhasedTtt(DocumentTtt):
    """Block i is the documents of phase i, the last block those behind the last phase.

    At a phase's end the slots have run empty; its documents, packed into rows of seq_len that keep them apart, are cut
    into chunks, and SGD trains the base weights on all but the last chunk. Then adapters start anew. rows: of a batch
    of that training on this rank.
    """

    learns_together = True

    def __init__(
        self,
        cfg: LoraConfig,
        phases: PhasesConfig,
        seq_len: int,
        order: Order = STREAM,
        *,
        rows: int = 32,
        bos: int = BOS,
        compiled: Compiled = lambda f: f,
    ):
        super().__init__(cfg, seq_len, order, bos=bos, compiled=compiled)
        self.phases, self.rows, self.compiled = phases, rows, compiled
        self.name += f", {phases.count} phases over {phases.documents} documents, settings {digest(phases)}"

    def start(self, tokens: Tensor, n_targets: int, neural: Neural, dist) -> None:
        super().start(tokens, n_targets, neural, dist)
        self.base = [param for param, _, _ in self.loan.kept]
        self.roles_ask = [asks for _, _, asks in self.loan.kept]

    def blocks(self, n_targets: int) -> Sequence[Sequence[Document]]:
        ends = [min(end, len(self.docs)) for end in self.phases.ends()]
        bounds = sorted({0, *ends, len(self.docs)})
        return [self.docs[first:end] for first, end in pairwise(bounds)]

    def adapt_block(self, number: int, neural: Neural) -> Sequence[Interval]:
        blocks = self.blocks(len(self.tokens) - 1)
        if number + 1 == len(blocks):
            return ()
        detach(self.model)
        for param, asks in zip(self.base, self.roles_ask, strict=True):
            param.requires_grad_(asks)  # what never asked for a gradient is not trained
        learned = self._train(blocks[number])
        self.fresh_adapters()
        return learned

    def _train(self, docs: Sequence[Document]) -> list[Interval]:
        """One pass of SGD; returns the targets that it has seen."""
        cfg = self.phases.sgd()
        learner = Learner(self.model, cfg, self.dist, self.rows, self.seq_len, self.compiled)
        inputs = torch.cat([torch.arange(d.start, d.start + d.size) for d in docs])
        starts = torch.tensor([0, *(d.size for d in docs[:-1])]).cumsum(0)
        chunks = -(-len(inputs) // cfg.chunk)
        for number in range(chunks - 1):
            at, begin = inputs[number * cfg.chunk : (number + 1) * cfg.chunk], number * cfg.chunk
            inside = starts[(starts >= begin) & (starts < begin + cfg.chunk)] - begin
            text = Text(self.tokens[at], self.tokens[at + 1], None, inside)
            learner.learn(text, rate_at(cfg, number, chunks))
        seen = (chunks - 1) * cfg.chunk
        cut = ((d, min(d.size, seen - int(s))) for d, s in zip(docs, starts, strict=True))
        return [(d.start, d.start + size) for d, size in cut if size > 0]

    def state(self) -> dict:
        return {**super().state(), "base": [p.detach() for p in self.base]}

    @torch.no_grad()
    def load_state(self, state: dict) -> None:
        super().load_state(state)
        torch._foreach_copy_(self.base, state["base"])
