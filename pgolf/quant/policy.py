"""How each parameter is stored: its role names a setting, the setting a kind and a clip; patterns override both."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pgolf.errors import ConfigError, NumericalError
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.clips import clips_of, least
from pgolf.quant.config import Clip, QuantConfig, parse_clip, parse_overrides
from pgolf.quant.grid import GRIDS, Grid, round_to, steps_of
from pgolf.quant.hadamard import can_rotate, rotate
from pgolf.quant.lowrank import correct
from pgolf.quant.records import Record, as_rows, n_rows

# The QuantConfig field that names the kind; with _clip behind it, the clip. Other roles are few and sensitive: fp16.
SETTING_OF = {Role.MATRIX: "matrix", Role.SIDE_MATRIX: "matrix", Role.EMBED: "embed", Role.HEAD: "embed"}

Parts = dict[str, np.ndarray]  # a record's arrays by name


class Storage(NamedTuple):
    """How one parameter is stored."""

    kind: str  # key of records.KINDS
    clip: Clip = Clip("max")  # of kinds on a grid


def grid_of(kind: str) -> Grid | None:
    """The integers of `kind`; None for kinds that have none."""
    return GRIDS.get(kind)


def candidate_clips(rows: Tensor, storage: Storage) -> list[Tensor]:
    """rows (rows, cols) fp32 -> the clips that `storage` says, each (rows,) fp32; more than one only in a search."""
    return clips_of(rows, storage.clip)


def storage_of(infos: Iterable[ParamInfo], cfg: QuantConfig) -> dict[str, Storage]:
    """{name: how it is stored} for all parameters. ConfigError on an override that fits none that is quantised."""
    overrides = parse_overrides(cfg.overrides)
    out, fitted = {}, set()
    for info in infos:
        if info.role not in SETTING_OF or info.param.numel() <= cfg.keep_numel:
            out[info.name] = Storage("fp16")
            continue
        setting = SETTING_OF[info.role]
        kind, clip = getattr(cfg, setting), getattr(cfg, f"{setting}_clip")
        for rule in overrides:
            if fnmatchcase(info.name, rule.pattern):
                kind, clip = rule.kind or kind, rule.clip or clip
                fitted.add(rule)
        out[info.name] = Storage(kind, parse_clip(clip, kind))
    if idle := [rule.pattern for rule in overrides if rule not in fitted]:
        some = [name for name, storage in out.items() if storage.kind != "fp16"]
        raise ConfigError(f"quant.overrides: {idle[0]} fits no parameter that is quantised; such are {some[:3]}")
    return out


def quantize_state(
    state: dict[str, Tensor],
    infos: list[ParamInfo],
    cfg: QuantConfig,
    given: Mapping[str, Parts] | None = None,
    diagonals: Mapping[str, Tensor] | None = None,
) -> list[Record]:
    """Quantises `state` {name: fp32 tensor of any shape} in the order of `infos`.

    given: {name: integers and steps} of those that calibration has rounded. diagonals: {name: mean square of each input
    (cols,)} for the low-rank correction, of the parameters that have one.

    Raises ValueError unless `state` and `infos` name the same parameters, NumericalError on weights that are not finite
    or do not fit their kind, ConfigError on an override that fits nothing.
    """
    names = {i.name for i in infos}
    if names != state.keys():
        raise ValueError(f"state and infos differ: {sorted(names ^ state.keys())[:5]} are in one of the two only")
    table = storage_of(infos, cfg)
    given = given or {}
    records = [_quantize(info, state[info.name], table[info.name], cfg, given.get(info.name)) for info in infos]
    return correct(records, state, cfg.low_rank, diagonals) if cfg.low_rank else records


def turned(info: ParamInfo, cfg: QuantConfig) -> bool:
    """Whether the rows of this parameter, which is on a grid, are rotated before they are rounded."""
    return cfg.optrot and SETTING_OF[info.role] == "matrix" and can_rotate(n_rows(info.param.shape))


def _quantize(info: ParamInfo, w: Tensor, storage: Storage, cfg: QuantConfig, given: Parts | None) -> Record:
    w = w.detach().to("cpu", torch.float32)
    if not torch.isfinite(w).all():
        raise NumericalError(f"{info.name}: inf or NaN in the weights to export; export an earlier checkpoint")
    try:
        if storage.kind not in GRIDS:
            parts = {"value": _float(w, storage.kind).numpy()}
            return Record(info.name, info.role.value, storage.kind, tuple(w.shape), parts)
        rotated = turned(info, cfg)
        kind = f"{storage.kind}+optrot" if rotated else storage.kind
        if given is None:
            rows = as_rows(w)
            q, step = nearest(rotate(rows) if rotated else rows, storage, cfg.scale_floor)
            given = {"q": q.view(w.shape).numpy(), "scale": step.numpy()}
        return Record(info.name, info.role.value, kind, tuple(w.shape), given)
    except ValueError as e:
        raise NumericalError(f"{info.name}: max |w| = {w.abs().max():.3g} does not fit {storage.kind} ({e})") from e


def nearest(rows: Tensor, storage: Storage, floor: float) -> tuple[Tensor, Tensor]:
    """rows (rows, cols) fp32 -> (integers (rows, cols) int8, step (rows,) fp16), each weight to its nearest.

    A search keeps the clips with the least squared error. ValueError when a row has no finite step.
    """
    grid = GRIDS[storage.kind]
    steps = [steps_of(clip, grid, floor) for clip in candidate_clips(rows, storage)]
    tries = [round_to(rows, step, grid) for step in steps]
    if len(tries) == 1:
        return tries[0], steps[0]
    errors = [(rows - q * step.float()[:, None]).square().sum(dim=1) for q, step in zip(tries, steps, strict=True)]
    kept, row = least(errors, storage.clip), torch.arange(len(rows))
    return torch.stack(tries)[kept, row], torch.stack(steps)[kept, row]


def _float(w: Tensor, kind: str) -> Tensor:
    if kind == "float":
        return w.clone()
    value = w.half()
    if not torch.isfinite(value).all():
        raise ValueError("fp16 ends at 65504")
    return value
