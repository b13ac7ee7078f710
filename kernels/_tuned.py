"""The launch table: how each kernel is launched, by compute capability and shape class.

A row holds for its arch and for later ones that have no row. Arch 0 is the CPU interpreter, whose tiny blocks give
small test shapes edges. A note says what the row rests on: "static" = compiled ahead of time without spills at the
shapes of `bench/cases`, never timed; a GPU's name and a commit = measured there.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Launch:
    """Warps, pipeline stages and block sizes of a launch."""

    num_warps: int
    num_stages: int
    blocks: dict[str, int] = field(default_factory=dict)
    note: str = "static"


TABLE: dict[str, dict[tuple[int, str], Launch]] = {
    # residual: rows of BLOCK_T tokens by the whole width; class D<width rounded up to a power of two>
    "residual_fwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 4}),
        (80, "*"): Launch(8, 1, {"BLOCK_T": 8}),
    },
    "residual_bwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 4}),
        (80, "*"): Launch(8, 1, {"BLOCK_T": 8}),
    },
}
