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
from pgolf.quant.records import Record, as_rows, dequantize, n_rows

# The QuantConfig field that names the kind; with _clip behind it, the clip. Other roles are few and sensitive: fp16.
SETTING_OF = {Role.MATRIX: "matrix", Role.SIDE_MATRIX: "matrix", Role.EMBED: "embed", Role.HEAD: "embed"}


class Storage(NamedTuple):
    """How one parameter is stored."""

    kind: str  # one of config.QUANT_KINDS
    clip: Clip = Clip("max")  # of kinds on a grid
    turned: bool = False  # rounded in a Hadamard basis


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
        turned = cfg.optrot and kind in GRIDS and setting == "matrix" and can_rotate(n_rows(info.param.shape))
        out[info.name] = Storage(kind, parse_clip(clip, kind), turned)
    if idle := [rule.pattern for rule in overrides if rule not in fitted]:
        some = [name for name, storage in out.items() if storage.kind != "fp16"]
        raise ConfigError(f"quant.overrides: {idle[0]} fits no parameter that is quantised; such are {some[:3]}")
    return out


def quantize_state(
    state: dict[str, Tensor],
    infos: list[ParamInfo],
    cfg: QuantConfig,
    given: Mapping[str, dict[str, np.ndarray]] | None = None,
    diagonals: Mapping[str, Tensor] | None = None,
) -> list[Record]:
    """Quantises `state` {name: fp32 tensor of any shape} in the order of `infos`.

    given: {name: q and scale} of what was rounded by other means, from `rows_to_round`. diagonals: {name: mean square
    of each input (cols,)}, for the low-rank correction. Raises ValueError unless `state` and `infos` name the same
    parameters, NumericalError on weights that are not finite or do not fit their kind,
    ConfigError on an override that fits nothing.
    """
    names = {i.name for i in infos}
    if names != state.keys():
        raise ValueError(f"state and infos differ: {sorted(names ^ state.keys())[:5]} are in one of the two only")
    table, given = storage_of(infos, cfg), given or {}
    records = [_quantize(info, state[info.name], table[info.name], cfg, given.get(info.name)) for info in infos]
    return correct(records, state, cfg.low_rank, diagonals) if cfg.low_rank else records


def rows_to_round(w: Tensor, storage: Storage) -> Tensor:
    """w of any shape -> the rows (rows, cols) whose integers are stored."""
    return rotate(as_rows(w)) if storage.turned else as_rows(w)


def _quantize(info: ParamInfo, w: Tensor, storage: Storage, cfg: QuantConfig, given: dict | None) -> Record:
    w = w.detach().to("cpu", torch.float32)
    if not torch.isfinite(w).all():
        raise NumericalError(f"{info.name}: inf or NaN in the weights to export; export an earlier checkpoint")
    try:
        parts = given or _parts(w, storage, cfg.scale_floor)
    except ValueError as e:
        raise NumericalError(f"{info.name}: max |w| = {w.abs().max():.3g} does not fit {storage.kind} ({e})") from e
    kind = f"{storage.kind}+optrot" if storage.turned else storage.kind
    record = Record(info.name, info.role.value, kind, tuple(w.shape), parts)
    if given and storage.turned and not _alike(w, dequantize([record])[info.name]):
        raise ValueError(f"{info.name}: the given parts are not of this weight's rows_to_round")
    return record


def _alike(w: Tensor, back: Tensor) -> bool:
    """Whether `back` may be w, however coarsely rounded: in another basis the two would be nearly orthogonal."""
    return (w * back).sum() >= 0.05 * w.norm() * back.norm()


def _parts(w: Tensor, storage: Storage, floor: float) -> dict[str, np.ndarray]:
    """What is stored of w, without any correction. ValueError when w does not fit."""
    if storage.kind in GRIDS:
        q, step = nearest(rows_to_round(w, storage), storage, floor)
        return {"q": q.view(w.shape).numpy(), "scale": step.numpy()}
    value = w.clone() if storage.kind == "float" else w.half()
    if not torch.isfinite(value).all():
        raise ValueError("fp16 ends at 65504")
    return {"value": value.numpy()}


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
