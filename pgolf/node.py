"""What this node is: the facts that decide how fast a run goes, its fingerprint.

The same program trains a different number of steps on two machines of the same name: another driver, a power limit, a
container with fewer cores. So each run keeps a fingerprint beside its result. Finding one is quick, measures nothing
and cannot fail a run: what the machine does not tell is None.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pgolf
from pgolf.errors import SetupError
from pgolf.result import write_file

TORCH = "2.9"  # the oldest that works; a test holds it to setup.py
ROOT = Path(__file__).resolve().parent.parent
# What speed depends on; the commit and the measured rates are compared too, but are not part of the digest.
SPEED = ("host", "gpus", "driver", "versions")
GPU_FIELDS = {  # our name: nvidia-smi's
    "uuid": "uuid",
    "driver": "driver_version",
    "clock_mhz": "clocks.sm",
    "clock_max_mhz": "clocks.max.sm",
    "memory_clock_max_mhz": "clocks.max.mem",
    "power_limit_w": "power.limit",
}


def fingerprint(cache_dir: str | Path = "", torch: ModuleType | None = None) -> dict[str, Any]:
    """host, gpus (the visible ones, in torch's order), driver, versions, git, now (not compared), rates, digest.

    cache_dir: where `doctor --bench` has put what it measured on this very node; "" = ~/.cache/pgolf. torch: the
    module, imported when not given. About 0.1 s beyond torch's import; at most 25 s where nvidia-smi and git hang.
    """
    torch = torch or import_torch()
    gpus, driver, clocks = _gpus(torch)
    facts: dict[str, Any] = {"host": _host(), "gpus": gpus, "driver": driver, "versions": _versions(torch)}
    code = digest(facts)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    now = {"clock_mhz": clocks, "load": None if load is None else round(load, 2)}
    rates = recalled_rates(cache_dir, code)
    return {**facts, "git": git(), "now": now, "rates": rates, "digest": code}


def record(run_dir: Path, cache_dir: str | Path = "") -> dict[str, Any]:
    """Writes this node's fingerprint to `run_dir`/node.json and returns it."""
    here = fingerprint(cache_dir)
    write_file(run_dir / "node.json", (json.dumps(here, indent=2) + "\n").encode())
    return here


def digest(facts: Mapping[str, Any]) -> str:
    """sha256 over the parts that decide speed, as hex."""
    return hashlib.sha256(json.dumps([facts.get(k) for k in SPEED], sort_keys=True).encode()).hexdigest()


def import_torch() -> ModuleType | None:
    """torch, or None where it cannot be imported for whatever reason."""
    with suppress(Exception):  # ImportError, OSError of a library that is missing, RuntimeError of two that disagree
        import torch

        return torch
    return None


# -- host ------------------------------------------------------------------------------------------------------------


def _host() -> dict[str, Any]:
    return {"cpu": cpu_model(), "cores": cores(), "memory_gib": round(memory_bytes() / 2**30) or None}


def cpu_model(proc: Path = Path("/proc")) -> str:
    """The processor's name; the architecture where the system does not say."""
    names = re.findall(r"^model name\s*:\s*(.+)$", _read(proc / "cpuinfo"), re.M)
    return names[0].strip() if names else platform.processor() or platform.machine()


def cores(sys_fs: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> float:
    """Cores that this process may use: those of its affinity, or fewer by a container's quota."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for folder in _cgroups(sys_fs, proc, "cpu"):
        quota, _, period = _read(folder / "cpu.max").partition(" ")
        quota, period = quota or _read(folder / "cpu.cfs_quota_us"), period or _read(folder / "cpu.cfs_period_us")
        with suppress(ValueError, ZeroDivisionError):  # "max", -1 and nothing mean no limit
            if float(quota) > 0:
                allowed = min(allowed, round(float(quota) / float(period), 2))
    return allowed


def memory_bytes(sys_fs: Path = Path("/sys/fs/cgroup"), proc: Path = Path("/proc")) -> int:
    """Memory that this process may use: the machine's, or less by a container's limit. 0 = unknown."""
    found = re.search(r"^MemTotal:\s*(\d+) kB", _read(proc / "meminfo"), re.M)
    total = int(found[1]) * 1024 if found else 0
    for folder in _cgroups(sys_fs, proc, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name).strip()
            if limit.isdigit() and int(limit) < (total or math.inf):
                total = int(limit)
    return total


def _cgroups(sys_fs: Path, proc: Path, controller: str) -> list[Path]:
    """Folders of this process's group, version 2 and 1, and the tops that a container sees as its own."""
    out = [sys_fs, sys_fs / controller]
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, names, path = [*line.split(":", 2), "", ""][:3]
        if not names or controller in names.split(","):
            out.append(sys_fs / (controller if names else "") / path.lstrip("/"))
    return out


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


# -- GPUs ------------------------------------------------------------------------------------------------------------


def _gpus(torch: ModuleType | None) -> tuple[list[dict], str | None, list]:
    """(facts of each visible GPU, driver, clocks now in MHz)."""
    told = {row.get("uuid"): row for row in smi_gpus(GPU_FIELDS)}
    out, clocks = [], []
    with suppress(Exception):  # a broken driver must not stop a run on the CPU
        for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            p = torch.cuda.get_device_properties(i)
            row = told.get(gpu_uuid(p), {})
            fact = {"name": p.name, "capability": f"{p.major}.{p.minor}", "sms": p.multi_processor_count}
            fact["memory_gib"] = round(p.total_memory / 2**30, 1)
            out.append(fact | {k: number(row.get(k)) for k in GPU_FIELDS if k.endswith(("max_mhz", "limit_w"))})
            clocks.append(number(row.get("clock_mhz")))
    driver = next((r.get("driver") for r in told.values()), None) or _read(Path("/sys/module/nvidia/version")).strip()
    return out, driver or None, clocks


def gpu_uuid(properties: Any) -> str:
    """nvidia-smi's name of a device of torch."""
    return f"GPU-{getattr(properties, 'uuid', '')}"


def smi_gpus(fields: Mapping[str, str], ask: Callable[..., str | None] | None = None) -> list[dict[str, str]]:
    """A row for each GPU of the machine, visible or not: {our name: nvidia-smi's text}. Empty without nvidia-smi.

    One field that a driver does not know makes it refuse all, so then each is asked for alone.
    """
    ask = ask or nvidia_smi
    text = ask(f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits")
    if text is not None:
        cells = [[c.strip() for c in line.split(",")] for line in text.splitlines() if line.strip()]
        return [dict(zip(fields, row, strict=False)) for row in cells]
    if len(fields) == 1 or ask("--list-gpus") is None:
        return []
    rows: list[dict[str, str]] = []
    for name, field in fields.items():
        for i, row in enumerate(smi_gpus({name: field}, ask)):
            rows += [{}] * (i == len(rows))
            rows[i] = rows[i] | row
    return rows


def nvidia_smi(*arguments: str) -> str | None:
    """What it prints; None when it is not there, fails or takes more than 10 s."""
    return output("nvidia-smi", *arguments, seconds=10)


def output(*command: str, seconds: float) -> str | None:
    """What a program prints; None when it is not there, fails or takes longer."""
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=seconds
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def number(text: str | None) -> float | None:
    """A number of nvidia-smi's; "[N/A]" and the like are None."""
    try:
        return float(text or "")
    except ValueError:
        return None


# -- software --------------------------------------------------------------------------------------------------------


def _versions(torch: ModuleType | None) -> dict[str, str | None]:
    out = {"pgolf": pgolf.__version__, "python": platform.python_version(), "torch": None, "cuda": None, "cudnn": None}
    if torch is not None:
        cudnn = torch.backends.cudnn.version()
        out |= {"torch": torch.__version__, "cuda": torch.version.cuda, "cudnn": None if cudnn is None else str(cudnn)}
    return out | {name: version_of(name) for name in ("triton", "numpy", "flash_attn_3")}


def release(version: str) -> tuple[int, ...]:
    """The release of a version: "2.9.0a0+git1" is (2, 9, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def check_torch() -> None:
    """SetupError when torch is missing or older than TORCH: imports of names that it lacks would fail, somewhere."""
    version = version_of("torch")
    if version is None and importlib.util.find_spec("torch") is None:
        raise SetupError(f"torch is not installed: pip install 'torch>={TORCH}'")
    if version and release(version) < release(TORCH):
        raise SetupError(f"torch {version} is too old, expected {TORCH} or newer: pip install -U 'torch>={TORCH}'")


def version_of(name: str) -> str | None:
    """Version of an installed distribution, without importing it; None when there is none."""
    for candidate in {"triton": ("triton", "triton-windows", "pytorch-triton")}.get(name, (name,)):
        with suppress(Exception):  # PackageNotFoundError, and whatever damaged metadata may raise
            return metadata.version(candidate)
    return None


def git(root: Path = ROOT) -> dict[str, Any] | None:
    """{"commit", "dirty": whether tracked files differ from it} of the checkout that pgolf runs from; None without."""
    if not (root / ".git").exists():  # or an environment inside another project's checkout would answer for it
        return None
    command = ("git", "--no-optional-locks", "-C", str(root), "status", "--porcelain=v2", "--branch")
    lines = (output(*command, "--untracked-files=no", seconds=5) or "").splitlines()
    commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
    return commit and {"commit": commit, "dirty": any(not line.startswith("#") for line in lines)}


# -- measured rates --------------------------------------------------------------------------------------------------


def cache_folder(cache_dir: str | Path = "") -> Path:
    """pgolf's cache: `cache_dir`, or ~/.cache/pgolf."""
    return Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "pgolf"


def recalled_rates(cache_dir: str | Path, code: str) -> dict[str, Any] | None:
    """{"measured": when, "values": the rates} as `doctor --bench` kept them; None without, or when unreadable."""
    with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: no home folder
        found = json.loads(rates_path(cache_dir, code).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) and isinstance(found.get("values"), dict) else None
    return None


def rates_path(cache_dir: str | Path, code: str) -> Path:
    return cache_folder(cache_dir) / f"rates-{code[:16]}.json"
