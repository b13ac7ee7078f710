"""GPTQ on one matrix, against its definition: optimal brain surgery, one column at a time, in fp64."""

from dataclasses import replace

import pytest
import torch

from pgolf.quant import gptq
from pgolf.quant.config import GptqConfig
from pgolf.quant.grid import GRIDS, steps_of

GRID = GRIDS["int4"]
CFG = GptqConfig()


def problem(rows=24, cols=40, tokens=200, seed=0, dtype=torch.float64):
    """(w, h): inputs correlated and of very different sizes, as those of a layer are."""
    gen = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=gen, dtype=torch.float64) * torch.logspace(-1, 1, cols, dtype=torch.float64)
    x = torch.randn(tokens, cols, generator=gen, dtype=torch.float64) @ mix
    w = torch.randn(rows, cols, generator=gen, dtype=torch.float64)
    return w.to(dtype), (x.T @ x / tokens).to(dtype)


def peak(w):
    return w.abs().amax(1).float()


def surgery(w, h, grid, step, damp):
    """Rounds column by column; after each, all columns that are left move to where the error is least, and the column
    is taken out of H^-1 (Hassibi and Stork 1993). No factorisation, no blocks."""
    w, s = w.clone(), step.to(w.dtype)
    inverse = torch.linalg.inv(h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype))
    q, left = torch.zeros_like(w), torch.argsort(h.diagonal(), descending=True).tolist()
    while left:
        i = left.pop(0)
        q[:, i] = torch.round(w[:, i] / s).clamp(grid.low, grid.high)
        error = (w[:, i] - q[:, i] * s) / inverse[i, i]
        w[:, left] -= error[:, None] * inverse[i, left]
        inverse = inverse - torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return q


def weighted(w, q, step, h):
    e = w - q.to(w.dtype) * step.to(w.dtype)[:, None]
    return ((e @ h) * e).sum(1)


@pytest.mark.parametrize("block", [1, 7, 40, 128])
@pytest.mark.parametrize("seed", range(3))
def test_is_optimal_brain_surgery(seed, block):
    w, h = problem(seed=seed)
    q, step = gptq.quantize(w, h, GRID, [peak(w)], 0.0, replace(CFG, block=block))
    assert torch.equal(step, steps_of(peak(w), GRID, 0.0))
    assert torch.equal(q.double(), surgery(w, h, GRID, step, CFG.damp))


def test_fp32_on_the_device_is_nearly_that():
    w, h = problem(rows=64, cols=96, tokens=500)
    q, step = gptq.quantize(w.float(), h.float(), GRIDS["int6"], [peak(w)], 0.0, CFG)
    want = surgery(w, h, GRIDS["int6"], step, CFG.damp)
    assert (q.double() != want).double().mean() < 2e-3 and (q.double() - want).abs().max() <= 1


def test_beats_rounding_where_it_counts_and_loses_elsewhere():
    w, h = problem()
    step = steps_of(peak(w), GRID, 0.0)
    plain = torch.round(w / step.double()[:, None]).clamp(*GRID)
    q, _ = gptq.quantize(w, h, GRID, [peak(w)], 0.0, CFG)
    assert weighted(w, q, step, h).sum() < 0.6 * weighted(w, plain, step, h).sum()
    square = lambda v: (w - v.double() * step.double()[:, None]).square().sum()
    assert square(q) > square(plain)


def test_inputs_that_do_not_correlate_leave_plain_rounding():
    w, _ = problem()
    for h in (torch.diag(torch.rand(40, dtype=torch.float64)), torch.zeros(40, 40, dtype=torch.float64)):
        q, step = gptq.quantize(w, h, GRID, [peak(w)], 0.0, CFG)
        assert torch.equal(q.double(), torch.round(w / step.double()[:, None]).clamp(*GRID))


def test_v7_takes_rising_order_and_the_plain_inverse():
    """Written out from its definition; and it is worse than the real one."""
    w, h = problem()
    cfg = replace(CFG, variant="v7", damp=0.01)
    q, step = gptq.quantize(w, h, GRID, [peak(w)], 0.0, cfg)
    order = torch.argsort(h.diagonal())
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype)
    inverse, todo, s = torch.linalg.inv(damped), w.clone(), step.double()
    want = torch.zeros_like(w)
    for at, i in enumerate(order.tolist()):
        want[:, i] = torch.round(todo[:, i] / s).clamp(*GRID)
        later = order[at + 1 :]
        todo[:, later] -= ((todo[:, i] - want[:, i] * s) / inverse[i, i])[:, None] * inverse[i, later]
    assert torch.equal(q.double(), want)
    full, _ = gptq.quantize(w, h, GRID, [peak(w)], 0.0, CFG)
    assert weighted(w, full, step, h).sum() < weighted(w, q, step, h).sum()


def test_each_error_chooses_its_own_clip():
    w, h = problem()
    clips = [peak(w) * share for share in (1.0, 0.8, 0.6, 0.4)]
    cost = {"hessian": weighted, "rows": lambda w, q, s, h: (w - q.double() * s.double()[:, None]).square().sum(1)}
    single = [gptq.quantize(w, h, GRID, [clip], 0.0, CFG) for clip in clips]
    for name, of in cost.items():
        q, step = gptq.quantize(w, h, GRID, clips, 0.0, replace(CFG, clip_by=name))
        got, each = of(w, q, step, h), torch.stack([of(w, *one, h) for one in single])
        assert torch.equal(got, each.amin(0)) and (each.argmin(0) != each.argmin(0)[0]).any()
    q, step = gptq.quantize(w, h, GRID, clips, 0.0, replace(CFG, clip_by="matrix"))
    totals = [cost["rows"](w, *one, h).sum() for one in single]
    best = min(range(4), key=lambda i: totals[i])
    assert torch.equal(q, single[best][0]) and torch.equal(step, single[best][1])


def test_damping_pulls_towards_plain_rounding():
    w, h = problem()
    step = steps_of(peak(w), GRID, 0.0)
    plain = torch.round(w / step.double()[:, None]).clamp(*GRID)
    moved = [
        (gptq.quantize(w, h, GRID, [peak(w)], 0.0, replace(CFG, damp=damp))[0] != plain).double().mean()
        for damp in (0.001, 0.1, 1.0)
    ]
    assert moved[0] > moved[1] > moved[2] > 0


def test_fewer_tokens_than_columns_and_the_floor():
    w, h = problem(tokens=3)
    q, step = gptq.quantize(w, h, GRID, [peak(w)], 50.0, CFG)
    assert (step == steps_of(peak(w), GRID, 50.0)).all() and q.abs().max() <= 2


def test_what_cannot_be_quantised_is_refused():
    w, h = problem()
    with pytest.raises(ValueError, match="Hessian"):
        gptq.quantize(w, h.index_fill(0, torch.tensor([3]), float("nan")), GRID, [peak(w)], 0.0, CFG)
    with pytest.raises(ValueError):
        gptq.quantize(w, h, GRID, [peak(w) * float("inf")], 0.0, CFG)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"damp": 0.0}, "damp=0.0 must be in"),
        ({"batches": 0}, "batches=0 must be at least 1"),
        ({"block": 0}, "block=0"),
        ({"variant": "v8"}, "one of full, v7"),
        ({"clip_by": "guess"}, "one of hessian, rows, matrix"),
    ],
)
def test_settings_out_of_range_are_refused(change, said):
    assert said in "; ".join(replace(CFG, **change).problems())


def test_settings_name_every_row_of_the_table():
    from pgolf.quant.config import CLIP_ERRORS

    assert set(CLIP_ERRORS) == set(gptq.CLIP_BY)
