"""Who else is on a GPU: a run beside another process is slow, and may not fit. Nobody is stopped."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from pgolf import node

# torch's own context takes 0.3 to 0.6 GiB of each GPU that is asked.
FOREIGN_GIB = 1.0
PROC = Path("/proc")


class Process(NamedTuple):
    """A process on a GPU, as far as the system tells."""

    uuid: str
    pid: int
    name: str
    mib: float | None
    user: str
    age_s: float | None

    def text(self) -> str:
        parts = [f"pid {self.pid}", self.user, Path(self.name).name]
        parts.append("memory unknown" if self.mib is None else f"{self.mib / 1024:.1f} GiB")
        parts.append("" if self.age_s is None else f"for {age(self.age_s)}")
        return " ".join(p for p in parts if p)


def age(seconds: float) -> str:
    """Seconds for people: minutes, hours, days."""
    for unit, scale in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= scale:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds:.0f} s"


def listed(processes: list[Process]) -> str:
    """The first four in words, and how many more."""
    shown = "; ".join(p.text() for p in processes[:4])
    return shown + (f"; and {len(processes) - 4} more" if len(processes) > 4 else "")


def others(ranks_here: int, ask: Callable[..., str | None] = node.nvidia_smi, proc: Path = PROC) -> list[Process]:
    """Processes on the machine's GPUs but this one and, with more `ranks_here` (torchrun), its sisters."""
    text = ask("--query-compute-apps=gpu_uuid,pid,used_memory,process_name", "--format=csv,noheader,nounits")
    out = []
    for line in (text or "").splitlines():
        uuid, pid, mib, name = ([c.strip() for c in line.split(",", 3)] + [""] * 4)[:4]
        if not pid.isdigit() or int(pid) == os.getpid():
            continue
        user, age_s, parent = told_by_proc(proc, int(pid))
        if ranks_here > 1 and parent == os.getppid():
            continue
        out.append(Process(uuid, int(pid), name, node.number(mib), user, age_s))
    return out


def told_by_proc(proc: Path, pid: int) -> tuple[str, float | None, int | None]:
    """(user, age in seconds, parent's pid) of a process; a container does not see those outside."""
    user, age_s, parent = "", None, None
    with suppress(OSError, ValueError, IndexError, AttributeError):  # AttributeError: no os.sysconf
        uid = (proc / str(pid)).stat().st_uid
        user = user_name(uid)
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()  # from field 3 on
        parent = int(fields[1])
        uptime = float((proc / "uptime").read_text().split()[0])
        age_s = max(0.0, uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK"))
    return user, age_s, parent


def user_name(uid: int) -> str:
    """Its name, or "uid N" where the system has none."""
    try:
        import pwd

        return pwd.getpwuid(uid).pw_name
    except (ImportError, KeyError):
        return f"uid {uid}"


def note(uuid: str, free: int, total: int, there: list[Process]) -> str:
    """What a run says at its start of the others on its GPU; empty when it has it for itself.

    free, total: bytes of the GPU's memory. there: `others`; those that /proc does not know may be this run's own ranks
    under a container's other numbers, so only their memory tells of them.
    """
    named = [p for p in there if p.uuid == uuid and p.user]
    held = (total - free) / 2**30
    if not named and held <= FOREIGN_GIB:
        return ""
    who = listed(named) or "processes that cannot be seen from here"
    return f"not alone on the GPU, {held:.1f} of {total / 2**30:.1f} GiB are held: {who}"
