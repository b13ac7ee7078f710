"""What an artifact holds of one parameter, and the way back to its values, exact and the same on every machine.

Kinds (rows = first axis, the others flattened; a vector is one row):
    int8 ... int4, ternary   an int8 value an element, on the grid of that name, and one fp16 step a row
    fp16   rounded to nearest even
    float  fp32, as is
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf.errors import ArtifactError
from pgolf.quant.config import GRID_KINDS


@dataclass(frozen=True, eq=False)
class Record:
    """One stored tensor: its name and role, its kind, its shape and the arrays it consists of.

    Two records are equal when all of it is, arrays bit for bit.
    """

    name: str
    role: str  # Role.value
    kind: str  # key of KINDS
    shape: tuple[int, ...]
    parts: dict[str, np.ndarray]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return self._bits() == other._bits()

    def _bits(self) -> tuple:
        parts = {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in self.parts.items()}
        return self.name, self.role, self.kind, self.shape, parts


@dataclass(frozen=True)
class Kind:
    """`decode(parts, shape)` -> fp32 tensor, `expect(shape)` -> {part: (dtype, shape)}."""

    decode: Callable[[dict[str, np.ndarray], tuple[int, ...]], Tensor]
    expect: Callable[[tuple[int, ...]], dict[str, tuple[str, tuple[int, ...]]]]


def dequantize(records: list[Record], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """{name: tensor on the CPU}. Raises ArtifactError on a record whose parts do not fit its kind and shape."""
    out = {}
    for record in records:
        check(record)
        out[record.name] = KINDS[record.kind].decode(record.parts, record.shape).to(dtype)
    return out


def check(record: Record) -> None:
    """Raises ArtifactError unless the record's parts are those that its kind and shape call for."""
    if record.kind not in KINDS:
        raise ArtifactError(f"{record.name}: unknown kind {record.kind!r}, expected one of {', '.join(KINDS)}")
    got = {name: (a.dtype.name, a.shape) for name, a in record.parts.items()}
    expected = KINDS[record.kind].expect(record.shape)
    if got != expected:
        raise ArtifactError(f"{record.name}: parts {got} do not fit {record.kind} {record.shape}, expected {expected}")


def n_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def as_rows(w: Tensor) -> Tensor:
    """(rows, cols); a vector is one row."""
    return w.reshape(n_rows(w.shape), math.prod(w.shape) // max(n_rows(w.shape), 1))


def _scaled(parts: dict[str, np.ndarray], shape: tuple[int, ...]) -> Tensor:
    q = as_rows(torch.from_numpy(parts["q"]))
    return (q.float() * torch.from_numpy(parts["scale"]).float()[:, None]).view(shape)


def _plain(parts: dict[str, np.ndarray], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(parts["value"]).to(torch.float32, copy=True)


GRID = Kind(_scaled, lambda shape: {"q": ("int8", shape), "scale": ("float16", (n_rows(shape),))})
KINDS = {
    **dict.fromkeys(GRID_KINDS, GRID),
    "fp16": Kind(_plain, lambda shape: {"value": ("float16", shape)}),
    "float": Kind(_plain, lambda shape: {"value": ("float32", shape)}),
}
