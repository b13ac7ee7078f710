"""A check's rows, what the checks look at, and how they are run: none may crash the doctor or keep it waiting."""

from __future__ import annotations

import shutil
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any, NamedTuple

from pgolf import node
from pgolf.schema import RunConfig

OK, WARN, FAIL, NONE = "ok", "warn", "fail", "n/a"
LIMIT_S = 60.0  # of a check; compiling the first Triton kernel takes about 10 s on a busy machine


class Row(NamedTuple):
    """What one check found. fix: what mends it, where something can."""

    name: str
    status: str  # OK, WARN, FAIL, or NONE where the question does not arise
    what: str
    fix: str = ""


@dataclass
class Machine:
    """What the checks look at; a test puts stand-ins here.

    smi: `node.nvidia_smi` or what answers like it. torch_error: why torch is None. settings_error: why `config` is only
    the default.
    """

    environ: Mapping[str, str]
    config: RunConfig
    torch: ModuleType | None = None
    torch_error: str = ""
    settings_error: str = ""
    smi: Callable[..., str | None] = node.nvidia_smi
    proc: Path = Path("/proc")
    facts: dict[str, Any] = field(default_factory=dict)  # what one check leaves for a later one

    @cached_property
    def gpus(self) -> list[Any]:
        """Properties of each visible CUDA device, as torch gives them; empty when torch sees none."""
        if self.torch is None:
            return []
        with warnings.catch_warnings():  # an old driver makes torch warn; the check of CUDA says it
            warnings.simplefilter("ignore")
            count = self.torch.cuda.device_count() if self.torch.cuda.is_available() else 0
            return [self.torch.cuda.get_device_properties(i) for i in range(count)]

    @property
    def compiles(self) -> bool:
        """Whether a run here uses torch.compile or Triton, and so the folders where compiled code lies."""
        asked = self.config.train
        return asked.compile == "on" or (asked.device != "cpu" and bool(self.gpus))

    @property
    def ranks_here(self) -> int:
        """Processes that torchrun has started on this machine; 1 without torchrun."""
        text = self.environ.get("LOCAL_WORLD_SIZE") or self.environ.get("WORLD_SIZE") or "1"
        return int(text) if text.isdigit() else 1


Check = Callable[[Machine], Iterable[Row]]


def load_torch() -> tuple[ModuleType | None, str]:
    """(torch, "") or (None, why it cannot be imported)."""
    try:
        import torch
    except Exception as err:  # ImportError, OSError of a missing library, RuntimeError of two that disagree
        return None, f"{type(err).__name__}: {first_line(err)}"
    return torch, ""


def run(checks: Mapping[str, Check], machine: Machine, limit_s: float = LIMIT_S) -> Iterator[Row]:
    """The rows of each check, in order. One that raises gives a warning, one that takes over `limit_s` a failure."""
    for name, check in checks.items():
        rows: list[Row] = []
        worker = Thread(target=_collect, args=(name, check, machine, rows), daemon=True)
        worker.start()
        worker.join(limit_s)
        if worker.is_alive():
            what = f"no answer within {limit_s:g} s"
            rows = [
                *rows,
                Row(name, FAIL, what, "a driver or a network mount hangs; `dmesg` and `mount` may say which"),
            ]
        yield from rows


def _collect(name: str, check: Check, machine: Machine, rows: list[Row]) -> None:
    try:
        rows.extend(check(machine))
    except Exception as err:
        rows.append(Row(name, WARN, f"could not be checked: {type(err).__name__}: {first_line(err)}"))


def first_line(err: BaseException) -> str:
    """The first line of a message that has one."""
    return next((line.strip() for line in str(err).splitlines() if line.strip()), "no message")


def table(rows: Iterable[Row], pad: int, width: int | None = None) -> list[str]:
    """Lines of plain ASCII: status, name (at least `pad` wide), finding, and what mends it where something is wrong."""
    rows = list(rows)
    pad = max([pad, *(len(r.name) for r in rows)])
    width = max(60, width or shutil.get_terminal_size((120, 24)).columns)
    lines = []
    for row in rows:
        body = _wrap(row.what, width - pad - 8)
        if row.fix and row.status in (WARN, FAIL):
            body += _wrap(f"-> {row.fix}", width - pad - 8)
        heads = [f"{row.status:<4}  {row.name:<{pad}}  ", *[" " * (pad + 8)] * (len(body) - 1)]
        lines += [(head + text).rstrip() for head, text in zip(heads, body, strict=True)]
    return [ascii_only(line) for line in lines]


def _wrap(text: str, width: int) -> list[str]:
    # commands are copied from here: words are never broken
    return textwrap.wrap(ascii_only(text), max(width, 30), break_long_words=False, break_on_hyphens=False) or [""]


def summary(rows: Iterable[Row]) -> str:
    """How many rows of each status."""
    counts = Counter(row.status for row in rows)
    return ", ".join(f"{counts[status]} {status}" for status in (OK, WARN, FAIL, NONE))


def ascii_only(text: str) -> str:
    """`text` as every console can print it."""
    return text.encode("ascii", "backslashreplace").decode()


def size(nbytes: float) -> str:
    """Bytes for people: decimal, as df -H and disks' makers have them."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.1f} {unit}"
    return f"{nbytes / 1e3:.0f} kB"
