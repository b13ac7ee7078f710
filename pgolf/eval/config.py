"""Settings of the final evaluation. No torch here (see pgolf/model/config.py)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentsConfig:
    """A pass in which each document is scored on its own, packed into rows of seq_len."""

    stride: int = 0  # of the windows within a document; 0 = seq_len, no token is forwarded twice

    def problems(self) -> list[str]:
        return [] if self.stride >= 0 else [f"stride={self.stride} must not be negative"]


@dataclass(frozen=True)
class TemperatureConfig:
    """A softmax temperature, chosen on training data before the weights are packed, and part of the artifact."""

    targets: int = 65536  # of the training split that it is chosen on
    adaptive: bool = False  # by the entropy of each prediction

    def problems(self) -> list[str]:
        return [] if self.targets >= 1 else [f"targets={self.targets} must be at least 1"]


@dataclass(frozen=True)
class EvalConfig:
    seq_len: int = 0  # context of plain and sliding windows; 0 = data.seq_len
    stride: int = 64  # of the sliding window; 0 = no sliding evaluation
    batch_tokens: int = 524288  # tokens forwarded per batch over all ranks, plain windows (VAL_BATCH_SIZE)
    max_tokens: int = 0  # score only the first n targets of the val split; 0 = all. The result names the subset
    sliding_max_tokens: int = 0  # the same for the passes behind the plain one: sliding, documents, adapting
    documents: DocumentsConfig | None = None
    temperature: TemperatureConfig | None = None
    max_seconds: float = 600.0  # of all scoring of the artifact together; it is stopped before. 0 = no limit
    reserve_seconds: float = 1.0  # how long before
    save_seconds: float = 60.0  # between saves of an evaluation's progress, for a killed one to go on from; 0 = none

    def problems(self) -> list[str]:
        out = [f"{n}={getattr(self, n)} must not be negative"
               for n in ("seq_len", "stride", "max_tokens", "sliding_max_tokens", "max_seconds", "reserve_seconds",
                         "save_seconds")
               if getattr(self, n) < 0]  # fmt: skip
        if 0 < self.max_seconds <= self.reserve_seconds:
            out.append(f"reserve_seconds={self.reserve_seconds} must be below max_seconds={self.max_seconds}")
        return out if self.batch_tokens >= 1 else [*out, f"batch_tokens={self.batch_tokens} must be at least 1"]
