"""bigram: the front of the network in one pass: token embedding, hashed n-gram rows, RMS norm, smear.

    x_t = tok[id_t] + rows[h2(t)] (+ rows[h3(t)]) (+ extra_t)
    x_t = x_t / sqrt(mean(x_t^2) + eps)
    x_t <- (1 - G) x_t + G x_{t-1},  G = sigmoid(gate), x_{-1} = 0          if gate is given

`rows` (N, D) is the hash table already projected to the model's width and scaled: projecting the table (N = 2,048) and
not the tokens (98,304 a step) does the same sum with 1/48 of the work. ids (B, T) int64; token_table (V, D), rows and
extra (B, T, D) of one dtype; gate (D,) of any -> (B, T, D) in token_table's dtype.
Hashes, int32 semantics, exact for ids < 41,700 (id * 51,497 < 2^31):
    xor      h2 = (36313 x_t ^ 27191 x_{t-1}) mod (N-1), N-1 at position 0
             h3 = (36313 x_t ^ 27191 x_{t-1} ^ 51497 x_{t-2}) mod (N-1), N-1 at positions 0 and 1
    mul1009  h2 = (1009 x_{t-1} + x_t) mod N, x_{-1} = 0

reach (B, T) int32, where rows hold several documents (`document_reach`): how many tokens before it, at most t of them,
each token may look back at. Where it is 0 a token is as at position 0, where it is 1 as at position 1, in all of the
above and in the gradients, so that a packed document gives what it gives alone in a row. None: t, the whole row.

Kernel: sums, norm and smear in fp32, rounded once (the reference rounds after each). The smear recomputes the token
before from the tables, which stay in L2. Saved for backward: one fp32 number a token; the sum is gathered again there
rather than saved, 2 x 100.7 MB less at the reference shape. With d_t the gradient at t and d_T = 0,
    d xhat_t = (1 - G) d_t + G d_{t+1},   d gate = G (1 - G) sum_t xhat_t (d_{t+1} - d_t)
so backward needs no neighbour's sum. Gate sums leave as one fp32 row a program, added in fixed order; the tables'
gradients are segment sums over sorted rows (`_segment_sum.py`): no atomics, bit-reproducible, untouched rows exact 0.
Limits: D <= 4096, B * T <= 2^29, with rows V <= 41,700; fp32, bf16, fp16. Error against fp64, relative: bf16 4e-3,
fp32 1e-6. An id outside [0, V): ValueError on a CPU (not in a graph compiled from the reference); on a GPU, where
looking would stop the host, it counts as the nearest id of the table, and nothing is read or written out of bounds.
Sources: the challenge's records PR #401 (xor), the gated-MLP family of the same fork (mul1009), PR #609 (trigram).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._op import cdiv, check_device, check_kernel_dtype, launch, pow2, register_op, sm_count, tuned, use_kernel
from ._segment_sum import segment_sum
from ._triton import jit, tl

MAX_WIDTH = 4096
MAX_VOCAB = 41_700  # of the hashes: 51,497 * 41,699 < 2^31
MAX_TOKENS = 2**29  # three keys a token are sorted, counted in int32


def beyond(ids: Tensor, by: int, reach: Tensor | None = None) -> Tensor:
    """Bool, (T,) or (B, T): where the token `by` positions before is none that may be looked at."""
    t = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
    return (t if reach is None else t.minimum(reach)) < by


def shifted(ids: Tensor, by: int, reach: Tensor | None = None) -> Tensor:
    """ids (B, T) moved right by `by` positions, zeros where `reach` ends."""
    return F.pad(ids, (by, 0))[:, : ids.shape[1]].masked_fill(beyond(ids, by, reach), 0)


def bigram_index(ids: Tensor, rows: int, hash: str = "xor", reach: Tensor | None = None) -> Tensor:
    """(B, T) int64 row of each position's bigram in a table of `rows` rows."""
    previous = shifted(ids, 1, reach)
    if hash == "mul1009":
        return (1009 * previous + ids) % rows
    index = ((36313 * ids) ^ (27191 * previous)) % (rows - 1)
    return index.masked_fill(beyond(ids, 1, reach), rows - 1)


def trigram_index(ids: Tensor, rows: int, reach: Tensor | None = None) -> Tensor:
    """(B, T) int64 row of each position's trigram in the bigrams' table."""
    before = (27191 * shifted(ids, 1, reach)) ^ (51497 * shifted(ids, 2, reach))
    return (((36313 * ids) ^ before) % (rows - 1)).masked_fill(beyond(ids, 2, reach), rows - 1)


def bigram_ref(
    ids: Tensor,
    token_table: Tensor,
    rows: Tensor | None = None,
    *,
    hash: str = "xor",
    trigram: bool = False,
    extra: Tensor | None = None,
    gate: Tensor | None = None,
    reach: Tensor | None = None,
    eps: float = 2.0**-23,
) -> Tensor:
    """Reference of `bigram`, in plain torch."""
    x = F.embedding(ids, token_table)
    if rows is not None:
        x = x + F.embedding(bigram_index(ids, rows.shape[0], hash, reach), rows)
        if trigram:
            x = x + F.embedding(trigram_index(ids, rows.shape[0], reach), rows)
    if extra is not None:
        x = x + extra
    x = F.rms_norm(x, (x.shape[-1],), eps=eps)
    if gate is not None:
        previous = F.pad(x, (0, 0, 1, 0))[:, :-1]
        if reach is not None:
            previous = previous.masked_fill(beyond(ids, 1, reach)[..., None], 0)
        x = torch.lerp(x, previous, torch.sigmoid(gate).to(x.dtype))
    return x


# -- kernels: `row` counts the B * T tokens, `t` is how many tokens before it a token may look at --------------------


@jit
def _id(ids, row, live, V):
    """int32 ids at `row`, forced into the table; 0 where not live, as before the first position."""
    return tl.minimum(tl.maximum(tl.load(ids + row, mask=live, other=0), 0), V - 1).to(tl.int32)


@jit
def _seen(reach, row, position, live):
    """t of the tokens at `row`. Never beyond the row, whatever `reach` holds."""
    t = position
    if reach is not None:
        t = tl.minimum(tl.load(reach + row, mask=live, other=0), position)
    return t


@jit
def _mod(a, n):
    """a mod n in [0, n): the remainder of % has the sign of a."""
    m = a % n
    return tl.where(m < 0, m + n, m)


@jit
def _places(ids, rows, row, t, live, V, N, XOR: tl.constexpr, TRI: tl.constexpr):
    """Rows of the token in tok, of its bigram and of its trigram in `rows`."""
    a = _id(ids, row, live, V)
    h2, h3 = a, a
    if rows is not None:
        b = _id(ids, row - 1, live & (t > 0), V)
        if XOR:
            mixed = (36313 * a) ^ (27191 * b)
            h2 = tl.where(t > 0, _mod(mixed, N - 1), N - 1)
            if TRI:
                c = _id(ids, row - 2, live & (t > 1), V)
                h3 = tl.where(t > 1, _mod(mixed ^ (51497 * c), N - 1), N - 1)
        else:
            h2 = _mod(1009 * b + a, N)
    return a, h2, h3


@jit
def _gather(tok, rows, extra, row, a, h2, h3, j, mask, D: tl.constexpr, TRI: tl.constexpr):
    """The sum before the norm (BLOCK_T, BLOCK_D) fp32, 0 where masked."""
    x = tl.load(tok + a.to(tl.int64)[:, None] * D + j[None, :], mask=mask, other=0.0).to(tl.float32)
    if rows is not None:
        x += tl.load(rows + h2.to(tl.int64)[:, None] * D + j[None, :], mask=mask, other=0.0).to(tl.float32)
        if TRI:
            x += tl.load(rows + h3.to(tl.int64)[:, None] * D + j[None, :], mask=mask, other=0.0).to(tl.float32)
    if extra is not None:
        x += tl.load(extra + row[:, None] * D + j[None, :], mask=mask, other=0.0).to(tl.float32)
    return x


@jit
def _bigram_fwd_kernel(
    ids, tok, rows, extra, gate, reach, out, rstd, tokens, T, V, N, eps,
    D: tl.constexpr, XOR: tl.constexpr, TRI: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row, live = index.to(tl.int64), index < tokens
    t = _seen(reach, row, index % T, live)
    j = tl.arange(0, BLOCK_D)
    cols = j < D
    mask = live[:, None] & cols[None, :]
    a, h2, h3 = _places(ids, rows, row, t, live, V, N, XOR, TRI)
    x = _gather(tok, rows, extra, row, a, h2, h3, j, mask, D, TRI)
    r = tl.rsqrt(tl.sum(x * x, axis=1) / D + eps)
    tl.store(rstd + row, r, mask=live)
    x = x * r[:, None]
    if gate is not None:
        has = live & (t > 0)
        before = has[:, None] & cols[None, :]
        a, h2, h3 = _places(ids, rows, row - 1, t - 1, has, V, N, XOR, TRI)
        y = _gather(tok, rows, extra, row - 1, a, h2, h3, j, before, D, TRI)
        r = tl.where(has, tl.rsqrt(tl.sum(y * y, axis=1) / D + eps), 0.0)  # no 0 * inf at eps = 0
        smear = tl.sigmoid(tl.load(gate + j, mask=cols, other=0.0).to(tl.float32))[None, :]
        x += smear * (y * r[:, None] - x)
    tl.store(out + row[:, None] * D + j[None, :], x.to(out.dtype.element_ty), mask=mask)


@jit
def _bigram_bwd_kernel(
    dout, ids, tok, rows, extra, gate, reach, rstd, dx, keys, dgate, tokens, T, V, N,
    D: tl.constexpr, XOR: tl.constexpr, TRI: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    j = tl.arange(0, BLOCK_D)
    cols = j < D
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    smear = tl.zeros((BLOCK_D,), tl.float32)
    if gate is not None:
        smear = tl.sigmoid(tl.load(gate + j, mask=cols, other=0.0).to(tl.float32))
    for block in range(pid, tl.cdiv(tokens, BLOCK_T), tl.num_programs(0)):
        index = block * BLOCK_T + tl.arange(0, BLOCK_T)
        row, position, live = index.to(tl.int64), index % T, index < tokens
        t = _seen(reach, row, position, live)
        mask = live[:, None] & cols[None, :]
        at = row[:, None] * D + j[None, :]
        a, h2, h3 = _places(ids, rows, row, t, live, V, N, XOR, TRI)
        tl.store(keys + row, a, mask=live)
        if rows is not None:  # in one numbering: the rows of `rows` come after the V tokens
            tl.store(keys + tokens + row, V + h2, mask=live)
            if TRI:
                tl.store(keys + tokens + tokens + row, V + h3, mask=live)
        r = tl.load(rstd + row, mask=live, other=0.0)[:, None]
        unit = _gather(tok, rows, extra, row, a, h2, h3, j, mask, D, TRI) * r
        d = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        if gate is not None:
            after = live & (position + 1 < T)  # a token that looks back at this one
            if reach is not None:
                after = after & (tl.load(reach + row + 1, mask=after, other=0) > 0)
            step = tl.load(dout + at + D, mask=mask & after[:, None], other=0.0).to(tl.float32) - d
            acc += unit * step
            d += smear[None, :] * step
        d = r * (d - unit * (tl.sum(d * unit, axis=1) / D)[:, None])
        tl.store(dx + at, d.to(dx.dtype.element_ty), mask=mask)
    if gate is not None:
        tl.store(dgate + pid.to(tl.int64) * D + j, tl.sum(acc, axis=0) * smear * (1 - smear), mask=cols)


# -- launchers -------------------------------------------------------------------------------------------------------


def _bigram(
    ids: Tensor,
    token_table: Tensor,
    rows: Tensor | None,
    extra: Tensor | None,
    gate: Tensor | None,
    reach: Tensor | None,
    xor: bool,
    trigram: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(out, rstd)."""
    _check_range(ids, token_table.shape[0])
    args, sizes, constants = _common(ids, token_table, rows, extra, gate, reach, xor, trigram)
    out, rstd = _bigram_fake(ids, token_table, rows, extra, gate, reach, xor, trigram, eps)
    how = tuned("bigram_fwd", token_table, f"D{constants['BLOCK_D']}")
    grid = (cdiv(ids.numel(), how.blocks["BLOCK_T"]),)
    launch(_bigram_fwd_kernel, grid, *args, out, rstd, *sizes, eps, how=how, **constants)
    return out, rstd


def _common(ids, token_table, rows, extra, gate, reach, xor: bool, trigram: bool) -> tuple[list, tuple, dict]:
    """What both kernels take: tensors, sizes, constants."""
    tensors = [t if t is None else t.contiguous() for t in (ids, token_table, rows, extra, gate, reach)]
    sizes = (ids.numel(), ids.shape[1], token_table.shape[0], 0 if rows is None else rows.shape[0])
    width = token_table.shape[1]
    return tensors, sizes, {"D": width, "BLOCK_D": pow2(width), "XOR": xor, "TRI": trigram}


def _bigram_fake(ids, token_table, rows, extra, gate, reach, xor, trigram, eps):
    out = torch.empty((*ids.shape, token_table.shape[1]), dtype=token_table.dtype, device=ids.device)
    return out, torch.empty(ids.shape, dtype=torch.float32, device=ids.device)


def _bigram_bwd(
    dout: Tensor,
    ids: Tensor,
    token_table: Tensor,
    rows: Tensor | None,
    extra: Tensor | None,
    gate: Tensor | None,
    reach: Tensor | None,
    rstd: Tensor,
    xor: bool,
    trigram: bool,
) -> list[Tensor]:
    """Gradients of token_table and of what there is of rows, extra and gate."""
    args, sizes, constants = _common(ids, token_table, rows, extra, gate, reach, xor, trigram)
    tokens, width = ids.numel(), token_table.shape[1]
    dx = torch.empty((*ids.shape, width), dtype=token_table.dtype, device=ids.device)
    lookups = 1 if rows is None else 2 + trigram
    keys = torch.empty((lookups * tokens,), dtype=torch.int32, device=ids.device)
    how = tuned("bigram_bwd", token_table, f"D{constants['BLOCK_D']}")
    programs = max(1, min(cdiv(tokens, how.blocks["BLOCK_T"]), 4 * sm_count(dout)))
    dgate = None if gate is None else torch.empty((programs, width), dtype=torch.float32, device=ids.device)
    args = (dout.contiguous(), *args, rstd, dx, keys, dgate)
    launch(_bigram_bwd_kernel, (programs,), *args, *sizes, how=how, **constants)
    tables = segment_sum(dx.view(tokens, width), keys, sizes[2:3] if rows is None else sizes[2:])
    return [*tables, *([] if extra is None else [dx]), *([] if gate is None else [dgate.sum(0).to(gate.dtype)])]


def _bigram_bwd_fake(dout, ids, token_table, rows, extra, gate, reach, rstd, xor, trigram):
    given = [t for t in (token_table, rows, extra, gate) if t is not None]
    return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in given]


def _setup(ctx, inputs, output):
    *tensors, ctx.xor, ctx.trigram, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, output[1])


def _backward(ctx, dout, _):
    ids, *given, reach, rstd = ctx.saved_tensors
    if dout is None:
        return (None,) * 9
    got = iter(_bwd_op(dout, ids, *given, reach, rstd, ctx.xor, ctx.trigram))
    return None, *(None if t is None else next(got) for t in given), None, None, None, None


_bwd_op = register_op(_bigram_bwd, _bigram_bwd_fake)
_op = register_op(_bigram, _bigram_fake, setup=_setup, backward=_backward)


def bigram(
    ids: Tensor,
    token_table: Tensor,
    rows: Tensor | None = None,
    *,
    hash: str = "xor",
    trigram: bool = False,
    extra: Tensor | None = None,
    gate: Tensor | None = None,
    reach: Tensor | None = None,
    eps: float = 2.0**-23,
) -> Tensor:
    """See the module's contract."""
    _check(ids, token_table, rows, hash, trigram, extra, gate, reach)
    if not use_kernel("bigram", token_table):
        if not torch.compiler.is_compiling():
            _check_range(ids, token_table.shape[0])
        options = {"hash": hash, "trigram": trigram, "extra": extra, "gate": gate, "reach": reach, "eps": eps}
        return bigram_ref(ids, token_table, rows, **options)
    check_kernel_dtype("bigram", token_table=token_table, gate=gate)
    vocab, width = token_table.shape
    if width > MAX_WIDTH or ids.numel() > MAX_TOKENS or (rows is not None and vocab > MAX_VOCAB):
        raise ValueError(
            f"bigram: width {width}, {ids.numel()} ids, vocabulary {vocab}, expected at most {MAX_WIDTH}, {MAX_TOKENS}"
            f" and, with rows, {MAX_VOCAB} for the kernel"
        )
    return _op(ids, token_table, rows, extra, gate, reach, hash == "xor", trigram, eps)[0]


def _check(ids, token_table, rows, hash, trigram, extra, gate, reach) -> None:
    if ids.dim() != 2 or ids.dtype != torch.int64:
        raise ValueError(f"bigram: ids {tuple(ids.shape)} {ids.dtype}, expected (B, T) torch.int64")
    if token_table.dim() != 2 or not token_table.shape[0]:
        raise ValueError(f"bigram: token_table {tuple(token_table.shape)}, expected (V, D) with V >= 1")
    if hash not in ("xor", "mul1009") or (trigram and (hash != "xor" or rows is None)):
        raise ValueError(f"bigram: hash {hash!r}, trigram {trigram}: expected xor, or mul1009 without trigram")
    width = token_table.shape[1]
    fewest = 2 if hash == "xor" else 1
    if rows is not None and (rows.dim() != 2 or rows.shape[1] != width or rows.shape[0] < fewest):
        raise ValueError(f"bigram: rows {tuple(rows.shape)}, expected (N, {width}) with N >= {fewest}")
    for name, t, shape in (("extra", extra, (*ids.shape, width)), ("gate", gate, (width,))):
        if t is not None and t.shape != shape:
            raise ValueError(f"bigram: {name} {tuple(t.shape)}, expected {tuple(shape)}")
    for name, t in (("rows", rows), ("extra", extra)):
        if t is not None and t.dtype != token_table.dtype:
            raise ValueError(f"bigram: {name} is {t.dtype}, expected {token_table.dtype} like token_table")
    if reach is not None and (reach.shape != ids.shape or reach.dtype != torch.int32):
        raise ValueError(f"bigram: reach {tuple(reach.shape)} {reach.dtype}, expected {tuple(ids.shape)} torch.int32")
    check_device("bigram", ids, token_table=token_table, rows=rows, extra=extra, gate=gate, reach=reach)


def _check_range(ids: Tensor, vocab: int) -> None:
    """ValueError on the first id outside the table; on a GPU nothing, the answer would stop the host."""
    if ids.device.type != "cpu":
        return
    wrong = (ids < 0) | (ids >= vocab)
    if wrong.any():
        b, t = wrong.nonzero()[0].tolist()
        raise ValueError(f"bigram: ids[{b}, {t}] is {ids[b, t].item()}, expected 0 <= id < {vocab}")
