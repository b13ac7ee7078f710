"""Would an entropy coder of our own pay? Layouts x codecs on quantised weights, against entropies and against models.

    python -m bench.codecs RUN_DIR                  the integers of RUN_DIR/model.pgolf, as they ship
    python -m bench.codecs RUN_DIR --kinds int6     the weights of its newest checkpoint, quantised anew
    python -m bench.codecs --synthetic              Gaussian and Laplace weights of 512 x 1536

Every column but the first two is bytes relative to the order-0 entropy of the tensor. Codecs are real sizes at their
strongest level, in the better of their layouts. `rows/o0` is the entropy if every row's own histogram were known for
nothing: no coder's size. The models are what an ideal arithmetic coder would write, tables and side information
included; a real one adds about 0.1 %:

    row         a class of scale for each row (quarter octaves), stored; a histogram a class
    row+col     the same for columns too; a histogram for each sum of the two classes
    adaptive    a stored class a row, and the running mean of |q| in the column so far, joint; the better orientation
    +mean       the same with the column's running mean of q
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pgolf import checkpoint
from pgolf.artifact import codecs
from pgolf.artifact.layouts import LAYOUTS
from pgolf.artifact.pack import unpack
from pgolf.quant.grid import GRIDS, round_to, steps_of

STEP = 0.25  # octaves between two classes of scale
RATE = 1 / 64  # of the running means, once there are that many rows
PAYS = 0.01  # what a coder of our own must save on trained weights
KINDS = ("int5", "int6", "int8")


def entropy(counts: np.ndarray) -> float:
    """Bytes of a message with these symbol counts under its own histogram."""
    counts = counts[counts > 0].astype(float)
    return float((counts * np.log2(counts.sum() / counts)).sum() / 8)


def histogram(q: np.ndarray) -> np.ndarray:
    """Counts (256,) of int8 values."""
    return np.bincount(q.ravel().view(np.uint8), minlength=256)


def given(q: np.ndarray, context: np.ndarray) -> float:
    """Bytes of q when each value is coded with its context's histogram, and the histograms have to be learnt or sent:
    half a log of its count for each symbol that occurs. context: integers, broadcastable to q."""
    context = np.broadcast_to(context - context.min(), q.shape).ravel()
    table = np.bincount(context * 256 + q.ravel().view(np.uint8), minlength=256 * (int(context.max()) + 1))
    table = table.reshape(-1, 256)
    learnt = 0.5 * np.log2(table[table > 0] + 1.0).sum() / 8
    return sum(map(entropy, table)) + float(learnt)


def classes(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale classes of rows and columns of q (rows, columns): rms in STEPs of an octave, fitted in turn."""
    square = q.astype(np.float64) ** 2 + 1 / 12  # a rounded value is spread over one step
    row, col = np.zeros(q.shape[0]), np.zeros(q.shape[1])
    for _ in range(4):
        row = 0.5 * np.log2((square * 4.0**-col).mean(1))
        col = 0.5 * np.log2((square * 4.0 ** -row[:, None]).mean(0))
        col -= col.mean()
    return np.round(row / STEP).astype(np.int64), np.round(col / STEP).astype(np.int64)


def side(labels: np.ndarray) -> float:
    """Bytes to store classes."""
    return entropy(np.unique(labels, return_counts=True)[1])


def running(q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log2 of the mean |q|, mean q) of each column over the rows above, as a decoder would have them."""
    size, mean = np.full(q.shape[1], np.abs(q[0].astype(float)).mean() + 0.5), np.zeros(q.shape[1])
    sizes, means = np.empty(q.shape), np.empty(q.shape)
    for i, row in enumerate(q.astype(float)):
        sizes[i], means[i], rate = size, mean, max(RATE, 1 / (i + 2))
        size, mean = size + rate * (np.abs(row) - size), mean + rate * (row - mean)
    return np.log2(sizes + 0.3), means / (sizes + 0.3)


def models(q: np.ndarray) -> dict[str, float]:
    """{model: bytes} of q (rows, columns) int8."""
    row, col = classes(q)
    out = {"row": given(q, row[:, None]) + side(row), "row+col": given(q, row[:, None] + col) + side(row) + side(col)}
    out |= {"adaptive": math.inf, "+mean": math.inf}
    for a, label in ((q, row), (np.ascontiguousarray(q.T), col)):
        size, mean = running(a)
        lane = np.round(size / STEP).astype(np.int64)
        joint = label[:, None] * 64 + lane
        out["adaptive"] = min(out["adaptive"], *(given(a, c) + side(label) for c in (joint, label[:, None] + lane)))
        moved = (label[:, None] + lane) * 64 + np.round(2 * mean).astype(np.int64)
        out["+mean"] = min(out["+mean"], given(a, moved) + side(label))
    return out


def coded(q: np.ndarray) -> dict[str, int]:
    """{codec: bytes} of q in its better layout, at the strongest level."""
    orders = [lay.encode(q) for lay in LAYOUTS.values() if lay.applies(q.dtype)]
    return {name: min(len(codec.compress(raw)) for raw in orders) for name, codec in codecs.CODECS.items()}


# -- sources -----------------------------------------------------------------------------------------------------


def quantised(w: Tensor, kind: str) -> np.ndarray:
    """w to integers (rows, columns) int8, a row's largest magnitude on the end of the grid."""
    rows = w.reshape(w.shape[0], -1).float()
    return round_to(rows, steps_of(rows.abs().amax(1), GRIDS[kind], 0.0), GRIDS[kind]).numpy()


def shipped(run: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The int8 matrices of a run's artifact."""
    for record in unpack((run / "model.pgolf").read_bytes())[0]:
        for part, a in record.parts.items():
            if a.dtype == np.int8 and a.ndim > 1:
                yield f"{record.name} {record.kind}.{part}", a.reshape(a.shape[0], -1)


def requantised(run: Path, kinds: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The large matrices of a run's newest checkpoint, in each of `kinds`."""
    tensors, _ = checkpoint.read(checkpoint.newest(run / "checkpoints"))
    large = {n: w for n, w in tensors.items() if n.startswith("model.") and w.ndim > 1 and w.numel() > 65536}
    for kind in kinds:
        yield from ((f"{name.removeprefix('model.')} {kind}", quantised(w, kind)) for name, w in large.items())


def synthetic(kinds: list[str], seed: int = 0) -> Iterator[tuple[str, np.ndarray]]:
    """Independent values; rows differ by scale, which a step a row removes."""
    draws = {"Gaussian": torch.distributions.Normal(0.0, 1.0), "Laplace": torch.distributions.Laplace(0.0, 1.0)}
    for kind in kinds:
        for name, law in draws.items():
            torch.manual_seed(seed)
            yield f"{name} {kind}", quantised(law.sample((512, 1536)) * torch.rand(512, 1).exp(), kind)


# -- table -------------------------------------------------------------------------------------------------------


def table(tensors: Iterator[tuple[str, np.ndarray]]) -> float:
    """Prints a line a tensor and the totals; returns the share that the models save where they are the smaller."""
    names = [*codecs.CODECS, "rows/o0", "row", "row+col", "adaptive", "+mean"]
    print(f"{'tensor':44}{'values':>10}{'order-0':>10} " + "".join(f"{n:>10}" for n in names))
    best = both = values = 0.0
    for name, q in tensors:
        zeroth, real, ideal = entropy(histogram(q)), coded(q), models(q)
        found = {**real, "rows/o0": sum(entropy(histogram(r)) for r in q), **ideal}
        rest = "".join(f"{found[n] / zeroth - 1:>+10.2%}" for n in names)
        print(f"{name[-43:]:44}{q.size:>10,}{zeroth:>10,.0f} {rest}", flush=True)
        best, values = best + min(real.values()), values + q.size
        both += min(*real.values(), *ideal.values())
    saved = 1 - both / best
    print(f"{values:,.0f} values; the best codec for each: {best:,.0f} bytes, {8 * best / values:.3f} bits a value")
    print(f"with an ideal coder where that is smaller: {both:,.0f} bytes, {saved:.2%} less; it pays from {PAYS:.0%} on")
    return saved


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codecs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN_DIR", help="a run's folder")
    parser.add_argument("--synthetic", action="store_true", help="drawn weights instead of a run's")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, help="quantise the checkpoint's weights to these")
    args = parser.parse_args(argv)
    if args.synthetic == bool(args.run):
        parser.error("expected a run's folder or --synthetic, one of the two")
    if args.synthetic:
        table(synthetic(args.kinds or list(KINDS)))
    else:
        table(requantised(args.run, args.kinds) if args.kinds else shipped(args.run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
