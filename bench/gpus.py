"""What GPUs can do at most, and what a plan may assume of them.

Peaks are the vendor's data sheets (dense, without sparsity). The planning rates are assumptions of the ledger, what
good kernels reach at this project's shapes on parts that others have measured; a measured roof of `bench/results`
replaces them with `--roofs FILE`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path


@dataclass(frozen=True)
class Gpu:
    """Rates in FLOP/s and bytes/s, latency in seconds."""

    name: str
    arch: int
    tensor: float  # bf16 tensor cores, peak
    memory: float  # device memory, peak
    link: float  # to the other GPUs of a node, one direction
    host: float  # from host memory
    gemm: float  # planning: products at K = 512
    attention: float  # planning: causal attention, forward and backward together
    copy: float  # planning: streaming kernels
    latency: float = 4e-6  # a launch that has nothing to do


GPUS = {
    "h100": Gpu("H100 SXM", 90, 989.4e12, 3.35e12, 450e9, 55e9, gemm=620e12, attention=430e12, copy=2.9e12),
    "h200": Gpu("H200 SXM", 90, 989.4e12, 4.8e12, 450e9, 55e9, gemm=640e12, attention=430e12, copy=4.0e12),
    "a100": Gpu("A100 SXM 80 GB", 80, 312e12, 2.039e12, 300e9, 25e9, gemm=230e12, attention=150e12, copy=1.7e12),
    "rtx4090": Gpu("RTX 4090", 89, 165.2e12, 1.008e12, 25e9, 25e9, gemm=140e12, attention=90e12, copy=0.9e12),
}


# Names that the driver gives. Others of the family (PCIe, NVL, a part by MIG) are slower and not to be taken for these.
DEVICE_NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
}


def key_of(device_name: str) -> str | None:
    """The key in GPUS of what `torch.cuda.get_device_name` says, None for a GPU that is not there."""
    return DEVICE_NAMES.get(device_name.strip())


def with_roofs(gpu: Gpu, path: Path) -> Gpu:
    """`gpu` with the roofs that a report measured: keys gemm, attention and copy of its "roofs"."""
    roofs = json.loads(path.read_text())["roofs"]
    return replace(gpu, **{k: float(roofs[k]) for k in ("gemm", "attention", "copy") if k in roofs})
