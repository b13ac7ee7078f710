"""mlp: y = act(x @ Wup^T) @ Wdown^T, for the ungated activations.

    u = x @ Wup^T        post = act(u)        y = post @ Wdown^T
    relu2        relu(u)^2
    leaky_relu2  (u if u >= 0 else slope u)^2
    gelu2        gelu(u)^2, erf form
    silu2        silu(u)^2

x (..., D), Wup (F, D), Wdown (D, F), one floating dtype -> y (..., D) in it. Products accumulate in fp32 on a GPU.

Kernels: the activation is the epilogue of the up product and acts on its fp32 accumulator (the reference rounds u
first); du = (dy @ Wdown) * act'(u) is one product with an epilogue too. The other four products are torch's.
Saved for backward besides the inputs: post, from which act' follows where the activation can be inverted, else act'.
    relu2        post                            act' = 2 sqrt(post)
    leaky_relu2  post, one bit an element        act' = 2 sqrt(post) where u > 0, else -2 |slope| sqrt(post)
    gelu2 silu2  post, act' in x's dtype         as many bytes as u, and rounded once where act'(rounded u) is twice
The root halves post's rounding error. Nothing is recomputed; a gradient that nobody needs is not computed, and with
none at all nothing but post is written. In fp16 act' of a |u| < 2.4e-4 is lost: its square underflows.
Limits of the kernels: fp32, bf16, fp16; D and F positive multiples of 16 bytes, as TMA has it.
Error against fp64, relative: bf16 4e-3 forward, 6e-3 gradients; fp32 1e-6.
Raises ValueError on an unknown activation and on shapes, dtypes or devices that do not agree.
Source: keeping post alone for relu2, modded-nanogpt; the sign bits are new here.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import (
    INTERPRETER,
    arch_of,
    cdiv,
    check_device,
    check_kernel_dtype,
    launch,
    register_op,
    sm_count,
    tuned,
    use_kernel,
)
from ._triton import TensorDescriptor, described, jit, tl
from ._tuned import Launch

ACTIVATIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "relu2": lambda u, slope: F.relu(u).square(),
    "leaky_relu2": lambda u, slope: F.leaky_relu(u, slope).square(),
    "gelu2": lambda u, slope: F.gelu(u).square(),
    "silu2": lambda u, slope: F.silu(u).square(),
}
# what backward needs besides the inputs and post; a class of the launch table
KEEPS = {"relu2": "nothing", "leaky_relu2": "signs", "gelu2": "derivative", "silu2": "derivative"}
SIGN_GROUP = 64  # columns whose signs share 8 bytes


def mlp_ref(x: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "relu2", slope: float = 0.5) -> Tensor:
    """Reference of `mlp`, in plain torch."""
    return F.linear(ACTIVATIONS[activation](F.linear(x, w_up), slope), w_down)


# -- kernels: persistent over tiles of (rows, hidden); the matrices are descriptors, or pointers where TMA is missing --
#
# A tile leaves in two halves, left and right: the buffers through which it leaves are half as large, and one stage more
# of the product's pipeline fits beside them. Rows and columns beyond the edge load as 0 and are not stored.


@jit
def _activate(u, slope, ACT: tl.constexpr):
    """(a, da/du) of u in fp32, for act = a^2."""
    if ACT == "relu2":
        a = tl.maximum(u, 0.0, propagate_nan=tl.PropagateNan.ALL)  # a plain maximum would turn NaN into 0
        return a, a
    elif ACT == "leaky_relu2":
        a = tl.where(u > 0, u, slope * u)
        return a, a
    elif ACT == "silu2":
        s = 1.0 / (1.0 + tl.exp(-u))
        a = u * s
        return a, s + a * (1.0 - s)
    else:
        cdf = 0.5 + 0.5 * tl.math.erf(u * 0.7071067811865476)
        return u * cdf, cdf + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)


@jit
def _signs_at(signs, m, n, M, F, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Pointers to the sign bytes of a (ROWS, COLS) block at (m, n), and which exist.

    Byte 8 g + j of a row holds columns 64 g + j + 8 i, i = 0..7. A thread of a tensor-core accumulator owns columns
    that are equal modulo 8, so it packs its own bits; eight neighbouring columns would meet in a byte by shuffles.
    """
    tl.static_assert(COLS % 64 == 0, "sign bits come in groups of 64 columns")
    row = (m + tl.arange(0, ROWS)).to(tl.int64)
    byte = n // 8 + tl.arange(0, COLS // 8)
    wide = tl.cdiv(F, 64) * 8
    return signs + row[:, None] * wide + byte[None, :], (row < M)[:, None] & (byte < wide)[None, :]


@jit
def _up_epilogue(
    u, post, deriv, signs, slope, m, n, M, F, ACT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Writes what one half (ROWS, COLS) of u gives."""
    if signs is not None:
        bits = tl.reshape((u > 0).to(tl.int32), (ROWS, COLS // 64, 8, 8)) << tl.arange(0, 8)[None, None, :, None]
        at, mask = _signs_at(signs, m, n, M, F, ROWS, COLS)
        tl.store(at, tl.reshape(tl.sum(bits, axis=2), (ROWS, COLS // 8)).to(tl.uint8), mask=mask)
    a, da = _activate(u, slope, ACT)
    post.store([m, n], (a * a).to(post.dtype))
    if deriv is not None:
        deriv.store([m, n], (2.0 * a * da).to(deriv.dtype))


@jit
def _mlp_up_kernel(
    x, w, post, deriv, signs, slope, M, F, D, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_N // 2
    x, w = described(x, M, D, BLOCK_M, BLOCK_K), described(w, F, D, BLOCK_N, BLOCK_K)
    post = described(post, M, F, BLOCK_M, HALF)
    if deriv is not None:
        deriv = described(deriv, M, F, BLOCK_M, HALF)
    across = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * across, tl.num_programs(0), flatten=True):
        m, n = (tile // across) * BLOCK_M, (tile % across) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            acc = tl.dot(x.load([m, k]), w.load([n, k]).T, acc, input_precision="ieee")
        left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        _up_epilogue(left, post, deriv, signs, slope, m, n, M, F, ACT, BLOCK_M, HALF)
        _up_epilogue(right, post, deriv, signs, slope, m, n + HALF, M, F, ACT, BLOCK_M, HALF)


@jit
def _derivative(saved, m, n, DERIV: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """act' of a tile in fp32, but for the signs.

    Joined before it meets the accumulator: so the compiler reads it in the accumulator's layout. Half by half, it
    would carry the accumulator, twice as many bytes, through shared memory into the layout of the load.
    """
    left, right = saved.load([m, n]), saved.load([m, n + COLS // 2])
    d = tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), (ROWS, COLS)).to(tl.float32)
    return d if DERIV else 2.0 * tl.sqrt(d)


@jit
def _mlp_du_kernel(
    dy, w, saved, signs, du, slope, M, F, D, DERIV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """du = (dy @ w) * act'. saved: act' with DERIV, else post. slope: its magnitude."""
    HALF: tl.constexpr = BLOCK_N // 2
    dy, w = described(dy, M, D, BLOCK_M, BLOCK_K), described(w, D, F, BLOCK_K, BLOCK_N)
    saved, du = described(saved, M, F, BLOCK_M, HALF), described(du, M, F, BLOCK_M, HALF)
    across = tl.cdiv(F, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * across, tl.num_programs(0), flatten=True):
        m, n = (tile // across) * BLOCK_M, (tile % across) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, D, BLOCK_K):
            acc = tl.dot(dy.load([m, k]), w.load([k, n]), acc, input_precision="ieee")
        if signs is not None:  # before `saved` arrives: both at once would not fit in the registers
            at, mask = _signs_at(signs, m, n, M, F, BLOCK_M, BLOCK_N)
            byte = tl.reshape(tl.load(at, mask=mask, other=0), (BLOCK_M, BLOCK_N // 64, 1, 8))
            bits = byte >> tl.arange(0, 8).to(tl.uint8)[None, None, :, None] & 1
            acc = tl.where(tl.reshape(bits, (BLOCK_M, BLOCK_N)) != 0, acc, -slope * acc)
        acc *= _derivative(saved, m, n, DERIV, BLOCK_M, BLOCK_N)
        left, right = tl.split(tl.permute(tl.reshape(acc.to(du.dtype), (BLOCK_M, 2, HALF)), (0, 2, 1)))
        du.store([m, n], left)
        du.store([m, n + HALF], right)


# -- launchers -------------------------------------------------------------------------------------------------------


def _matrix(t: Tensor) -> Tensor:
    """t as a contiguous matrix of its last axis, at an address that a descriptor may have: a multiple of 16 bytes."""
    t = t.reshape(-1, t.shape[-1]).contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _plan(kernel: str, x: Tensor, hidden: int, activation: str) -> tuple[Launch, tuple[int], Callable]:
    """(launch, grid, how a matrix is passed) for the product of x's rows and `hidden` units."""
    how = tuned(kernel, x, "fp32" if x.dtype == torch.float32 else KEEPS[activation])
    tile = how.blocks["BLOCK_M"], how.blocks["BLOCK_N"]
    # two small tiles fit on a multiprocessor: one multiplies while the other is in its epilogue
    programs = sm_count(x) * (2 if tile[0] * tile[1] <= 128 * 128 else 1)
    grid = (min(cdiv(x.shape[0], tile[0]) * cdiv(hidden, tile[1]), programs),)
    no_tma = INTERPRETER < arch_of(x) < 90
    return how, grid, (lambda t, block: t) if no_tma else TensorDescriptor.from_tensor


def _kept(x: Tensor, w_up: Tensor, activation: str, keep: bool) -> list[Tensor | None]:
    """Empty [post, act', signs]; the last two only with `keep` and where the activation needs them."""
    rows, hidden = math.prod(x.shape[:-1]), w_up.shape[0]
    what = KEEPS[activation] if keep else "nothing"
    deriv = x.new_empty((rows, hidden)) if what == "derivative" else None
    packed = (rows, cdiv(hidden, SIGN_GROUP) * SIGN_GROUP // 8)
    return [x.new_empty((rows, hidden)), deriv, x.new_empty(packed, dtype=torch.uint8) if what == "signs" else None]


def _mlp(x: Tensor, w_up: Tensor, w_down: Tensor, activation: str, slope: float, keep: bool) -> list[Tensor]:
    """[y], and with `keep` [y, post] or [y, post, act' or signs]."""
    post, deriv, signs = kept = _kept(x, w_up, activation, keep)
    rows, hidden = _matrix(x), w_up.shape[0]
    if len(rows):  # a descriptor must have rows
        how, grid, of = _plan("mlp_up", rows, hidden, activation)
        bm, bn, bk = (how.blocks[b] for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        out = [t if t is None else of(t, [bm, bn // 2]) for t in (post, deriv)]
        args = (of(rows, [bm, bk]), of(_matrix(w_up), [bn, bk]), *out, signs, slope, *post.shape, rows.shape[1])
        launch(_mlp_up_kernel, grid, *args, how=how, ACT=activation)
    y = torch.mm(post, w_down.t()).view(x.shape)
    return [y, *(t for t in kept if t is not None)] if keep else [y]


def _mlp_fake(x, w_up, w_down, activation, slope, keep):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return [y, *(t for t in _kept(x, w_up, activation, keep) if t is not None)] if keep else [y]


def _mlp_bwd(
    dy: Tensor,
    x: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    post: Tensor,
    aux: Tensor | None,
    activation: str,
    slope: float,
    need_x: bool,
    need_up: bool,
    need_down: bool,
) -> list[Tensor]:
    """Those of [dx, dWup, dWdown] that are needed."""
    rows, out = _matrix(dy), []
    if need_x or need_up:
        du = _du(rows, _matrix(w_down), post, aux, activation, slope)
        if need_x:
            out.append(torch.mm(du, w_up).view(x.shape))
        if need_up:
            out.append(torch.mm(du.t(), x.reshape(-1, x.shape[-1])))
    if need_down:
        out.append(torch.mm(rows.t(), post))
    return out


def _du(dy: Tensor, w_down: Tensor, post: Tensor, aux: Tensor | None, activation: str, slope: float) -> Tensor:
    """d loss / du, (rows, F)."""
    du, what = torch.empty_like(post), KEEPS[activation]
    if len(dy):
        how, grid, of = _plan("mlp_du", dy, post.shape[1], activation)
        bm, bn, bk = (how.blocks[b] for b in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        saved = _matrix(aux if what == "derivative" else post)
        halves = of(saved, [bm, bn // 2]), aux if what == "signs" else None, of(du, [bm, bn // 2])
        args = (of(dy, [bm, bk]), of(w_down, [bk, bn]), *halves, abs(slope), *post.shape, dy.shape[1])
        launch(_mlp_du_kernel, grid, *args, how=how, DERIV=what == "derivative")
    return du


def _mlp_bwd_fake(dy, x, w_up, w_down, post, aux, activation, slope, need_x, need_up, need_down):
    like = [t for t, need in ((x, need_x), (w_up, need_up), (w_down, need_down)) if need]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in like]


def _setup(ctx, inputs, output):
    x, w_up, w_down, ctx.activation, ctx.slope, _ = inputs
    _, post, aux = (*output, None, None)[:3]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w_up, w_down, post, aux)


def _backward(ctx, grads):
    need = ctx.needs_input_grad[:3]
    if grads[0] is None:
        return (None,) * 6
    got = iter(_bwd_op(grads[0], *ctx.saved_tensors, ctx.activation, ctx.slope, *need))
    return (*(next(got) if n else None for n in need), None, None, None)


_bwd_op = register_op(_mlp_bwd, _mlp_bwd_fake)
_op = register_op(_mlp, _mlp_fake, setup=_setup, backward=_backward)


def mlp(x: Tensor, w_up: Tensor, w_down: Tensor, *, activation: str = "relu2", slope: float = 0.5) -> Tensor:
    """See the module's contract."""
    _check(x, w_up, w_down, activation)
    if not use_kernel("mlp", x):
        return mlp_ref(x, w_up, w_down, activation=activation, slope=slope)
    _check_kernel(x, w_up, activation)
    keep = torch.is_grad_enabled() and (x.requires_grad or w_up.requires_grad or w_down.requires_grad)
    return _op(x, w_up, w_down, activation, slope, keep)[0]


def _check(x: Tensor, w_up: Tensor, w_down: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"mlp: activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if x.ndim < 1 or w_up.ndim != 2 or w_up.shape[1] != x.shape[-1] or w_down.shape != w_up.shape[::-1]:
        raise ValueError(
            f"mlp: x {tuple(x.shape)}, Wup {tuple(w_up.shape)}, Wdown {tuple(w_down.shape)} do not chain:"
            f" expected (..., D), (F, D), (D, F)"
        )
    for name, w in (("Wup", w_up), ("Wdown", w_down)):
        if w.dtype != x.dtype:
            raise ValueError(f"mlp: {name} is {w.dtype}, expected {x.dtype} like x")
    check_device("mlp", x, Wup=w_up, Wdown=w_down)


def _check_kernel(x: Tensor, w_up: Tensor, activation: str) -> None:
    check_kernel_dtype("mlp", x=x)
    aligned = 16 // x.element_size()
    for name, size in (("D", w_up.shape[1]), ("F", w_up.shape[0])):
        if not size or size % aligned:
            raise ValueError(
                f"mlp: {name} is {size}, expected a positive multiple of {aligned} for the {x.dtype} kernel"
            )
