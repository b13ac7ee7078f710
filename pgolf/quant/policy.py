"""How each parameter is stored: its role names a setting, the setting names a kind, a kind is a row of `KINDS`.

Kinds (rows = first axis, the others flattened):
    int6   one int8 value in [-32, 31] an element and one fp16 step a row: the grid of `pgolf.kernels.int6`
    int8   the same with values in [-127, 127] and the row's clip at a quantile of |w|
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

from pgolf.errors import ArtifactError, NumericalError
from pgolf.kernels.int6 import check_steps, int6_quantize_ref, row_step
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import QuantConfig

# The QuantConfig field that names the kind. Other roles are few and sensitive: always fp16.
SETTING_OF = {Role.MATRIX: "matrix", Role.SIDE_MATRIX: "matrix", Role.EMBED: "embed", Role.HEAD: "embed"}
QUANTILE_LIMIT = 2**23  # elements per torch.quantile call; torch refuses more than 2^24


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
    """`encode(w, cfg)` -> parts, `decode(parts, shape)` -> fp32 tensor, `expect(shape)` -> {part: (dtype, shape)}."""

    encode: Callable[[Tensor, QuantConfig], dict[str, np.ndarray]]
    decode: Callable[[dict[str, np.ndarray], tuple[int, ...]], Tensor]
    expect: Callable[[tuple[int, ...]], dict[str, tuple[str, tuple[int, ...]]]]


def kind_of(role: Role, numel: int, cfg: QuantConfig) -> str:
    """The kind that a parameter of this role and element count is stored as."""
    if role not in SETTING_OF or numel <= cfg.keep_numel:
        return "fp16"
    return getattr(cfg, SETTING_OF[role])


def quantize_state(state: dict[str, Tensor], infos: list[ParamInfo], cfg: QuantConfig) -> list[Record]:
    """Quantises `state` {name: fp32 tensor of any shape} in the order of `infos`.

    Raises ValueError unless `state` and `infos` name the same parameters, NumericalError on weights that are not finite
    or do not fit their kind.
    """
    names = {i.name for i in infos}
    if names != state.keys():
        raise ValueError(f"state and infos differ: {sorted(names ^ state.keys())[:5]} are in one of the two only")
    return [_quantize(info, state[info.name], cfg) for info in infos]


def _quantize(info: ParamInfo, w: Tensor, cfg: QuantConfig) -> Record:
    kind = kind_of(info.role, info.param.numel(), cfg)
    w = w.detach().to("cpu", torch.float32)
    if not torch.isfinite(w).all():
        raise NumericalError(f"{info.name}: inf or NaN in the weights to export; export an earlier checkpoint")
    try:
        parts = KINDS[kind].encode(w, cfg)
    except ValueError as e:
        raise NumericalError(f"{info.name}: max |w| = {w.abs().max():.3g} does not fit {kind} ({e})") from e
    return Record(info.name, info.role.value, kind, tuple(w.shape), parts)


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


def _rows(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) > 1 else 1


def _as_rows(w: Tensor) -> Tensor:
    """(rows, cols); a vector is one row."""
    return w.reshape(_rows(w.shape), math.prod(w.shape) // max(_rows(w.shape), 1))


def _int6(w: Tensor, cfg: QuantConfig) -> dict[str, np.ndarray]:
    q, step = int6_quantize_ref(_as_rows(w), scale_floor=cfg.scale_floor)
    return {"q": q.view(w.shape).numpy(), "scale": step.numpy()}


def _int8(w: Tensor, cfg: QuantConfig) -> dict[str, np.ndarray]:
    """The challenge baseline's int8: a row's clip is a quantile of |w| (linear interpolation) and 127 steps long."""
    rows = _as_rows(w)
    chunk = max(1, QUANTILE_LIMIT // rows.shape[1])
    clip = torch.cat([r.abs().quantile(cfg.int8_clip, dim=1) for r in rows.split(chunk)])
    step = row_step(clip, 127, cfg.scale_floor)
    check_steps(step)
    clipped = rows.clamp(-clip[:, None], clip[:, None])
    q = torch.round(clipped / step.float()[:, None]).clamp(-127, 127).to(torch.int8)
    return {"q": q.view(w.shape).numpy(), "scale": step.numpy()}


def _fp16(w: Tensor, cfg: QuantConfig) -> dict[str, np.ndarray]:
    value = w.half()
    if not torch.isfinite(value).all():
        raise ValueError("fp16 ends at 65504")
    return {"value": value.numpy()}


def _scaled(parts: dict[str, np.ndarray], shape: tuple[int, ...]) -> Tensor:
    q = _as_rows(torch.from_numpy(parts["q"]))
    return (q.float() * torch.from_numpy(parts["scale"]).float()[:, None]).view(shape)


def _plain(parts: dict[str, np.ndarray], shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(parts["value"]).to(torch.float32, copy=True)


def _expect_scaled(shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {"q": ("int8", shape), "scale": ("float16", (_rows(shape),))}


KINDS = {
    "int6": Kind(_int6, _scaled, _expect_scaled),
    "int8": Kind(_int8, _scaled, _expect_scaled),
    "fp16": Kind(_fp16, _plain, lambda shape: {"value": ("float16", shape)}),
    "float": Kind(lambda w, cfg: {"value": w.numpy().copy()}, _plain, lambda shape: {"value": ("float32", shape)}),
}
