"""Sliding windows, chunk after chunk of the stream; after a chunk is scored all ranks train the model on it.

Sources: PR #461, #549, #1413, #1493; variants: PR #401 (moving average scores), #688, #834.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.eval.base import ByteCounts, Evaluator
from pgolf.eval.ledger import Interval
from pgolf.eval.neural import Neural
from pgolf.eval.spans import Span
from pgolf.eval.windowed import Windows
from pgolf.ttt.config import SgdConfig, digest
from pgolf.ttt.learner import Compiled, Learner, Loan, Text, check_length, rate_at


class ChunkTtt(Evaluator):
    """Chunk c is targets [c C, (c + 1) C); a window belongs to the chunk of the first target it scores.

    With seq_len and C multiples of the stride, and C at least seq_len, windows score inside their own chunk only. The
    last chunk is not trained on: nothing is scored after it. byte_counts, val_bytes: as `evaluate` has them; needed for
    byte_weighted. Raises ConfigError.
    """

    learns_together = True

    def __init__(
        self,
        cfg: SgdConfig,
        seq_len: int,
        stride: int,
        batch_tokens: int = 524288,
        *,
        byte_counts: ByteCounts | None = None,
        val_bytes: Tensor | None = None,
        compiled: Compiled = lambda f: f,
    ):
        super().__init__(seq_len, batch_tokens)
        if not 1 <= stride <= seq_len or seq_len % stride or cfg.chunk % stride or cfg.chunk < seq_len:
            raise ConfigError(
                f"ttt.sgd.chunk={cfg.chunk}, window {seq_len}, stride {stride}: chunk and window must be multiples of"
                " the stride and the chunk at least a window, or windows would reach into the next chunk"
            )
        if cfg.byte_weighted and byte_counts is None and val_bytes is None:
            raise ConfigError("ttt.sgd.byte_weighted: needs byte_counts or val_bytes")
        self.cfg, self.stride, self.compiled = cfg, stride, compiled
        self.byte_counts, self.val_bytes = byte_counts, val_bytes
        self.name = (
            f"test-time training, {cfg.optimizer} on chunks of {cfg.chunk}, windows of {seq_len}, stride {stride},"
            f" settings {digest(cfg)}"
        )
        self.loan: Loan | None = None

    def start(self, tokens: Tensor, n_targets: int, neural: Neural, dist) -> None:
        check_length(neural.model, self.seq_len)
        self.tokens, self.chunks = tokens, -(-n_targets // self.cfg.chunk)
        rows = max(self.batch_tokens // (dist.world_size * self.seq_len), 1)
        share = -(-min(self.cfg.chunk, n_targets) // (self.stride * dist.world_size))
        self.least_rows = -(-share // -(-share // rows))  # of a whole chunk: the first has fewer windows
        self.loan = Loan(neural.model)
        self.learner = Learner(neural.model, self.cfg, dist, rows, self.seq_len, self.compiled)

    def finish(self) -> None:
        if self.loan:
            self.loan.put_back()
        self.loan = self.learner = None

    def spans(self, n_targets: int) -> Windows:
        return Windows(n_targets, self.seq_len, self.stride)

    def blocks(self, n_targets: int) -> Sequence[Sequence[Span]]:
        """Windows by chunk, without making them: window j > 0 scores from j * stride + seq_len - stride on."""
        windows, chunk = self.spans(n_targets), self.cfg.chunk
        first = lambda c: -(-(c * chunk - self.seq_len + self.stride) // self.stride) if c else 0
        return [windows[first(c) : first(c + 1)] for c in range(-(-n_targets // chunk))]

    def adapt_block(self, number: int, neural: Neural) -> Sequence[Interval]:
        if number + 1 >= self.chunks or (self.cfg.max_chunks and number >= self.cfg.max_chunks):
            return ()
        begin, end = number * self.cfg.chunk, (number + 1) * self.cfg.chunk
        ids, targets = self.tokens[begin:end], self.tokens[begin + 1 : end + 1]
        self.learner.learn(Text(ids, targets, self._weights(begin, end)), rate_at(self.cfg, number, self.chunks))
        return [(begin, end)]

    def _weights(self, begin: int, end: int) -> Tensor | None:
        """Bytes of each target, if they weigh."""
        if not self.cfg.byte_weighted:
            return None
        if self.val_bytes is not None:
            return self.val_bytes[begin + 1 : end + 1].float().cpu()
        device = self.learner.dist.device
        ids, targets = self.tokens[begin:end].to(device), self.tokens[begin + 1 : end + 1].to(device)
        return self.byte_counts(ids, targets).float().cpu()

    def state(self) -> dict:
        return self.learner.state()

    def load_state(self, state: dict) -> None:
        self.learner.load_state(state)
