"""What an artifact holds of one parameter, and the way back to its values, exact and the same on every machine.

Kinds (rows = first axis, the others flattened; a vector is one row):
    int8 ... int4, ternary   an int8 value an element, on the grid of that name, and one fp16 step a row
    fp16   rounded to nearest even
    float  fp32, as is

Stages behind a kind on a grid, as in "int6+optrot+lowrank":
    optrot   the integers are those of the rotated matrix (pgolf/quant/hadamard.py)
    lowrank  A B is added (pgolf/quant/lowrank.py): left (rank, rows) is A transposed, right (rank, cols) is B, both
             fp16 or int8; the latter with fp16 scales, each for one of as many equal runs of the values
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pgolf.errors import ArtifactError
from pgolf.quant.config import GRID_KINDS
from pgolf.quant.hadamard import can_rotate, rotate

FLOATS = {"fp16": "float16", "float": "float32"}
STAGES = [[], ["optrot"], ["lowrank"], ["optrot", "lowrank"]]


Parts = dict[str, np.ndarray]  # the arrays of a record, by name


@dataclass(frozen=True, eq=False)
class Record:
    """One stored tensor: its name and role, its kind, its shape and the arrays it consists of.

    Two records are equal when all of it is, arrays bit for bit.
    """

    name: str
    role: str  # Role.value
    kind: str  # as above
    shape: tuple[int, ...]
    parts: dict[str, np.ndarray]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Record):
            return NotImplemented
        return self._bits() == other._bits()

    def _bits(self) -> tuple:
        parts = {k: (a.dtype.str, a.shape, a.tobytes()) for k, a in self.parts.items()}
        return self.name, self.role, self.kind, self.shape, parts


def dequantize(records: list[Record], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """{name: tensor on the CPU}. Raises ArtifactError on a record whose parts do not fit its kind and shape."""
    out = {}
    for record in records:
        check(record)
        out[record.name] = _decode(record).to(dtype)
    return out


def check(record: Record) -> None:
    """Raises ArtifactError unless the record's parts are those that its kind and shape call for."""
    base, *stages = record.kind.split("+")
    if base not in (*GRID_KINDS, *FLOATS) or stages not in (STAGES if base in GRID_KINDS else [[]]):
        known = f"{', '.join((*GRID_KINDS, *FLOATS))}, the former with {', '.join('+'.join(s) for s in STAGES[1:])}"
        raise ArtifactError(f"{record.name}: unknown kind {record.kind!r}, expected one of {known}")
    if "optrot" in stages and not can_rotate(n_rows(record.shape)):
        raise ArtifactError(f"{record.name}: {record.kind} {record.shape} has no power of two as number of rows")
    got = {name: (a.dtype.name, a.shape) for name, a in record.parts.items()}
    expected = _expected(base, record.shape)
    if "lowrank" in stages:
        expected |= _expected_factors(record)
    if got != expected:
        raise ArtifactError(f"{record.name}: parts {got} do not fit {record.kind} {record.shape}, expected {expected}")


def base_of(kind: str) -> str:
    """The kind without its stages: "int6" of "int6+optrot"."""
    return kind.partition("+")[0]


Spec = dict[str, tuple[str, tuple[int, ...]]]  # {part: (dtype, shape)}


def _expected(base: str, shape: tuple[int, ...]) -> Spec:
    if base in FLOATS:
        return {"value": (FLOATS[base], shape)}
    return {"q": ("int8", shape), "scale": ("float16", (n_rows(shape),))}


def _expected_factors(record: Record) -> Spec:
    """What the factors must be, given the rank, dtype and number of scales that they have if these are possible."""
    rows, cols = as_rows(torch.empty(record.shape, device="meta")).shape
    left = record.parts.get("left")
    fits = left is not None and left.ndim == 2 and 1 <= left.shape[0] <= min(rows, cols)
    rank = left.shape[0] if fits else 1
    dtype = "float16" if fits and left.dtype == np.float16 else "int8"
    out: Spec = {"left": (dtype, (rank, rows)), "right": (dtype, (rank, cols))}
    for side, size in (("left", rank * rows), ("right", rank * cols)) if dtype == "int8" else ():
        scale = record.parts.get(f"{side}_scale")
        runs = scale.size if scale is not None and scale.size and size % scale.size == 0 else 1
        out[f"{side}_scale"] = ("float16", (runs,))
    return out


def _decode(record: Record) -> Tensor:
    """fp32 values of a checked record."""
    base, *stages = record.kind.split("+")
    if base in FLOATS:
        return torch.from_numpy(record.parts["value"]).to(torch.float32, copy=True)
    w = as_rows(torch.from_numpy(record.parts["q"])).float() * torch.from_numpy(record.parts["scale"]).float()[:, None]
    if "optrot" in stages:
        w = rotate(w)
    if "lowrank" in stages:
        w += factors_product(record.parts)
    return w.view(record.shape)


def factors_product(parts: dict[str, np.ndarray]) -> Tensor:
    """A B of stored factors, (rows, cols) fp32. Summed component by component: a matrix product's order of sums, and so
    its last bits, differ between machines."""
    left, right = _factor(parts, "left"), _factor(parts, "right")
    out = left[0][:, None] * right[0]
    for a, b in zip(left[1:], right[1:], strict=True):
        out += a[:, None] * b
    return out


def _factor(parts: dict[str, np.ndarray], side: str) -> Tensor:
    """(rank, length) fp32; scale i of n belongs to the i-th of n equal runs of the values."""
    values = torch.from_numpy(parts[side]).float()
    if f"{side}_scale" not in parts:
        return values
    scale = torch.from_numpy(parts[f"{side}_scale"]).float()
    return (values.view(len(scale), -1) * scale[:, None]).view(values.shape)


def n_rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def as_rows(w: Tensor) -> Tensor:
    """(rows, cols); a vector is one row."""
    return w.reshape(n_rows(w.shape), math.prod(w.shape) // max(n_rows(w.shape), 1))
