"""Settings of the data side. No torch here (see pgolf/model/config.py)."""

from __future__ import annotations

from dataclasses import dataclass

LOADER_NAMES = ("sequential", "coprime_a", "coprime_b")


@dataclass(frozen=True)
class DataConfig:
    path: str = ""  # folder of the shards; empty: the corpus embedded in Python's own standard library
    tokenizer_path: str = ""  # SentencePiece model; may stay empty with the embedded corpus
    cache_dir: str = ""  # where the embedded corpus is built; empty: the user's cache folder
    loader: str = "sequential"  # sequential, coprime_a (PR #1130) or coprime_b (PR #1120)
    seq_len: int = 1024  # tokens a row in training
    batch_tokens: int = 524288  # per step, all ranks and micro-batches together
    # Micro-batches per step over all ranks: a rank accumulates ceil(micro_batches / world size) of them, so that 1, 2,
    # 4 or 8 ranks see the same step.
    micro_batches: int = 8
    shards_per_batch: int = 1  # coprime_b
    shard_hold_steps: int = 64  # coprime_b
    max_loaded_shards: int = 4  # coprime_b

    def problems(self) -> list[str]:
        out = []
        if self.loader not in LOADER_NAMES:
            out.append(f"loader={self.loader!r} must be one of {', '.join(LOADER_NAMES)}")
        if self.seq_len < 2:
            out.append(f"seq_len={self.seq_len} must be at least 2")
        if self.micro_batches < 1:
            out.append(f"micro_batches={self.micro_batches} must be at least 1")
        need = self.seq_len * max(self.micro_batches, 1)
        if self.batch_tokens < need:
            out.append(f"batch_tokens={self.batch_tokens} must hold one sequence per micro-batch: at least {need}")
        return out
