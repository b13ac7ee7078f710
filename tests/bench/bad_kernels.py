"""Kernels that the static gate must refuse. Run as a script it compiles them for sm_90 and prints their figures."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import triton
import triton.language as tl

from bench.static import figures
from pgolf.kernels._op import Recorded
from pgolf.kernels._tuned import Launch


@triton.jit
def spills_kernel(x, y, B: tl.constexpr):
    i, j = tl.arange(0, B), tl.arange(0, B)
    at = i[:, None] * B + j[None, :]
    a = tl.load(x + at).to(tl.float32)
    rows = tl.sum(a * a, axis=1)
    tl.store(y + at, a * rows[:, None] + tl.sum(a, axis=0)[None, :])


@triton.jit
def atomic_kernel(x, y, B: tl.constexpr):
    tl.atomic_add(y, tl.sum(tl.load(x + tl.arange(0, B)), axis=0))


@triton.jit
def scatter_kernel(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.atomic_add(y + (i & 7), tl.load(x + i), sem="relaxed")  # unused result: SASS has REDG, not ATOMG


@triton.jit
def no_wgmma_kernel(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    at = i[:, None] * B + i[None, :]
    tl.store(y + at, tl.dot(tl.load(x + at), tl.load(x + at)))


@triton.jit
def good_kernel(x, y, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(y + i, tl.load(x + i) * 2.0)


def compiled(kernel, block: int, warps: int) -> dict:
    tensor = torch.empty(1, device="meta")
    return asdict(figures(Recorded(kernel, (1,), (tensor, tensor), Launch(warps, 1, {"B": block}), {}), 90, "case"))


if __name__ == "__main__":
    rows = {
        "spills": compiled(spills_kernel, 128, 1),
        "atomic": compiled(atomic_kernel, 256, 4),
        "scatter": compiled(scatter_kernel, 256, 4),
        "no_wgmma": compiled(no_wgmma_kernel, 16, 4),  # 16 rows: too few for a warp group
        "good": compiled(good_kernel, 1024, 4),
    }
    print(json.dumps(rows))
