"""Errors of torch that a user can mend, as the errors of pgolf: out of memory, and a compiler that fails."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pgolf.errors import OutOfMemoryError, PgolfError, SetupError

if TYPE_CHECKING:
    from pgolf.schema import RunConfig

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|ALLOC_FAILED", re.IGNORECASE)
UNITS = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50}
# "Tried to allocate 2.00 GiB" (CUDA), "tried to allocate 8000 bytes" (CPU), "Unable to allocate 7.28 TiB" (numpy)
NEED = re.compile(r"(?:tried|unable) to allocate ([\d.]+) (?:bytes|([KMGTP]i)B)", re.IGNORECASE)


def explain(err: Exception, phase: str, cfg: RunConfig, device: torch.device) -> Exception:
    """`err` as a PgolfError where it is one that users can mend, else `err` itself. phase: where it came from."""
    if isinstance(err, PgolfError):
        return err
    text, where = str(err), f" in phase {phase}" if phase else ""
    runtime_error = isinstance(err, RuntimeError) and NO_MEMORY.search(text)
    if runtime_error or isinstance(err, torch.OutOfMemoryError | MemoryError):
        need = needed(text)
        asked = f"{gib(need)} more" if need is not None else "more"
        return OutOfMemoryError(
            f"out of memory{where}: {asked} on {device} was needed; {available(device)}.\n{advice(phase, cfg)}"
        )
    if type(err).__module__.startswith(("torch._dynamo", "torch._inductor")):
        lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason given"]
        return SetupError(
            f"torch.compile failed{where}: {type(err).__name__}: {lines[0]}\n"
            "Run without it: --no-compile (train.compile=off). --debug shows all of it."
        )
    return err


def advice(phase: str, cfg: RunConfig) -> str:
    """Which setting makes `phase` need less memory."""
    if phase.startswith(("evaluate", "validate", "adapt")):
        half = max(cfg.eval.batch_tokens // 2, 1)
        now = cfg.eval.batch_tokens
        return f"Score fewer tokens at a time: eval.batch_tokens={half} (VAL_BATCH_SIZE); it is {now}."
    if phase in ("compile", "train"):
        count = cfg.data.micro_batches
        if 2 * count * cfg.data.seq_len <= cfg.data.batch_tokens:
            return f"Take a step in smaller parts: data.micro_batches={2 * count} (MICRO_BATCHES); it is {count}."
        return f"A micro-batch is one row already: use a shorter data.seq_len ({cfg.data.seq_len} now) or model.dim."
    return "Free memory of this machine: other processes, or other runs on it."


def needed(text: str) -> int | None:
    """Bytes that an out-of-memory message says were asked for; None if it does not say."""
    found = NEED.search(text)
    return int(float(found[1]) * UNITS[(found[2] or "").capitalize()]) if found else None


def available(device: torch.device) -> str:
    """In words, how much memory there is on `device`."""
    if device.type == "cuda" and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info(device)
        ours = torch.cuda.memory_allocated(device)
        others = max(total - free - torch.cuda.memory_reserved(device), 0)
        return f"{gib(free)} of {gib(total)} is free, this run's tensors hold {gib(ours)}, other use is {gib(others)}"
    texts = []
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        texts += [f"{gib(int(found[1]) << 10)} of the machine's is available"] if found else []
        import resource  # not everywhere

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            texts.append(f"this process may address {gib(soft)} (ulimit -v) and uses {gib(used)}")
    except (OSError, ImportError):
        pass
    return ", ".join(texts) or "how much there is is not known"


def gib(size: int) -> str:
    return f"{size / (1 << 30):,.2f} GiB"
