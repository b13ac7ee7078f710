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
        (100, "*"): Launch(4, 1, {"BLOCK_T": 4}),  # 8 rows spill a word at three terms
    },
    "residual_bwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 4}),
        (80, "*"): Launch(8, 1, {"BLOCK_T": 8}),
    },
    # cross_entropy: BLOCK_T rows by BLOCK_V columns; a smaller vocabulary gets more rows instead
    "cross_entropy_fwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 2, "BLOCK_V": 16}),
        (80, "*"): Launch(4, 1, {"BLOCK_T": 2, "BLOCK_V": 1024}),
    },
    "cross_entropy_bwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 2, "BLOCK_V": 16}),
        (80, "*"): Launch(4, 1, {"BLOCK_T": 2, "BLOCK_V": 1024}),
    },
    # qk_prep: BLOCK_T tokens by BLOCK_H heads of q, k and v; class D<head width rounded up to a power of two>
    "qk_prep_fwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 2, "BLOCK_H": 4}),
        (80, "*"): Launch(4, 1, {"BLOCK_T": 2, "BLOCK_H": 16}),
        (80, "D128"): Launch(4, 1, {"BLOCK_T": 2, "BLOCK_H": 8}),
        (80, "D256"): Launch(4, 1, {"BLOCK_T": 2, "BLOCK_H": 4}),
    },
    "qk_prep_bwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 2, "BLOCK_H": 4}),
        (80, "*"): Launch(4, 1, {"BLOCK_T": 2, "BLOCK_H": 16}),
        (80, "D128"): Launch(8, 1, {"BLOCK_T": 2, "BLOCK_H": 8}),
        (80, "D256"): Launch(8, 1, {"BLOCK_T": 2, "BLOCK_H": 4}),
    },
    # int6_cast, flat_update: BLOCK_R whole rows a program; class C<columns rounded up to a power of two>
    "int6_cast": {
        (0, "*"): Launch(1, 1, {"BLOCK_R": 4}),
        (80, "*"): Launch(8, 1, {"BLOCK_R": 8}),
        (80, "C1024"): Launch(8, 1, {"BLOCK_R": 4}),
        (80, "C2048"): Launch(8, 1, {"BLOCK_R": 2}),
        (80, "C4096"): Launch(8, 1, {"BLOCK_R": 1}),
        (80, "C8192"): Launch(16, 1, {"BLOCK_R": 1}),
    },
    "flat_update": {
        (0, "*"): Launch(1, 1, {"BLOCK_R": 4}),
        (80, "*"): Launch(8, 1, {"BLOCK_R": 8}),
        (80, "C1024"): Launch(8, 1, {"BLOCK_R": 4}),
        (80, "C2048"): Launch(8, 1, {"BLOCK_R": 2}),
        (80, "C4096"): Launch(8, 1, {"BLOCK_R": 1}),
        (80, "C8192"): Launch(16, 1, {"BLOCK_R": 1}),
    },
    # mlp: tiles of BLOCK_M rows by BLOCK_N hidden units (a multiple of 128), BLOCK_K deep. Classes: what backward needs
    # besides post; fp32, which has no tensor cores. (90, derivative): 128 registers, so two programs run at once
    "mlp_up": {
        (0, "*"): Launch(1, 1, {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 16}),
        (80, "*"): Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),
        (80, "fp32"): Launch(8, 2, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}),
        (90, "*"): Launch(8, 4, {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}),
        (90, "derivative"): Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),
        (90, "fp32"): Launch(8, 2, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16}),
        (120, "*"): Launch(8, 4, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}),
        (120, "fp32"): Launch(8, 2, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 16}),
    },
    "mlp_du": {
        (0, "*"): Launch(1, 1, {"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 16}),
        (80, "*"): Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),
        (80, "fp32"): Launch(8, 2, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}),
        (90, "*"): Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}),
        (90, "fp32"): Launch(8, 2, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}),
        (100, "signs"): Launch(8, 4, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}),
        (120, "*"): Launch(8, 4, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}),
        (120, "fp32"): Launch(8, 2, {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32}),
    },
    # bigram: BLOCK_T tokens by the whole width; class D<width rounded up to a power of two>
    "bigram_fwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 4}),
        (80, "*"): Launch(4, 1, {"BLOCK_T": 8}),
        (80, "D1024"): Launch(8, 1, {"BLOCK_T": 8}),
        (80, "D2048"): Launch(8, 1, {"BLOCK_T": 4}),
        (80, "D4096"): Launch(8, 1, {"BLOCK_T": 2}),
    },
    "bigram_bwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 4}),
        (80, "*"): Launch(4, 1, {"BLOCK_T": 4}),
        (80, "D1024"): Launch(8, 1, {"BLOCK_T": 4}),
        (80, "D2048"): Launch(8, 1, {"BLOCK_T": 2}),
        (80, "D4096"): Launch(8, 1, {"BLOCK_T": 1}),
    },
    # segment sums: BLOCK_R rows by BLOCK_D columns at a time, segments cut every CHUNK rows
    "segment_sum": {
        (0, "*"): Launch(1, 1, {"CHUNK": 4, "BLOCK_R": 2, "BLOCK_D": 16}),
        (80, "*"): Launch(4, 1, {"CHUNK": 128, "BLOCK_R": 16, "BLOCK_D": 256}),
    },
    "segment_fold": {
        (0, "*"): Launch(1, 1, {"BLOCK_R": 2, "BLOCK_D": 16}),
        (80, "*"): Launch(4, 1, {"BLOCK_R": 8, "BLOCK_D": 256}),
    },
    # ngram_hash: BLOCK positions, sorted elements or targets; BLOCK_M lines, BLOCK_P keys
    "ngram_hash": {
        (0, "*"): Launch(1, 1, {"BLOCK": 16}),
        (80, "*"): Launch(4, 1, {"BLOCK": 1024}),
    },
    "ngram_count": {
        (0, "*"): Launch(1, 1, {"BLOCK": 8}),
        (80, "*"): Launch(8, 1, {"BLOCK": 1024}),
    },
    "ngram_fill": {
        (0, "*"): Launch(1, 1, {"BLOCK_M": 8}),
        (80, "*"): Launch(4, 1, {"BLOCK_M": 64}),
    },
    "ngram_lookup": {
        (0, "*"): Launch(1, 1, {"BLOCK_P": 8}),
        (80, "*"): Launch(4, 1, {"BLOCK_P": 128}),
    },
    "ngram_legacy": {
        (0, "*"): Launch(1, 1, {"BLOCK": 16}),
        (80, "*"): Launch(4, 1, {"BLOCK": 512}),
    },
    # attention: BLOCK_M queries by BLOCK_N keys of one head; class D<head width, a power of two>, or fp32, which no
    # tensor core multiplies exactly
    "attention_fwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_M": 16, "BLOCK_N": 8}),
        (80, "*"): Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 64}),
        (80, "D128"): Launch(8, 2, {"BLOCK_M": 128, "BLOCK_N": 32}),
        (80, "fp32"): Launch(8, 1, {"BLOCK_M": 16, "BLOCK_N": 32}),
    },
    "attention_dkdv": {
        (0, "*"): Launch(1, 1, {"BLOCK_M": 8, "BLOCK_N": 16}),
        (80, "*"): Launch(8, 2, {"BLOCK_M": 32, "BLOCK_N": 128}),
        (80, "D128"): Launch(8, 2, {"BLOCK_M": 32, "BLOCK_N": 64}),
        (80, "fp32"): Launch(8, 1, {"BLOCK_M": 16, "BLOCK_N": 32}),
        (90, "D64"): Launch(8, 2, {"BLOCK_M": 64, "BLOCK_N": 128}),
        (100, "D64"): Launch(8, 2, {"BLOCK_M": 32, "BLOCK_N": 128}),
        (100, "D128"): Launch(8, 1, {"BLOCK_M": 32, "BLOCK_N": 64}),
    },
    "attention_dq": {
        (0, "*"): Launch(1, 1, {"BLOCK_M": 16, "BLOCK_N": 8}),
        (80, "*"): Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 64}),
        (80, "D128"): Launch(8, 2, {"BLOCK_M": 128, "BLOCK_N": 32}),
        (80, "fp32"): Launch(8, 1, {"BLOCK_M": 16, "BLOCK_N": 32}),
    },
    # exclude: BLOCK_R (token, KV head) pairs with their query heads
    "exclude_fwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_R": 4}),
        (80, "*"): Launch(4, 1, {"BLOCK_R": 32}),
    },
    "exclude_bwd": {
        (0, "*"): Launch(1, 1, {"BLOCK_R": 4}),
        (80, "*"): Launch(4, 1, {"BLOCK_R": 16}),
    },
    # newton_schulz: square tiles of BLOCK, BLOCK_K deep. Class few: too few large tiles to fill the device; fp32: no
    # tensor cores
    "newton_schulz": {
        (0, "*"): Launch(1, 1, {"BLOCK": 16, "BLOCK_K": 16}),
        (80, "*"): Launch(8, 4, {"BLOCK": 128, "BLOCK_K": 64}),
        (80, "few"): Launch(4, 4, {"BLOCK": 64, "BLOCK_K": 64}),
        (80, "fp32"): Launch(8, 2, {"BLOCK": 64, "BLOCK_K": 32}),
    },
}
