"""The mlp op beyond the cases: every activation on chosen u, packed signs, what is computed and saved, bad input."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.cases.mlp import CASES
from bench.check import check
from pgolf.kernels import mlp as module
from pgolf.kernels._op import recording
from pgolf.kernels._triton import TensorDescriptor
from pgolf.kernels.mlp import ACTIVATIONS, mlp, mlp_ref

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEN = torch.Generator().manual_seed(0)
BY_HAND = {  # (a, a') with act = a^2
    "relu2": lambda u, s: (max(u, 0.0), float(u > 0)),
    "leaky_relu2": lambda u, s: (u, 1.0) if u > 0 else (s * u, s),
    "gelu2": lambda u, s: (u * cdf(u), cdf(u) + u * math.exp(-u * u / 2) / math.sqrt(2 * math.pi)),
    "silu2": lambda u, s: (u * sigmoid(u), sigmoid(u) + u * sigmoid(u) * sigmoid(-u)),
}


def cdf(u):
    return 0.5 * math.erfc(-u / math.sqrt(2))


def sigmoid(u):
    return 1 / (1 + math.exp(-u)) if u > -700 else 0.0


def rand(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=GEN).to(DEVICE, dtype)


def weights(d, f, dtype=torch.float32):
    return rand(f, d, dtype=dtype) / d**0.5, rand(d, f, dtype=dtype) / f**0.5


def through_identity(u, activation, slope=0.5):
    """(act(u), act'(u)) of (n, 8) values: with unit weights u = x, y = act(x) and dx = dy act'(x)."""
    eye = torch.eye(8, dtype=u.dtype, device=DEVICE)
    x = u.to(DEVICE).requires_grad_()
    y = mlp(x, eye, eye, activation=activation, slope=slope)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.bfloat16, 2.0**-7)])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_each_activation_by_hand(activation, dtype, tolerance):
    values = [0.0, -0.0, 1e-3, -1e-3, 0.7, -0.7, 3.0, -3.0, 12.0, -12.0, 1e4, -1e4, 1e9, -1e9, -80.0, 88.0]
    u = torch.tensor(values).view(2, 8).to(dtype)
    got, slope = through_identity(u, activation, 0.25)
    hand = [BY_HAND[activation](v, 0.25) for v in u.flatten().tolist()]
    want = torch.tensor([a * a for a, _ in hand]).view(2, 8)
    want_slope = torch.tensor([2 * a * da for a, da in hand]).view(2, 8)
    torch.testing.assert_close(got.cpu().float(), want, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(slope.cpu().float(), want_slope, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, -0.3, 1.0, 2.0])
def test_any_slope(slope):
    u = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0]])
    got, derivative = through_identity(u, "leaky_relu2", slope)
    a = torch.where(u > 0, u, slope * u)
    torch.testing.assert_close(got.cpu(), a * a)
    torch.testing.assert_close(derivative.cpu(), torch.where(u > 0, 2 * u, 2 * slope**2 * u))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_swallowed(activation):
    """A diverged run must show: a plain maximum in the kernel would turn NaN into 0."""
    u = torch.full((1, 8), float("nan"))
    y, slope = through_identity(u, activation)
    assert y.isnan().all() and slope.isnan().all()


def test_signs_are_packed_as_documented():
    x, (up, down) = rand(19, 8), weights(8, 200)
    x[3] = 0.0  # u = 0 counts as not positive
    y, post, signs = torch.ops.pgolf.mlp(x, up, down, "leaky_relu2", 0.5, True)
    assert signs.shape == (19, 32)  # 200 columns: 4 groups of 64, 8 bytes each
    u = (x @ up.T).cpu().numpy()
    for g, j, i in np.ndindex(4, 8, 8):
        column = 64 * g + j + 8 * i
        if column < 200:
            np.testing.assert_array_equal(signs[:, 8 * g + j].cpu().numpy() >> i & 1, u[:, column] > 0)
    torch.testing.assert_close(post, torch.nn.functional.leaky_relu(x @ up.T, 0.5).square(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(y, post @ down.T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation, extra", [("relu2", 0), ("leaky_relu2", 1), ("silu2", 1), ("gelu2", 1)])
def test_what_is_saved(activation, extra):
    """Without a backward only y leaves the op, and it is the same y."""
    x, (up, down) = rand(5, 8), weights(8, 16)
    kept = torch.ops.pgolf.mlp(x, up, down, activation, 0.5, True)
    alone = torch.ops.pgolf.mlp(x, up, down, activation, 0.5, False)
    assert len(kept) == 2 + extra and len(alone) == 1
    assert torch.equal(kept[0], alone[0])
    with torch.no_grad():
        assert torch.equal(mlp(x.requires_grad_(), up, down, activation=activation), alone[0])


@pytest.mark.parametrize("needed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)])
def test_only_needed_gradients_are_computed(needed, monkeypatch):
    launched, launch = [], module.launch
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: (launched.append(kernel), launch(kernel, *a, **k)))
    leaves = [rand(6, 8), *weights(8, 16)]
    for leaf, need in zip(leaves, needed, strict=True):
        leaf.requires_grad_(bool(need))
    grads = []
    for f in (mlp, mlp_ref):
        y = f(*leaves, activation="leaky_relu2", slope=0.3)
        grads.append(torch.autograd.grad(y.square().sum(), [t for t in leaves if t.requires_grad]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert (module._mlp_du_kernel in launched) == bool(needed[0] or needed[1])  # dWdown = dy^T post needs no du


def test_leading_axes_do_not_matter():
    x, (up, down) = rand(12, 8), weights(8, 16)
    y = mlp(x, up, down, activation="silu2")
    assert torch.equal(mlp(x.view(3, 4, 8), up, down, activation="silu2").view(12, 8), y)
    assert torch.equal(mlp(x.view(2, 3, 2, 8), up, down, activation="silu2").view(12, 8), y)
    torch.testing.assert_close(mlp(x[3], up, down, activation="silu2"), y[3])


@pytest.mark.parametrize("activation", ["leaky_relu2", "silu2"])
def test_non_contiguous_and_misaligned(activation):
    """Transposed x, strided weights, a transposed gradient; then x at an address that TMA refuses."""
    x, up, down = rand(5, 3, 8).transpose(0, 1), rand(16, 16)[:, ::2], rand(16, 8).T
    assert not (x.is_contiguous() or up.is_contiguous() or down.is_contiguous())
    grads = []
    for f in (mlp, mlp_ref):
        leaves = [t.detach().requires_grad_() for t in (x, up, down)]
        y = f(*leaves, activation=activation)
        grads.append((y, *torch.autograd.grad(y, leaves, y.detach().mT.contiguous().mT)))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    shifted = rand(41)[1:].view(5, 8)
    assert shifted.is_contiguous() and shifted.data_ptr() % 16
    want = mlp_ref(shifted, up, down, activation=activation)
    torch.testing.assert_close(mlp(shifted, up, down, activation=activation), want, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(DEVICE == "cuda", reason="natively an arch takes the one path that it has")
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_with_and_without_tma_agree(activation, monkeypatch):
    """GPUs before sm_90 get pointers where the others get descriptors."""
    leaves, got = [t.requires_grad_() for t in (rand(17, 24), *weights(24, 136))], []
    for arch in (0, 80):
        monkeypatch.setattr(module, "arch_of", lambda x, arch=arch: arch)
        y = mlp(*leaves, activation=activation)
        got.append((y, *torch.autograd.grad(y.sum(), leaves)))
    for a, b in zip(*got, strict=True):
        assert torch.equal(a, b)


def test_one_kernel_each_way_on_every_arch():
    case = next(c for c in CASES if c.name == "leaky_relu2")
    for arch in (80, 90, 120):
        with recording(arch) as seen:
            inputs = case.make("production", "meta", torch.bfloat16)
            y = mlp(**{k: v.requires_grad_() if k in case.grads else v for k, v in inputs.items()})
            torch.autograd.grad(y, [inputs[g] for g in case.grads], torch.empty_like(y))
        assert [one.kernel for one in seen.launches] == [module._mlp_up_kernel, module._mlp_du_kernel]
        for one in seen.launches:
            assert isinstance(one.args[0], TensorDescriptor) == (arch >= 90)
            assert one.grid[0] <= 2 * 170


@pytest.mark.parametrize(
    "change, message",
    [
        ({"activation": "tanh"}, "activation 'tanh', expected one of relu2, leaky_relu2"),
        ({"x": torch.ones(2, 16)}, r"x \(2, 16\).* do not chain"),
        ({"w_down": torch.ones(16, 16)}, r"Wdown \(16, 16\) do not chain"),
        ({"w_up": torch.ones(16, 8).half()}, "Wup is torch.float16, expected torch.float32 like x"),
        ({"w_down": torch.ones(8, 16).bfloat16()}, "Wdown is torch.bfloat16, expected torch.float32 like x"),
        ({"w_down": torch.ones(8, 16, device="meta")}, "Wdown is on meta, expected"),
        ({"x": torch.ones(2, 6), "w_up": torch.ones(16, 6), "w_down": torch.ones(6, 16)}, "D is 6, .*multiple of 4"),
        ({"w_up": torch.ones(18, 8), "w_down": torch.ones(8, 18)}, "F is 18, expected a positive multiple of 4"),
        ({"w_up": torch.ones(0, 8), "w_down": torch.ones(8, 0)}, "F is 0, expected a positive multiple of 4"),
    ],
)
def test_bad_input(change, message):
    inputs = {"x": torch.ones(2, 8), "w_up": torch.ones(16, 8), "w_down": torch.ones(8, 16)} | change
    on = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) and not v.is_meta else v for k, v in inputs.items()}
    with pytest.raises(ValueError, match=message):
        mlp(**on)


def test_kernel_refuses_what_the_reference_takes():
    wide = [t.to(DEVICE, torch.float64) for t in (torch.ones(2, 8), torch.ones(16, 8), torch.ones(8, 16))]
    with pytest.raises(ValueError, match=r"x is torch\.float64, expected float32"):
        mlp(*wide)
    half = [t.to(DEVICE, torch.bfloat16) for t in (torch.ones(2, 12), torch.ones(16, 12), torch.ones(12, 16))]
    with pytest.raises(ValueError, match="D is 12, expected a positive multiple of 8"):
        mlp(*half)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_full_tiles_natively(case, dtype):
    """Sizes of several tiles each way, and none that divides."""
    check(replace(case, sizes={"tiles": {"b": 3, "t": 1001, "d": 328, "f": 1448}}), "tiles", "cuda", dtype)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    rows, (up, down) = 2**31 // 1536 + 300, weights(64, 1536, torch.bfloat16)
    x = torch.zeros(rows, 64, dtype=torch.bfloat16, device="cuda")
    x[-7:] = rand(7, 64, dtype=torch.bfloat16)
    x.requires_grad_()
    y = mlp(x, up, down, activation="leaky_relu2")
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    tail = x[-7:].detach().requires_grad_()
    want = mlp_ref(tail, up, down, activation="leaky_relu2")
    (dtail,) = torch.autograd.grad(want, tail, torch.ones_like(want))
    torch.testing.assert_close(y[-7:], want, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(dx[-7:], dtail, rtol=2e-2, atol=2e-2)
    assert (y[:-7] == 0).all() and (dx[:-7] == 0).all()
