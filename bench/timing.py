"""What the device is, what it can do at most, and how long something takes on it.

    times = time_interleaved({"new": new, "old": old}, device="cuda", rounds=10, min_ms=20)
    times["new"].median, times["new"].p20, times["new"].p80          milliseconds

A time is the device's own: CUDA events around each call, read after a synchronisation. Caches are flushed before every
call. Candidates take turns, so that a clock that drops hits all of them.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

MAX_REPEATS = 50  # calls a round
# A flush of this size keeps an H100 busy for 0.3 ms, in which the host gets ahead: launching is then not in the time.
FLUSH_BYTES = 1 << 30
HEAD = 64


# -- clocks ----------------------------------------------------------------------------------------------------------


class HostClock:
    """The clock of a CPU, where work is done when its call returns."""

    def __init__(self):
        self.scratch = torch.empty(2 * cpu_cache_bytes(), dtype=torch.uint8)

    def flush(self) -> None:
        """Fills the caches with something else."""
        self.scratch.fill_(0)

    def mark(self) -> Any:
        """A point in the order of the device's work."""
        return time.perf_counter()

    def wait(self) -> None:
        """Returns when all work up to here is done."""

    def ms(self, begin: Any, end: Any) -> float:
        """Milliseconds between two marks that `wait` has passed."""
        return 1e3 * (end - begin)

    def now(self) -> float:
        """The host's clock, seconds."""
        return time.perf_counter()


class CudaClock(HostClock):
    """The clock of a GPU, which works while the host goes on: events in the current stream."""

    def __init__(self, device: torch.device):
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        size = max(2 * properties.L2_cache_size, min(FLUSH_BYTES, properties.total_memory // 16))
        self.scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def ms(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end)


def clock_of(device: str | torch.device) -> HostClock:
    """The clock of a device. ValueError for one that is neither CPU nor CUDA."""
    device = torch.device(device)
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"timing: got device {device}, expected cpu or cuda")
    return CudaClock(device) if device.type == "cuda" else HostClock()


def cpu_cache_bytes() -> int:
    """The largest cache of CPU 0; 32 MB where the system does not say."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(t[:-1]) * unit[t[-1]] for t in texts if t[-1:] in unit), default=32 << 20)


# -- timing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Milliseconds of a call on the device; quantiles over all calls of all rounds."""

    median: float
    p20: float
    p80: float
    rounds: int
    repeats: int  # calls a round
    host: float  # median milliseconds until the call returned to the host: what launching takes
    samples: tuple[float, ...]  # median of each round

    @classmethod
    def of(cls, rounds: list[list[float]], host: list[float]) -> Timing:
        """From the times of each round's calls."""
        times = sorted(t for calls in rounds for t in calls)
        at = lambda q: times[round(q * (len(times) - 1))]
        samples = tuple(median(calls) for calls in rounds)
        return cls(median(times), at(0.2), at(0.8), len(rounds), len(rounds[0]), median(host), samples)


def time_interleaved(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    device: str | torch.device = "cpu",
    rounds: int = 10,
    min_ms: float = 20.0,
    prepare: Callable[[str], Any] | None = None,
    clock: HostClock | None = None,
) -> dict[str, Timing]:
    """The time of each candidate, by turns.

    rounds: each times every candidate once, for as many calls as take `min_ms` milliseconds, at most MAX_REPEATS.
    prepare: called with the candidate's name before each of its calls, untimed. clock: another than the device's.
    Raises ValueError on fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"timing: got {rounds} rounds, expected at least 1")
    clock, ready = clock or clock_of(device), prepare or (lambda name: None)
    repeats = {name: _warm_up(clock, name, fn, ready, min_ms) for name, fn in candidates.items()}
    times: dict[str, list] = {name: [] for name in candidates}
    host: dict[str, list] = {name: [] for name in candidates}
    for i in range(rounds):
        for name in turn(list(candidates), i):
            on_device, on_host = _round(clock, name, candidates[name], ready, repeats[name])
            times[name].append(on_device)
            host[name] += on_host
    return {name: Timing.of(times[name], host[name]) for name in candidates}


def turn(names: list[str], i: int) -> list[str]:
    """The order of round i: every second one reversed, and the first place passed on."""
    first = i // 2 % max(len(names), 1)
    order = names[first:] + names[:first]
    return order[::-1] if i % 2 else order


def _warm_up(clock: HostClock, name: str, fn: Callable, prepare: Callable, min_ms: float) -> int:
    """Compiles, fills allocators, wakes clocks; returns the calls a round."""
    _round(clock, name, fn, prepare, 2)
    ms = min(_round(clock, name, fn, prepare, 3)[0])
    repeats = max(1, min(MAX_REPEATS, math.ceil(min_ms / max(ms, 1e-4))))
    _round(clock, name, fn, prepare, repeats)
    return repeats


def _round(
    clock: HostClock, name: str, fn: Callable, prepare: Callable, repeats: int
) -> tuple[list[float], list[float]]:
    """Milliseconds of each call on the device, and until it returned to the host."""
    marks, host = [], []
    for _ in range(repeats):
        prepare(name)
        clock.flush()
        called = clock.now()
        begin = clock.mark()
        fn()
        marks.append((begin, clock.mark()))
        host.append(1e3 * (clock.now() - called))
    clock.wait()
    return [clock.ms(begin, end) for begin, end in marks], host


def graphed(fn: Callable[[], Any]) -> Callable[[], None]:
    """The launches of `fn` as one CUDA graph, for kernels that are shorter than their launch; returns its replay.

    Inputs must stay where they are. RuntimeError from torch where `fn` waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


# -- what the device can do ------------------------------------------------------------------------------------------


def roofs(device: str | torch.device, *, rounds: int = 5, min_ms: float = 20.0) -> dict[str, float]:
    """Rates that the vendor's own kernels reach now: bytes/s read and written for "copy", FLOP/s for the others.

    On a GPU in bf16: "copy" of 1 GiB, "gemm" at the reference's MLP (98,304 x 512 by 512 x 1,536), "gemm_large" at
    8,192^3, "attention" causal with heads of 64, forward and backward, 3.5 times the FLOPs of a causal forward. On a
    CPU smaller ones in fp32.
    """
    device = torch.device(device)
    gpu = device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    rand = lambda *shape: torch.randn(*shape, device=device, dtype=dtype)
    n = (1 << 30 if gpu else 1 << 26) // dtype.itemsize
    m, large = (98_304, 8_192) if gpu else (2_048, 1_024)
    b, h, t = (48, 8, 2_048) if gpu else (2, 4, 512)
    source, target = rand(n), rand(n)
    x, w, big = rand(m, 512), rand(1_536, 512), rand(2, large, large)
    qkv = [rand(b, h, t, HEAD).requires_grad_() for _ in range(3)]
    dy = rand(b, h, t, HEAD)
    work = {  # name: (what is run, bytes or FLOPs)
        "copy": (lambda: target.copy_(source), 2 * n * dtype.itemsize),
        "gemm": (lambda: F.linear(x, w), 2 * m * 512 * 1_536),
        "gemm_large": (lambda: F.linear(*big), 2 * large**3),
        "attention": (lambda: _attention(qkv, dy), 3.5 * 2 * b * h * t * t * HEAD),
    }
    runs = {name: fn for name, (fn, _) in work.items()}
    times = time_interleaved(runs, device=device, rounds=rounds, min_ms=min_ms)
    return {name: amount / (times[name].median / 1e3) for name, (_, amount) in work.items()}


def _attention(qkv: list[torch.Tensor], dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(F.scaled_dot_product_attention(*qkv, is_causal=True), qkv, dy)


def roof_ms(nbytes: float, flops: float, roofs: Mapping[str, float], product: str = "gemm") -> float:
    """Milliseconds that the measured roofs allow: the longer of moving the bytes and of computing.

    product: the roof of the FLOPs, "gemm" or "attention".
    """
    return 1e3 * max(nbytes / roofs["copy"], flops / roofs[product])


def rates(
    ms: float, nbytes: float, flops: float, roofs: Mapping[str, float], product: str = "gemm"
) -> dict[str, float]:
    """What a time of `ms` means: gb_per_s and tflop_per_s (where there are bytes, FLOPs), percent_of_roof."""
    out = {"gb_per_s": nbytes / ms / 1e6, "tflop_per_s": flops / ms / 1e9}
    out["percent_of_roof"] = 100 * roof_ms(nbytes, flops, roofs, product) / ms
    return {name: float(f"{value:.4g}") for name, value in out.items() if value}


# -- what the device is ----------------------------------------------------------------------------------------------

SMI = {  # our name: nvidia-smi's
    "driver": "driver_version",
    "clock_mhz": "clocks.sm",
    "clock_max_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
}


def device_card(device: str | torch.device) -> dict[str, Any]:
    """What a number's provenance needs. A key whose value the machine does not tell is not there."""
    device = torch.device(device)
    what = _gpu_card(device) if device.type == "cuda" else _cpu_card()
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
    triton = sys.modules.get("triton") or _import("triton")
    source = {"triton": getattr(triton, "__version__", None), "commit": _commit()}
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    card = {"device": device.type, **what, **versions, **source, "date": now}
    return {key: value for key, value in card.items() if value is not None}


def _gpu_card(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    fields = ",".join(SMI.values())
    answer = _output(
        "nvidia-smi", f"--id=GPU-{properties.uuid}", f"--query-gpu={fields}", "--format=csv,noheader,nounits"
    )
    told = dict(zip(SMI, [v.strip() for v in answer.split(",")], strict=False)) if answer else {}
    return {
        "name": properties.name,
        "arch": 10 * properties.major + properties.minor,
        "sms": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        **{key: value if key == "driver" else _number(value) for key, value in told.items()},
    }


def _cpu_card() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line]
        if info.exists()
        else []
    )
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "cache_bytes": cpu_cache_bytes(),
    }


def _number(text: str) -> float | None:
    """ "[N/A]" is no number."""
    try:
        return float(text)
    except ValueError:
        return None


def _commit() -> str | None:
    """The checkout's commit, with "+" when files differ from it."""
    root = str(Path(__file__).parent)
    head = _output("git", "-C", root, "rev-parse", "--short", "HEAD")
    return head and head + "+" * bool(_output("git", "-C", root, "status", "--porcelain", "--untracked-files=no"))


def _output(*command: str) -> str | None:
    """What a program prints; None when it is not there, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _import(name: str) -> Any:
    try:
        return __import__(name)
    except ImportError:
        return None
