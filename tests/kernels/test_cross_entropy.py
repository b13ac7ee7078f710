"""cross_entropy beyond the cases: brute force in fp64, extreme logits, per-token weights, targets that are no ids."""

import math

import numpy as np
import pytest
import torch
from helpers import random_batch
from torch.autograd import gradcheck

from pgolf.kernels import _op
from pgolf.kernels import cross_entropy as module
from pgolf.kernels.cross_entropy import cross_entropy, cross_entropy_ref
from pgolf.model.config import AttentionConfig, EmbedConfig, InitConfig, LossConfig, MileConfig, ModelConfig, PlanConfig
from pgolf.model.gpt import GPT
from pgolf.model.objective import Objective

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CPU = pytest.mark.skipif(DEVICE == "cuda", reason="targets are looked at on a CPU only")


def brute_force(logits, targets, cap):
    """nll, entropy and the gradient of nll, row by row in numpy's fp64."""
    x, y = logits.detach().double().cpu().numpy(), targets.cpu().numpy()
    nll, entropy, grad = np.zeros(len(x)), np.zeros(len(x)), np.zeros(x.shape)
    for n, row in enumerate(x):
        t = np.tanh(row / cap)
        p = np.exp(cap * t - (cap * t).max())
        p /= p.sum()
        log_p = cap * t - (cap * t).max() - np.log(np.exp(cap * t - (cap * t).max()).sum())
        nll[n], entropy[n] = -log_p[y[n]], -(p * log_p).sum()
        grad[n] = (p - (np.arange(len(row)) == y[n])) * (1 - t * t)
    return nll, entropy, grad


def make(n, v, scale=8.0, dtype=torch.float32, seed=0):
    gen = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=gen) * scale).to(dtype)
    return logits.to(DEVICE).requires_grad_(), torch.randint(0, v, (n,), generator=gen).to(DEVICE)


def close(got, want, atol, rtol=0.0):
    np.testing.assert_allclose(got.detach().double().cpu().numpy(), want, atol=atol, rtol=rtol)


@pytest.mark.parametrize("cap", [15.0, 30.0, 75.0])
@pytest.mark.parametrize("n, v", [(5, 2), (4, 37), (3, 70)])
def test_equals_brute_force_within_the_error_of_the_contract(n, v, cap, kernels_on):
    logits, targets = make(n, v, scale=cap / 2)  # a third of the entries well into the cap
    nll, entropy = cross_entropy(logits, targets, cap=cap, entropy=True)
    want_nll, want_entropy, want_grad = brute_force(logits, targets, cap)
    close(nll, want_nll, atol=6e-7 * cap)
    close(entropy, want_entropy, atol=6e-7 * cap)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    close(grad, want_grad, atol=1e-6 * cap)


@pytest.mark.parametrize("dtype, error", [(torch.bfloat16, 4e-3), (torch.float16, 5e-4)])
def test_half_precision_logits_are_exact_inputs_and_the_gradient_is_rounded_once(dtype, error, kernels_on):
    logits, targets = make(6, 37, scale=4.0, dtype=dtype)
    nll, _ = cross_entropy(logits, targets, cap=30.0)
    want_nll, _, want_grad = brute_force(logits, targets, 30.0)
    close(nll, want_nll, atol=2e-5)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    assert grad.dtype == dtype
    close(grad, want_grad, atol=2e-6, rtol=error)


def test_small_probabilities_survive_in_bf16(kernels_on):
    """p = 1e-13 times 1e-5, a token's share of the loss: bf16 has fp32's range of exponents, so nothing is flushed."""
    logits = torch.tensor([[15.0, -15.0, 0.0]], dtype=torch.bfloat16, device=DEVICE).requires_grad_()
    nll, _ = cross_entropy(logits, torch.zeros(1, dtype=torch.int64, device=DEVICE), cap=30.0)
    (grad,) = torch.autograd.grad(nll.sum() * 1e-5, logits)
    want = brute_force(logits, torch.zeros(1, dtype=torch.int64), 30.0)[2] * 1e-5
    assert 0 < abs(want[0, 1]) < 1e-16
    close(grad[:, 1:], want[:, 1:], atol=0, rtol=4.1e-3)


@pytest.mark.parametrize("big", [1e4, 3e38, math.inf])
@pytest.mark.parametrize("cap", [30.0, 80.0])
def test_extreme_logits_are_the_cap(big, cap, kernels_on):
    rows = [[big, -big, 0.0, big], [-big] * 4, [big] * 4, [-big, big, -big, -big]]
    logits = torch.tensor(rows, device=DEVICE).requires_grad_()
    targets = torch.tensor([0, 1, 2, 0], device=DEVICE)
    nll, entropy = cross_entropy(logits, targets, cap=cap, entropy=True)
    z = torch.tensor(rows, dtype=torch.float64).clamp(-cap, cap)
    log_p = z - torch.logsumexp(z, 1, keepdim=True)
    close(nll, -log_p[range(4), targets.cpu()].numpy(), atol=2e-5)
    close(entropy, -(log_p.exp() * log_p).sum(1).numpy(), atol=2e-5)
    assert (nll >= 0).all() and (entropy >= 0).all()
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    assert torch.isfinite(grad).all()
    assert (grad[logits.abs() == big] == 0).all()  # the cap is flat there


def test_a_nan_stays_in_its_row(kernels_on):
    logits, targets = make(5, 20)
    with torch.no_grad():
        logits[2, 3] = math.nan
    nll, entropy = cross_entropy(logits, targets, cap=30.0, entropy=True)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    bad = torch.arange(5, device=DEVICE) == 2
    for t in (nll, entropy, grad.sum(1)):
        assert torch.equal(t.isnan(), bad)


def test_a_row_s_gradient_scales_with_its_weight(kernels_on):
    logits, targets = make(6, 37)
    weight = torch.tensor([0.0, 1.0, 2.0, -4.0, 0.5, 1.0], device=DEVICE)  # powers of two: exact
    nll, _ = cross_entropy(logits, targets, cap=30.0)
    (plain,) = torch.autograd.grad(nll.sum(), logits, retain_graph=True)
    (weighted,) = torch.autograd.grad((weight * nll).sum(), logits)
    assert torch.equal(weighted, plain * weight[:, None])
    assert plain.abs().sum(1).min() > 0


def test_backward_can_run_twice_and_changes_nothing(kernels_on):
    logits, targets = make(4, 20)
    before = logits.detach().clone()
    nll, entropy = cross_entropy(logits, targets, cap=30.0, entropy=True)
    first, second = (torch.autograd.grad(nll.mean(), logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(logits, before)
    assert nll.requires_grad and not entropy.requires_grad


def test_strided_inputs(kernels_on):
    logits, targets = make(20, 6)
    wide, ids = torch.zeros(6, 40, device=DEVICE), torch.zeros(12, dtype=torch.int64, device=DEVICE)
    wide[:, ::2], ids[::2] = logits.detach().T, targets[:6] % 20
    view = wide.requires_grad_()[:, ::2]
    nll, _ = cross_entropy(view, ids[::2], cap=30.0)
    want, _ = cross_entropy(view.detach().contiguous(), ids[::2].contiguous(), cap=30.0)
    assert torch.equal(nll, want)
    (grad,) = torch.autograd.grad(nll.mean(), wide)
    close(grad[:, ::2], brute_force(view, ids[::2], 30.0)[2] / 6, atol=1e-6)
    assert (grad[:, 1::2] == 0).all()


# -- weights through the objective -----------------------------------------------------------------------------------

MODEL = ModelConfig(
    dim=16,
    embed=EmbedConfig(vocab_size=40),
    plan=PlanConfig(num_layers=1),
    attn=AttentionConfig(num_heads=2, num_kv_heads=1),
    init=InitConfig(kind="orthogonal"),
)


@pytest.mark.parametrize("loss", [LossConfig(mile=MileConfig(gamma=1.1, peak_frac=0.5)), LossConfig(focal_gamma=2.0)])
def test_token_weights_of_the_objective_equal_the_reference_path(loss, kernels_on):
    model = GPT(MODEL, train_length=16).init_weights(0).to(DEVICE)
    batch = random_batch(40, length=16)
    batch = type(batch)(batch.ids.to(DEVICE), batch.targets.to(DEVICE))
    objective = Objective(loss, model, DEVICE)
    objective.set_progress(0.4)
    found = {}
    others = dict.fromkeys(_op.PATHS, "reference")
    for path in ("triton", "reference"):
        with _op.paths(**{**others, "cross_entropy": path}):
            value, plain = objective(batch)
            found[path] = [value, plain, *torch.autograd.grad(value, list(model.parameters()), allow_unused=True)]
    assert found["triton"][0] != found["triton"][1]  # the weights do something
    for got, want in zip(found["triton"], found["reference"], strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


# -- refusals --------------------------------------------------------------------------------------------------------


@ON_CPU
@pytest.mark.parametrize("bad", [-1, 7, -100])  # -100 is ignored by torch's own loss
@pytest.mark.parametrize("path", ["triton", "reference"])
def test_a_target_out_of_range_is_named_with_its_position(bad, path, kernels_on):
    targets = torch.tensor([0, 6, bad, 3])
    with _op.paths(cross_entropy=path), pytest.raises(ValueError, match=rf"target {bad} at position 2.*\[0, 7\)"):
        cross_entropy(torch.zeros(4, 7), targets, cap=30.0)


@pytest.mark.parametrize("bad", [-1, 7, -100, 2**40, -(2**62)])
def test_the_kernel_gives_nan_for_a_target_out_of_range(bad, kernels_on, monkeypatch):
    """What a GPU does, where nobody looks at the targets before."""
    monkeypatch.setattr(module, "_check_targets", lambda logits, targets: None)
    logits, _ = make(4, 7)
    targets = torch.tensor([0, 6, bad, 3], device=DEVICE)
    nll, _ = cross_entropy(logits, targets, cap=30.0)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    want = torch.tensor([False, False, True, False], device=DEVICE)
    assert torch.equal(nll.isnan(), want)
    assert torch.equal(grad.isnan().all(1), want) and torch.equal(grad.isnan().any(1), want)


IDS = torch.zeros(2, dtype=torch.int64, device=DEVICE)
LOGITS = torch.zeros(2, 1024, device=DEVICE)


@pytest.mark.parametrize(
    "logits, targets, cap, message",
    [
        (LOGITS, IDS.int(), 30.0, "int32.*expected int64"),
        (LOGITS, IDS[:1], 30.0, "expected"),
        (LOGITS[None], IDS, 30.0, "expected"),
        (LOGITS[:, :0], IDS, 30.0, "at least one column"),
        (LOGITS, IDS, 0.0, "positive"),
        (LOGITS, IDS, 82.0, "expected cap \\+ ln V <= 88"),
        (LOGITS.double(), IDS, 30.0, "float64"),
        (LOGITS, IDS.to("meta"), 30.0, "meta"),
    ],
)
def test_refuses(logits, targets, cap, message, kernels_on):
    with pytest.raises(ValueError, match=message):
        cross_entropy(logits, targets, cap=cap)


def test_reference_gradients():
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.tensor([0, 5, 2, 2])
    assert gradcheck(lambda x: cross_entropy_ref(x * 4, targets, cap=5.0)[0], (logits,))


# -- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31(kernels_on):
    """4.5 GB of logits: a 32-bit offset would wrap in the last rows."""
    n, v = 2**18 + 3, 8192 + 16
    logits = torch.zeros(n, v, dtype=torch.bfloat16, device="cuda")
    logits[-5:] = torch.randn(5, v, device="cuda") * 8
    logits.requires_grad_()
    targets = torch.randint(0, v, (n,), device="cuda")
    nll, _ = cross_entropy(logits, targets, cap=30.0)
    (grad,) = torch.autograd.grad(nll.sum(), logits)
    want_nll, _, want_grad = brute_force(logits[-5:], targets[-5:], 30.0)
    close(nll[-5:], want_nll, atol=1e-5)
    close(grad[-5:], want_grad, atol=1e-6, rtol=4e-3)
