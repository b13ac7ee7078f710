"""Windows over the stream, which do not look at documents: plain and sliding."""

from __future__ import annotations

from collections.abc import Sequence

from pgolf.errors import ConfigError
from pgolf.eval.base import Evaluator
from pgolf.eval.spans import Span


class Windows(Sequence):
    """Window j starts at j * stride and scores from its first `stride` last positions on; window 0 scores all.

    Spans are made when asked for: the challenge's val split has 969,057 windows at length 2048 and stride 64.
    """

    def __init__(self, n_targets: int, length: int, stride: int, which: range | None = None):
        self.n_targets, self.length, self.stride = n_targets, length, stride
        # j = 0, or j * stride + length - stride < n_targets: every window scores at least one target
        count = 1 + max(0, -(-(n_targets - length) // stride))
        self.which = range(count) if which is None else which

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, j):
        if isinstance(j, slice):
            return Windows(self.n_targets, self.length, self.stride, self.which[j])
        start = self.which[j] * self.stride
        score_from = start + self.length - self.stride if start else 0
        return Span(start, min(start + self.length, self.n_targets), score_from)


class PlainWindows(Evaluator):
    """Non-overlapping windows of `seq_len`; the tail is a short last window.

    truncated: the rule of the challenge's baseline, which drops the tail and scores floor(n / seq_len) * seq_len of n
    targets; for comparison with published numbers.
    """

    def __init__(self, seq_len: int, batch_tokens: int = 524288, truncated: bool = False):
        _check(seq_len, seq_len)
        super().__init__(seq_len, batch_tokens)
        self.truncated = truncated
        self.name = f"plain windows of {seq_len}" + (", truncated" if truncated else "")

    def covered(self, n_targets: int) -> int:
        return n_targets // self.seq_len * self.seq_len if self.truncated else n_targets

    def spans(self, n_targets: int) -> Sequence[Span]:
        return Windows(n_targets, self.seq_len, self.seq_len)


class SlidingWindows(Evaluator):
    """Windows of `seq_len` every `stride`: the first scores all its targets, each later one its last `stride`.

    So every target but the first `seq_len` has at least `seq_len - stride` tokens of context. Costs about
    seq_len / stride times a plain evaluation; worth 0.022 BPB at 2048 / 64 with 11 layers (challenge records).
    """

    def __init__(self, seq_len: int, stride: int, batch_tokens: int = 524288):
        _check(seq_len, stride)
        super().__init__(seq_len, batch_tokens)
        self.stride = stride
        self.name = f"sliding windows of {seq_len}, stride {stride}"

    def spans(self, n_targets: int) -> Sequence[Span]:
        return Windows(n_targets, self.seq_len, self.stride)


def _check(seq_len: int, stride: int) -> None:
    if seq_len < 1 or not 1 <= stride <= seq_len:
        raise ConfigError(f"eval.seq_len={seq_len}, eval.stride={stride}: need 1 <= stride <= seq_len")
