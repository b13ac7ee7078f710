"""newton_schulz against the scalar polynomial on singular values, in fp64: the reference, and the kernels."""

import numpy as np
import pytest
import torch

from pgolf.kernels import newton_schulz as module
from pgolf.kernels._op import paths, recording
from pgolf.kernels.newton_schulz import newton_schulz, newton_schulz_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def oracle(g: np.ndarray, steps: int = 5, eps: float = 1e-7) -> np.ndarray:
    """U f(S) V^T, f the quintic applied `steps` times to each singular value: no matrix iteration at all."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / (np.sqrt((s**2).sum()) + eps)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


SHAPES = [(1, 1), (1, 7), (7, 1), (5, 5), (24, 56), (56, 24), (64, 64)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 5])
def test_is_the_polynomial_on_singular_values(shape, steps):
    g = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(newton_schulz(g, steps=steps).numpy(), oracle(g.numpy(), steps), atol=1e-11)
    single = newton_schulz(g.float(), steps=steps)
    assert single.dtype == torch.float32 and single.is_contiguous()
    np.testing.assert_allclose(single.numpy(), oracle(g.numpy(), steps), atol=2e-5)


@pytest.mark.parametrize("shape", [(24, 56), (64, 64)])
def test_bf16_error_is_a_few_percent_of_the_norm(shape):
    g = torch.randn(*shape, generator=torch.Generator().manual_seed(2))
    got, truth = newton_schulz(g, compute_dtype=torch.bfloat16).double().numpy(), oracle(g.double().numpy())
    assert 1e-4 < np.linalg.norm(got - truth) / np.linalg.norm(truth) < 0.03  # above 0: it did run in bf16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_in_the_band(dtype):
    g = torch.randn(96, 48, generator=torch.Generator().manual_seed(3)) * 1e-4  # scale must not matter
    s = torch.linalg.svdvals(newton_schulz(g, compute_dtype=dtype))
    assert s.min() > 0.66 and s.max() < 1.23
    assert s.max() - s.min() > 0.05  # the band is wide: this is not an exact polar factor


def test_batch_equals_singles_and_tall_equals_wide_transposed():
    g = (
        torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(4))
        * torch.tensor([1.0, 1e3, 1e-3])[:, None, None]
    )
    batch = newton_schulz(g)
    torch.testing.assert_close(batch, torch.stack([newton_schulz(m) for m in g]), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(batch, newton_schulz(g.mT).mT, atol=1e-5, rtol=1e-4)
    assert batch.is_contiguous() and batch.shape == g.shape


def test_zero_and_empty_stay():
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    assert newton_schulz(torch.empty(0, 3, 4)).shape == (0, 3, 4)


def test_input_is_untouched_and_ref_is_the_cpu_path():
    g = torch.randn(4, 6, generator=torch.Generator().manual_seed(5))
    kept = g.clone()
    assert torch.equal(newton_schulz(g), newton_schulz_ref(g)) and torch.equal(g, kept)


def test_refuses_wrong_input():
    with pytest.raises(ValueError, match="expected"):
        newton_schulz(torch.zeros(3))
    with pytest.raises(ValueError, match="at least 1"):
        newton_schulz(torch.zeros(3, 3), steps=0)


# -- the kernels -----------------------------------------------------------------------------------------------------


def matrices(*shape, seed=7, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def distance(got, want: np.ndarray) -> float:
    """Of a matrix from what it should be, as a share of that."""
    return np.linalg.norm(got.double().cpu().numpy() - want) / np.linalg.norm(want)


# sides of one tile and of several, whole (16, 32 in the interpreter) and not; steps 1 and 5, wide and tall
@pytest.mark.parametrize("shape, steps", [((2, 1, 7), 5), ((1, 16, 16), 1), ((2, 33, 20), 5), ((1, 50, 50), 2)])
@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_kernel_is_the_polynomial_on_singular_values(shape, steps, dtype, error, kernels_on):
    g = matrices(*shape)
    got = newton_schulz(g, steps=steps, compute_dtype=dtype)
    assert got.shape == g.shape and got.dtype == g.dtype and got.is_contiguous()
    for one, m in zip(got, g, strict=True):
        assert distance(one, oracle(m.double().cpu().numpy(), steps)) < error


def test_kernel_s_singular_values_end_in_the_band(kernels_on):
    g = matrices(2, 20, 60) * 1e-4  # scale must not matter
    s = torch.linalg.svdvals(newton_schulz(g, compute_dtype=torch.float32))
    assert s.min() > 0.68 and s.max() < 1.21
    assert s.max() - s.min() > 0.05  # not an exact polar factor


def products(x):
    """The kernels' (A, P) of x (n, S, K), S and K whole tiles."""
    how = module._launch_of(x, *x.shape[:2], x.dtype)
    gram, poly = (x.new_full((len(x), x.shape[1], x.shape[1]), float("nan")) for _ in range(2))
    module._poly(x, gram, poly, how)
    return gram, poly


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_right_and_exactly_symmetric(dtype, kernels_on):
    """4 tiles a side in the interpreter: on and off the diagonal, every one written, in every matrix."""
    x = matrices(2, 64, 32, dtype=dtype) / 40 if DEVICE == "cpu" else matrices(2, 512, 256, dtype=dtype) / 200
    gram, poly = products(x)
    assert torch.equal(gram, gram.mT) and torch.equal(poly, poly.mT)
    _, b, c = module.COEFFICIENTS
    want = x.double() @ x.double().mT
    unit = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[dtype]
    assert (gram.double() - want).abs().max() <= unit * want.abs().max()
    want = b * gram.double() + c * gram.double() @ gram.double()  # of the rounded A, which is what the kernel reads
    assert (poly.double() - want).abs().max() <= unit * want.abs().max()


def in_fp32(g):
    return newton_schulz(g, steps=2, compute_dtype=torch.float32)


def test_kernel_keeps_matrices_of_a_batch_apart(kernels_on):
    g = matrices(3, 20, 40) * torch.tensor([1.0, 1e3, 1e-3], device=DEVICE)[:, None, None]
    batch = in_fp32(g)
    torch.testing.assert_close(batch, torch.stack([in_fp32(m) for m in g]), atol=1e-6, rtol=1e-5)
    g[1] = float("nan")
    with_nan = in_fp32(g)
    assert torch.equal(with_nan[[0, 2]], batch[[0, 2]]) and with_nan[1].isnan().all()


def test_kernel_on_a_tall_matrix_is_that_on_the_wide_one_transposed(kernels_on):
    g = matrices(2, 20, 35)
    wide, tall, strided = in_fp32(g), in_fp32(g.mT.contiguous()), in_fp32(g.mT)
    assert tall.is_contiguous() and strided.is_contiguous()
    torch.testing.assert_close(tall.mT, wide, atol=1e-6, rtol=1e-5)  # the norm is summed in another order
    torch.testing.assert_close(strided, tall, atol=1e-6, rtol=1e-5)


def test_kernel_leaves_zero_and_the_input(kernels_on):
    assert torch.equal(newton_schulz(torch.zeros(2, 3, 20, device=DEVICE)), torch.zeros(2, 3, 20, device=DEVICE))
    assert newton_schulz(torch.empty(2, 0, 4, device=DEVICE)).shape == (2, 0, 4)
    g = matrices(5, 18)
    kept = g.clone()
    assert newton_schulz(g, steps=1).shape == (5, 18) and torch.equal(g, kept)


def test_kernel_refuses_what_it_cannot_do(kernels_on):
    with pytest.raises(ValueError, match=r"g is .*float64"):
        newton_schulz(matrices(3, 3).double())
    with pytest.raises(ValueError, match=r"compute_dtype is .*float64"):
        newton_schulz(matrices(3, 3), compute_dtype=torch.float64)
    with pytest.raises(RuntimeError, match="autograd"):
        newton_schulz(matrices(3, 3).requires_grad_(), steps=1).sum().backward()


@pytest.mark.parametrize("n, side, block", [(22, 512, 128), (11, 512, 64), (1, 128, 64), (66, 256, 128)])
def test_tiles_are_small_where_large_ones_would_leave_the_device_idle(n, side, block):
    g = torch.empty(n, side, 2 * side, device="meta")
    with recording(90) as seen:
        newton_schulz(g, steps=2, compute_dtype=torch.bfloat16)
    assert [one.kernel.__name__ for one in seen.launches] == 2 * [
        "_newton_schulz_gram_kernel",
        "_newton_schulz_poly_kernel",
    ]
    tiles = side // block
    for one in seen.launches:
        assert one.how.blocks["BLOCK"] == block and one.grid == (n * tiles * (tiles + 1) // 2,)


def test_reference_path_is_a_choice(kernels_on):
    g = matrices(4, 6)
    with paths(newton_schulz="reference"):
        assert torch.equal(newton_schulz(g), newton_schulz_ref(g))


@pytest.mark.gpu
def test_cuda_runs_in_bf16():
    g = torch.randn(4, 256, 128, generator=torch.Generator().manual_seed(6))
    got = newton_schulz(g.cuda())
    assert got.dtype == torch.float32
    for m, t in zip(got.cpu().double().numpy(), g.double().numpy(), strict=True):
        assert np.linalg.norm(m - oracle(t)) / np.linalg.norm(oracle(t)) < 0.03
