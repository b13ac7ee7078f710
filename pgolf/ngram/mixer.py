"""mixer: a small trained gate over the model and the exact n-gram distribution of each order.

    p = w_0 p_model + sum_n w_n c(s_n, .) / c(s_n),    w = softmax over the orders with c(s_n) >= min_count, and 0
    w_0 <- floor + (1 - floor) w_0, the others (1 - floor) w_n

Which orders take part depends on context counts alone, and the gate's input on the prefix: per order ln(1 + c), the
leader's share, ln(1 + T); the model's entropy; its hidden state where the caller has it. So p sums to one. After the
challenge's PR #834 and #859, whose experts were hashed tables and learned to exploit collisions (weight of order 7 up,
of the model down); with exact counts there is nothing of the kind to learn.

`fit` trains it on TRAINING text, with counts of that text before each of its targets. The weights are part of the
artifact, fp16: (3 K + 2) (K + 1) numbers for K orders without hidden layer or state, 468 bytes for 8 orders. Not
trained, it weighs the model e^2 : 1 against each order that takes part.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pgolf.errors import ArtifactError
from pgolf.eval.order import STREAM, Order
from pgolf.eval.stats import TokenStats
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.scorer import MOST_NATS, Prepared, Scorer, entropy_of

BLOCK = 2**18  # targets whose features exist at a time
MODEL_BIAS = 2.0


class MixerHead(nn.Module):
    """Features (n, F) -> logits (n, 1 + K), the model first."""

    def __init__(self, n_orders: int, width: int = 0, hidden_state: int = 0):
        """width: of the hidden layer, 0 = none. hidden_state: D of the model's state, appended to the features."""
        super().__init__()
        features = 3 * n_orders + 1 + hidden_state
        self.inner = nn.Linear(features, width) if width else None
        self.outer = nn.Linear(width or features, n_orders + 1)
        nn.init.zeros_(self.outer.weight)
        with torch.no_grad():
            self.outer.bias.copy_(torch.tensor([MODEL_BIAS] + [0.0] * n_orders))

    def forward(self, x: Tensor) -> Tensor:
        if self.inner is not None:
            x = nn.functional.gelu(self.inner(x))
        return self.outer(x)


class Mixer(Scorer):
    name = "mixer"
    needs = frozenset({"entropy"})

    def __init__(self, cfg: NgramConfig, vocab_size: int, hidden_state: int = 0):
        super().__init__(cfg, vocab_size)
        self.head = MixerHead(len(cfg.orders), cfg.mixer_hidden, hidden_state).double()

    def prepare(self, tokens: Tensor, order: Order = STREAM, counts: StreamCounts | None = None) -> Prepared:
        """Keeps the counts of all orders, 20 bytes a target each: the gate looks at all of them at once."""
        prepared = super().prepare(tokens, order, counts)
        prepared.counts.keep = True
        return prepared

    def mixed(self, prepared: Prepared, stats: TokenStats, hidden: Tensor | None = None) -> Tensor:
        """hidden: (T, D) where the head was made for it."""
        head = self.head.to(prepared.counts.device)
        out = [
            self.block_nats(head, prepared.counts, stats, at, None if hidden is None else hidden[at])
            for at in torch.arange(prepared.counts.n_targets, device=prepared.counts.device).split(BLOCK)
        ]
        return torch.cat(out).detach()

    def block_nats(
        self, head: nn.Module, counts: StreamCounts, stats: TokenStats, at: Tensor, hidden: Tensor | None = None
    ) -> Tensor:
        """(n,) fp64 of the targets `at`, with gradients for the head."""
        features, q, known = self.inputs(counts, stats.entropy, at)
        if hidden is not None:
            features = torch.cat([features, hidden.double()], 1)
        w = self.weights(head(features), known)
        nats = stats.nats[at].double()
        ratio = w[:, 0] + (w[:, 1:] * q).sum(1) * nats.clamp(max=MOST_NATS).exp()
        return nats - torch.where(known.any(1), ratio, 1.0).log()

    def inputs(self, counts: StreamCounts, entropy: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features (n, 3 K + 1) fp64, q of the target (n, K) fp64, which orders take part (n, K) bool."""
        columns, q, known = [], [], []
        for n in self.cfg.orders:
            c, pair, distinct, _, leader = (x[at].double() for x in counts.of(n))
            columns += [c.log1p(), leader / c.clamp(min=1), distinct.log1p()]
            q.append(pair / c.clamp(min=1))
            known.append(c >= self.cfg.min_count)
        return torch.stack([*columns, entropy[at].double()], 1), torch.stack(q, 1), torch.stack(known, 1)

    def weights(self, logits: Tensor, known: Tensor) -> Tensor:
        """(n, 1 + K), each row sums to one."""
        unknown = torch.cat([torch.zeros_like(known[:, :1]), ~known], 1)
        w = logits.masked_fill(unknown, -torch.inf).softmax(1) * (1 - self.cfg.mixer_floor)
        return torch.cat([w[:, :1] + self.cfg.mixer_floor, w[:, 1:]], 1)

    def fit(
        self, tokens: Tensor, stats: TokenStats, *, steps: int = 300, batch: int = 4096, lr: float = 0.02,
        seed: int = 0, hidden: Tensor | None = None,
    ) -> list[float]:  # fmt: skip
        """Trains the head on training text. stats: what the model said of its targets. Returns mean nats by step."""
        prepared = self.prepare(tokens, stats.order)
        stats = self.checked(prepared, stats)
        draw, losses = torch.Generator().manual_seed(seed), []
        optim = torch.optim.Adam(self.head.parameters(), lr=lr)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(optim, steps)
        for _ in range(steps):
            at = torch.randint(len(stats), (min(batch, len(stats)),), generator=draw).to(prepared.counts.device)
            state = None if hidden is None else hidden[at]
            loss = self.block_nats(self.head, prepared.counts, stats, at, state).mean()
            optim.zero_grad()
            loss.backward()
            optim.step()
            decay.step()
            losses.append(loss.item())
        self.load_state(self.state())  # scores what the artifact holds
        return losses

    def state(self) -> dict[str, Tensor]:
        """The weights as the artifact holds them, fp16 on the CPU."""
        return {name: w.detach().to("cpu", torch.float16) for name, w in self.head.state_dict().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`. Raises ArtifactError when the weights are of other settings."""
        try:
            self.head.load_state_dict(state)
        except RuntimeError as err:
            raise ArtifactError(f"ngram: the mixer's weights do not fit its settings ({err})") from err

    @property
    def stored_bytes(self) -> int:
        """Of `state`, before compression."""
        return sum(2 * w.numel() for w in self.head.parameters())

    def distribution(self, tokens: Tensor, stats: TokenStats, base: Tensor) -> Tensor:
        counts, features, vectors = self.dict_counts(tokens), [], [base]
        for n in self.cfg.orders:
            row = counts.row(n) or {}
            total = sum(row.values())
            features += [total, max(row.values(), default=0) / max(total, 1), len(row)]
            vectors.append(counts.vector(n, self.vocab_size) / total if total >= self.cfg.min_count else None)
        x = torch.tensor([*features, entropy_of(base)], dtype=torch.float64)
        x[0:-1:3], x[2:-1:3] = x[0:-1:3].log1p(), x[2:-1:3].log1p()
        with torch.no_grad():
            raw = self.head(x[None])[0].exp().tolist()
        mass = sum(w for w, vector in zip(raw, vectors, strict=True) if vector is not None)
        floor, out = self.cfg.mixer_floor, self.cfg.mixer_floor * base
        for w, vector in zip(raw, vectors, strict=True):
            if vector is not None:
                out = out + (1 - floor) * w / mass * vector
        return out
