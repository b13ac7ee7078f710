"""Where a step's time goes: every op of one GPU's share, with FLOPs, bytes, what bounds it, and its roofline time.

    python -m bench.ledger --preset rat_rod_green --gpu h100 [--path reference] [--fold] [--world-size 8] [--json FILE]

All of it is derived from the configuration: the model, the optimiser and the collectives are traced on meta tensors at
the step's real shapes (bench/trace.py). Bytes count each input and output once. Plain torch ops are counted one by one,
as eager runs them; a compiler fuses some (bench/step_bytes.py counts that). Time is a row's larger one of
FLOPs / rate and bytes / rate, at planning rates and, as the floor, at the data sheet's peaks (bench/gpus.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pgolf.config import RunConfig
from pgolf.presets import PRESETS

from .gpus import GPUS, Gpu, with_roofs

PHASES = ("data", "forward", "backward", "optimizer", "communication")
SDPA = "_scaled_dot_product_flash_attention"
CORE = ("attention_fwd", "attention_dkdv", "attention_dq", SDPA, f"{SDPA}_backward")


@dataclass(frozen=True)
class Row:
    """Calls of one kernel in one phase, taken together."""

    phase: str
    op: str  # op of kernels/, or "torch"
    kernel: str
    calls: int
    flops: int
    bytes: int
    bound: str  # tensor core, memory, latency, link, host
    ms: float  # at planning rates
    floor_ms: float  # at peak rates

    @property
    def is_glue(self) -> bool:
        """Neither a product nor the attention core: what fusion can save."""
        return self.phase in ("forward", "backward") and not self.flops


@dataclass(frozen=True)
class Ledger:
    """All rows of a step, and what they add up to."""

    preset: str
    gpu: Gpu
    tokens: int
    rows: list[Row]

    def total(self, what: str, phases: Iterable[str] = PHASES) -> float:
        return sum(getattr(r, what) for r in self.rows if r.phase in phases)

    @property
    def model_flops(self) -> int:
        """Forward and backward products and attention: what MFU counts."""
        return int(self.total("flops", ("forward", "backward")))

    @property
    def glue_bytes(self) -> int:
        return sum(r.bytes for r in self.rows if r.is_glue)

    def mfu(self, ms: float) -> float:
        """Model FLOPs utilisation at `ms` a step, against the tensor cores' peak."""
        return self.model_flops / (ms * 1e-3 * self.gpu.tensor)

    def to_dict(self) -> dict:
        """For --json."""
        totals = {w: self.total(w) for w in ("flops", "bytes", "ms", "floor_ms")}
        totals |= {"model_flops": self.model_flops, "glue_bytes": self.glue_bytes}
        head = {"preset": self.preset, "gpu": asdict(self.gpu), "tokens": self.tokens, "totals": totals}
        return head | {"rows": [asdict(r) for r in self.rows]}


def ledger(cfg: RunConfig, gpu: Gpu, path: str = "triton", world_size: int = 8) -> Ledger:
    """The ledger of one GPU of `world_size`. path: "triton" or "reference"."""
    from .trace import share_rows, trace_step  # imports torch

    groups: dict[tuple[str, str, str], list[int]] = {}
    for e in trace_step(cfg, gpu.arch, path, world_size):
        sums = groups.setdefault((e.phase, e.op or "torch", e.name), [0, 0, 0])
        for i, value in enumerate((1, e.flops, e.bytes)):
            sums[i] += value
    rows = [_row(gpu, *key, *sums) for key, sums in groups.items()]
    tokens = share_rows(cfg, world_size) * cfg.data.seq_len
    rows += [*_adamw_and_averages(cfg, gpu, world_size), *_communication(cfg, gpu, world_size), _data(gpu, tokens)]
    rows.sort(key=lambda r: (PHASES.index(r.phase), -r.ms))
    return Ledger(cfg.preset, gpu, tokens, rows)


def _row(gpu: Gpu, phase: str, op: str, kernel: str, calls: int, flops: int, size: int) -> Row:
    rate = gpu.attention if kernel in CORE else gpu.gemm
    compute, memory, wait = flops / rate, size / gpu.copy, calls * gpu.latency
    bound = {compute: "tensor core", memory: "memory", wait: "latency"}[max(compute, memory, wait)]
    floor = max(flops / gpu.tensor, size / gpu.memory)
    return Row(phase, op, kernel, calls, flops, size, bound, 1e3 * max(compute, memory, wait), 1e3 * floor)


def _moved(gpu: Gpu, phase: str, op: str, kernel: str, calls: int, size: float, rate: float, bound: str) -> Row:
    seconds = size / rate if size else 0.0
    slow = calls * gpu.latency > seconds
    ms = 1e3 * max(seconds, calls * gpu.latency)
    return Row(phase, op, kernel, calls, 0, int(size), "latency" if slow else bound, ms, 1e3 * seconds)


def _adamw_and_averages(cfg: RunConfig, gpu: Gpu, world_size: int) -> list[Row]:
    """AdamW reads weight, gradient and two moments and writes all but the gradient, fp32 at most; EMA reads weight and
    average and writes the average; clipping reads twice and writes once this rank's share of the gradients."""
    from pgolf.dry_run import exchanged, groups_on_paper

    matrices, adamw = exchanged(groups_on_paper(cfg))
    muon = sum(n * rows * cols for (rows, cols), n in matrices.items())
    rows = [_row(gpu, "optimizer", "torch", "fused_adamw", 1, 0, 7 * 4 * adamw)]
    if cfg.average.ema:
        rows.append(_row(gpu, "optimizer", "torch", "ema", 1, 0, 3 * 4 * (muon + adamw)))
    if cfg.optim.clip:
        rows.append(_row(gpu, "optimizer", "torch", "clip", 2, 0, 3 * 4 * (muon // world_size + adamw)))
    return rows


def _communication(cfg: RunConfig, gpu: Gpu, world_size: int) -> list[Row]:
    """What the optimiser sends (pgolf/optim/exchange.py), by rings."""
    from pgolf.dry_run import exchanged, groups_on_paper
    from pgolf.optim.exchange import traffic_of

    sums: dict[str, list[int]] = {}
    for sent in traffic_of(*exchanged(groups_on_paper(cfg)), cfg.optim.muon, world_size):
        calls, size = sums.setdefault(sent.collective, [0, 0])
        sums[sent.collective] = [calls + 1, size + sent.wire]
    return [_moved(gpu, "communication", "torch", c, n, size, gpu.link, "link") for c, (n, size) in sums.items()]


def _data(gpu: Gpu, tokens: int) -> Row:
    """uint16 tokens to the device."""
    return _moved(gpu, "data", "torch", "tokens to device", 1, 2 * tokens, gpu.host, "host")


# -- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ledger", description=__doc__.split("\n")[0])
    parser.add_argument("--preset", default="rat_rod_green", choices=list(PRESETS))
    parser.add_argument("--gpu", default="h100", choices=list(GPUS))
    parser.add_argument("--path", default="triton", choices=("triton", "reference"), help="kernels or plain torch")
    parser.add_argument("--fold", action="store_true", help="with kernels.fold_scales=true")
    parser.add_argument("--world-size", type=int, default=8, help="GPUs that share a step")
    parser.add_argument("--ms", type=float, default=87.2, help="a step time to give the MFU of")
    parser.add_argument("--roofs", type=Path, help="a report of bench/results whose measured roofs are the rates")
    parser.add_argument("--json", type=Path, help="write everything here")
    args = parser.parse_args(argv)
    if args.world_size < 1 or args.ms <= 0:
        parser.error(f"--world-size {args.world_size} must be at least 1 and --ms {args.ms} positive")
    cfg, gpu = PRESETS[args.preset](), GPUS[args.gpu]
    if args.fold:
        cfg = replace(cfg, kernels=replace(cfg.kernels, fold_scales=True))
    if args.roofs:
        gpu = with_roofs(gpu, args.roofs)
    found = ledger(cfg, gpu, args.path, args.world_size)
    print_ledger(found, args.ms)
    if args.json:
        args.json.write_text(json.dumps(found.to_dict(), indent=1) + "\n")
    return 0


def print_ledger(found: Ledger, ms: float) -> None:
    """The table, largest rows first within a phase, then the totals."""
    print(f"{found.preset}: {found.tokens:,} tokens a step on one {found.gpu.name}")
    head = f"{'phase':14s}{'op':18s}{'kernel':28s}{'calls':>6s}{'GFLOP':>10s}{'MB':>9s}"
    print(f"{head}  {'bound':12s}{'ms':>8s}{'floor':>8s}")
    for r in found.rows:
        if r.ms >= 0.005 or r.phase in ("data", "communication"):
            print(
                f"{r.phase:14s}{r.op:18s}{r.kernel:28s}{r.calls:6d}{r.flops / 1e9:10.1f}{r.bytes / 1e6:9.1f}"
                f"  {r.bound:12s}{r.ms:8.3f}{r.floor_ms:8.3f}"
            )
    for phase in PHASES:
        print(f"= {phase:14s}{found.total('ms', (phase,)):8.2f} ms, floor {found.total('floor_ms', (phase,)):.2f} ms")
    print(f"= all           {found.total('ms'):8.2f} ms, floor {found.total('floor_ms'):.2f} ms")
    print(f"model FLOPs {found.model_flops / 1e12:.2f} T, glue {found.glue_bytes / 1e9:.1f} GB")
    print(
        f"MFU at {ms:g} ms: {100 * found.mfu(ms):.1f} %; at the sum above: {100 * found.mfu(found.total('ms')):.1f} %"
    )


if __name__ == "__main__":
    sys.exit(main())
