"""The attention op beyond the cases: documents by brute force, XSA's identities, bounds on the logits, isolation, other
layouts and widths, bad input, and the routes through a library's core with stand-ins for the library."""

import math
import sys
import types

import pytest
import torch

from pgolf.kernels import _attention_peers as peers
from pgolf.kernels import attention as module
from pgolf.kernels._attention_flash import flash_forward
from pgolf.kernels._attention_flash_bwd import flash_backward
from pgolf.kernels._attention_xsa import exclude_backward
from pgolf.kernels._documents import document_bounds, document_reach
from pgolf.kernels._op import paths
from pgolf.kernels.attention import attention, attention_ref, document_mask, explain

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEN = torch.Generator().manual_seed(0)


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GEN).to(DEVICE, dtype)


def qkv(b=1, t=19, h=2, k=1, d=8, dtype=torch.float32):
    return rand(b, t, h, d, dtype=dtype), rand(b, t, k, d, dtype=dtype), rand(b, t, k, d, dtype=dtype)


def cu(*starts):
    return torch.tensor(starts, dtype=torch.int32, device=DEVICE)


def gradients(fn, tensors, dy):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    y = fn(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def close(got, want, tol=2e-5):
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.float(), w.float(), rtol=tol, atol=tol)


# -- against brute force ---------------------------------------------------------------------------------------------


def brute_force(q, k, v, xsa, starts):
    """One query at a time in fp64; a document starts at each of `starts` and at each row."""
    q, k, v = (x.double().cpu() for x in (q, k, v))
    b, t, h, d = q.shape
    out = torch.zeros_like(q)
    for i in range(b):
        for pos in range(t):
            first = max([s for s in (*starts, i * t) if s <= i * t + pos]) - i * t
            for head in range(h):
                kv = head // (h // k.shape[2])
                keys, values = k[i, max(first, 0) : pos + 1, kv], v[i, max(first, 0) : pos + 1, kv]
                o = torch.softmax(keys @ q[i, pos, head] / math.sqrt(d), 0) @ values
                unit = values[-1] / values[-1].norm()
                out[i, pos, head] = o - (o @ unit) * unit if xsa else o
    return out


@pytest.mark.parametrize(
    "starts",
    [
        (0, 3, 3, 20, 38),  # an empty document, one across two rows
        (2, 17),  # tokens before the first start and after the last
        (0, 1, 16, 17, 18, 19, 35, 38),  # single tokens at both sides of a block's edge
        (0, 20, 38, 38, 38),  # filled up to a constant length
    ],
)
def test_documents_equal_brute_force(starts):
    q, k, v = qkv(b=2)
    got = attention(q, k, v, xsa=len(starts) > 2, cu_seqlens=cu(*starts))
    want = brute_force(q, k, v, len(starts) > 2, starts)
    torch.testing.assert_close(got.double().cpu(), want, rtol=0, atol=5e-6)


def test_document_bounds_equal_the_mask():
    for starts in ((0, 3, 3, 20, 38), (2, 17), (0, 38)):
        first, end = document_bounds(cu(*starts), 2, 19)
        first, end, mask = first.view(2, 19), end.view(2, 19), document_mask(cu(*starts), 2, 19)[:, 0]
        assert torch.equal(torch.arange(1, 20, device=DEVICE) - mask.sum(-1), first)
        for row in range(2):
            for t in range(19):
                seen_by = mask[row, :, t].nonzero().flatten()
                assert end[row, t] == seen_by[-1] + 1 and seen_by[0] == t


def test_starts_that_fill_up_change_no_bit():
    tensors, dy = qkv(b=2), rand(2, 19, 2, 8)
    for path in ("triton", "reference"):
        with paths(attention=path):
            runs = [
                gradients(lambda *a, s=starts: attention(*a, xsa=True, cu_seqlens=cu(*s)), tensors, dy)
                for starts in ((0, 4, 20, 38), (0, 4, 20, 38, 38, 38))
            ]
        assert all(torch.equal(one, two) for one, two in zip(*runs, strict=True))


def test_reach_counts_the_tokens_before_in_the_same_document():
    got = document_reach(cu(0, 3, 3, 7, 10, 10), 2, 5)
    assert got.dtype == torch.int32 and got.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]  # a row ends a document
    assert document_reach(cu(0, 0), 0, 5).shape == (0, 5)
    assert document_reach(cu(-5, 900, 7), 2, 4).tolist() == [[0, 1, 2, 3]] * 2


def test_document_bounds_stay_inside_the_row_whatever_cu_seqlens_holds():
    first, end = (x.view(2, 19) for x in document_bounds(cu(-5, 900, 7), 2, 19))
    at = torch.arange(19, device=DEVICE)
    assert (first >= 0).all() and (first <= at).all() and (end > at).all() and (end <= 19).all()


@pytest.mark.parametrize("d, t", [(1, 3), (3, 18), (128, 9)])
def test_head_widths(d, t):
    tensors = qkv(t=t, d=d)
    dy = rand(1, t, 2, d)
    xsa = d > 1  # in one dimension the projection is all of o, and y is rounding
    got, want = (gradients(lambda *a, f=f: f(*a, xsa=xsa), tensors, dy) for f in (attention, attention_ref))
    close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_one_token_gives_its_value(dtype):
    tensors, dy = qkv(b=2, t=1, h=4, k=2, dtype=dtype), rand(2, 1, 4, 8)
    y, dq, dk, dv = gradients(attention, tensors, dy)
    assert torch.equal(y, tensors[2].repeat_interleave(2, 2))
    assert dq.abs().max() < 1e-5 and dk.abs().max() < 1e-5
    torch.testing.assert_close(dv.float(), dy.view(2, 1, 2, 2, 8).sum(3), rtol=2e-3, atol=2e-3)
    y, dq, dk, dv = gradients(lambda *a: attention(*a, xsa=True), tensors, dy)
    for zero in (y, dq, dk, dv):
        assert zero.abs().max() < (1e-6 if dtype == torch.float32 else 2e-2)


def test_no_token_at_all():
    tensors = qkv(b=2, t=0)
    for grad in gradients(lambda *a: attention(*a, xsa=True, cu_seqlens=cu(0, 0)), tensors, rand(2, 0, 2, 8)):
        assert grad.numel() == 0


# -- XSA -------------------------------------------------------------------------------------------------------------


def test_xsa_is_orthogonal_to_the_own_value_and_zero_where_documents_start():
    q, k, v = qkv(b=2, h=4, k=2)
    y = attention(q, k, v, xsa=True, cu_seqlens=cu(0, 6, 30, 38))
    dots = (y.view(2, 19, 2, 2, 8) * v[:, :, :, None]).sum(-1)
    assert dots.abs().max() < 5e-6
    for row, t in ((0, 0), (0, 6), (1, 0), (1, 11)):
        assert y[row, t].abs().max() < 1e-6
    assert y[0, 1].abs().max() > 0.01


def test_delta_needs_no_o():
    """rowsum(dy * y) is rowsum(do * o): the core's backward may be given y for its output."""
    q, k, v = qkv(b=2, t=5, h=4, k=2)
    o = flash_forward(q, k, v, None, None, False)[0]
    y, _, s = flash_forward(q, k, v, None, None, True)
    dy, delta = rand(2, 5, 4, 8), torch.empty(2, 4, 5, device=DEVICE)
    do, _ = exclude_backward(dy, y, v, s, delta)
    torch.testing.assert_close(delta, (do * o).sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta, (dy * y).sum(-1).transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_a_zero_value_is_no_direction():
    q, k, v = qkv(t=5)
    v[:, 2] = 0
    dy = rand(1, 5, 2, 8)
    got, want = (gradients(lambda *a, f=f: f(*a, xsa=True), (q, k, v), dy) for f in (attention, attention_ref))
    close(got, want)
    assert torch.equal(got[0][:, 2], attention(q, k, v)[:, 2])


# -- bounds on the logits --------------------------------------------------------------------------------------------


def normed(gain, d=16, t=19, dtype=torch.float32):
    q, k, v = qkv(t=t, d=d)
    unit = lambda x: torch.nn.functional.rms_norm(x, (d,))
    return (unit(q) * gain).to(dtype), unit(k).to(dtype), v.to(dtype)


@pytest.mark.parametrize("gain", [0.0, 1.5, 8.0])
def test_a_bound_changes_nothing_but_rounding(gain):
    q, k, v = normed(gain)
    bound = torch.full((2,), gain * 4.0, device=DEVICE)
    online, free = (flash_forward(q, k, v, None, b, True) for b in (None, bound))
    close(free, online, 1e-5)
    assert gain == 0 or not torch.equal(free[1], online[1]), "both took the same path"


@pytest.mark.parametrize("limit", [40.5, 1e30, math.inf, -1.0, math.nan])
def test_other_bounds_take_the_online_softmax(limit):
    q, k, v = normed(30.0)
    bound = torch.tensor([limit, limit], device=DEVICE)
    bounded, online = (flash_forward(q, k, v, None, b, False) for b in (bound, None))
    for got, want in zip(bounded, online, strict=True):
        assert torch.equal(got, want) and torch.isfinite(got).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_every_logit_at_the_limit(sign, dtype):
    """All logits +40 or all -40, under a bound of 40: a mean of values, and an lse of +-40 + log n."""
    k = torch.full((1, 19, 1, 16), 1.0, device=DEVICE, dtype=dtype)
    v = rand(1, 19, 1, 16, dtype=dtype)
    q = sign * 10.0 * k.repeat(1, 1, 2, 1)  # 16 * 10 / 4 = 40
    y, lse = flash_forward(q, k, v, None, torch.full((2,), 40.0, device=DEVICE), False)
    count = torch.arange(1, 20, device=DEVICE)
    mean = v.float().cumsum(1) / count[None, :, None, None]
    tol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(y.float(), mean.expand(-1, -1, 2, -1), rtol=tol, atol=tol)
    torch.testing.assert_close(lse[0, 0], sign * 40 + count.log(), rtol=1e-6, atol=1e-5)


def test_heads_have_bounds_of_their_own_and_half_precision_has_none():
    q, k, v = normed(8.0)
    q[:, :, 1] *= 30
    got = attention(q, k, v, logit_bound=torch.tensor([32.0, 960.0], device=DEVICE))
    close([got], [attention_ref(q, k, v)])
    q, k, v = normed(9.0, dtype=torch.float16)
    bound = torch.full((2,), 36.0, device=DEVICE)  # exp(36) is no fp16 number
    assert torch.equal(attention(q, k, v, logit_bound=bound), attention(q, k, v))


def test_a_bound_is_not_differentiated():
    q, k, v = (x.requires_grad_() for x in normed(2.0, t=3))
    bound = torch.full((2,), 8.0, device=DEVICE, requires_grad=True)
    attention(q, k, v, logit_bound=bound).sum().backward()
    assert bound.grad is None and q.grad is not None


# -- who sees whom ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limited", [False, True])
def test_the_future_changes_nothing(limited):
    q, k, v = qkv(t=35)
    bound = torch.full((2,), 30.0, device=DEVICE) if limited else None
    before = attention(q, k, v, xsa=True, logit_bound=bound)
    for tensor in (q, k, v):
        tensor[:, 17:] = rand(*tensor[:, 17:].shape)
    after = attention(q, k, v, xsa=True, logit_bound=bound)
    assert torch.equal(before[:, :17], after[:, :17]) and not torch.equal(before[:, 17], after[:, 17])


def test_a_document_sees_no_other():
    tensors, starts, dy = qkv(b=2), cu(0, 7, 25, 38), rand(2, 19, 2, 8)
    dy.view(-1, 2, 8)[:7] = 0
    dy.view(-1, 2, 8)[25:] = 0  # only the document 7..24, which a row's end cuts in two
    f = lambda *a: attention(*a, xsa=True, cu_seqlens=starts)
    first = gradients(f, tensors, dy)
    for grad in first[1:]:
        flat = grad.flatten(0, 1)
        assert (flat[:7] == 0).all() and (flat[25:] == 0).all() and flat[8:25].abs().max() > 0
    for tensor in tensors:
        tensor.flatten(0, 1)[:7] = 5.0
        tensor.flatten(0, 1)[25:] = -5.0
    for one, other in zip(first, gradients(f, tensors, dy), strict=True):
        assert torch.equal(one.flatten(0, 1)[7:25], other.flatten(0, 1)[7:25])


# -- layouts and input -----------------------------------------------------------------------------------------------


def test_slices_of_a_packed_projection_and_other_strides():
    b, t, h, k, d = 2, 6, 2, 2, 8
    packed, dy = rand(b, t, (h + 2 * k) * d), rand(b, t, h, d)
    cut = lambda x: [p.unflatten(-1, (-1, d)) for p in x.split([h * d, k * d, k * d], -1)]
    grads = []
    for f in (attention, attention_ref):
        x = packed.clone().requires_grad_()
        f(*cut(x), xsa=True).backward(dy)
        grads.append(x.grad)
    close(*[[g] for g in grads])
    q, keys, v = (x.contiguous() for x in cut(packed))
    by_head = q.transpose(1, 2).contiguous().transpose(1, 2)
    across = torch.stack([v, v], -1)[..., 0]
    want = attention(q, keys, v, xsa=True)
    assert across.stride(-1) == 2 and torch.equal(attention(by_head, keys, across, xsa=True), want)
    expanded = torch.autograd.grad(attention(q.requires_grad_(), keys, v, xsa=True).sum(), q)[0]  # dy: stride 0
    close([expanded], [torch.autograd.grad(attention_ref(q, keys, v, xsa=True).sum(), q)[0]])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda q, k, v: attention(q[0], k, v), r"q \(3, 4, 8\), .*expected \(B, T, H, d\)"),
        (lambda q, k, v: attention(q, k[:, :2], v), r"k \(1, 2, 2, 8\), .*expected"),
        (lambda q, k, v: attention(q[:, :, :3], k, v), "3 query heads of 8, expected a multiple of the 2"),
        (lambda q, k, v: attention(q, k[:, :, :0], v[:, :, :0]), "expected a multiple of the 0"),
        (lambda q, k, v: attention(q, k.half(), v), "k torch.float16.*expected one dtype"),
        (lambda q, k, v: attention(q.double(), k.double(), v.double()), "float64, expected float32, bfloat16 or"),
        (lambda q, k, v: attention(*(x.new_ones(1, 2, 2, 136) for x in (q, k, v))), "136, expected at most 128"),
        (lambda q, k, v: attention(q, k, v, cu_seqlens=cu(0, 3).long()), r"\(2,\) torch.int64, expected .* int32"),
        (lambda q, k, v: attention(q, k, v, cu_seqlens=cu(0)), r"cu_seqlens \(1,\) .*, expected"),
        (lambda q, k, v: attention(q, k, v, cu_seqlens=cu(0, 3)[None]), r"cu_seqlens \(1, 2\) .*, expected"),
        (lambda q, k, v: attention(q, k, v, logit_bound=rand(2)), r"logit_bound \(2,\) .*, expected \(4,\)"),
        (lambda q, k, v: attention(q, k, v, logit_bound=rand(4).double()), "float64, expected .* float32"),
        (lambda q, k, v: attention(q, k.to("meta"), v), "k is on meta, expected"),
        (lambda q, k, v: attention(q, k, v, cu_seqlens=cu(0, 3).to("meta")), "cu_seqlens is on meta, expected"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(*qkv(t=3, h=4, k=2))


# -- a library's core between our kernels ----------------------------------------------------------------------------


def core_forward(q, k, v, cu_seqlens):
    """An attention core in plain torch."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2).float() for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q.float(), k) * q.shape[3] ** -0.5
    starts = cu(0) if cu_seqlens is None else cu_seqlens
    logits = logits.masked_fill(~document_mask(starts, q.shape[0], q.shape[1]), -math.inf)
    return torch.einsum("bhts,bshd->bthd", logits.softmax(-1), v).to(q.dtype), logits.logsumexp(-1)


def core_backward(do, q, k, v, out, lse, cu_seqlens):
    """Its backward from `out` and `lse`, as flash attention does it."""
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    do, q, out = do.float(), q.float(), out.float()
    keys, values = (x.repeat_interleave(group, 2).float() for x in (k, v))
    logits = torch.einsum("bthd,bshd->bhts", q, keys) * scale
    starts = cu(0) if cu_seqlens is None else cu_seqlens
    p = (logits - lse[..., None]).exp() * document_mask(starts, q.shape[0], q.shape[1])
    dp = torch.einsum("bthd,bshd->bhts", do, values)
    ds = p * (dp - (do * out).sum(-1).transpose(1, 2)[..., None]) * scale
    fold = lambda x: x.unflatten(2, (-1, group)).sum(3).to(k.dtype)
    dk, dv = torch.einsum("bhts,bthd->bshd", ds, q), torch.einsum("bhts,bthd->bshd", p, do)
    return torch.einsum("bhts,bshd->bthd", ds, keys).to(k.dtype), fold(dk), fold(dv)


@pytest.fixture
def plain_core(monkeypatch):
    monkeypatch.setitem(peers.CORES, "plain", peers.Core(core_forward, core_backward, lambda need: ""))


@pytest.mark.parametrize("xsa", [False, True])
@pytest.mark.parametrize("starts", [None, (0, 4, 9, 14)])
def test_a_core_between_the_xsa_kernels(plain_core, xsa, starts):
    tensors, dy = qkv(b=2, t=7, h=4, k=2), rand(2, 7, 4, 8)
    documents = None if starts is None else cu(*starts)
    with paths(attention="plain"):
        got = gradients(lambda *a: attention(*a, xsa=xsa, cu_seqlens=documents), tensors, dy)
    close(got, gradients(lambda *a: attention_ref(*a, xsa=xsa, cu_seqlens=documents), tensors, dy))


def test_any_backward_fits_any_forward(plain_core):
    (q, k, v), dy = qkv(b=2, t=7, h=4, k=2), rand(2, 7, 4, 8)
    saved = {asked: module._attention(q, k, v, None, None, True, asked) for asked in ("triton", "plain")}
    for one, other in zip(*saved.values(), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
    close(saved["triton"], saved["plain"])
    for forward, backward in (("triton", "plain"), ("plain", "triton")):
        got = module._attention_bwd(dy, q, k, v, *saved[forward], None, backward)
        close(got, flash_backward(dy, q, k, v, *saved["triton"], None))


def test_cudnn_operators_take_our_calls():
    """On meta tensors: arguments, GQA and layouts are torch's own to judge."""
    q, k, v = (torch.empty(2, 7, n, 8, dtype=torch.bfloat16, device="meta") for n in (4, 2, 2))
    o, lse = peers.cudnn_forward(q, k, v, None)
    assert o.shape == q.shape and o.is_contiguous() and lse.shape == (2, 4, 7) and lse.dtype == torch.float32
    for grad, x in zip(peers.cudnn_backward(o, q, k, v, o, lse, None), (q, k, v), strict=True):
        assert grad.shape == x.shape and grad.is_contiguous()


@pytest.mark.parametrize("stats_dim", [3, 4])
def test_cudnn_route_with_a_stand_in(monkeypatch, stats_dim):
    by_head = lambda *x: [t.transpose(1, 2) for t in x]

    def forward(q, k, v, bias, compute_lse, dropout, causal, debug=False, *, scale=None):
        assert bias is None and compute_lse and causal and not dropout and scale == 8**-0.5
        o, lse = core_forward(*by_head(q, k, v), None)
        return o.transpose(1, 2), lse[..., None] if stats_dim == 4 else lse

    def backward(do, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale=None):
        assert lse.dim() == stats_dim and max_q == max_k == 7 and causal and scale == 8**-0.5
        return by_head(*core_backward(*by_head(do, q, k, v, out), lse.view(2, 4, 7), None))

    monkeypatch.setattr(peers, "_cudnn_forward_op", forward)
    monkeypatch.setattr(peers, "_cudnn_backward_op", backward)
    monkeypatch.setattr(peers, "_cudnn_stats_dim", lambda: stats_dim)
    core = peers.CORES["cudnn"]
    monkeypatch.setitem(peers.CORES, "cudnn", peers.Core(core.forward, core.backward, lambda need: ""))
    tensors, dy = qkv(b=2, t=7, h=4, k=2), rand(2, 7, 4, 8)
    with paths(attention="cudnn"):
        got = gradients(lambda *a: attention(*a, xsa=True), tensors, dy)
    close(got, gradients(lambda *a: attention_ref(*a, xsa=True), tensors, dy))


def fa3_packed(cu_q, max_q, *tensors):
    """FA3's arguments as (B, T, ...), and whether they were packed: documents may be empty but not too long."""
    if cu_q is None:
        return tensors, False
    lengths = cu_q.diff()
    assert cu_q.dtype == torch.int32 and (lengths >= 0).all() and lengths.max() <= max_q
    assert cu_q[0] == 0 and all(cu_q[-1] == x.shape[0] for x in tensors[:3])
    return [x[None] for x in tensors], True


def fa3_forward_core(q, k, v, cu_q, max_q, scale):
    assert scale == 8**-0.5
    tensors, packed = fa3_packed(cu_q, max_q, q, k, v)
    o, lse = core_forward(*tensors, cu_q)
    return (o[0], lse[0], None, None) if packed else (o, lse, None, None)


def fa3_backward_core(dout, q, k, v, out, lse, cu_q, max_q, grads, scale):
    assert scale == 8**-0.5
    tensors, _ = fa3_packed(cu_q, max_q, dout, q, k, v, out, lse)
    for to, grad in zip(grads, core_backward(*tensors, cu_q), strict=True):
        to.copy_(grad.view_as(to))


def earlier_fa3():
    """FlashAttention-3 of 2025-04, whose optional arguments are required."""

    def _flash_attn_forward(
        q, k, v, k_new, v_new, qv, out, cu_seqlens_q, cu_seqlens_k, seqused_q, max_seqlen_q, max_seqlen_k,
        softmax_scale, causal, window_size=(-1, -1), softcap=0.0,
    ):  # fmt: skip
        assert causal and k_new is None and seqused_q is None and window_size == (-1, -1)
        return fa3_forward_core(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, sequed_q, max_seqlen_q, max_seqlen_k,
        dq, dk, dv, softmax_scale, causal, window_size=(-1, -1), deterministic=False,
    ):  # fmt: skip
        assert causal and sequed_q is None
        grads = (dq, dk, dv)
        fa3_backward_core(dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q, grads, softmax_scale)

    return _flash_attn_forward, _flash_attn_backward


def later_fa3():
    """FlashAttention-3 of 2026: custom ops, defaults throughout, `is_causal` in backward."""

    class Op:  # as torch.library.custom_op makes it: its own signature says nothing
        def __init__(self, fn):
            self._init_fn, self.__name__ = fn, fn.__name__

        def __call__(self, *args, **kwargs):
            return self._init_fn(*args, **kwargs)

    def _flash_attn_forward(
        q, k, v, k_new=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, window_size_left=-1,
    ):  # fmt: skip
        assert causal
        return fa3_forward_core(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False, deterministic=False,
    ):  # fmt: skip
        assert is_causal
        grads = (dq, dk, dv)
        fa3_backward_core(dout, q, k, v, out, softmax_lse, cu_seqlens_q, max_seqlen_q, grads, softmax_scale)

    return Op(_flash_attn_forward), Op(_flash_attn_backward)


@pytest.mark.parametrize("version", [earlier_fa3, later_fa3])
@pytest.mark.parametrize("starts", [None, (0, 4, 9, 14), (2, 7), (0, 9, 14, 14, 14)])
def test_fa3_route_with_a_stand_in(monkeypatch, version, starts):
    fake = types.ModuleType("flash_attn_interface")
    fake._flash_attn_forward, fake._flash_attn_backward = version()
    monkeypatch.setitem(sys.modules, "flash_attn_interface", fake)
    peers._fa3.cache_clear()
    core = peers.CORES["fa3"]
    monkeypatch.setitem(peers.CORES, "fa3", peers.Core(core.forward, core.backward, lambda need: ""))
    tensors, dy = qkv(b=2, t=7, h=4, k=2), rand(2, 7, 4, 8)
    documents = None if starts is None else cu(*starts)
    with paths(attention="fa3"):
        got = gradients(lambda *a: attention(*a, xsa=True, cu_seqlens=documents), tensors, dy)
    peers._fa3.cache_clear()
    close(got, gradients(lambda *a: attention_ref(*a, xsa=True, cu_seqlens=documents), tensors, dy))


def test_an_unknown_fa3_is_refused():
    with pytest.raises(ValueError, match="has no causal; expected FlashAttention-3 of"):
        peers.call_by_name(lambda q: q, q=1, causal=True)


# -- the choice ------------------------------------------------------------------------------------------------------

HOPPER = {"capability": (9, 0), "fa3": True, "cudnn": 91000}


def pretend(monkeypatch, machine):
    """A GPU as HOPPER, but for what `machine` says."""
    machine = HOPPER | machine
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: machine["cudnn"])
    monkeypatch.setattr(peers, "fa3_installed", lambda: machine["fa3"])


@pytest.mark.parametrize(
    "machine, need, want, reason",
    [
        ({}, {}, "fa3", "installed"),
        ({"fa3": False}, {}, "cudnn", "no fa3: flash_attn_interface is not installed"),
        ({"capability": (10, 0)}, {}, "cudnn", "no fa3: needs compute capability 9.0"),
        ({"fa3": False}, {"documents": True}, "triton", "no cudnn: has no document segments"),
        ({}, {"documents": True}, "fa3", "installed"),
        ({}, {"dtype": torch.float32}, "triton", "no cudnn: needs bfloat16 or float16, got torch.float32"),
        ({}, {"head_dim": 20}, "triton", "no fa3: needs a head width that is a multiple of 8, got 20"),
        ({}, {"rows": 0}, "triton", "at least one token"),
        ({"fa3": False}, {"tokens": 1}, "triton", "rows of 2 tokens"),
        ({"fa3": False}, {"rows": 70000}, "triton", "at most 65535 rows, got 70000"),
        ({"fa3": False, "cudnn": 8907}, {}, "triton", "no cudnn: needs cuDNN 9"),
        ({"capability": (7, 5)}, {}, "triton", "no cudnn: needs compute capability 8.0"),
    ],
)
def test_explain(monkeypatch, machine, need, want, reason):
    pretend(monkeypatch, machine)
    got, why = explain(torch.device("cuda"), **need)
    assert got == want and reason in why
    assert explain(torch.device("cuda"), got, **need) == (got, "asked for")


def test_determinism_rules_cudnn_out(monkeypatch):
    pretend(monkeypatch, {"fa3": False})
    assert explain(torch.device("cuda"))[0] == "cudnn"
    torch.use_deterministic_algorithms(True)
    try:
        got, why = explain(torch.device("cuda"))
    finally:
        torch.use_deterministic_algorithms(False)
    assert got == "triton" and "no cudnn: is not deterministic" in why


@pytest.mark.parametrize("asked, message", [("fa3", "back end fa3, which needs"), ("flash", "back end 'flash'")])
def test_a_back_end_that_cannot_run_is_refused(asked, message):
    with pytest.raises(ValueError, match=message):
        explain(torch.device("cpu"), asked)
    with paths(attention=asked), pytest.raises(ValueError, match=message):
        attention(*qkv(t=3))


# -- natively --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["fa3", "cudnn", "triton"])
@pytest.mark.parametrize("xsa, starts", [(False, None), (True, None), (True, (0, 100, 101, 700, 1000))])
def test_back_ends_agree(asked, dtype, xsa, starts):
    documents = None if starts is None else cu(*starts)
    try:
        explain(torch.device("cuda"), asked, dtype=dtype, documents=documents is not None)
    except ValueError as why:
        pytest.skip(str(why))
    tensors, dy = qkv(b=2, t=500, h=8, k=4, d=64, dtype=dtype), rand(2, 500, 8, 64, dtype=dtype)
    with paths(attention=asked):
        got = gradients(lambda *a: attention(*a, xsa=xsa, cu_seqlens=documents), tensors, dy)
    wide = [t.double() for t in tensors]
    want = gradients(lambda *a: attention_ref(*a, xsa=xsa, cu_seqlens=documents), wide, dy)
    for g, w in zip(got, want, strict=True):
        assert (g.double() - w).abs().max() < 0.02 * w.abs().max()


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    b, t, h, k, d = 2**31 // (2048 * 8 * 64) + 2, 2048, 8, 4, 64
    tensors = [torch.randn(b, t, n, d, dtype=torch.bfloat16, device="cuda") for n in (h, k, k)]
    dy = torch.randn(b, t, h, d, dtype=torch.bfloat16, device="cuda")
    f = lambda *a: attention(*a, xsa=True)
    for whole, last in zip(gradients(f, tensors, dy), gradients(f, [x[-1:] for x in tensors], dy[-1:]), strict=True):
        assert torch.equal(whole[-1:], last)
