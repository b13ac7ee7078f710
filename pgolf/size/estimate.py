"""What a run's artifact will weigh, before there are weights.

Random weights of two shapes go through the run's own quantisation, and the entropy of what comes out, tensor by tensor
and byte plane by byte plane, stands for the codec's work. Trained weights lie between the two: docs/artifact.md has the
measurements.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from pgolf import tree
from pgolf.artifact.budget import LIMIT, role_of
from pgolf.artifact.pack import HEAD
from pgolf.artifact.table import group_of
from pgolf.model.gpt import GPT
from pgolf.model.roles import ParamInfo, roles_of
from pgolf.quant.policy import Record, quantize_state
from pgolf.schema import RunConfig

# Trained rows lie between a Laplace and a Gaussian, and differ in scale. Their rms decides how many steps fit where
# quant.scale_floor binds: 4.5 bits a weight (PR #401, int6) is an rms of 0.18. Without a floor a row's step follows its
# largest weight, and the rms has no effect.
LAWS: dict[str, Callable[[torch.Size, torch.Generator], Tensor]] = {
    "low": lambda shape, gen: _laplace(shape, gen) * (0.12 / math.sqrt(2)),
    "high": lambda shape, gen: torch.randn(shape, generator=gen) * 0.24 * _scales(shape, gen),
}
# Bytes over the order-0 entropy, at most (python -m bench.codecs --synthetic)
EXCESS = {"brotli": 0.010, "auto": 0.010, "zstd": 0.015, "lzma": 0.035, "zlib": 0.10}
PLANES = 0.06  # more where a stream has planes of low and of high bytes: zstd loses it, the others less
STRUCTURE = 0.04  # of the bytes, that brotli saves by what rows and columns have in common; measured 0 to 7.4 %
STREAM = 120  # bytes of a codec's own tables, in each group
VECTORS = 0.25  # of their bytes, at least: gains that hardly moved are nearly all the same number
ELEMENTS, ROWS = 2**16, 64  # of a tensor that are drawn: an entropy is then known to 0.1 %


@dataclass(frozen=True)
class Range:
    """Bytes, from low to high."""

    low: int
    high: int


@dataclass(frozen=True)
class Estimate:
    """`groups` {role.kind.part: Range} and "table"; `code` is known exactly."""

    parameters: int
    groups: dict[str, Range]
    code: int

    @property
    def total(self) -> Range:
        """Artifact and code."""
        low, high = (sum(getattr(r, end) for r in self.groups.values()) for end in ("low", "high"))
        return Range(low + self.code, high + self.code)

    def by_role(self) -> dict[str, Range]:
        """The groups of each role together."""
        out: dict[str, Range] = {}
        for name, r in self.groups.items():
            old = out.get(role_of(name), Range(0, 0))
            out[role_of(name)] = Range(old.low + r.low, old.high + r.high)
        return out

    def verdict(self) -> str:
        """One line: fits, may not fit, does not fit."""
        if self.total.low > LIMIT:
            return f"over the limit of {LIMIT:,} by at least {self.total.low - LIMIT:,}"
        if self.total.high > LIMIT:
            return f"may be over the limit of {LIMIT:,}, by up to {self.total.high - LIMIT:,}"
        return f"fits the limit of {LIMIT:,}, with at least {LIMIT - self.total.high:,} left"


def estimate(cfg: RunConfig, code: int) -> Estimate:
    """The bytes that `cfg` will lead to with a script of `code` bytes. A few seconds on a CPU."""
    infos = infos_of(cfg)
    ends = {law: sizes(infos, cfg, law) for law in LAWS}
    groups = {name: Range(min(low, ends["high"][name]), ends["high"][name]) for name, low in ends["low"].items()}
    return Estimate(sum(i.param.numel() for i in infos), groups, code)


def infos_of(cfg: RunConfig) -> list[ParamInfo]:
    """The parameters of a run, without storage."""
    with torch.device("meta"):
        return roles_of(GPT(cfg.model, train_length=cfg.data.seq_len))


def sizes(infos: list[ParamInfo], cfg: RunConfig, law: str) -> dict[str, int]:
    """{group: bytes} of weights drawn from a law, and "table"."""
    gen = torch.Generator().manual_seed(0)
    state = {i.name: LAWS[law](_sample(i.param.shape), gen) for i in infos}
    records = quantize_state(state, infos, cfg.quant)
    out: dict[str, float] = {}
    for info, record in zip(infos, records, strict=True):
        rows = len(state[info.name]) if info.param.ndim > 1 else 0
        for part, a in record.parts.items():
            group = group_of(record.role, record.kind, part)
            share = info.param.shape[0] / rows if rows and rows in a.shape else 1.0
            out[group] = out.get(group, 0.0) + entropy(a) * share * _factor(record, a, law, cfg.quant.codec)
    tables = STREAM if law == "high" else 0
    return {"table": table_bytes(infos, records, cfg)} | {group: round(n) + tables for group, n in out.items()}


def entropy(a: np.ndarray) -> float:
    """Bytes of an array under the histogram of each of its byte planes."""
    planes = np.frombuffer(a.tobytes(), np.uint8).reshape(-1, a.dtype.itemsize).T
    return sum(_entropy(np.bincount(plane, minlength=256)) for plane in planes)


def table_bytes(infos: list[ParamInfo], records: list[Record], cfg: RunConfig) -> int:
    """What header and table will take: names and shapes are known, the settings of the model too."""
    rows = []
    for n, (i, r) in enumerate(zip(infos, records, strict=True)):
        parts = {part: [a.dtype.name, list(a.shape), n] for part, a in r.parts.items()}
        rows.append([r.name, r.role, r.kind, list(i.param.shape), parts])
    streams = [[1, "columns", zlib.crc32(bytes([n % 256])) % 2**20] for n in range(len(rows))]
    digest = sha256(b"").hexdigest()  # stands for the tokenizer's, which does not compress either
    table = json.dumps([tree.to_dict(cfg.model), digest, rows, streams], separators=(",", ":"))
    return HEAD.size + len(zlib.compress(table.encode(), 9))


def _sample(shape: torch.Size) -> torch.Size:
    """The shape to draw for a tensor: as many rows as the entropy needs, vectors whole."""
    if len(shape) < 2 or not shape.numel():
        return shape
    return torch.Size([min(shape[0], max(ROWS, ELEMENTS // shape[1:].numel())), *shape[1:]])


def _factor(record: Record, a: np.ndarray, law: str, codec: str) -> float:
    if law == "high":
        return 1 + EXCESS[codec] + (PLANES if a.dtype.itemsize > 1 else 0)
    return VECTORS if record.role == "vector" else 1 - STRUCTURE


def _laplace(shape: torch.Size, gen: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=gen).clamp(1e-7, 1 - 1e-7) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs())


def _scales(shape: torch.Size, gen: torch.Generator) -> Tensor:
    """A factor a row, e to a normal of s.d. 0.7."""
    rows = shape[:1] if len(shape) > 1 else torch.Size([1])
    return torch.exp(0.7 * torch.randn(rows, generator=gen)).view(-1, *[1] * (len(shape) - 1))


def _entropy(counts: np.ndarray) -> float:
    counts = counts[counts > 0].astype(float)
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)
