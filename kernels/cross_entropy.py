"""cross_entropy: softcapped cross-entropy per token.

    z = c tanh(logits / c);  nll_n = logsumexp(z_n) - z_n[target_n];  H_n = entropy of softmax(z_n), nats
    d logits = (softmax(z) - onehot(target)) (1 - tanh^2) * d nll_n

logits (N, V), targets (N,) int64 -> nll (N,) fp32, and H (N,) fp32, detached, when `entropy=True`. All arithmetic is in
fp32 (fp64 in the reference for fp64). There is no ignored id: a weight per token multiplies nll outside, and comes back
through the gradient of nll, row by row. logits may be infinite: they count as z = +-c, with gradient 0.

Kernel: |z| <= c, so there is no running maximum: sum exp(z) fits fp32 as long as c + ln V <= 88 (V = 1,024: c <= 81; V
= 8,192: c <= 78). Forward reads the logits once, in blocks of columns, so that any V fits; it saves lse, 4 bytes a row.
Backward reads the logits again, recomputes z, and writes d logits in the logits' dtype. It does not write over the
logits: changing a saved tensor would break a second backward silently. No sums across programs, so bit-reproducible.
Limits: fp32, bf16, fp16; in fp16 gradients below 6e-8 vanish, as they do at 1/N a token: scale the loss.
Error against fp64 of the same logits, absolute, as z is held to a few 1e-7 c: nll and H 6e-7 c (c = 30: 2e-5); d logits
1e-6 c times |d nll|, and in bf16 the rounding, 4e-3 relative.
Targets outside [0, V): ValueError with the position on a CPU; on a GPU, where looking would cost a synchronisation,
the kernel gives NaN for nll and gradient of that row and reads nothing out of bounds (the reference asserts there).
Raises ValueError on shapes, dtypes or devices that do not agree, and on cap <= 0.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import cdiv, check_device, check_kernel_dtype, launch, pow2, register_op, tuned, use_kernel
from ._triton import jit, tl
from ._tuned import Launch

MAX_EXPONENT = 88.0  # exp(88) = 1.7e38, just under fp32's largest number


def softcap(logits: Tensor, cap: float) -> Tensor:
    """cap * tanh(logits / cap) in fp32; fp64 stays fp64."""
    return cap * torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)


def cross_entropy_ref(
    logits: Tensor, targets: Tensor, *, cap: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Reference of `cross_entropy`, in plain torch."""
    log_p = F.log_softmax(softcap(logits, cap), dim=-1)
    nll = F.nll_loss(log_p, targets, reduction="none")
    if not entropy:
        return nll, None
    detached = log_p.detach()
    return nll, -(detached.exp() * detached).sum(-1)


# -- kernels: N rows of V logits, contiguous -------------------------------------------------------------------------


#
# tanh(x / c) = 1 - 2 r with r = 1 / (1 + exp(2 x / c)). So z, in units of ln 2, is top - 2 top r, top = c log2(e), and
# 1 - tanh^2 = 4 r (1 - r). exp2 and rsqrt are one instruction each, exp and a division four to six: with those a logit
# takes 41 instructions, here 22, and forward would last twice as long as its bytes. 2^(x step) may overflow: r = 0.


@jit
def _squashed(x, step):
    """1 / (1 + 2^(x step)), in [0, 1]; step = 2 log2(e) / c."""
    root = tl.rsqrt(1.0 + tl.exp2(x * step))
    return root * root


@jit
def _cross_entropy_fwd_kernel(
    logits, targets, nll, lse, entropy, N, cap, step, top, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr
):
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    rows = row < N
    total = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)  # added up across columns once, at the end
    moment = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for start in range(0, V, BLOCK_V):
        col = start + tl.arange(0, BLOCK_V)
        mask = rows[:, None] & (col < V)[None, :]
        x = tl.load(logits + row[:, None] * V + col[None, :], mask=mask, other=0.0).to(tl.float32)
        r = _squashed(x, step)
        p = tl.exp2(top - 2.0 * top * r)
        if V % BLOCK_V:
            p = tl.where((col < V)[None, :], p, 0.0)
        total += p
        if entropy is not None:
            moment += p * r
    s = tl.sum(total, axis=1)
    log_s = tl.log(s)
    y = tl.load(targets + row, mask=rows, other=0)
    known = (y >= 0) & (y < V)
    x = tl.load(logits + row * V + y, mask=rows & known, other=0.0).to(tl.float32)  # in cache: just read
    loss = log_s - cap * (1.0 - 2.0 * _squashed(x, step))
    loss = tl.where(loss < 0, 0.0, loss)  # rounding, when the target has all the mass; keeps NaN
    tl.store(nll + row, tl.where(known, loss, float("nan")), mask=rows)
    tl.store(lse + row, log_s, mask=rows)
    if entropy is not None:
        h = log_s - cap * (1.0 - 2.0 * (tl.sum(moment, axis=1) / s))
        tl.store(entropy + row, tl.where(h < 0, 0.0, h), mask=rows)


@jit
def _cross_entropy_bwd_kernel(
    dnll, logits, targets, lse, dlogits, N, step, top, V: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr
):
    row = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    rows = row < N
    col = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = rows[:, None] & (col < V)[None, :]
    at = row[:, None] * V + col[None, :]
    x = tl.load(logits + at, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(targets + row, mask=rows, other=0)
    g = 4.0 * tl.load(dnll + row, mask=rows, other=0.0).to(tl.float32)
    g = tl.where((y >= 0) & (y < V), g, float("nan"))
    r = _squashed(x, step)
    shift = top - 1.4426950408889634 * tl.load(lse + row, mask=rows, other=0.0)  # log2(e)
    p = tl.exp2(shift[:, None] - 2.0 * top * r)
    p = tl.where(col[None, :] == y[:, None], p - 1.0, p)
    tl.store(dlogits + at, (p * (r - r * r) * g[:, None]).to(dlogits.dtype.element_ty), mask=mask)


# -- launchers -------------------------------------------------------------------------------------------------------


def _fit(how: Launch, vocab: int) -> Launch:
    """A small vocabulary trades columns for rows: the block's area stays."""
    wide = min(how.blocks["BLOCK_V"], pow2(vocab))
    rows = how.blocks["BLOCK_T"] * how.blocks["BLOCK_V"] // wide
    return replace(how, blocks={"BLOCK_T": rows, "BLOCK_V": wide})


def _scales(cap: float) -> tuple[float, float]:
    """(step, top): what x is multiplied by in the exponent of 2, and the cap in units of ln 2."""
    return 2.0 * math.log2(math.e) / cap, cap * math.log2(math.e)


def _cross_entropy(logits: Tensor, targets: Tensor, cap: float, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(nll, lse, H); H is empty unless asked for."""
    _check_targets(logits, targets)
    n, vocab = logits.shape
    nll, lse, h = _outputs(logits, entropy)
    how = _fit(tuned("cross_entropy_fwd", logits), vocab)
    args = (logits.contiguous(), targets.contiguous(), nll, lse, h if entropy else None, n, cap, *_scales(cap))
    launch(_cross_entropy_fwd_kernel, (cdiv(n, how.blocks["BLOCK_T"]),), *args, how=how, V=vocab)
    return nll, lse, h


def _outputs(logits: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    new = lambda size: torch.empty(size, dtype=torch.float32, device=logits.device)
    return new(n), new(n), new(n if entropy else 0)


def _cross_entropy_fake(logits, targets, cap, entropy):
    return _outputs(logits, entropy)


def _cross_entropy_bwd(dnll: Tensor, logits: Tensor, targets: Tensor, lse: Tensor, cap: float) -> Tensor:
    n, vocab = logits.shape
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    how = _fit(tuned("cross_entropy_bwd", logits), vocab)
    grid = (cdiv(n, how.blocks["BLOCK_T"]), cdiv(vocab, how.blocks["BLOCK_V"]))
    args = (dnll.contiguous(), logits.contiguous(), targets.contiguous(), lse, dlogits, n, *_scales(cap))
    launch(_cross_entropy_bwd_kernel, grid, *args, how=how, V=vocab)
    return dlogits


def _cross_entropy_bwd_fake(dnll, logits, targets, lse, cap):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output):
    logits, targets, ctx.cap, _ = inputs
    _, lse, h = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, h)
    ctx.save_for_backward(logits, targets, lse)


def _backward(ctx, dnll, dlse, dh):
    logits, targets, lse = ctx.saved_tensors
    return None if dnll is None else _bwd_op(dnll, logits, targets, lse, ctx.cap), None, None, None


_bwd_op = register_op(_cross_entropy_bwd, _cross_entropy_bwd_fake)
_op = register_op(_cross_entropy, _cross_entropy_fake, setup=_setup, backward=_backward)


def cross_entropy(
    logits: Tensor, targets: Tensor, *, cap: float, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """See the module's contract."""
    _check(logits, targets, cap)
    if not use_kernel("cross_entropy", logits):
        if not torch.compiler.is_compiling():  # the check reads values, which a graph cannot
            _check_targets(logits, targets)
        return cross_entropy_ref(logits, targets, cap=cap, entropy=entropy)
    check_kernel_dtype("cross_entropy", logits=logits)
    if cap + math.log(logits.shape[1]) > MAX_EXPONENT:
        raise ValueError(
            f"cross_entropy: cap={cap} with V={logits.shape[1]}, expected cap + ln V <= {MAX_EXPONENT} for the kernel:"
            " it sums exp(z) in fp32"
        )
    nll, _, h = _op(logits, targets, float(cap), entropy)
    return nll, h if entropy else None


def _check(logits: Tensor, targets: Tensor, cap: float) -> None:
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(
            f"cross_entropy: logits {tuple(logits.shape)}, targets {tuple(targets.shape)}: expected (N, V), (N,)"
        )
    if logits.shape[1] < 1:
        raise ValueError(f"cross_entropy: logits {tuple(logits.shape)}, expected at least one column")
    if targets.dtype != torch.int64:
        raise ValueError(f"cross_entropy: targets are {targets.dtype}, expected int64")
    if not cap > 0:
        raise ValueError(f"cross_entropy: cap={cap}, expected a positive number")
    check_device("cross_entropy", logits, targets=targets)


def _check_targets(logits: Tensor, targets: Tensor) -> None:
    """On a CPU only: elsewhere it would wait for the device."""
    if targets.device.type != "cpu":
        return
    wrong = ((targets < 0) | (targets >= logits.shape[1])).nonzero()
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            f"cross_entropy: target {int(targets[at])} at position {at}, expected an id in [0, {logits.shape[1]})"
        )
