"""flat_update against torch's foreach kernels, its cast against int6_cast, rates as tensors, edges, bad input."""

import math

import pytest
import torch

from pgolf.kernels._op import paths
from pgolf.kernels.flat_update import flat_update, flat_update_ref
from pgolf.kernels.int6 import MAX_WIDTH, int6_cast_ref

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOTH = pytest.mark.parametrize("path", ["triton", "reference"])


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def zero_dim(value):
    return torch.tensor(value, dtype=torch.float32, device=DEVICE)


def ulps(got, want):
    """The largest distance in units of the last place of the larger of the two."""
    size = torch.maximum(got.abs(), want.abs()).double().clamp_min(2.0**-126)
    return ((got.double() - want.double()).abs() / torch.exp2(size.log2().floor() - 23)).max().item()


@BOTH
@pytest.mark.parametrize("shape", [(2, 9, 20), (5, 48)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_step_equals_the_foreach_kernels_to_an_ulp(path, dtype, shape):
    """w and the direction of the same sign, so that no cancellation makes a small number's last place count."""
    w, d, ema = rand(*shape).abs(), -rand(*shape, seed=1).abs().to(dtype), rand(*shape, seed=2).abs()
    lr, decay, scale, average = 0.023, 0.04, math.sqrt(3), 0.997
    want, want_ema = w.clone(), ema.clone()
    torch._foreach_mul_([want], 1.0 - lr * decay)
    torch._foreach_add_([want], [d], alpha=-lr * scale)
    with paths(flat_update=path):
        flat_update(w, d, lr=lr, weight_decay=decay, scale=scale, ema=ema, ema_decay=average)
    assert ulps(w, want) <= 1 and not torch.equal(want, rand(*shape).abs())
    torch._foreach_lerp_([want_ema], [w], 1.0 - average)
    assert ulps(ema, want_ema) <= 1


@BOTH
@pytest.mark.parametrize("shape", [(9, 20), (2, 7, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantize", [False, True])
def test_out_is_the_cast_of_the_weights_that_were_written(path, quantize, dtype, shape):
    w, scale = rand(*shape), rand(*shape[:-1], seed=3)
    out = torch.full_like(w, float("nan"), dtype=dtype)
    grid = {"quantize": quantize, "row_scale": scale, "qmax": 15, "qmin": -16, "scale_floor": 0.01}
    with paths(flat_update=path):
        flat_update(w, rand(*shape, seed=1), lr=0.1, weight_decay=0.1, out=out, **grid)
    assert torch.equal(out, int6_cast_ref(w, dtype=dtype, **grid))


def test_many_steps_follow_fp64():
    w, ema = rand(4, 33), rand(4, 33, seed=2)
    exact, exact_ema = w.double(), ema.double()
    for step in range(6):
        d, rates = rand(4, 33, seed=step).bfloat16(), {"lr": 0.05 / (1 + step), "weight_decay": 0.1}
        flat_update(w, d, **rates, ema=ema, ema_decay=0.9)
        exact = exact * (1 - rates["lr"] * 0.1) - rates["lr"] * d.double()
        exact_ema = 0.9 * exact_ema + 0.1 * exact
    torch.testing.assert_close(w.double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(ema.double(), exact_ema, rtol=0, atol=2e-6)


@BOTH
@pytest.mark.parametrize("lr, decay", [(zero_dim, zero_dim), (zero_dim, float), (float, zero_dim)])
def test_rates_as_tensors_equal_numbers(lr, decay, path):
    got, want, d = rand(3, 20), rand(3, 20), rand(3, 20, seed=1)
    with paths(flat_update=path):
        flat_update(got, d, lr=lr(0.125), weight_decay=decay(0.5), scale=1.5)
        flat_update(want, d, lr=0.125, weight_decay=0.5, scale=1.5)
    assert torch.equal(got, want)


def test_a_new_rate_in_a_tensor_needs_no_new_graph():
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph

    @torch.compile(backend=keep, fullgraph=True)
    def step(w, d, lr, decay):
        flat_update(w, d, lr=lr, weight_decay=decay)

    w, d, decay = torch.ones(2, 8, device=DEVICE), torch.ones(2, 8, device=DEVICE), zero_dim(0.0)
    for rate in (0.5, 0.25, 0.125):
        step(w, d, zero_dim(rate), decay)
    assert len(graphs) == 1 and (w == 0.125).all()


@BOTH
def test_ends_of_the_average_and_a_rate_of_zero_are_exact(path):
    w, d, ema = rand(5, 20), rand(5, 20, seed=1), rand(5, 20, seed=2) * 1e3
    before = ema.clone()
    with paths(flat_update=path):
        flat_update(w, d, lr=0.1, weight_decay=0.0, ema=ema, ema_decay=1.0)
        assert torch.equal(ema, before)
        flat_update(w, d, lr=0.1, weight_decay=0.0, ema=ema, ema_decay=0.0)
        assert torch.equal(ema, w)
        before = w.clone()
        flat_update(w, d, lr=0.0, weight_decay=0.3)
        assert torch.equal(w, before)


def test_only_w_ema_and_out_are_written_in_place():
    tensors = {name: rand(3, 7, 20, seed=i) for i, name in enumerate(("w", "direction", "ema", "out"))}
    scale = rand(3, 7)
    before, at = {k: t.clone() for k, t in tensors.items()}, {k: t.data_ptr() for k, t in tensors.items()}
    assert flat_update(**tensors, lr=0.1, weight_decay=0.1, ema_decay=0.5, row_scale=scale) is None
    assert {k: t.data_ptr() for k, t in tensors.items()} == at
    changed = {k for k, t in tensors.items() if not torch.equal(t, before[k])}
    assert changed == {"w", "ema", "out"} and torch.equal(scale, rand(3, 7))


def test_neither_parameters_nor_strides_are_in_the_way():
    """A parameter that requires grad is updated as by an optimiser; a transposed direction counts as it reads."""
    w = torch.nn.Parameter(rand(20, 12))
    want, d = w.detach().clone(), rand(12, 20, seed=1).T
    flat_update(w, d, lr=0.1, weight_decay=0.1)
    flat_update(want, d.contiguous(), lr=0.1, weight_decay=0.1)
    assert torch.equal(w, want) and w.requires_grad and w.is_leaf


@BOTH
def test_nan_stays_in_its_row(path):
    w, d = rand(6, 20), rand(6, 20, seed=1)
    d[2, 3] = float("nan")
    out = torch.empty_like(w, dtype=torch.bfloat16)
    with paths(flat_update=path):
        flat_update(w, d, lr=0.1, weight_decay=0.1, out=out, quantize=True)
    assert out[2].isnan().all() and int(out.isnan().sum()) == 20 and int(w.isnan().sum()) == 1


@pytest.mark.parametrize("cols", [1, 129, 1536, MAX_WIDTH])
def test_widths(cols):
    w, d = rand(2, cols), rand(2, cols, seed=1)
    want, out = w.clone(), torch.empty_like(w, dtype=torch.bfloat16)
    flat_update(w, d, lr=0.1, weight_decay=0.1, out=out, quantize=True)
    flat_update_ref(want, d, lr=0.1, weight_decay=0.1)
    torch.testing.assert_close(w, want, rtol=1e-6, atol=1e-7)
    assert torch.equal(out, int6_cast_ref(w, quantize=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"w": torch.ones(8)}, r"w \(8,\) torch.float32, expected"),
        ({"w": torch.ones(3, 8).bfloat16()}, r"w \(3, 8\) torch.bfloat16"),
        ({"w": torch.ones(8, 3).T}, r"w has strides \(1, 3\), expected contiguous"),
        ({"direction": torch.ones(8, 3)}, r"direction is \(8, 3\), expected \(3, 8\)"),
        ({"direction": torch.ones(3, 8).double()}, "direction is torch.float64, expected float32"),
        ({"direction": torch.ones(3, 8, device="meta")}, "direction is on meta"),
        ({"ema": torch.ones(3, 8).bfloat16()}, r"ema is \(3, 8\) torch.bfloat16.*expected \(3, 8\) torch.float32"),
        ({"ema": torch.ones(8, 3).T}, r"ema is .*strides \(1, 3\), expected"),
        ({"ema_decay": 1.5}, "ema_decay=1.5, expected 0 to 1"),
        ({"out": torch.ones(3, 4)}, r"out \(3, 4\).*, expected \(3, 8\), contiguous"),
        ({"out": torch.ones(3, 8).double()}, "out is torch.float64"),
        ({"quantize": True}, "quantize or row_scale without out"),
        ({"row_scale": torch.ones(3)}, "quantize or row_scale without out"),
        ({"row_scale": torch.ones(8), "out": torch.ones(3, 8)}, r"row_scale \(8,\).*, expected \(3,\)"),
        ({"lr": torch.ones(1)}, r"lr is \(1,\) torch.float32, expected a number or \(\) float32"),
        ({"weight_decay": torch.ones((), dtype=torch.float64)}, r"weight_decay is \(\) torch.float64"),
        ({"qmax": 0}, "qmax=0, expected"),
        ({"w": torch.ones(1, MAX_WIDTH + 1)}, f"{MAX_WIDTH + 1} columns, expected at most {MAX_WIDTH}"),
    ],
)
def test_bad_input(change, message):
    inputs = {"w": torch.ones(3, 8), "direction": torch.ones(3, 8), "lr": 0.1, "weight_decay": 0.1, **change}
    inputs = {k: t.to(DEVICE) if isinstance(t, torch.Tensor) and not t.is_meta else t for k, t in inputs.items()}
    with pytest.raises(ValueError, match=message):
        flat_update(**inputs)


@pytest.mark.gpu
def test_equals_the_foreach_kernels_on_a_gpu():
    w, d, ema = rand(4, 512, 1536), rand(4, 512, 1536, seed=1).bfloat16(), rand(4, 512, 1536, seed=2)
    want, want_ema = w.clone(), ema.clone()
    flat_update(w, d, lr=0.023, weight_decay=0.04, scale=3**0.5, ema=ema, ema_decay=0.997)
    torch._foreach_mul_([want], 1.0 - 0.023 * 0.04)
    torch._foreach_add_([want], [d], alpha=-0.023 * 3**0.5)
    torch.testing.assert_close(w, want, rtol=2.0**-23, atol=1e-8)
    torch._foreach_lerp_([want_ema], [w], 1.0 - 0.997)
    torch.testing.assert_close(ema, want_ema, rtol=2.0**-23, atol=1e-8)


@pytest.mark.gpu
def test_a_captured_graph_takes_a_new_rate():
    w, d, lr, decay = rand(2, 512), rand(2, 512, seed=1), zero_dim(0.5), zero_dim(0.0)
    flat_update(w.clone(), d, lr=lr, weight_decay=decay)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        flat_update(w, d, lr=lr, weight_decay=decay)
    w.zero_()
    for rate in (1.0, 2.0):
        lr.fill_(rate)
        graph.replay()
    assert torch.equal(w, -3 * d)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    rows = 2**31 // 1024 + 3
    w = torch.zeros(rows, 1024, device="cuda")
    d = torch.zeros(rows, 1024, device="cuda", dtype=torch.bfloat16)
    d[-1] = 2.0
    out = torch.empty_like(w, dtype=torch.bfloat16)
    flat_update(w, d, lr=0.5, weight_decay=0.0, out=out, quantize=True)
    assert (w[-1] == -1).all() and (out[-1] == -1).all() and (w[-2] == 0).all()
