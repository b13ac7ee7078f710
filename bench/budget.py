"""The step budget of `bench/budget.toml`: what it says, and whether a time keeps it. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pgolf.presets import PRESETS

from .gpus import GPUS

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

COMMITTED = Path(__file__).with_name("budget.toml")
MARGIN = 1.03  # a tightened ceiling lies this far above what was measured: clocks of two cards differ by as much


@dataclass(frozen=True)
class Budget:
    """Of one preset. ceiling: GPU of bench/gpus.py (or "cpu") -> ms, which fails above it; plan, goal: ms, to read."""

    ceiling: dict[str, float] = field(default_factory=dict)
    plan: float | None = None
    goal: float | None = None


def read(path: Path = COMMITTED, devices: Iterable[str] = (*GPUS, "cpu")) -> dict[str, Budget]:
    """Preset -> budget. ValueError for what is no TOML, an unknown preset, device or key, or no positive number."""
    try:
        tables = tomllib.loads(Path(path).read_text())
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise ValueError(f"{path}: {error}, expected a step budget such as {COMMITTED}") from None
    out = {}
    for preset, table in tables.items():
        _known(path, "preset", preset, PRESETS)
        if not isinstance(table, dict) or not isinstance(table.get("ceiling", {}), dict):
            raise ValueError(f"{path}: {preset} is {table!r}, expected a table with a table `ceiling`")
        for key in table:
            _known(path, f"key of {preset}", key, Budget.__dataclass_fields__)
        for device in table.get("ceiling", {}):
            _known(path, f"GPU of {preset}", device, list(devices))
        for value in (*table.get("ceiling", {}).values(), *(table[k] for k in ("plan", "goal") if k in table)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{path}: {preset}: got {value!r}, expected milliseconds above 0")
        out[preset] = Budget(**table)
    return out


def _known(path: Path, what: str, got: str, known: Iterable[str]) -> None:
    if got not in known:
        raise ValueError(f"{path}: {what}: got {got!r}, expected one of {', '.join(known)}")


def verdict(budget: Budget, device: str | None, ms: float) -> tuple[bool, str]:
    """(whether `ms` keeps the budget on a device, what to say of it). Without a ceiling everything does.

    device: a key of `Budget.ceiling`, None for one that has no name in bench/gpus.py.
    """
    if not budget.ceiling:
        return True, "no ceiling for this preset"
    if device not in budget.ceiling:
        return True, f"no ceiling for this device, only for {', '.join(budget.ceiling)}"
    ceiling = budget.ceiling[device]
    aims = [f"{name} {value:g}" for name in ("plan", "goal") if (value := getattr(budget, name))]
    said = f"{ms:.4g} ms, ceiling {ceiling:g} ms on {device}" + f" ({', '.join(aims)})" * bool(aims)
    if ms > ceiling:
        return False, f"over budget: {said}"
    tight = math.ceil(10 * MARGIN * ms) / 10
    return True, said + f"; tighten the ceiling to {tight:g}" * (tight < ceiling)
