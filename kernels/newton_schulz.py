"""newton_schulz: the nearest semi-orthogonal matrix, roughly, by a quintic iteration (Muon's orthogonalisation).

    X_0 = G / (||G||_F + eps)
    A = X X^T;  P = b A + c A^2;  X <- a X + P X,   (a, b, c) = (3.4445, -4.7750, 2.0315), `steps` times

The coefficients trade accuracy for speed: singular values of at least 0.002 ||G||_F end between 0.68 and 1.21 after 5
steps, not at 1. Smaller ones end below that, at up to 486 times (3.4445^5) their share of the norm. Zero stays zero.

g (n, r, c) or (r, c), any float dtype -> the same shape and dtype, contiguous. Matrices of a batch do not mix. The
shorter side is multiplied out, so A is min(r, c) square. The norm is taken in at least fp32; the iteration runs in
`compute_dtype`: bf16 on CUDA (products accumulate in fp32), at least fp32 elsewhere and for fp64, because a CPU's bf16
matmul is some 70 times slower than its fp32 one. Error against fp64, as a share of the result's norm: bf16 1.5 %, fp32
2e-6. Not differentiable by intent; on the kernel path autograd raises.

Kernel: A and P are symmetric, so one kernel computes the tiles on and above the diagonal and stores each twice, the
second time transposed: (t + 1) / 2t of the products at t tiles a side. P's `b A +` is its epilogue. A and P equal their
transposes exactly, which a library's product does not promise. X <- a X + P X is torch.baddbmm. Sides that are no whole
tiles are filled up with zeros once, at the start; the iteration leaves those zero.
Limits: fp32, bf16, fp16 for g and compute_dtype.
Raises ValueError on fewer than 2 or more than 3 axes and on steps < 1.
Source: Muon (K. Jordan 2024); Parameter Golf's baseline optimiser; symmetric products as in modded-nanogpt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._op import arch_of, cdiv, check_kernel_dtype, launch, register_op, sm_count, tuned, use_kernel
from ._triton import TensorDescriptor, described, jit, tl
from ._tuned import Launch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz_ref(g: Tensor, steps: int = 5, eps: float = 1e-7, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Reference of `newton_schulz`, in plain torch: three batched products a step."""
    wide = torch.promote_types(g.dtype, torch.float32)
    a, b, c = COEFFICIENTS
    x = g.unsqueeze(0) if g.ndim == 2 else g
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=wide)
    x = (x / (norm + eps)).to(compute_dtype or _default_dtype(g))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        poly = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, poly, x, beta=a)
    x = x.mT if tall else x
    return x.contiguous().to(g.dtype).view(g.shape)


def _default_dtype(g: Tensor) -> torch.dtype:
    wide = torch.promote_types(g.dtype, torch.float32)
    return torch.bfloat16 if g.is_cuda and wide == torch.float32 else wide


# -- kernels ---------------------------------------------------------------------------------------------------------


@jit
def _product_tile(x, rows, S, K, tiles, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """(x[m] x[m]^T at tile (i, j) in fp32, m, i, j). Programs: `tiles` a matrix, (0, 0), (0, 1), (1, 1), (0, 2), ..."""
    m, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    j = ((tl.sqrt_rn(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # a correctly rounded root: exact at whole numbers
    i = tile - j * (j + 1) // 2
    x = described(x, rows, K, BLOCK, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK_K):
        left, right = x.load([m * S + i * BLOCK, k]), x.load([m * S + j * BLOCK, k])
        acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    return acc, m, i, j


@jit
def _tile_of(t, m, i, j, S, BLOCK: tl.constexpr):
    """Addresses of tile (i, j) of matrix m of t (n, S, S)."""
    r = tl.arange(0, BLOCK)
    return t + (m.to(tl.int64) * S + i * BLOCK) * S + j * BLOCK + (r[:, None] * S + r[None, :])


@jit
def _store_mirrored(out, y, m, i, j, S, BLOCK: tl.constexpr):
    """Stores y at tile (i, j) and its transpose at (j, i)."""
    if i == j:  # the two halves of a diagonal tile may have been summed in different order: the upper one counts
        r = tl.arange(0, BLOCK)
        tl.store(_tile_of(out, m, i, j, S, BLOCK), tl.where(r[:, None] <= r[None, :], y, y.T))
    else:
        tl.store(_tile_of(out, m, i, j, S, BLOCK), y)
        tl.store(_tile_of(out, m, j, i, S, BLOCK), y.T)


@jit
def _newton_schulz_gram_kernel(
    x, out, rows, S, K, tiles, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out (n, S, S) = x x^T a matrix; x (rows = n S, K), a tensor or its descriptor; S a multiple of BLOCK."""
    acc, m, i, j = _product_tile(x, rows, S, K, tiles, PRECISION, BLOCK, BLOCK_K)
    _store_mirrored(out, acc.to(out.dtype.element_ty), m, i, j, S, BLOCK)


@jit
def _newton_schulz_poly_kernel(
    x, gram, out, rows, S, tiles, b, c, PRECISION: tl.constexpr, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out (n, S, S) = b gram + c gram^2 a matrix; gram is symmetric, and x is gram as (rows = n S, S)."""
    acc, m, i, j = _product_tile(x, rows, S, S, tiles, PRECISION, BLOCK, BLOCK_K)
    acc = c * acc + b * tl.load(_tile_of(gram, m, i, j, S, BLOCK)).to(tl.float32)
    _store_mirrored(out, acc.to(out.dtype.element_ty), m, i, j, S, BLOCK)


# -- launcher --------------------------------------------------------------------------------------------------------


def _launch_of(g: Tensor, n: int, side: int, dtype: torch.dtype) -> Launch:
    """Large tiles where they are enough to fill the device. fp32, which has no tensor cores, is a class of its own."""
    if dtype == torch.float32:
        return tuned("newton_schulz", g, "fp32")
    how = tuned("newton_schulz", g)
    return how if n * _tiles(side, how) >= sm_count(g) else tuned("newton_schulz", g, "few")


def _tiles(side: int, how: Launch) -> int:
    """Tiles on and above the diagonal of a matrix."""
    t = cdiv(side, how.blocks["BLOCK"])
    return t * (t + 1) // 2


def _described_rows(x: Tensor, how: Launch) -> Tensor | TensorDescriptor:
    """The rows of all matrices of x (n, S, K), below each other; as a descriptor where there is a TMA unit."""
    rows = x.view(-1, x.shape[-1])
    if arch_of(x) < 90:
        return rows
    return TensorDescriptor.from_tensor(rows, [how.blocks["BLOCK"], how.blocks["BLOCK_K"]])


def _poly(x: Tensor, gram: Tensor, poly: Tensor, how: Launch) -> None:
    """gram = x x^T, poly = b gram + c gram^2, for each matrix of x (n, S, K)."""
    n, side, k = x.shape
    tiles = _tiles(side, how)
    of = {"how": how, "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32"}
    _, b, c = COEFFICIENTS
    args = (_described_rows(x, how), gram, n * side, side, k, tiles)
    launch(_newton_schulz_gram_kernel, (n * tiles,), *args, **of)
    args = (_described_rows(gram, how), gram, poly, n * side, side, tiles, b, c)
    launch(_newton_schulz_poly_kernel, (n * tiles,), *args, **of)


def _normalised(g: Tensor, eps: float, how: Launch, dtype: torch.dtype) -> Tensor:
    """g (n, side, long) / (norm + eps), contiguous, filled up with zeros to whole tiles: those stay zero."""
    n, side, long = g.shape
    up = lambda size, block: cdiv(size, how.blocks[block]) * how.blocks[block]
    shape = (n, up(side, "BLOCK"), up(long, "BLOCK_K"))
    x = (torch.empty if shape == g.shape else torch.zeros)(shape, dtype=dtype, device=g.device)
    norm = torch.linalg.vector_norm(g, dim=(1, 2), keepdim=True, dtype=torch.float32)
    torch.div(g, norm + eps, out=x[:, :side, :long])
    return x


def _newton_schulz(g: Tensor, steps: int, eps: float, compute_dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(g, memory_format=torch.contiguous_format)
    if not g.numel():
        return out
    wide = g.unsqueeze(0) if g.ndim == 2 else g
    tall = wide.shape[1] > wide.shape[2]
    wide = wide.mT if tall else wide
    n, side, long = wide.shape
    how = _launch_of(g, n, side, compute_dtype)
    x = _normalised(wide, eps, how, compute_dtype)
    spare = torch.empty_like(x)
    gram, poly = (x.new_empty((n, x.shape[1], x.shape[1])) for _ in range(2))
    for _ in range(steps):
        _poly(x, gram, poly, how)
        x, spare = torch.baddbmm(x, poly, x, beta=COEFFICIENTS[0], out=spare), x
    x = x[:, :side, :long]
    out.view(n, *g.shape[-2:]).copy_(x.mT if tall else x)
    return out


def _newton_schulz_fake(g, steps, eps, compute_dtype):
    return torch.empty_like(g, memory_format=torch.contiguous_format)


_op = register_op(_newton_schulz, _newton_schulz_fake)


def newton_schulz(g: Tensor, steps: int = 5, eps: float = 1e-7, compute_dtype: torch.dtype | None = None) -> Tensor:
    """See the module's contract."""
    if g.ndim not in (2, 3):
        raise ValueError(f"newton_schulz: g is {tuple(g.shape)}, expected (r, c) or (n, r, c)")
    if steps < 1:
        raise ValueError(f"newton_schulz: steps={steps} must be at least 1")
    if not use_kernel("newton_schulz", g):
        return newton_schulz_ref(g, steps, eps, compute_dtype)
    check_kernel_dtype("newton_schulz", g=g)
    compute_dtype = compute_dtype or _default_dtype(g)
    if compute_dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"newton_schulz: compute_dtype is {compute_dtype}, expected float32, bfloat16 or float16 for the kernel"
        )
    return _op(g, steps, eps, compute_dtype)
