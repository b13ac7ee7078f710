"""The qk_prep op beyond the cases: an oracle in complex numbers, bounds, gain 0, missing gradients, bad input."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck

from pgolf.kernels.qk_prep import MAX_HEAD_DIM, qk_prep, qk_prep_ref

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H, K, D = 4, 2, 8
HEADS = {"num_heads": H, "num_kv_heads": K, "eps": 1e-6}


def made(b=2, t=5, r=4, *, h=H, k=K, d=D, by_position=False, dtype=torch.float32, seed=0):
    """qkv, gain, cos, sin."""
    gen = torch.Generator().manual_seed(seed)
    qkv, gain = torch.randn(b, t, (h + 2 * k) * d, generator=gen), torch.randn(h, generator=gen)
    angle = torch.rand(*([b] if by_position else []), t, r // 2, generator=gen) * 6
    return qkv.to(DEVICE, dtype), *(x.to(DEVICE) for x in (gain, angle.cos(), angle.sin()))


def complex_oracle(qkv, gain, cos, sin, h=H, k=K, eps=1e-6):
    """fp64; channels i and i + r/2 of a head are one complex number, turned by exp(-i angle)."""
    qkv, gain, cos, sin = (x.double() for x in (qkv, gain, cos, sin))
    heads = qkv.unflatten(-1, (h + 2 * k, -1))
    x = heads[:, :, : h + k]
    x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
    half = cos.shape[-1]
    z = torch.complex(x[..., :half], x[..., half : 2 * half]) * torch.complex(cos, -sin).unsqueeze(-2)
    x = torch.cat([z.real, z.imag, x[..., 2 * half :]], -1)
    return x[:, :, :h] * gain[:, None], x[:, :, h:], heads[:, :, h + k :]


def gradients(fn, qkv, gain, cos, sin, cotangents):
    """Gradients of qkv and gain; a cotangent of None leaves its output unused."""
    qkv, gain = qkv.detach().clone().requires_grad_(), gain.detach().clone().requires_grad_()
    pairs = [(o, g) for o, g in zip(fn(qkv, gain, cos, sin), cotangents, strict=True) if g is not None]
    grads = torch.autograd.grad(
        [o for o, _ in pairs], [qkv, gain], [g.to(o.dtype) for o, g in pairs], allow_unused=True
    )
    return [torch.zeros_like(x) if g is None else g for x, g in zip((qkv, gain), grads, strict=True)]


def kernel(qkv, gain, cos, sin):
    return qk_prep(qkv, gain, cos, sin, **HEADS)


@pytest.mark.parametrize("r, by_position", [(4, False), (D, False), (2, True), (0, False)])
def test_equals_the_complex_oracle_with_gradients(r, by_position):
    given = made(r=r, t=11, by_position=by_position)
    got, want = kernel(*given), complex_oracle(*given)
    cotangents = [torch.randn_like(o) for o in got]
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g.double(), w, rtol=0, atol=3e-6)
    got, want = (gradients(f, *given, cotangents) for f in (kernel, complex_oracle))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-5)


def test_norms_and_the_bound_on_logits():
    qkv, gain, cos, sin = made(r=6)
    q, k, _ = kernel(qkv * 50, gain, cos, sin)
    root = D**0.5
    torch.testing.assert_close(k.norm(dim=-1), torch.full(k.shape[:3], root, device=DEVICE))
    torch.testing.assert_close(q.norm(dim=-1), (gain.abs() * root).expand(q.shape[:3]))
    logits = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(H // K, 2)) / root
    assert (logits.abs() <= gain.abs()[:, None, None] * root * 1.000001).all()
    same = torch.cat([qkv[..., :D]] * (H + 2 * K), -1)  # q and k heads alike: the bound is reached
    q, k, _ = kernel(same, gain, cos, sin)
    torch.testing.assert_close((q[:, :, 0] * k[:, :, 0]).sum(-1) / root, (gain[0] * root).expand(q.shape[:2]))


def test_a_logit_depends_on_the_distance_alone():
    t = 9
    angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.3, 0.05])
    row = torch.randn(1, 1, (H + 2 * K) * D, generator=torch.Generator().manual_seed(1)).expand(1, t, -1)
    tables = (x.to(DEVICE) for x in (angle.cos(), angle.sin()))
    q, k, _ = kernel(row.to(DEVICE), torch.ones(H, device=DEVICE), *tables)
    logits = torch.einsum("td,sd->ts", q[0, :, 0], k[0, :, 0])
    for distance in range(-t + 1, t):
        line = logits.diagonal(distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), rtol=1e-5, atol=1e-5)
    assert (logits[0] - logits[0, 0]).abs().max() > 0.1


@pytest.mark.parametrize("zeros", [[2], [0, 1, 2, 3]])
def test_gain_zero_has_exact_gradients(zeros):
    qkv, gain, cos, sin = made(t=7)
    gain[zeros] = 0.0
    outs = kernel(qkv, gain, cos, sin)
    assert (outs[0][:, :, zeros] == 0).all()
    cotangents = [torch.randn_like(o) for o in outs]
    got, want = (gradients(f, qkv, gain, cos, sin, cotangents) for f in (kernel, complex_oracle))
    for g, w in zip(got, want, strict=True):
        assert torch.isfinite(g).all()
        torch.testing.assert_close(g, w, rtol=2e-6, atol=1e-5)
    assert (want[1][zeros].abs() > 0.1).all()  # a gain can leave 0
    assert (got[0].unflatten(-1, (-1, D))[:, :, zeros] == 0).all()


@pytest.mark.parametrize("used", [u for u in itertools.product([True, False], repeat=3) if any(u) and not all(u)])
def test_a_missing_gradient_counts_as_zero(used):
    given = made(r=6)
    outs = kernel(*given)
    cotangents = [torch.randn_like(o) if u else None for o, u in zip(outs, used, strict=True)]
    filled = [torch.zeros_like(o) if c is None else c for o, c in zip(outs, cotangents, strict=True)]
    for got, want in zip(gradients(kernel, *given, cotangents), gradients(complex_oracle, *given, filled), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-5)


def test_non_contiguous_inputs_and_gradients():
    qkv, gain, cos, sin = made(b=3, t=5, r=4)
    odd = qkv.transpose(0, 1).contiguous().transpose(0, 1), gain.repeat_interleave(2)[::2]
    tables = cos.t().contiguous().t(), torch.stack([sin, sin], -1)[..., 0]
    assert not any(x.is_contiguous() for x in (*odd, *tables))
    outs, want = kernel(*odd, *tables), kernel(qkv, gain, cos, sin)
    for g, w in zip(outs, want, strict=True):
        assert torch.equal(g, w) and g.is_contiguous()
    cotangents = [torch.randn_like(o) for o in outs]
    strided = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in cotangents]
    got = gradients(kernel, *odd, *tables, strided)
    for g, w in zip(got, gradients(kernel, qkv, gain, cos, sin, cotangents), strict=True):
        assert torch.equal(g, w)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_and_their_gradient_pass_bit_for_bit(dtype):
    given = made(dtype=dtype)
    q, k, v = kernel(*given)
    assert q.dtype == k.dtype == v.dtype == dtype
    assert torch.equal(v, given[0].unflatten(-1, (-1, D))[:, :, H + K :])
    cotangents = [torch.randn_like(o) for o in (q, k, v)]
    dqkv, dgain = gradients(kernel, *given, cotangents)
    assert torch.equal(dqkv.unflatten(-1, (-1, D))[:, :, H + K :], cotangents[2]) and dgain.dtype == torch.float32
    want = complex_oracle(*given)
    for g, w in zip((q, k), want, strict=False):  # one rounding
        torch.testing.assert_close(g.double(), w, rtol=torch.finfo(dtype).eps / 2 * 1.001, atol=1e-5)


def test_outputs_own_their_memory():
    given = made()
    before = given[0].clone()
    for out in kernel(*given):
        out.fill_(7.0)
    assert torch.equal(given[0], before)


def test_zero_heads_stay_zero_and_finite():
    qkv, gain, cos, sin = made()
    qkv = torch.zeros_like(qkv).requires_grad_()
    outs = kernel(qkv, gain, cos, sin)
    assert all((o == 0).all() for o in outs)
    sum(o.sum() for o in outs).backward()
    assert torch.isfinite(qkv.grad).all()


@pytest.mark.parametrize("b, t", [(0, 3), (2, 0)])
def test_no_tokens(b, t):
    given = made(b=b, t=t)
    outs = kernel(*given)
    assert [tuple(o.shape) for o in outs] == [(b, t, H, D), (b, t, K, D), (b, t, K, D)]
    dqkv, dgain = gradients(kernel, *given, [torch.randn_like(o) for o in outs])
    assert dqkv.shape == given[0].shape and (dgain == 0).all()


def test_gradients_of_the_reference():
    for r, by_position in ((4, True), (D, False), (0, False)):
        qkv, gain, cos, sin = (x.double() for x in made(b=1, t=3, r=r, by_position=by_position))
        gain[1] = 0.0
        fn = lambda a, g, cos=cos, sin=sin: qk_prep_ref(a, g, cos, sin, **HEADS)
        assert gradcheck(fn, (qkv.requires_grad_(), gain.requires_grad_()))


def wrong(**changed):
    """A call of qk_prep with some arguments changed."""
    qkv, gain, cos, sin = made()
    return qk_prep(**({"qkv": qkv, "gain": gain, "cos": cos, "sin": sin} | HEADS | changed))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"qkv": torch.ones(2, 5, 63)}, r"qkv \(2, 5, 63\), expected \(B, T, d \* 8\)"),
        ({"qkv": torch.ones(5, 64)}, r"qkv \(5, 64\), expected"),
        ({"qkv": torch.ones(2, 5, 0)}, r"qkv \(2, 5, 0\), expected"),
        ({"qkv": torch.ones(2, 5, 64, device=DEVICE).double()}, "qkv is torch.float64, expected float32"),
        ({"qkv": torch.ones(2, 5, 8 * (MAX_HEAD_DIM + 1), device=DEVICE)}, f"expected at most {MAX_HEAD_DIM}"),
        ({"gain": torch.ones(K)}, r"gain \(2,\), expected \(4,\)"),
        ({"gain": torch.ones(H, device="meta")}, "gain is on meta, expected"),
        ({"cos": torch.ones(5, 3)}, r"cos \(5, 3\), sin \(5, 2\), expected"),
        ({"cos": torch.ones(6, 2), "sin": torch.ones(6, 2)}, r"cos \(6, 2\).*expected \(T=5, r/2\)"),
        ({"cos": torch.ones(1, 5, 2), "sin": torch.ones(1, 5, 2)}, r"cos \(1, 5, 2\).*expected .*\(B=2, T=5, r/2\)"),
        ({"cos": torch.ones(5, 5), "sin": torch.ones(5, 5)}, r"cos \(5, 5\).*r <= 8"),
        ({"cos": torch.ones(5, 2, device=DEVICE, requires_grad=True)}, "requires a gradient, expected constant"),
        ({"num_kv_heads": 0}, "4 query and 0 KV heads, expected at least 1"),
    ],
)
def test_bad_input(changed, message):
    with pytest.raises(ValueError, match=message):
        wrong(**changed)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    t, h, k, d = 2048, 8, 4, 64
    b = 2**31 // (t * (h + 2 * k) * d) + 2  # the last rows of qkv lie beyond 2^31
    qkv = torch.zeros(b, t, (h + 2 * k) * d, dtype=torch.bfloat16, device="cuda")
    qkv[-1] = torch.randn(t, (h + 2 * k) * d, device="cuda")
    _, *rest = made(b=1, t=t, r=16, h=h, k=k, d=d)
    gain = rest[0].requires_grad_()
    heads = {"num_heads": h, "num_kv_heads": k, "eps": 1e-6}
    last = qkv[-1:].clone().requires_grad_()
    whole = qk_prep(qkv.requires_grad_(), gain, *rest[1:], **heads)
    part = qk_prep(last, gain, *rest[1:], **heads)
    for a, c in zip(whole, part, strict=True):
        assert torch.equal(a[-1:], c) and (a[-2] == 0).all()
    (grad,) = torch.autograd.grad([o[-1].float().square().sum() for o in whole], qkv)
    (want,) = torch.autograd.grad([o.float().square().sum() for o in part], last)
    assert torch.equal(grad[-1:], want) and (grad[-2] == 0).all()
