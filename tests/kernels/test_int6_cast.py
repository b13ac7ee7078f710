"""int6_cast and int6's kernel: the grid against numpy bit for bit, rows that have no grid, clip, scale, bad input."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pgolf.kernels._op import paths
from pgolf.kernels.int6 import MAX_WIDTH, int6, int6_cast, int6_cast_, int6_cast_ref, int6_quantize_ref

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FP32 = torch.float32


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def of_all_sizes(rows, cols, seed=0):
    """Rows between subnormal and just below the largest that has a grid, zeros included."""
    w = rand(rows, cols, seed=seed) * 10.0 ** torch.linspace(-42, 5, rows, device=DEVICE)[:, None]
    w[rows // 2] = 0
    return w


def numpy_fake_quant(w, qmax=31, qmin=-32, floor=0.0):
    """The contract, written in numpy; fp32 throughout."""
    w = w.cpu().numpy()
    step = np.maximum(np.abs(w).max(axis=-1) / np.float32(qmax), np.float32(floor / qmax)).astype(np.float16)
    step = np.maximum(step, np.float16(2.0**-24)).astype(np.float32)[..., None]
    return torch.from_numpy(np.clip(np.rint(w / step), qmin, qmax).astype(np.int8).astype(np.float32) * step)


def assert_same_bits(got, want):
    torch.testing.assert_close(got.cpu().view(torch.int32), want.cpu().view(torch.int32), rtol=0, atol=0)


@pytest.mark.parametrize("qmax, qmin, floor", [(31, -32, 0.0), (31, -32, 1.0), (15, -15, 0.0), (127, -128, 0.01)])
@pytest.mark.parametrize("cols", [3, 48])
def test_equals_numpy_bit_for_bit(cols, qmax, qmin, floor):
    w = of_all_sizes(64, cols)
    want = numpy_fake_quant(w, qmax, qmin, floor)  # holds no -0, so neither may the kernel
    grid = {"qmax": qmax, "qmin": qmin, "scale_floor": floor}
    assert_same_bits(int6(w, **grid), want)
    assert_same_bits(int6_cast(w, quantize=True, dtype=FP32, **grid), want)
    with paths(int6="reference"):
        assert_same_bits(int6_cast(w, quantize=True, dtype=FP32, **grid), want)


def test_the_step_is_rounded_to_fp16_half_to_even():
    """Peaks of 31 times every kind of fp32 number around fp16's grid: ties, neighbours of ties, subnormals."""
    fp16 = torch.cat([torch.arange(0, 40), torch.arange(1010, 1040), torch.arange(31713, 31743)])
    fp16 = fp16.to(torch.int16).view(torch.float16).float()
    tie = (fp16[1:] + fp16[:-1]) / 2
    steps = torch.cat([fp16, tie, tie * (1 + 2.0**-22), tie * (1 - 2.0**-22)])
    w = (steps * 31)[:, None].to(DEVICE) * torch.tensor([1.0, -0.5], device=DEVICE)
    assert_same_bits(int6_cast(w, quantize=True, dtype=FP32), numpy_fake_quant(w))


def test_halves_round_to_even():
    row = torch.tensor([[31.0, 0.5, 1.5, 2.5, -0.5, -1.5, 30.5, -30.5]], device=DEVICE)  # step is exactly 1
    assert int6_cast(row, quantize=True).tolist() == [[31, 0, 2, 2, 0, -2, 30, -30]]


def test_a_second_time_changes_nothing_and_powers_of_two_pass_through():
    w = rand(9, 40)
    once = int6_cast(w, quantize=True, dtype=FP32)
    assert_same_bits(int6_cast(once, quantize=True, dtype=FP32), once)
    assert_same_bits(int6_cast(w * 0.25, quantize=True, dtype=FP32), once * 0.25)


@pytest.fixture
def hardware_maximum(monkeypatch):
    """tl.maximum and tl.minimum of a NaN and a number are the number, as on a GPU; the interpreter's are NaN."""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder as Builder

        for name, op in (("create_maxnumf", np.fmax), ("create_minnumf", np.fmin)):
            monkeypatch.setattr(Builder, name, lambda self, a, b, op=op: self.binary_op(a, b, op))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 31 * 65520.0])
@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("path", ["triton", "reference"])
def test_a_row_without_a_grid_is_nan_and_no_other(bad, clip, path, hardware_maximum):
    w = rand(6, 11)
    w[3, 5] = bad
    if bad == 31 * 65520.0:
        w[3] = bad  # the quantile must be too large, not one weight
    with paths(int6=path):
        out = int6_cast(w, quantize=True, clip=clip, row_scale=rand(6))
    assert out[3].isnan().all() and out[:3].isfinite().all() and out[4:].isfinite().all()
    assert torch.equal(int6_cast(w, quantize=False)[3, :5], w[3, :5].bfloat16())  # a plain cast has no rows


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [True, False])
def test_scale_is_applied_in_fp32_and_rounded_once(quantize, dtype):
    w, scale = rand(2, 5, 24), rand(2, 5)
    plain = numpy_fake_quant(w) if quantize else w.cpu()
    want = (plain * scale.cpu()[..., None]).to(dtype)
    got = int6_cast(w, quantize=quantize, row_scale=scale, dtype=dtype)
    assert got.dtype == dtype and torch.equal(got.cpu(), want)


@pytest.mark.parametrize("clip", [0.25, 0.9, 0.999])
@pytest.mark.parametrize("path", ["triton", "reference"])
def test_clip_is_the_quantile_of_the_row(clip, path):
    w = rand(3, 4, 50)
    peak = np.quantile(w.abs().double().cpu().numpy(), clip, axis=-1, keepdims=True)
    step = (peak / 31).astype(np.float16).astype(np.float64)
    want = np.clip(np.rint(w.double().cpu().numpy() / step), -31, 31) * step
    with paths(int6=path):
        got = int6_cast(w, quantize=True, clip=clip, qmin=-31, dtype=FP32)
    np.testing.assert_allclose(got.cpu().numpy(), want, rtol=1e-6)


def test_out_keeps_its_storage_and_w_is_left_alone():
    w, out = rand(4, 24), torch.full((4, 24), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    before, at = w.clone(), out.data_ptr()
    assert int6_cast_(out, w, quantize=True) is None
    assert out.data_ptr() == at and torch.equal(w, before)
    assert torch.equal(out, int6_cast_ref(w, quantize=True))


def test_strides_of_w_and_scale_do_not_matter():
    w, scale = rand(7, 3, 40).transpose(0, 1)[..., ::2], rand(7, 3).T
    got = int6_cast(w, quantize=True, row_scale=scale)
    assert torch.equal(got, int6_cast_ref(w.contiguous(), quantize=True, row_scale=scale.contiguous()))
    assert torch.equal(int6(w[0]), int6(w[0].contiguous())) and int6(w[0]).is_contiguous()


@pytest.mark.parametrize("cols", [129, 1536, MAX_WIDTH])
def test_wide_rows(cols):
    w = rand(2, cols)
    assert_same_bits(int6_cast(w, quantize=True, dtype=FP32), numpy_fake_quant(w))


def test_gradients_that_the_contract_states():
    """d w = G * row_scale and d row_scale = sum_c W G: what autograd finds through int6 and the product."""
    w, scale, grad = rand(5, 12).requires_grad_(), rand(5, seed=1).requires_grad_(), rand(5, 12, seed=2)
    (int6(w) * scale[:, None]).backward(grad)
    quantised = int6_cast(w, quantize=True, dtype=FP32)
    assert not quantised.requires_grad  # where a graph begins
    torch.testing.assert_close(w.grad, grad * scale.detach()[:, None])
    torch.testing.assert_close(scale.grad, (quantised * grad).sum(1))


def test_int6_passes_the_gradient_unchanged():
    w, grad = rand(6, 10).requires_grad_(), rand(6, 10, seed=1)
    int6(w).backward(grad)
    assert torch.equal(w.grad, grad)


def test_agrees_with_the_export():
    w = rand(32, 64)
    q, step = int6_quantize_ref(w)
    assert_same_bits(int6_cast(w, quantize=True, dtype=FP32), q.float() * step.float()[:, None])


@pytest.mark.slow
def test_compiled_reference_equals_eager():
    """Inductor would leave the step unrounded, were the reference not inside an op."""
    w, scale = rand(64, 96), rand(64)
    with paths(int6="reference"):
        f = lambda w: int6_cast(w * 1.5, quantize=True, row_scale=scale, dtype=FP32) + 1
        assert torch.equal(torch.compile(f, fullgraph=True)(w), f(w))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda w: int6_cast(w[0], quantize=True), r"w \(8,\) torch.float32, expected"),
        (lambda w: int6_cast(w.bfloat16(), quantize=True), r"w \(3, 8\) torch.bfloat16, expected"),
        (lambda w: int6_cast(w[:, :0], quantize=False), r"w \(3, 0\)"),
        (lambda w: int6_cast(w, quantize=True, dtype=torch.float64), "out is torch.float64, expected float32"),
        (lambda w: int6_cast(w, quantize=True, row_scale=w[0]), r"row_scale \(8,\).*, expected \(3,\) torch.float32"),
        (lambda w: int6_cast(w, quantize=True, row_scale=w[:, 0].half()), r"row_scale \(3,\) torch.float16"),
        (lambda w: int6_cast(w, quantize=True, row_scale=w[:, 0].to("meta")), "row_scale is on meta"),
        (lambda w: int6_cast(w, quantize=True, qmax=128), "qmax=128, expected"),
        (lambda w: int6_cast(w, quantize=True, qmin=1), "qmin=1, qmax=31, expected"),
        (lambda w: int6(w, qmax=0), "qmax=0, expected"),
        (lambda w: int6_cast(w, quantize=True, clip=0.0), "clip=0.0, expected a quantile"),
        (lambda w: int6_cast_(w[:2].clone(), w, quantize=True), r"out \(2, 8\).*, expected \(3, 8\), contiguous"),
        (lambda w: int6_cast_(w.T.contiguous().T, w, quantize=True), r"strides \(1, 3\), expected .*contiguous"),
        (lambda w: int6_cast(w.new_ones(1, MAX_WIDTH + 1), quantize=True), "8193 columns, expected at most"),
        (lambda w: int6(w.new_ones(1, MAX_WIDTH + 1)), "8193 columns, expected at most"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(rand(3, 8))


def test_the_reference_has_no_widest_row():
    w = torch.ones(1, MAX_WIDTH + 1)
    with paths(int6="reference"):
        assert int6(w).shape == w.shape


COMPILE = """
from bench import static
from bench.cases import CASES
from pgolf.kernels._op import recording
import triton
triton.runtime.driver.set_active(static.Pretend(90))
for case in (c for c in CASES if c.id in ("int6-cast_down", "flat_update-down")):
    with recording(90) as seen:
        case.fn(**case.make("production", "meta", case.dtypes[-1]))
    one = seen.launches[0]
    print(one.kernel.warmup(*one.args, grid=one.grid, **one.how.blocks, **one.constants).asm["ptx"])
"""


def test_divisions_are_ieee_in_the_machine_code(root):
    """The interpreter cannot tell: numpy's `/` is IEEE, Triton's is not."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE]
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    kinds = {word for word in run.stdout.split() if word.startswith("div.") and "f32" in word}
    assert run.stdout.count(".entry") == 2 and kinds == {"div.rn.f32"} and ".ftz" not in run.stdout


@pytest.mark.gpu
def test_a_million_rows_equal_the_cpu_bit_for_bit():
    w = of_all_sizes(2**20, 16)
    assert_same_bits(int6_cast(w, quantize=True, dtype=FP32), int6_cast_ref(w.cpu(), quantize=True, dtype=FP32))
    with paths(int6="reference"):  # torch's own division on CUDA, too
        assert_same_bits(int6(w), int6_cast_ref(w.cpu(), quantize=True, dtype=FP32))


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    rows = 2**31 // 1024 + 3
    w = torch.zeros(rows, 1024, device="cuda")
    w[-1] = 3.0
    out = int6_cast(w, quantize=True)
    assert (out[-1] == 3).all() and (out[-2] == 0).all()
