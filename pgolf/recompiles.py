"""Counts what torch.compile compiles again after warm-up, each with the guard that failed.

A run compiles everything before its clock starts; what is compiled again later costs training time, and means that
something which the graph took for a constant has changed. First compilations (of a validation, say) do not count.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recompile:
    """function: with file and line. guard: Dynamo's text, what was expected and what came. phase: of the run."""

    function: str
    guard: str
    phase: str

    def __str__(self) -> str:
        return f"{self.function}: {self.guard}"


class Recompiles:
    """Of this process, from its construction on. Torch's own record is read, which keeps the last 64 compilations."""

    def __init__(self) -> None:
        self.seen: list[Recompile] = []
        self._last_us = max((m.start_time_us for m in _record()), default=0)

    def new(self, phase: str) -> list[Recompile]:
        """Those since the last call, which happened in `phase`. Costs a microsecond when there are none."""
        record = _record()
        if not record or record[-1].start_time_us <= self._last_us:
            return []
        fresh = [m for m in record if m.start_time_us > self._last_us]
        self._last_us = max(m.start_time_us for m in fresh)
        found = [
            Recompile(f"{m.co_name} ({m.co_filename}:{m.co_firstlineno})", m.recompile_reason.splitlines()[0], phase)
            for m in fresh
            if m.recompile_reason
        ]
        self.seen += found
        return found

    def by_phase(self) -> dict[str, int]:
        """How many in each phase; phases without any are left out."""
        counts: dict[str, int] = {}
        for one in self.seen:
            counts[one.phase] = counts.get(one.phase, 0) + 1
        return counts


def _record() -> list:
    from torch._dynamo.utils import get_compilation_metrics  # a second of imports, which eager runs do without

    return get_compilation_metrics()
