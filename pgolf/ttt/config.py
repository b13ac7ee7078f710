"""Settings of test-time training, and those of the challenge's records. No torch here (see pgolf/model/config.py)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

KINDS = ("sgd", "lora", "phased")
ORDERS = ("stream", "length_sorted")
OPTIMIZERS = ("sgd", "adamw")
PARTS = ("all", "query", "late")
LORA_TARGETS = ("q", "k", "v", "o", "mlp", "head")


def digest(*settings: Any) -> str:
    """8 hex digits for these settings, in an evaluator's name: saves of other settings are not gone on from."""
    return hashlib.sha256(repr(settings).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class SgdConfig:
    """Trains the model's own weights on each chunk of the stream once that is scored (PR #461, #549, #1413)."""

    chunk: int = 32768  # targets of a chunk
    epochs: int = 3  # over a chunk, after it is scored
    step_rows: int = 256  # sequences of an optimiser step, over all ranks together
    optimizer: str = "sgd"  # sgd (with momentum) or adamw
    lr: float = 0.005  # of the first chunk
    lr_floor: float = 0.0  # share of lr at the end of the cosine over chunks
    warmup_chunks: int = 0  # chunks over which the rate rises linearly, on top of the cosine
    momentum: float = 0.9  # of sgd; kept from chunk to chunk
    beta1: float = 0.9  # of adamw
    beta2: float = 0.999  # of adamw
    eps: float = 1e-8  # of adamw
    weight_decay: float = 0.0  # sgd: added to the gradient; adamw: decoupled
    clip: float = 1.0  # largest L2 norm of the averaged gradient; 0 = no clipping
    trained: str = "all"  # all; query: the query projections; late: the last blocks, all vectors, the head
    late_blocks: int = 2  # how many blocks trained=late means
    freeze_blocks: int = 0  # the first n blocks stay as they are
    freeze_tables: bool = False  # token, hashed and value embeddings stay as they are
    block_rates: bool = False  # rate of block i of n times (i + 1) / n
    max_chunks: int = 0  # train on the first n chunks only, the cosine ends there; 0 = on all but the stream's last
    shadow: float = 0.0  # decay of a moving average of the weights, which then scores in their place; 0 = none
    sam: float = 0.0  # radius of sharpness-aware minimisation; 0 = off
    byte_weighted: bool = False  # each target's loss counts by its bytes

    def problems(self) -> list[str]:
        low = {"chunk": 1, "epochs": 1, "step_rows": 1, "lr": 0, "warmup_chunks": 0, "weight_decay": 0, "clip": 0}
        low |= {"late_blocks": 1, "freeze_blocks": 0, "max_chunks": 0, "sam": 0}
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        for name in ("momentum", "beta1", "beta2", "shadow"):
            if not 0 <= getattr(self, name) < 1:
                out.append(f"{name}={getattr(self, name)} must be in [0, 1)")
        if not 0 <= self.lr_floor <= 1:
            out.append(f"lr_floor={self.lr_floor} must be in [0, 1]")
        if self.eps <= 0:
            out.append(f"eps={self.eps} must be above 0")
        for name, allowed in (("optimizer", OPTIMIZERS), ("trained", PARTS)):
            if getattr(self, name) not in allowed:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        return out


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters that learn one document and forget it (record of 2026-03-17; PR #1530, #1767)."""

    targets: str = "k,o,mlp,head"  # what gets adapters, of q, k, v, o, mlp, head
    rank: int = 128  # of A and B
    alpha: float = 144.0  # adapters' output is scaled by alpha / rank
    chunk: int = 48  # targets that are scored, then learned from
    length_chunks: str = ""  # "256:8,2000:24": chunk 8 for documents of up to 256 targets, ...; needs length_sorted
    slots: int = 512  # documents at a time, over all ranks together
    lr: float = 1e-4  # of AdamW, one step a chunk
    beta1: float = 0.0  # first moment
    beta2: float = 0.99  # second moment
    eps: float = 1e-10  # added to the root of the second moment
    weight_decay: float = 0.5  # decoupled
    keep_a: bool = True  # a document's first adapter keeps A as its slot's last document left it; B is 0 always
    seed: int = 0  # of A's start

    @property
    def target_names(self) -> tuple[str, ...]:
        return tuple(self.targets.replace(",", " ").split())

    @property
    def by_length(self) -> tuple[tuple[int, int], ...]:
        """(targets of a document at most, its chunk), ascending. Raises ValueError if the text is something else."""
        parts = [part.split(":") for part in self.length_chunks.replace(",", " ").split()]
        return tuple(sorted((int(most), int(chunk)) for most, chunk in parts))

    def chunk_of(self, size: int) -> int:
        """The chunk of a document of `size` targets."""
        return next((chunk for most, chunk in self.by_length if size <= most), self.chunk)

    @property
    def widest_chunk(self) -> int:
        return max(self.chunk, *(chunk for _, chunk in self.by_length), 1)

    def problems(self) -> list[str]:
        low = {"rank": 1, "chunk": 1, "slots": 1, "lr": 0, "weight_decay": 0, "seed": 0}
        out = [f"{n}={getattr(self, n)} must be at least {v}" for n, v in low.items() if getattr(self, n) < v]
        if not self.target_names or set(self.target_names) - set(LORA_TARGETS):
            out.append(f"targets={self.targets!r} must be some of {', '.join(LORA_TARGETS)}")
        if self.alpha <= 0 or self.eps <= 0:
            out.append(f"alpha={self.alpha} and eps={self.eps} must be above 0")
        if not 0 <= self.beta1 < 1 or not 0 <= self.beta2 < 1:
            out.append(f"beta1={self.beta1} and beta2={self.beta2} must be in [0, 1)")
        try:
            good = all(most > 0 and chunk > 0 for most, chunk in self.by_length)
        except ValueError:
            good = False
        if not good:
            out.append(f"length_chunks={self.length_chunks!r} must read like 256:8,2000:24")
        return out


@dataclass(frozen=True)
class PhasesConfig:
    """SGD on the base weights, after some documents are done, on what these were (PR #1610, #1626)."""

    documents: int = 2000  # the last phase ends when so many documents are done
    count: int = 3  # phase i ends at floor(documents (i + 1) / count)
    lr: float = 0.001  # of the first chunk of a phase; cosine over its chunks
    warmup_chunks: int = 0  # chunks over which the rate rises linearly
    momentum: float = 0.9  # starts anew in each phase
    chunk: int = 32768  # tokens of a step; a phase's last chunk is not trained on
    epochs: int = 1  # over each chunk
    clip: float = 1.0  # largest L2 norm of the averaged gradient; 0 = no clipping

    def problems(self) -> list[str]:
        out = self.sgd().problems()
        if not 1 <= self.count <= self.documents:
            out.append(f"count={self.count} must be in 1..{self.documents} (documents)")
        return out

    def sgd(self) -> SgdConfig:
        """The training of a phase."""
        return SgdConfig(
            chunk=self.chunk, epochs=self.epochs, lr=self.lr, warmup_chunks=self.warmup_chunks, momentum=self.momentum,
            clip=self.clip,
        )  # fmt: skip

    def ends(self) -> list[int]:
        """How many documents are done at the end of each phase."""
        return [self.documents * (i + 1) // self.count for i in range(self.count)]


@dataclass(frozen=True)
class TttConfig:
    """Score-first test-time training: targets are scored, their score is final, then the model learns from them."""

    kind: str = "sgd"  # sgd: all weights, chunk by chunk; lora: adapters per document; phased: lora with phases of sgd
    order: str = "stream"  # of documents; length_sorted: longest first, as records do (uses where the next BOS is)
    seq_len: int = 0  # context; 0 = that of the evaluation
    sgd: SgdConfig = field(default_factory=SgdConfig)  # of kind sgd
    lora: LoraConfig = field(default_factory=LoraConfig)  # of kinds lora and phased
    phases: PhasesConfig = field(default_factory=PhasesConfig)  # of kind phased

    def problems(self) -> list[str]:
        out = []
        for name, allowed in (("kind", KINDS), ("order", ORDERS)):
            if getattr(self, name) not in allowed:
                out.append(f"{name}={getattr(self, name)!r} must be one of {', '.join(allowed)}")
        if self.seq_len < 0:
            out.append(f"seq_len={self.seq_len} must not be negative")
        if self.order == "length_sorted" and self.kind == "sgd":
            out.append("order=length_sorted with kind=sgd: chunks of the stream have stream order; set order=stream")
        if self.lora.length_chunks and self.order != "length_sorted":
            out.append(
                "lora.length_chunks with order=stream: a document's length is known only when its end is scored; set"
                " order=length_sorted, which declares that the score uses it, or length_chunks to nothing"
            )
        return out


_WIDE = LoraConfig(
    targets="q,k,v,o,mlp,head", rank=96, alpha=96, chunk=32, beta2=0.999, weight_decay=0.5, keep_a=False
)  # PR #1530
_WARM = LoraConfig(targets="q,k,v,o,mlp,head", rank=128, alpha=144, chunk=32, beta2=0.999, weight_decay=1.0)  # PR #1767
_SORTED = {"order": "length_sorted", "seq_len": 2048}
_PHASED = {"kind": "phased", "order": "length_sorted"}

# What records and their ablations did (docs/test_time_training.md says which values their sources leave open)
RECORDS: dict[str, TttConfig] = {
    "sgd_549": TttConfig(seq_len=2048, sgd=SgdConfig(lr=0.002)),
    "sgd_1413": TttConfig(seq_len=2048),  # and PR #1493
    "ema_401": TttConfig(sgd=SgdConfig(lr=0.002, shadow=0.995, max_chunks=200, freeze_tables=True)),
    "short_401": TttConfig(sgd=SgdConfig(lr=0.002, max_chunks=50, freeze_tables=True)),
    "polyak_688": TttConfig(
        sgd=SgdConfig(chunk=131072, optimizer="adamw", lr=1e-4, trained="late", late_blocks=2, shadow=0.998)
    ),
    "query_834": TttConfig(
        sgd=SgdConfig(chunk=1048576, epochs=1, optimizer="adamw", lr=3e-5, trained="query", byte_weighted=True)
    ),
    "sam": TttConfig(sgd=SgdConfig(lr=0.002, sam=0.05)),
    "v2": TttConfig(sgd=SgdConfig(lr=0.002, lr_floor=0.1, block_rates=True, momentum=0.3)),
    "lora_first": TttConfig(
        kind="lora", order="length_sorted", seq_len=1024,
        lora=LoraConfig(
            targets="q,v,head", rank=8, alpha=8, chunk=256, lr=0.01, beta1=0.9, beta2=0.95, weight_decay=0.0,
            keep_a=False,
        ),
    ),
    "lora_1530": TttConfig(kind="lora", lora=_WIDE, **_SORTED),
    "lora_1767": TttConfig(kind="lora", lora=_WARM, **_SORTED),
    "lora_1953": TttConfig(
        kind="lora", order="length_sorted", seq_len=2560, lora=LoraConfig(lr=7.5e-5, weight_decay=1.0)
    ),
    "phased_1610": TttConfig(**_PHASED, seq_len=2048, lora=_WIDE, phases=PhasesConfig(count=1)),
    "phased_1626": TttConfig(**_PHASED, seq_len=2048, lora=_WIDE, phases=PhasesConfig(count=3)),
    "phased_1855": TttConfig(
        **_PHASED, seq_len=2048, lora=LoraConfig(targets="q,k,v,o,mlp,head", rank=80),
        phases=PhasesConfig(documents=2500),
    ),
    "phased_2014": TttConfig(
        **_PHASED, seq_len=3072, lora=LoraConfig(length_chunks="256:8,2000:24", slots=192, rank=80),
        phases=PhasesConfig(documents=2500, count=1),
    ),
    "phased_2135": TttConfig(
        **_PHASED, seq_len=3072, lora=LoraConfig(targets="o,mlp,head", rank=80, lr=8e-5, weight_decay=2.0),
        phases=PhasesConfig(documents=2500, count=1),
    ),
}  # fmt: skip
