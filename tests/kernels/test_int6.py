"""int6's grid against numpy, its gradient, and its edges."""

import numpy as np
import pytest
import torch

from pgolf.kernels.int6 import SMALLEST_STEP, int6, int6_quantize_ref, int6_ref


def weights(rows=7, cols=33, spread=1.0, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=gen) * spread


def numpy_grid(w, floor=0.0):
    """The contract, written in numpy."""
    w = w.numpy()
    peak = np.abs(w).max(axis=1)
    step = np.maximum(peak / np.float32(31), np.float32(floor / 31)).astype(np.float16)
    step = np.maximum(step, np.float16(SMALLEST_STEP))
    q = np.clip(np.rint(w / step.astype(np.float32)[:, None]), -32, 31)  # rint: half to even
    return q.astype(np.int8), step


@pytest.mark.parametrize("spread", [1e-7, 1e-4, 0.02, 1.0, 1e4])
@pytest.mark.parametrize("floor", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 64), (64, 48), (0, 3)])
def test_grid_equals_numpy(shape, floor, spread):
    w = weights(*shape, spread=spread)
    q, step = int6_quantize_ref(w, scale_floor=floor)
    q_np, step_np = numpy_grid(w, floor) if w.numel() else (q.numpy(), step.numpy())
    assert q.dtype == torch.int8 and step.dtype == torch.float16
    np.testing.assert_array_equal(q.numpy(), q_np)
    np.testing.assert_array_equal(step.numpy(), step_np)


@pytest.mark.parametrize("spread", [1e-7, 0.02, 1.0, 1e4])
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_fake_quant_is_the_dequantised_grid_bit_for_bit(floor, spread):
    w = weights(64, 96, spread)
    q, step = int6_quantize_ref(w, scale_floor=floor)
    expected = q.float() * step.float()[:, None]
    for f in (int6, int6_ref):
        out = f(w.requires_grad_(), scale_floor=floor)
        assert torch.equal(out.detach().view(torch.int32), expected.view(torch.int32))  # zeros have the same sign too


@pytest.mark.parametrize("f", [int6, int6_ref])
def test_gradient_passes_unchanged(f):
    w = weights().requires_grad_()
    g = weights(seed=1)
    f(w).backward(g)
    assert torch.equal(w.grad, g)


def test_op_is_well_formed():
    torch.library.opcheck(torch.ops.pgolf.int6, (weights().requires_grad_(), 31, -32, 0.5))


def test_halves_round_to_even():
    row = torch.tensor([[31.0, 0.5, 1.5, 2.5, -0.5, -1.5]])  # step is exactly 1
    assert int6_quantize_ref(row)[0].tolist() == [[31, 0, 2, 2, 0, -2]]


def test_floor_is_a_fixed_grid_below_one():
    w = weights(spread=0.01)
    step = int6_quantize_ref(w, scale_floor=1.0)[1]
    assert (step == torch.tensor(1 / 31).half()).all()


def test_error_is_at_most_half_a_step_and_the_clip_is_the_step_rounding():
    w = weights(256, 64)
    q, step = int6_quantize_ref(w)
    error = (q.double() * step.double()[:, None] - w.double()).abs() / step.double()[:, None]
    # a step rounded down by up to 2^-11 puts the peak at 31 (1 + 2^-11), which clips by 0.015 steps
    assert error.max() <= 0.5 + 1e-5


def test_zeros_stay_zeros_with_a_positive_step():
    q, step = int6_quantize_ref(torch.zeros(2, 4))
    assert not q.any() and (step == SMALLEST_STEP).all()
    assert not int6(torch.zeros(2, 4)).any()


def test_step_below_fp16_becomes_its_smallest():
    w = torch.tensor([[2.0**-24, -(2.0**-22), 0.0]])
    q, step = int6_quantize_ref(w)
    assert step.tolist() == [2.0**-24] and q.tolist() == [[1, -4, 0]]


def test_step_above_fp16_is_refused_and_never_finite():
    largest, beyond = 31 * 65504.0, 31 * 65520.0
    assert int6_quantize_ref(torch.tensor([[largest, 1.0]]))[0].tolist() == [[31, 0]]
    w = torch.tensor([[1.0, 2.0], [beyond, 1.0]])
    with pytest.raises(ValueError, match="first row 1"):
        int6_quantize_ref(w)
    out = int6(w)
    assert out[1].isnan().all() and out[0].isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_weights(bad):
    w = weights()
    w[3, 5] = bad
    for f in (int6, int6_quantize_ref):
        with pytest.raises(ValueError, match="first row 3"):
            f(w)
    out = int6_ref(w)  # what a GPU sees
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()


@pytest.mark.parametrize("w", [torch.zeros(3), torch.zeros(3, 0), torch.zeros(2, 2, dtype=torch.float64)])
def test_wrong_input_is_refused(w):
    for f in (int6, int6_quantize_ref):
        with pytest.raises(ValueError, match="expected"):
            f(w)


@pytest.mark.slow
def test_compiled_whole_graph_equals_eager():
    w = weights(64, 96).requires_grad_()
    out = torch.compile(lambda x: int6(x, scale_floor=0.5), fullgraph=True)(w)
    assert torch.equal(out, int6(w, scale_floor=0.5))
    out.sum().backward()
    assert (w.grad == 1).all()
