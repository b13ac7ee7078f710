"""newton_schulz against the scalar polynomial on singular values, in fp64."""

import numpy as np
import pytest
import torch

from pgolf.kernels.newton_schulz import newton_schulz, newton_schulz_ref


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_runs_in_bf16():
    g = torch.randn(4, 256, 128, generator=torch.Generator().manual_seed(6))
    got = newton_schulz(g.cuda())
    assert got.dtype == torch.float32
    for m, t in zip(got.cpu().double().numpy(), g.double().numpy(), strict=True):
        assert np.linalg.norm(m - oracle(t)) / np.linalg.norm(oracle(t)) < 0.03
