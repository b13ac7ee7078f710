"""What kinds, clips and corrections cost and give: error and bits a weight, on matrices of known distributions.

    python -m bench.rates

Error: mean squared, of the mean square of the weights. Bits: every part of the record through brotli, layouts aside.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pgolf.artifact import codecs
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import GRID_KINDS, LowRankConfig, QuantConfig
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import dequantize

SHAPE = (1024, 512)
CASES: dict[str, dict] = {
    **{kind: {"matrix": kind} for kind in GRID_KINDS},
    "ternary, max": {"matrix": "ternary", "matrix_clip": "max"},
    **{f"int6, {clip}": {"matrix_clip": clip} for clip in ("0.9995", "0.999", "best", "best-row", "4sd", "12sd")},
    **{f"int4, {clip}": {"matrix": "int4", "matrix_clip": clip} for clip in ("0.999", "best-row", "4sd")},
    "int6, optrot": {"optrot": True},
    **{f"int6, LQER {f}": {"low_rank": LowRankConfig(factors=f)} for f in ("asym", "int4", "int8", "fp16")},
}


def matrices() -> dict[str, Tensor]:
    """A normal matrix, and one with heavy tails (Student's t of 5 degrees of freedom)."""
    gen = torch.Generator().manual_seed(0)
    normal = torch.randn(6, *SHAPE, generator=gen)
    # a normal over the root of a chi-square of 5 degrees over 5
    return {"normal": 0.05 * normal[0], "Student's t": 0.05 * normal[0] / normal[1:].square().mean(0).sqrt()}


def rate(w: Tensor, settings: dict) -> tuple[float, float]:
    """(relative squared error, bits a weight) of w (rows, cols) fp32 stored by `settings`."""
    info = ParamInfo("w", nn.Parameter(w), Role.MATRIX, None)
    (record,) = quantize_state({"w": w}, [info], QuantConfig(keep_numel=0, **settings))
    coder = codecs.get("brotli")
    size = sum(len(coder.compress(part.tobytes(), -1)) for part in record.parts.values())
    error = (dequantize([record])["w"] - w).square().sum() / w.square().sum()
    return error.item(), 8 * size / w.numel()


def table(found: dict[str, Tensor], cases: dict[str, dict]) -> Iterator[str]:
    """Lines of a Markdown table."""
    yield "| stored as |" + "".join(f" {name}: error | bits |" for name in found)
    yield "|---|" + "---|---|" * len(found)
    for label, settings in cases.items():
        cells = (f" {error:.2e} | {bits:.2f} |" for error, bits in (rate(w, settings) for w in found.values()))
        yield f"| {label} |" + "".join(cells)


if __name__ == "__main__":
    for line in table(matrices(), CASES):
        print(line)
