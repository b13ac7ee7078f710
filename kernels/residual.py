"""residual: weighted sum of streams, then RMS norm.

    out    = sum_i w_i * t_i                      (B, T, D), dtype of t_0
    normed = out / sqrt(mean(out^2) + eps) * norm_scale

Every join of the network is this one op: input mix (x, x0), attention add, MLP add, U-Net skip. The norm is taken of
the *rounded* sum that is returned, so forward and backward see the same tensor; the mean is accumulated in fp32.

terms: 1 to 4 tensors (..., D), one dtype. weights: per term `None` (1), a (D,) vector or a scalar tensor, fp32; terms
that are given the same tensor share it, and their gradient is one tensor.
Returns (out, normed); `normed` is None with `normalize=False`.
`residual_kept` also takes a sum inside the sum and returns it, rounded: kept = sum over the first `inner` terms,
out = kept_weight * kept + the other terms: an encoder layer's output, which a U-Net skip reads later.

Kernel: one pass each way. The sum is rounded once (the reference rounds after each term). Backward reads the terms,
out, one fp32 number a row and the two gradients, recomputes nothing, and accumulates the weights' gradients in
registers of a persistent grid: one fp32 partial row a program, added in fixed order, no atomics, bit-reproducible.
Limits: D <= 8192 (a row lives in registers); fp32, bf16, fp16. Error against fp64, relative: bf16 4e-3 a term, weight
gradients 1e-3; fp32 1e-6.
Raises ValueError when shapes, dtypes, devices or counts do not agree.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import cdiv, check_device, check_kernel_dtype, launch, pow2, register_op, sm_count, tuned, use_kernel
from ._triton import jit, tl

MAX_TERMS = 4
MAX_WIDTH = 8192


def rms_norm(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last axis, no gain; mean in fp32, result in x's dtype."""
    if use_kernel("residual", x):
        return residual([x], [None], eps=eps)[1]
    return F.rms_norm(x, (x.shape[-1],), eps=eps)


def residual_ref(
    terms: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    *,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
    normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Reference of `residual`, in plain torch."""
    out = None
    for term, weight in zip(terms, weights, strict=True):
        if out is None:
            out = term if weight is None else term * weight.to(term.dtype)
        elif weight is None:
            out = out + term
        else:
            out = torch.addcmul(out, term, weight.to(term.dtype))
    if not normalize:
        return out, None
    normed = F.rms_norm(out, (out.shape[-1],), eps=eps)
    return out, normed if norm_scale == 1.0 else normed * norm_scale


def residual_kept_ref(
    terms: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    kept_weight: Tensor,
    *,
    inner: int,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reference of `residual_kept`."""
    kept, _ = residual_ref(terms[:inner], weights[:inner], normalize=False)
    outer = [kept, *terms[inner:]], [kept_weight, *weights[inner:]]
    return kept, *residual_ref(*outer, norm_scale=norm_scale, eps=eps)


# -- kernels: T rows of D numbers, contiguous; WS* is 1 for a (D,) weight, 0 for a scalar one ------------------------


@jit
def _term(t, w, at, j, mask, cols, WS: tl.constexpr):
    """One weighted term (BLOCK_T, BLOCK_D) fp32."""
    x = tl.load(t + at, mask=mask, other=0.0).to(tl.float32)
    if w is not None:
        x = x * tl.load(w + j * WS, mask=cols, other=0.0).to(tl.float32)[None, :]
    return x


@jit
def _keep(x, kept, wk, at, j, mask, cols):
    """Stores the inner sum x; returns it, as it was rounded, times its weight."""
    rounded = x.to(kept.dtype.element_ty)
    tl.store(kept + at, rounded, mask=mask)
    return rounded.to(tl.float32) * tl.load(wk + j, mask=cols, other=0.0).to(tl.float32)[None, :]


@jit
def _residual_fwd_kernel(
    t0, t1, t2, t3, w0, w1, w2, w3, kept, wk, out, normed, rstd, T, norm_scale, eps,
    D: tl.constexpr, WS0: tl.constexpr, WS1: tl.constexpr, WS2: tl.constexpr, WS3: tl.constexpr,
    INNER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    j = tl.arange(0, BLOCK_D)
    cols = j < D
    mask = (row < T)[:, None] & cols[None, :]
    at = row[:, None] * D + j[None, :]
    x = _term(t0, w0, at, j, mask, cols, WS0)
    if INNER == 1:
        x = _keep(x, kept, wk, at, j, mask, cols)
    if t1 is not None:
        x += _term(t1, w1, at, j, mask, cols, WS1)
    if INNER == 2:
        x = _keep(x, kept, wk, at, j, mask, cols)
    if t2 is not None:
        x += _term(t2, w2, at, j, mask, cols, WS2)
    if INNER == 3:
        x = _keep(x, kept, wk, at, j, mask, cols)
    if t3 is not None:
        x += _term(t3, w3, at, j, mask, cols, WS3)
    rounded = x.to(t0.dtype.element_ty)
    if out is not None:  # a single unweighted term is its own sum: nothing to write
        tl.store(out + at, rounded, mask=mask)
    if normed is not None:
        x = rounded.to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
        tl.store(rstd + row, r, mask=row < T)
        y = x * (r * norm_scale)[:, None]
        tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)


@jit
def _term_grad(t, w, dt, acc, d, at, j, mask, cols, WS: tl.constexpr):
    """Writes w * d to dt; returns acc plus this block's column sums of d * t."""
    if w is not None:
        wide = tl.load(w + j * WS, mask=cols, other=0.0).to(tl.float32)[None, :]
        acc += tl.sum(d * tl.load(t + at, mask=mask, other=0.0).to(tl.float32), axis=0)
        if dt is not None:  # else another term has the same weight, and so the same gradient
            tl.store(dt + at, (wide * d).to(dt.dtype.element_ty), mask=mask)
    return acc


@jit
def _into_kept(d, acc, kept, wk, dkept, at, j, mask, cols):
    """The inner sum's gradient from the outer one's; acc plus the column sums of d * kept."""
    acc += tl.sum(d * tl.load(kept + at, mask=mask, other=0.0).to(tl.float32), axis=0)
    d = d * tl.load(wk + j, mask=cols, other=0.0).to(tl.float32)[None, :]
    if dkept is not None:
        d += tl.load(dkept + at, mask=mask, other=0.0).to(tl.float32)
    return d, acc


@jit
def _residual_bwd_kernel(
    dout, dnormed, dkept, out, rstd, t0, t1, t2, t3, w0, w1, w2, w3, kept, wk, dt0, dt1, dt2, dt3, dplain, dw, T,
    norm_scale, D: tl.constexpr, WS0: tl.constexpr, WS1: tl.constexpr, WS2: tl.constexpr, WS3: tl.constexpr,
    INNER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    j = tl.arange(0, BLOCK_D)
    cols = j < D
    g0 = tl.zeros((BLOCK_D,), tl.float32)
    g1, g2, g3, gk = g0, g0, g0, g0
    for block in range(pid, tl.cdiv(T, BLOCK_T), programs):
        row = (block * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (row < T)[:, None] & cols[None, :]
        at = row[:, None] * D + j[None, :]
        d = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
        if dout is not None:
            d += tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        if dnormed is not None:
            r = tl.load(rstd + row, mask=row < T, other=0.0)[:, None]
            unit = tl.load(out + at, mask=mask, other=0.0).to(tl.float32) * r
            dn = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32) * norm_scale
            d += r * (dn - unit * (tl.sum(dn * unit, axis=1) / D)[:, None])
        g3 = _term_grad(t3, w3, dt3, g3, d, at, j, mask, cols, WS3)
        if INNER == 3:
            d, gk = _into_kept(d, gk, kept, wk, dkept, at, j, mask, cols)
        g2 = _term_grad(t2, w2, dt2, g2, d, at, j, mask, cols, WS2)
        if INNER == 2:
            d, gk = _into_kept(d, gk, kept, wk, dkept, at, j, mask, cols)
        g1 = _term_grad(t1, w1, dt1, g1, d, at, j, mask, cols, WS1)
        if INNER == 1:
            d, gk = _into_kept(d, gk, kept, wk, dkept, at, j, mask, cols)
        g0 = _term_grad(t0, w0, dt0, g0, d, at, j, mask, cols, WS0)
        if dplain is not None:
            tl.store(dplain + at, d.to(dplain.dtype.element_ty), mask=mask)
    base = dw + pid.to(tl.int64) * D + j  # dw (weighted terms, programs, D), in the terms' order
    if w0 is not None:
        tl.store(base, g0, mask=cols)
        base += programs * D
    if w1 is not None:
        tl.store(base, g1, mask=cols)
        base += programs * D
    if w2 is not None:
        tl.store(base, g2, mask=cols)
        base += programs * D
    if w3 is not None:
        tl.store(base, g3, mask=cols)
        base += programs * D
    if INNER > 0:
        tl.store(base, gk, mask=cols)


# -- launchers -------------------------------------------------------------------------------------------------------
# `weights` holds each distinct weight once. `index` says which term has which: octal digit i is 0 for an unweighted
# term i, else 1 + the place in `weights`. Terms of one weight have one gradient, which is written once.


def _weight_of(index: int, count: int) -> list[int]:
    """For each of `count` terms the place of its weight, -1 without one."""
    return [(index >> 3 * i & 7) - 1 for i in range(count)]


def _slots(terms: Sequence[Tensor], weights: Sequence[Tensor], owner: list[int]) -> tuple[list, list, dict[str, int]]:
    """Terms and weights by position, None where there is none, and each weight's step along the width."""
    padding = [None] * (MAX_TERMS - len(owner))
    own = [w.contiguous() for w in weights]
    spread = [None if k < 0 else own[k] for k in owner] + padding
    steps = {f"WS{i}": int(w is not None and w.ndim == 1) for i, w in enumerate(spread)}
    return [t if t is None else t.contiguous() for t in terms] + padding, spread, steps


def _residual(
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    index: int,
    inner: int,
    kept_weight: Tensor | None,
    norm_scale: float,
    eps: float,
    normalize: bool,
) -> list[Tensor]:
    """[kept] if inner, [out] unless it would be terms[0] itself, [normed, rstd] if normalize."""
    ts, ws, steps = _slots(terms, weights, _weight_of(index, len(terms)))
    width = terms[0].shape[-1]
    rows = terms[0].numel() // max(width, 1)
    kept, out, normed, rstd = _outputs(terms, weights, inner, normalize)
    how = tuned("residual_fwd", terms[0], f"D{pow2(width)}")
    grid = (cdiv(rows, how.blocks["BLOCK_T"]),)
    wk = None if kept_weight is None else kept_weight.contiguous()
    args = (*ts, *ws, kept, wk, out, normed, rstd, rows, norm_scale, eps)
    launch(_residual_fwd_kernel, grid, *args, how=how, D=width, INNER=inner, BLOCK_D=pow2(width), **steps)
    return [o for o in (kept, out, normed, rstd) if o is not None]


def _outputs(terms: Sequence[Tensor], weights: Sequence[Tensor], inner: int, normalize: bool) -> list[Tensor | None]:
    new = lambda: torch.empty_like(terms[0], memory_format=torch.contiguous_format)
    kept, out = new() if inner else None, new() if len(terms) > 1 or len(weights) else None
    if not normalize:
        return [kept, out, None, None]
    return [kept, out, new(), torch.empty(terms[0].shape[:-1], dtype=torch.float32, device=terms[0].device)]


def _residual_fake(terms, weights, index, inner, kept_weight, norm_scale, eps, normalize):
    return [o for o in _outputs(terms, weights, inner, normalize) if o is not None]


def _residual_bwd(
    dout: Tensor | None,
    dnormed: Tensor | None,
    dkept: Tensor | None,
    out: Tensor | None,
    rstd: Tensor | None,
    kept: Tensor | None,
    kept_weight: Tensor | None,
    terms: Sequence[Tensor],
    weights: Sequence[Tensor],
    index: int,
    inner: int,
    count: int,
    norm_scale: float,
) -> list[Tensor]:
    """[gradient of each weight's terms], [of each weight], [of kept_weight if inner], then that of the unweighted
    terms unless it is dout. terms: the weighted ones of `count`; out and rstd: with dnormed only. What is not read is
    not kept."""
    owner = _weight_of(index, count)
    weighted, given = [k for k in owner if k >= 0], iter(terms)
    ts, ws, steps = _slots([None if k < 0 else next(given) for k in owner], weights, owner)
    like = next(g for g in (dout, dnormed, dkept) if g is not None)
    width = like.shape[-1]
    rows = like.numel() // max(width, 1)
    dts, plain = _term_grads(like, weights, owner, inner, dnormed)
    how = tuned("residual_bwd", like, f"D{pow2(width)}")
    programs = max(1, min(cdiv(rows, how.blocks["BLOCK_T"]), 2 * sm_count(like)))
    sums = len(weighted) + (inner > 0)
    partial = torch.empty((sums, programs, width), dtype=torch.float32, device=like.device)
    first = [dts[k] if k >= 0 and owner.index(k) == i else None for i, k in enumerate(owner)]
    slots = first + [None] * (MAX_TERMS - count)
    grads = [g if g is None else g.contiguous() for g in (dout, dnormed, dkept, out)]
    inside = [t if t is None else t.contiguous() for t in (kept, kept_weight)]
    args = (*grads, rstd, *ts, *ws, *inside, *slots, plain, partial, rows, norm_scale)
    constants = {"D": width, "INNER": inner, "BLOCK_D": pow2(width), **steps}
    launch(_residual_bwd_kernel, (programs,), *args, how=how, **constants)
    totals = partial.sum(1)
    of_kept = [totals[-1].clone().to(kept_weight.dtype)] if inner else []
    return [*dts, *_weight_grads(totals, weights, weighted), *of_kept, *([] if plain is None else [plain])]


def _weight_grads(sums: Tensor, weights: Sequence[Tensor], weighted: list[int]) -> list[Tensor]:
    """Column sums (weighted terms, D) -> a gradient for each weight: over its terms, and over D for a scalar."""
    out = []
    for place, w in enumerate(weights):
        mine = [sums[i] for i, k in enumerate(weighted) if k == place]
        total = torch.stack(mine).sum(0) if len(mine) > 1 else mine[0].clone()  # an output may not be a view
        out.append((total if w.ndim else total.sum()).to(w.dtype))
    return out


def _term_grads(like: Tensor, weights: Sequence[Tensor], owner: list[int], inner: int, dnormed: Tensor | None):
    """One for each weight, and one for unweighted terms unless that is dout as it came: a sum without norm or inner."""
    new = lambda: torch.empty_like(like, memory_format=torch.contiguous_format)
    return [new() for _ in weights], new() if -1 in owner and (inner or dnormed is not None) else None


def _residual_bwd_fake(
    dout, dnormed, dkept, out, rstd, kept, kept_weight, terms, weights, index, inner, count, norm_scale
):
    like = next(g for g in (dout, dnormed, dkept) if g is not None)
    dts, plain = _term_grads(like, weights, _weight_of(index, count), inner, dnormed)
    own = [*weights, kept_weight] if inner else weights
    dws = [torch.empty_like(w, memory_format=torch.contiguous_format) for w in own]
    return [*dts, *dws, *([] if plain is None else [plain])]


def _setup(ctx, inputs, output):
    terms, weights, ctx.index, ctx.inner, kept_weight, ctx.norm_scale, _, ctx.normalize = inputs
    ctx.count, ctx.has_out = len(terms), len(terms) > 1 or len(weights) > 0
    rest = output[1:] if ctx.inner else output
    out, rstd = (rest if ctx.has_out else [terms[0], *rest])[::2] if ctx.normalize else (None, None)
    weighted = [t for t, k in zip(terms, _weight_of(ctx.index, ctx.count), strict=True) if k >= 0]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(out, rstd, output[0] if ctx.inner else None, kept_weight, *weights, *weighted)


def _backward(ctx, grads):
    owner = _weight_of(ctx.index, ctx.count)
    n = max(owner) + 1
    out, rstd, kept, kept_weight, *saved = ctx.saved_tensors
    weights, terms = saved[:n], saved[n:]
    dkept, grads = (grads[0], grads[1:]) if ctx.inner else (None, grads)
    dout = grads[0] if ctx.has_out else None
    dnormed = grads[1 if ctx.has_out else 0] if ctx.normalize else None
    if dout is None and dnormed is None and dkept is None:
        return [None] * ctx.count, [None] * n, *[None] * 6
    if dnormed is None and n == 0 and not ctx.inner:  # a plain sum passes its gradient on
        return [dout] * ctx.count, [], *[None] * 6
    if dnormed is None:
        out = rstd = None
    given = dout, dnormed, dkept, out, rstd, kept, kept_weight
    got = _bwd_op(*given, terms, weights, ctx.index, ctx.inner, ctx.count, ctx.norm_scale)
    plain = dout if dnormed is None and not ctx.inner else got[-1]
    dterms = [plain if k < 0 else got[k] for k in owner]
    return dterms, list(got[n : 2 * n]), None, None, got[2 * n] if ctx.inner else None, None, None, None


_bwd_op = register_op(_residual_bwd, _residual_bwd_fake)
_op = register_op(_residual, _residual_fake, setup=_setup, backward=_backward)


def residual(
    terms: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    *,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
    normalize: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """See the module's contract."""
    _check(terms, weights)
    if not use_kernel("residual", terms[0]):
        return residual_ref(terms, weights, norm_scale=norm_scale, eps=eps, normalize=normalize)
    given, index = _distinct(terms, weights, 0)
    if len(terms) == 1 and not given and not normalize:
        return terms[0], None
    got = _op(list(terms), given, index, 0, None, norm_scale, eps, normalize)
    if len(terms) == 1 and not given:
        return terms[0], got[0]
    return got[0], got[1] if normalize else None


def residual_kept(
    terms: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    kept_weight: Tensor,
    *,
    inner: int,
    norm_scale: float = 1.0,
    eps: float = 2.0**-23,
) -> tuple[Tensor, Tensor, Tensor]:
    """(kept, out, normed), see the module's contract. kept_weight (D,) fp32; terms outside need a weight."""
    _check(terms, weights)
    if not 1 <= inner < len(terms) or any(w is None for w in weights[inner:]):
        raise ValueError(
            f"residual_kept: inner {inner} of {len(terms)} terms, weights {[w is not None for w in weights]}:"
            " expected at least one term inside and weighted ones outside"
        )
    if kept_weight.shape != terms[0].shape[-1:]:
        raise ValueError(
            f"residual_kept: kept_weight {tuple(kept_weight.shape)}, expected {tuple(terms[0].shape[-1:])}"
        )
    if not use_kernel("residual", terms[0]):
        return residual_kept_ref(terms, weights, kept_weight, inner=inner, norm_scale=norm_scale, eps=eps)
    given, index = _distinct(terms, weights, inner)
    kept, out, normed, _ = _op(list(terms), given, index, inner, kept_weight, norm_scale, eps, True)
    return kept, out, normed


def _distinct(terms: Sequence[Tensor], weights: Sequence[Tensor | None], inner: int) -> tuple[list[Tensor], int]:
    """Each weight once, and the index (see the launchers). Terms share one inside and outside of the inner sum only."""
    check_kernel_dtype("residual", terms=terms[0])
    if terms[0].shape[-1] > MAX_WIDTH:
        raise ValueError(f"residual: width {terms[0].shape[-1]}, expected at most {MAX_WIDTH} for the kernel")
    given: list[tuple[bool, Tensor]] = []
    index = 0
    for i, weight in enumerate(weights):
        if weight is not None:
            mine = (i < inner, weight)
            place = next((k for k, (side, w) in enumerate(given) if side == mine[0] and w is weight), len(given))
            given += [mine] * (place == len(given))
            index |= (place + 1) << 3 * i
    return [w for _, w in given], index


def _check(terms: Sequence[Tensor], weights: Sequence[Tensor | None]) -> None:
    if not 1 <= len(terms) <= MAX_TERMS or len(weights) != len(terms):
        raise ValueError(f"residual: got {len(terms)} terms and {len(weights)} weights, expected 1 to 4 pairs")
    first = terms[0]
    for i, (term, weight) in enumerate(zip(terms, weights, strict=True)):
        if term.shape != first.shape or term.dtype != first.dtype:
            raise ValueError(
                f"residual: term {i} is {tuple(term.shape)} {term.dtype}, expected {tuple(first.shape)} {first.dtype}"
            )
        if weight is not None and weight.shape not in ((), (first.shape[-1],)):
            raise ValueError(f"residual: weight {i} is {tuple(weight.shape)}, expected () or ({first.shape[-1]},)")
        check_device("residual", first, **{f"term {i}": term, f"weight {i}": weight})
