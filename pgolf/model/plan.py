"""The layer plan: which block runs when, and what joins before it. Plain data, no torch."""

from __future__ import annotations

from dataclasses import dataclass

from pgolf.model.config import ModelConfig


@dataclass(frozen=True)
class Step:
    """One visit of a block.

    block: whose weights; slot: number of the visit, from 0; skip_from: slot whose output joins the stream before this
    visit; skip_row: row of the skip weights that this connection uses; keep: a later step or the backout reads this
    visit's output.
    """

    block: int
    slot: int
    skip_from: int | None = None
    skip_row: int | None = None
    keep: bool = False


def build(cfg: ModelConfig) -> tuple[Step, ...]:
    """Encoder layers, then decoder layers; decoder j takes encoder n_enc-1-j's output, as long as there is one."""
    layers, n_enc = cfg.plan.num_layers, cfg.plan.n_encoder
    n_skip = min(n_enc, layers - n_enc) if cfg.plan.skips else 0
    kept = {n_enc - 1 - j for j in range(n_skip)}
    if cfg.wiring.backout:
        kept.add(cfg.wiring.backout.layer)
    steps = []
    for i in range(layers):
        j = i - n_enc  # decoder number
        joins = 0 <= j < n_skip
        steps.append(Step(i, i, n_enc - 1 - j if joins else None, j if joins else None, keep=i in kept))
    return tuple(steps)


def table(steps: tuple[Step, ...]) -> list[str]:
    """The plan as lines for the log."""
    rows = ["visit block  joins"]
    for s in steps:
        join = f"output of visit {s.skip_from} (skip row {s.skip_row})" if s.skip_from is not None else "-"
        rows.append(f"{s.slot:5d} {s.block:5d}  {join}{'   output kept' if s.keep else ''}")
    return rows
