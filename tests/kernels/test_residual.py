"""The residual op beyond the cases: sharing of gradients, non-contiguous streams, bad input, wide and many rows."""

import pytest
import torch

from pgolf.kernels._op import paths
from pgolf.kernels.residual import MAX_WIDTH, residual, residual_ref, rms_norm

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEN = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(shape, generator=GEN).to(DEVICE)


def test_non_contiguous_terms_and_weights():
    a, b, w = rand(5, 3, 24).transpose(0, 1), rand(3, 5, 48)[..., ::2], rand(48)[::2]
    got, want = (f([a, b], [None, w], norm_scale=0.3) for f in (residual, residual_ref))
    for g, x in zip(got, want, strict=True):
        torch.testing.assert_close(g, x, rtol=1e-5, atol=1e-5)


def test_one_tensor_as_two_terms_gets_both_gradients():
    x = rand(2, 3, 8).requires_grad_()
    residual([x, x], [None, None], normalize=False)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_either_output_alone_has_a_gradient():
    for pick in (0, 1):
        grads = []
        for f in (residual, residual_ref):
            a, b, w = (t.clone().requires_grad_() for t in (torch.ones(2, 4, 8), torch.ones(2, 4, 8), torch.ones(8)))
            a, b, w = (t.detach().to(DEVICE).requires_grad_() for t in (a, b, w))
            (f([a, b], [None, w], eps=1e-5)[pick] * torch.arange(8.0, device=DEVICE)).sum().backward()
            grads.append((a.grad, b.grad, w.grad))
        for g, x in zip(*grads, strict=True):
            torch.testing.assert_close(g, x, rtol=1e-5, atol=1e-5)


def test_single_unweighted_term_is_passed_through():
    x = rand(2, 3, 8)
    out, normed = residual([x], [None])
    assert out is x
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(2, 3, device=DEVICE), rtol=1e-4, atol=1e-4)
    assert residual([x], [None], normalize=False) == (x, None)


def test_rms_norm_takes_the_kernel_and_the_reference_alike():
    x = rand(7, 20)
    with paths(residual="reference"):
        want = rms_norm(x, 1e-6)
    torch.testing.assert_close(rms_norm(x, 1e-6), want, rtol=1e-6, atol=1e-6)


def test_zero_row_is_zero_and_finite():
    x = torch.zeros(1, 2, 16, device=DEVICE, requires_grad=True)
    out, normed = residual([x, x], [None, None], eps=1e-6)
    assert (out == 0).all() and (normed == 0).all()
    normed.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: residual([x] * 5, [None] * 5), "got 5 terms and 5 weights, expected 1 to 4"),
        (lambda x: residual([x, x.double()], [None, None]), "term 1 is .*float64, expected"),
        (lambda x: residual([x.double()], [None]), "float64, expected float32, bfloat16 or float16 for the kernel"),
        (lambda x: residual([x, x[:1]], [None, None]), r"term 1 is \(1, 3, 8\).*, expected \(2, 3, 8\)"),
        (lambda x: residual([x], [torch.ones(7)]), r"weight 0 is \(7,\), expected"),
        (lambda x: residual([x, x.to("meta")], [None, None]), "term 1 is on meta, expected"),
        (lambda x: residual([x.new_ones(1, MAX_WIDTH + 1)], [None]), f"expected at most {MAX_WIDTH}"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(rand(2, 3, 8))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    rows = 2**31 // 512 + 3
    x = torch.zeros(rows, 512, dtype=torch.bfloat16, device="cuda")
    x[-1] = 3.0
    out, normed = residual([x, x], [None, None])
    assert (out[-1] == 6).all() and (out[-2] == 0).all()
    torch.testing.assert_close(normed[-1].float(), torch.ones(512, device="cuda"), rtol=1e-2, atol=1e-2)
