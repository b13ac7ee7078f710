"""The repairs of Triton's interpreter do what they say: bf16 equals torch's bit for bit, loops take tensor bounds."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: no interpreter to repair")
if torch.cuda.is_available():
    pytest.skip("kernels run natively here: the interpreter is off", allow_module_level=True)

import interp_shim
import numpy as np
import triton
import triton.language as tl

interp_shim.install()
BF16 = torch.bfloat16
GEN = torch.Generator().manual_seed(0)


def edge_values(n: int = 4096) -> torch.Tensor:
    """fp32 values around every rounding decision: random bit patterns, ties, subnormals, infinities, NaN."""
    bits = torch.randint(-(2**31), 2**31, (n,), generator=GEN)
    ties = torch.randint(0, 2**15, (n,), generator=GEN) * 2**16 + 2**15  # halfway between two bf16
    special = torch.tensor([0, 2**31 - 2**23 - 1, 0x7F800000, 0x7FC00000, 1, 0x7FFF, 0x8000, 0x8001])
    return torch.cat([bits, ties, special]).to(torch.int32).view(torch.float32)


@triton.jit
def copy_kernel(x, y, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


def copied(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    copy_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), B=1024)
    return y


def same(a, b):
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


def test_fp32_to_bf16_rounds_as_torch():
    x = edge_values()
    assert same(copied(x, BF16), x.to(BF16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bf16_widens_as_torch(dtype):
    x = edge_values().to(BF16)
    assert same(copied(x, dtype), x.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_integers_to_bf16_and_back(dtype):
    x = torch.arange(-3000, 3000, dtype=dtype)
    assert same(copied(x, BF16), x.to(BF16))
    assert torch.equal(copied(x.to(BF16), dtype), x.to(BF16).to(dtype))


@triton.jit
def arithmetic_kernel(x, y, out, less, n, B: tl.constexpr):
    i = tl.arange(0, B)
    a, b = tl.load(x + i, mask=i < n, other=0.0), tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + i, a * b + a - b, mask=i < n)
    tl.store(less + i, (a < b).to(tl.int32), mask=i < n)


def test_bf16_arithmetic_rounds_after_every_operation():
    x, y = torch.randn(500, generator=GEN).to(BF16), torch.randn(500, generator=GEN).to(BF16)
    out, less = torch.empty_like(x), torch.empty(500, dtype=torch.int32)
    arithmetic_kernel[(1,)](x, y, out, less, 500, B=512)
    assert torch.equal(out, x * y + x - y)
    assert torch.equal(less.bool(), x < y)


@triton.jit
def dot_kernel(x, y, out, N: tl.constexpr):
    i = tl.arange(0, N)
    at = i[:, None] * N + i[None, :]
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


def test_bf16_dot_multiplies_numbers():
    x, y = torch.randn(32, 32, generator=GEN).to(BF16), torch.randn(32, 32, generator=GEN).to(BF16)
    out = torch.empty(32, 32)
    dot_kernel[(1,)](x, y, out, N=32)
    torch.testing.assert_close(out, x.float() @ y.float(), rtol=1e-6, atol=1e-6)


@triton.jit
def loop_kernel(bound, out, B: tl.constexpr):
    total = 0
    for i in range(tl.program_id(0), tl.cdiv(tl.load(bound), B), 2):
        total += i
    tl.store(out + tl.program_id(0), total)


def test_loop_over_tensor_bounds():
    out = torch.zeros(2, dtype=torch.int64)
    loop_kernel[(2,)](torch.tensor([37]), out, B=4)
    assert out.tolist() == [0 + 2 + 4 + 6 + 8, 1 + 3 + 5 + 7 + 9]


@triton.jit
def reduced_kernel(x, out, n, N: tl.constexpr):
    i = tl.arange(0, N)
    positive = (tl.sum(tl.load(x + i), axis=0) > 0.0) & (n > 1)
    tl.store(out, positive.to(tl.int32))


def test_comparison_of_a_reduced_value_combines():
    out = torch.zeros(1, dtype=torch.int32)
    reduced_kernel[(1,)](torch.ones(4), out, 3, N=4)
    assert out.item() == 1


def test_the_repairs_are_needed():
    """Plain numpy truncation, what the unrepaired interpreter does, is wrong for half of all values: the tests above
    would see it."""
    x = torch.randn(1000, generator=GEN)
    truncated = (x.numpy().view(np.uint32) >> 16).astype(np.uint16)
    wrong = (truncated != x.to(BF16).view(torch.int16).numpy().view(np.uint16)).mean()
    assert 0.4 < wrong < 0.6
