"""What differs between two nodes, and measured rates kept for the fingerprints of later runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from pgolf.node import SPEED, rates_path

NOISE = 0.05  # rates that differ by less are the same


class Difference(NamedTuple):
    """One fact that two nodes do not share; None where one of them lacks it."""

    fact: str
    first: Any
    second: Any


def compare(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Difference]:
    """What differs between two fingerprints: hardware, driver, versions, commit, and rates by more than `NOISE`.

    Rates count where both have them. The state of the moment (clock, load) does not count.
    """
    a, b = (_flat({k: f.get(k) for k in (*SPEED, "git")}) for f in (first, second))
    out = [Difference(k, a.get(k), b.get(k)) for k in {**a, **b} if a.get(k) != b.get(k)]
    a, b = (_medians(f.get("rates")) for f in (first, second))
    apart = lambda x, y: abs(x - y) > NOISE * max(abs(x), abs(y))
    return out + [Difference(f"rates.{k}", a[k], b[k]) for k in a if k in b and apart(a[k], b[k])]


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(f"{path}.{k}" if path else str(k), v) for k, v in value.items()]
    elif isinstance(value, list):
        items = [(f"{path}[{i}]", v) for i, v in enumerate(value)]
    else:
        return {path: value}
    return {k: v for name, inner in items for k, v in _flat(inner, name).items()}


def _medians(rates: Any) -> dict[str, float]:
    values = rates.get("values") if isinstance(rates, Mapping) else None
    rows = values.items() if isinstance(values, Mapping) else ()
    found = {k: v.get("median") for k, v in rows if isinstance(v, Mapping)}
    return {k: v for k, v in found.items() if isinstance(v, int | float)}


def remember_rates(rates: Mapping[str, Any], cache_dir: str | Path, code: str) -> Path:
    """Keeps what a benchmark measured on the node of digest `code`, for the fingerprints of later runs. OSError.

    rates: {name: {"unit", "median", ...}}.
    """
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    path = rates_path(cache_dir, code)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"measured": now, "values": rates}, indent=2) + "\n", encoding="utf-8")
    return path
