"""A short benchmark of the node: matrix products at the model's shapes, a copy, an all-reduce when there are ranks.

Rates of the vendor's own code, as a fingerprint that two nodes can be compared by; what pgolf's kernels reach is the
business of bench/. Inputs are random: with zeros a GPU draws less power and keeps a higher clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F

from pgolf.dist import Dist

# K, N of the products of one layer and the head of the reference model: rows are the tokens of one GPU and step.
PRODUCTS = ((512, 1536), (1536, 512), (512, 512), (512, 1024))
GPU_ROWS, CPU_ROWS = 98_304, 2_048
COPY_BYTES = {"cuda": 1 << 29, "cpu": 1 << 26}
REDUCED = {"cuda": 27_000_000, "cpu": 2_000_000}  # numbers in the gradient of the reference model; fewer on a CPU
SAMPLES, SAMPLE_S, LONGEST_S = 15, 0.02, 4.0  # of one rate
SLOW_RANK = 0.93  # of the median of all ranks

Rate = dict[str, Any]  # unit, median, low and high (of the samples), ranks (each one's median, with several)


def measure(dist: Dist, ask_state: Callable[[], dict] | None = None) -> dict[str, Any]:
    """{"rates": name -> Rate, "under_load": what `ask_state` says while products run on a GPU}. All ranks call it.

    A product's rate is in TFLOP/s, a copy's in GB/s read and written, an all-reduce's in GB/s of the ring ("busbw").
    Takes 5 to 30 s.
    """
    device, rates = dist.device, {}
    kind = _dtype(device) + (f", {torch.get_num_threads()} threads" if device.type == "cpu" else "")
    for k, n in PRODUCTS:
        rows = GPU_ROWS if device.type == "cuda" and _free(device) > 4e9 else CPU_ROWS
        rates[f"gemm {rows}x{k}x{n} {kind}"] = _product(dist, rows, k, n)
    size = COPY_BYTES[device.type]
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = samples(lambda: target.copy_(source), device)
    rates[f"copy {size >> 20} MiB"] = over_ranks(dist, "GB/s", [2 * size / s / 1e9 for s in seconds])
    if dist.world_size > 1:
        rates[f"all-reduce {REDUCED[device.type] * 2 / 1e6:.0f} MB"] = _all_reduce(dist)
    return {"rates": rates, "under_load": _under_load(device, ask_state)}


def _free(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0]


def _dtype(device: torch.device) -> str:
    bf16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    return "bf16" if bf16 else "fp32"


def _operands(device: torch.device, rows: int, k: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    dtype = torch.bfloat16 if _dtype(device) == "bf16" else torch.float32
    return torch.randn(rows, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)


def _product(dist: Dist, rows: int, k: int, n: int) -> Rate:
    x, w = _operands(dist.device, rows, k, n)
    seconds = samples(lambda: F.linear(x, w), dist.device)
    return over_ranks(dist, "TFLOP/s", [2 * rows * k * n / s / 1e12 for s in seconds])


def _all_reduce(dist: Dist) -> Rate:
    n, count = dist.world_size, REDUCED[dist.device.type]
    flat = torch.zeros(count, dtype=torch.bfloat16, device=dist.device)
    for _ in range(3):
        dist.all_reduce_sum_(flat)
    seconds = []
    for _ in range(SAMPLES):  # a fixed number: a rank that stopped earlier would leave the others waiting
        dist.barrier()
        dist.synchronize()
        began = time.perf_counter()
        dist.all_reduce_sum_(flat)
        dist.synchronize()
        seconds.append(time.perf_counter() - began)
    moved = 2 * (n - 1) / n * flat.numel() * flat.itemsize
    return over_ranks(dist, "GB/s", [moved / s / 1e9 for s in seconds])


def samples(fn: Callable[[], Any], device: torch.device) -> list[float]:
    """Seconds of a call, `SAMPLES` times or for `LONGEST_S`; each sample is as many calls as fill `SAMPLE_S`."""
    began = time.perf_counter()
    for _ in range(3):
        _timed(fn, device, 1)
    calls = max(1, round(SAMPLE_S / max(_timed(fn, device, 1), 1e-6)))
    out = []
    while len(out) < SAMPLES and (len(out) < 3 or time.perf_counter() - began < LONGEST_S):
        out.append(_timed(fn, device, calls))
    return out


def _timed(fn: Callable[[], Any], device: torch.device, calls: int) -> float:
    """Seconds a call, by the device's own clock on a GPU."""
    if device.type == "cpu":
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - began) / calls
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(calls):
        fn()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / calls


def over_ranks(dist: Dist, unit: str, values: list[float]) -> Rate:
    """This rank's rates as one Rate; with several ranks each one's median too, and low and high over all of them."""
    mine = (median(values), min(values), max(values))
    if dist.world_size == 1:
        return {"unit": unit, "median": _4(mine[0]), "low": _4(mine[1]), "high": _4(mine[2])}
    told = torch.zeros(dist.world_size, 3, dtype=torch.float64)
    told[dist.rank] = torch.tensor(mine, dtype=torch.float64)
    medians, lows, highs = dist.all_reduce_sum_(told).T.tolist()
    low, high = _4(min(lows)), _4(max(highs))
    return {"unit": unit, "median": _4(median(medians)), "low": low, "high": high, "ranks": [_4(m) for m in medians]}


def _4(value: float) -> float:
    return float(f"{value:.4g}")


def slow_ranks(rate: Rate) -> dict[int, float]:
    """rank: its share of the median, for ranks that hold the others up."""
    shares = {i: r / rate["median"] for i, r in enumerate(rate.get("ranks", ())) if rate["median"]}
    return {i: share for i, share in shares.items() if share < SLOW_RANK}


def _under_load(device: torch.device, ask: Callable[[], dict] | None) -> dict | None:
    """Clocks and power in the middle of about 2 s of products; None on a CPU."""
    if device.type != "cuda" or ask is None:
        return None
    x, w = _operands(device, GPU_ROWS if _free(device) > 4e9 else CPU_ROWS, 512, 1536)
    calls = max(1, round(0.1 / max(_timed(lambda: F.linear(x, w), device, 5), 1e-6)))
    for _ in range(10):  # queued in parts, so that the queue does not fill
        _timed(lambda: F.linear(x, w), device, calls)
    event = torch.cuda.Event()
    for _ in range(10 * calls):
        F.linear(x, w)
    event.record()
    told = ask()
    event.synchronize()
    return told
