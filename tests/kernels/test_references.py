"""The reference ops against independent oracles in fp64, and gradcheck."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from pgolf.kernels.attention import attention, attention_ref
from pgolf.kernels.bigram import bigram, bigram_index, bigram_ref, trigram_index
from pgolf.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from pgolf.kernels.mlp import ACTIVATIONS, mlp, mlp_ref
from pgolf.kernels.qk_prep import qk_prep, qk_prep_ref
from pgolf.kernels.residual import residual, residual_ref

GEN = torch.Generator().manual_seed(0)


def rand(*shape, dtype=torch.float64, grad=True):
    return torch.randn(shape, dtype=dtype, generator=GEN).requires_grad_(grad)


def brute_attention(q, k, v, xsa, starts):
    """One query at a time, no vectorised mask."""
    b, t, h, d = q.shape
    group = h // k.shape[2]
    out = torch.zeros_like(q)
    for i in range(b):
        for pos in range(t):
            flat = i * t + pos
            first = max([s for s in starts if s <= flat], default=0) - i * t
            first = max(first, 0)
            for head in range(h):
                keys, values = k[i, first : pos + 1, head // group], v[i, first : pos + 1, head // group]
                p = torch.softmax(keys @ q[i, pos, head] / math.sqrt(d), 0)
                o = p @ values
                if xsa:
                    unit = values[-1] / values[-1].norm()
                    o = o - (o @ unit) * unit
                out[i, pos, head] = o
    return out


@pytest.mark.parametrize("xsa", [False, True])
@pytest.mark.parametrize("starts", [None, [0, 3, 7, 9, 14]])
@pytest.mark.parametrize("heads, kv", [(4, 4), (4, 2), (4, 1)])
def test_attention_equals_brute_force(xsa, starts, heads, kv):
    q, k, v = rand(2, 7, heads, 6, grad=False), rand(2, 7, kv, 6, grad=False), rand(2, 7, kv, 6, grad=False)
    cu = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    got = attention(q, k, v, xsa=xsa, cu_seqlens=cu)
    torch.testing.assert_close(got, brute_attention(q, k, v, xsa, starts or [0, 7]), rtol=0, atol=1e-12)


def test_xsa_is_orthogonal_to_own_value_and_zero_at_the_first_token():
    q, k, v = rand(2, 9, 4, 8, grad=False), rand(2, 9, 2, 8, grad=False), rand(2, 9, 2, 8, grad=False)
    y = attention(q, k, v, xsa=True)
    dots = (y.view(2, 9, 2, 2, 8) * v[:, :, :, None]).sum(-1)
    assert dots.abs().max() < 1e-12
    assert y[:, 0].abs().max() < 1e-12


def test_qk_prep_equals_complex_rotation():
    h, kv, d, r, t = 4, 2, 8, 6, 5
    qkv, gain = rand(2, t, (h + 2 * kv) * d, grad=False), rand(h, grad=False)
    angle = torch.rand(t, r // 2, dtype=torch.float64, generator=GEN)
    q, k, v = qk_prep(qkv, gain, angle.cos(), angle.sin(), num_heads=h, num_kv_heads=kv, eps=1e-6)
    x = qkv[..., : (h + kv) * d].view(2, t, h + kv, d)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    z = torch.complex(x[..., : r // 2], x[..., r // 2 : r]) * torch.exp(-1j * angle)[:, None]
    want = torch.cat([z.real, z.imag, x[..., r:]], -1)
    torch.testing.assert_close(k, want[:, :, h:], rtol=0, atol=1e-12)
    torch.testing.assert_close(q, want[:, :, :h] * gain[:, None], rtol=0, atol=1e-12)
    assert torch.equal(v, qkv[..., (h + kv) * d :].view(2, t, kv, d))


def test_bigram_hash_equals_int32_arithmetic():
    ids = torch.randint(0, 8192, (3, 50), generator=GEN)
    x = ids.numpy().astype(np.int32)
    rows = 2048
    want2, want3 = np.full(x.shape, rows - 1), np.full(x.shape, rows - 1)
    a, b, c = np.int32(36313), np.int32(27191), np.int32(51497)
    want2[:, 1:] = ((a * x[:, 1:]) ^ (b * x[:, :-1])) % (rows - 1)
    want3[:, 2:] = ((a * x[:, 2:]) ^ (b * x[:, 1:-1]) ^ (c * x[:, :-2])) % (rows - 1)
    assert (bigram_index(ids, rows).numpy() == want2).all()
    assert (trigram_index(ids, rows).numpy() == want3).all()
    linear = bigram_index(ids, 100, "mul1009").numpy()
    assert linear[0, 0] == x[0, 0] % 100 and linear[1, 7] == (1009 * int(x[1, 6]) + int(x[1, 7])) % 100


def test_bigram_front_by_hand():
    ids = torch.tensor([[3, 5, 3]])
    tok, rows, gate = rand(10, 4, grad=False), rand(8, 4, grad=False), rand(4, grad=False)
    index = [7, ((36313 * 5) ^ (27191 * 3)) % 7, ((36313 * 3) ^ (27191 * 5)) % 7]
    x = tok[ids[0]] + rows[index]
    x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    g = torch.sigmoid(gate)
    before = torch.cat([torch.zeros(1, 4, dtype=x.dtype), x[:-1]])
    got = bigram(ids, tok, rows, gate=gate, eps=1e-6)
    torch.testing.assert_close(got[0], (1 - g) * x + g * before, rtol=0, atol=1e-12)


def test_cross_entropy_equals_brute_force_and_entropy():
    logits, targets = rand(6, 11, dtype=torch.float32, grad=False) * 20, torch.randint(0, 11, (6,), generator=GEN)
    nll, h = cross_entropy(logits, targets, cap=15.0, entropy=True)
    z = 15 * torch.tanh(logits.double() / 15)
    p = torch.exp(z) / torch.exp(z).sum(-1, keepdim=True)
    torch.testing.assert_close(nll.double(), -p[range(6), targets].log(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(h.double(), -(p * p.log()).sum(-1), rtol=1e-4, atol=1e-5)
    assert not h.requires_grad


@pytest.mark.parametrize(
    "name, value", [("relu2", 0.0), ("leaky_relu2", (0.3 * 2) ** 2), ("silu2", None), ("gelu2", None)]
)
def test_activation_values(name, value):
    u = torch.tensor([-2.0, 1.5], dtype=torch.float64)
    got = ACTIVATIONS[name](u, 0.3)
    if value is None:
        sigma = 1 / (1 + math.exp(2)) if name == "silu2" else 0.5 * (1 + math.erf(-2 / math.sqrt(2)))
        value = (-2 * sigma) ** 2
    assert got[0].item() == pytest.approx(value)


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_mlp_gradients(activation):
    x, up, down = rand(3, 4), rand(6, 4), rand(4, 6)
    assert gradcheck(lambda *a: mlp_ref(*a, activation=activation, slope=0.5), (x, up, down))


@pytest.mark.parametrize("xsa", [False, True])
def test_attention_gradients(xsa):
    q, k, v = rand(1, 4, 4, 3), rand(1, 4, 2, 3), rand(1, 4, 2, 3)
    assert gradcheck(lambda *a: attention_ref(*a, xsa=xsa), (q, k, v))


def test_residual_value_and_gradients():
    a, b, c, w, s = rand(2, 3, 5), rand(2, 3, 5), rand(2, 3, 5), rand(5), rand()
    out, normed = residual([a, b, c], [None, w, s], norm_scale=0.5, eps=1e-5)
    want = a + w * b + s * c
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(normed, 0.5 * want / (want.square().mean(-1, keepdim=True) + 1e-5).sqrt())
    assert gradcheck(lambda *t: residual_ref(t[:3], [None, t[3], t[4]], norm_scale=0.5, eps=1e-5), (a, b, c, w, s))


def test_other_gradients():
    qkv, gain = rand(1, 3, 8 * 4), rand(4)
    angle = torch.rand(3, 1, dtype=torch.float64, generator=GEN)
    assert gradcheck(
        lambda a, g: qk_prep_ref(a, g, angle.cos(), angle.sin(), num_heads=4, num_kv_heads=2, eps=1e-6), (qkv, gain)
    )
    ids = torch.randint(0, 9, (2, 5), generator=GEN)
    tok, rows, gate = rand(9, 3), rand(8, 3), rand(3)
    assert gradcheck(lambda *a: bigram_ref(ids, a[0], a[1], trigram=True, gate=a[2], eps=1e-6), (tok, rows, gate))
    logits, targets = rand(4, 6), torch.randint(0, 6, (4,), generator=GEN)  # computed in fp32: loose tolerance
    nll = cross_entropy_ref(logits, targets, cap=5.0)[0].sum()
    (grad,) = torch.autograd.grad(nll, logits)
    z = 5 * torch.tanh(logits / 5)
    want = torch.autograd.grad(F.cross_entropy(z, targets, reduction="sum"), logits)[0]
    torch.testing.assert_close(grad, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda: residual([torch.ones(2, 3)], [torch.ones(2)]),
        lambda: residual([], []),
        lambda: residual([torch.ones(2, 3), torch.ones(2, 3).half()], [None, None]),
        lambda: mlp(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3, 5)),
        lambda: mlp(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3, 4), activation="tanh"),
        lambda: attention(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8)),
        lambda: attention(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 2, 8), torch.ones(1, 3, 2, 8)),
        lambda: qk_prep(
            torch.ones(1, 2, 30), torch.ones(4), torch.ones(2, 1), torch.ones(2, 1), num_heads=4, num_kv_heads=2
        ),
        lambda: bigram(torch.ones(2, 3), torch.ones(5, 4)),
        lambda: bigram(torch.ones(2, 3, dtype=torch.int64), torch.ones(5, 4), torch.ones(5, 3)),
        lambda: cross_entropy(torch.ones(2, 3), torch.ones(3, dtype=torch.int64), cap=30.0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"expected"):
        call()
