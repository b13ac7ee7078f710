"""Adapters: a fresh one changes nothing, each slot is alone, and only what it should learns."""

from dataclasses import replace

import pytest
import torch
from helpers import random_batch, reduced

from pgolf.data.batch import Batch
from pgolf.errors import ConfigError
from pgolf.model import plan
from pgolf.model.config import ACTIVATION_NAMES, MlpConfig, ModelConfig, WiringConfig
from pgolf.model.gpt import GPT
from pgolf.model.lora import TARGETS, Lora, attach, detach
from pgolf.model.roles import Role, roles_of
from pgolf.presets import PRESETS

VOCAB, LENGTH, SLOTS, RANK = 48, 12, 3, 2
SMALL = reduced(PRESETS["rat_rod_green"]().model, VOCAB)
SETTINGS = {"rank": RANK, "alpha": 6.0, "slots": SLOTS, "seed": 5}
WIRINGS = {
    "plain": SMALL,
    "untied": replace(SMALL, embed=replace(SMALL.embed, tied=False)),
    "parallel": replace(SMALL, wiring=WiringConfig(parallel=True)),
    "sandwich": replace(SMALL, wiring=WiringConfig(sandwich_norm=True)),
    **{a: replace(SMALL, mlp=MlpConfig(activation=a)) for a in ACTIVATION_NAMES if a != SMALL.mlp.activation},
}


def awake(cfg: ModelConfig = SMALL, dtype: torch.dtype = torch.float32, fold: bool = False) -> GPT:
    """A model in which nothing is zero."""
    model = GPT(cfg, train_length=LENGTH, compute_dtype=dtype, fold_scales=fold).init_weights(0)
    gen = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=gen))
    return model


def batch() -> Batch:
    return random_batch(VOCAB, rows=SLOTS, length=LENGTH)


def learn_(adapters: list[Lora], seed: int = 2) -> None:
    """As after some updates: B is not zero, A not what was drawn; every slot differs."""
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for lora in adapters:
            lora.a.add_(0.1 * torch.randn(lora.a.shape, generator=gen))
            lora.b.copy_(0.1 * torch.randn(lora.b.shape, generator=gen))


def nats(model: GPT, b: Batch) -> torch.Tensor:
    with torch.no_grad():
        return model(b)[0]


# -- the module ------------------------------------------------------------------------------------------------------


def test_the_path_by_hand():
    gen = torch.Generator().manual_seed(0)
    lora = Lora(torch.randn(2, 5, generator=gen), out_features=4, slots=3, alpha=3.0)
    learn_([lora])
    x = torch.randn(3, 7, 5, generator=gen)
    want = torch.stack([1.5 * (x[s] @ lora.a[s].T @ lora.b[s].T) for s in range(3)])
    torch.testing.assert_close(lora(x), want)
    assert lora.a.dtype == lora.b.dtype == torch.float32 and lora(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="x has 2 rows, expected one for each of the 3 slots"):
        lora(x[:2])


def test_the_scale_is_alpha_over_rank():
    start, x = torch.ones(4, 5), torch.ones(1, 1, 5)
    outs = []
    for alpha in (4.0, 8.0):
        lora = Lora(start, out_features=3, slots=1, alpha=alpha)
        torch.nn.init.ones_(lora.b)
        outs.append(lora(x))
    assert (outs[0] == 20).all() and (outs[1] == 40).all()  # 4 channels of 5, times 1 and 2


@pytest.mark.parametrize("keep_a", [False, True])
def test_reset_touches_the_chosen_slots_only(keep_a):
    lora = Lora(torch.randn(2, 5), out_features=4, slots=3, alpha=1.0)
    learn_([lora])
    a, b = lora.a.detach().clone(), lora.b.detach().clone()
    lora.reset_(torch.tensor([False, True, False]), keep_a=keep_a)
    assert torch.equal(lora.a[1], a[1] if keep_a else lora.start) and (lora.b[1] == 0).all()
    for other in (0, 2):
        assert torch.equal(lora.a[other], a[other]) and torch.equal(lora.b[other], b[other])
    lora.reset_(keep_a=keep_a)
    assert (lora.b == 0).all() and torch.equal(lora.a, a if keep_a else lora.start.expand(3, 2, 5))
    assert lora.a.requires_grad and lora.b.requires_grad
    for wrong in (torch.tensor([True]), torch.tensor([1, 0, 1])):
        with pytest.raises(ValueError, match=r"expected \(3,\) torch.bool"):
            lora.reset_(wrong)


# -- in a model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, fold", [*((n, False) for n in WIRINGS), ("plain", True), ("parallel", True)])
def test_fresh_and_reset_adapters_change_no_bit(name, fold):
    model, b = awake(WIRINGS[name], fold=fold), batch()
    base = nats(model, b)
    adapters = attach(model, TARGETS, **SETTINGS)
    assert torch.equal(nats(model, b), base)
    learn_(adapters)
    assert (nats(model, b) - base).abs().amin(dim=1).max() > 1e-4
    for lora in adapters:
        lora.reset_(keep_a=True)
    assert torch.equal(nats(model, b), base)
    detach(model)
    assert torch.equal(nats(model, b), base) and len(roles_of(model)) == len(roles_of(awake(WIRINGS[name])))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["plain", "untied", "swiglu"])
def test_an_adapter_is_a_weight(name, target):
    """One slot: A, B in the slot gives what scale B A added to the weight gives; o and mlp add to no one weight."""
    model = awake(WIRINGS[name])
    b = random_batch(VOCAB, rows=1, length=LENGTH)
    adapters = attach(model, [target], rank=RANK, alpha=4.0, slots=1, seed=5)
    learn_(adapters)
    got = nats(model, b)
    added = [2 * lora.b[0].detach() @ lora.a[0].detach() for lora in adapters]
    detach(model)
    assert (got - nats(model, b)).abs().max() > 1e-3
    if target in ("q", "k", "v"):
        for block, w in zip(model.blocks, added, strict=True):
            getattr(block.attn, target).weight.data += w
    elif target == "head":
        hidden = model.hidden(b)
        z = model.logits(hidden) + hidden @ added[0].T
        z = model.cfg.softcap * torch.tanh(z / model.cfg.softcap)
        want = torch.nn.functional.cross_entropy(z[0], b.targets[0], reduction="none")
        torch.testing.assert_close(got[0], want, rtol=0, atol=1e-5)
        return
    else:
        for block, w in zip(model.blocks, added, strict=True):
            part = block.attn if target == "o" else block.mlp
            part.register_forward_hook(lambda m, args, y, w=w: y + args[0] @ w.T)  # args[0]: the normed input
    torch.testing.assert_close(nats(model, b), got, rtol=0, atol=1e-5)


def test_folded_scales_scale_the_extra_too():
    plain, folded, b = awake(), awake(fold=True), batch()
    for model in (plain, folded):
        learn_(attach(model, TARGETS, **SETTINGS))
    torch.testing.assert_close(nats(folded, b), nats(plain, b), rtol=0, atol=1e-5)


def test_slots_are_independent():
    model, b = awake(), batch()
    adapters = attach(model, TARGETS, **SETTINGS)
    learn_(adapters)
    before = nats(model, b)
    b.ids[0] = (b.ids[0] + 1) % VOCAB
    changed = nats(model, b)
    assert torch.equal(changed[1:], before[1:]) and not torch.equal(changed[0], before[0])
    b.ids[0] = (b.ids[0] - 1) % VOCAB
    with torch.no_grad():
        for lora in adapters:
            lora.a[1] *= 2
            lora.b[1] += 0.1
    changed = nats(model, b)
    assert torch.equal(changed[[0, 2]], before[[0, 2]]) and not torch.equal(changed[1], before[1])


def test_a_document_s_start_and_step_do_not_depend_on_its_slot():
    """The same rows in another order, or in more slots, after one gradient step from a fresh start."""
    b, scores = batch(), []
    for rows in ([0, 1, 2], [2, 0, 1], [1, 1, 0, 2, 2]):
        model = awake()
        adapters = attach(model, TARGETS, **{**SETTINGS, "slots": len(rows)})
        one = Batch(b.ids[rows], b.targets[rows])
        model(one)[0].mean(dim=1).sum().backward()
        with torch.no_grad():
            for lora in adapters:
                lora.b -= 10 * lora.b.grad
        scores.append(nats(model, one)[[rows.index(i) for i in range(3)]])
    assert (scores[0] - nats(awake(), b)).abs().max() > 1e-3
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=1e-5)


def test_gradients_reach_a_and_b_only():
    model = awake()
    for p in model.parameters():
        p.requires_grad_(False)
    adapters = attach(model, TARGETS, **SETTINGS)
    model(batch())[0].mean().backward()
    for lora in adapters:
        assert lora.b.grad.abs().amax(dim=(1, 2)).min() > 0 and (lora.a.grad == 0).all()  # B = 0 lets nothing back to A
    learn_(adapters)
    model(batch())[0].mean().backward()
    assert all(lora.a.grad.abs().amax(dim=(1, 2)).min() > 0 for lora in adapters)
    mine = {id(p) for lora in adapters for p in (lora.a, lora.b)}
    assert [n for n, p in model.named_parameters() if p.grad is not None and id(p) not in mine] == []
    assert len(mine) == 2 * (5 * len(model.blocks) + 1)


def test_a_row_s_gradient_stays_in_its_slot():
    model = awake()
    adapters = attach(model, TARGETS, **SETTINGS)
    learn_(adapters)
    model(batch())[0][1].mean().backward()
    for lora in adapters:
        for grad in (lora.a.grad, lora.b.grad):
            assert (grad[[0, 2]] == 0).all() and grad[1].abs().max() > 0


def test_roles_know_adapters():
    model = awake()
    before = {i.name for i in roles_of(model)}
    attach(model, ["o", "head"], **SETTINGS)
    new = [i for i in roles_of(model) if i.name not in before]
    assert {i.role for i in new} == {Role.ADAPT_ONLY} and len(new) == 2 * (len(model.blocks) + 1)
    assert {i.block for i in new if i.name.startswith("blocks.1.")} == {1}
    detach(model)
    assert {i.name for i in roles_of(model)} == before == set(model.state_dict())


def test_the_seed_alone_decides_a_start():
    """Uniform in +-1/sqrt(in); whatever other targets, slots there are."""
    few = attach(awake(), ["mlp"], **{**SETTINGS, "rank": 16})
    many = attach(awake(), TARGETS, **{**SETTINGS, "rank": 16, "slots": 1})[-1 - len(few) : -1]
    other = attach(awake(), ["mlp"], **{**SETTINGS, "rank": 16, "seed": 6})
    bound = SMALL.dim**-0.5
    for one, two, three in zip(few, many, other, strict=True):
        assert torch.equal(one.start, two.start) and not torch.equal(one.start, three.start)
        assert 0.95 * bound < one.start.abs().max() <= bound and abs(one.start.mean()) < 0.1 * bound
    starts = torch.stack([lora.start for lora in few])
    assert len(starts.unique(dim=0)) == len(few)


def test_bf16_activations_keep_fp32_adapters():
    model = awake(dtype=torch.bfloat16)
    adapters = attach(model, TARGETS, **SETTINGS)
    learn_(adapters)
    loss = model(batch())[0].mean()
    loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for lora in adapters for p in lora.parameters())
    full = awake()
    learn_(attach(full, TARGETS, **SETTINGS))
    assert loss.item() == pytest.approx(full(batch())[0].mean().item(), rel=0.03)


def test_compiled_code_sees_adapters_come_and_go():
    model, b = awake(), batch()
    torch._dynamo.reset()
    compiled = torch.compile(lambda b: model(b)[0], backend="eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        base = compiled(b)
        learn_(attach(model, TARGETS, **SETTINGS))
        torch.testing.assert_close(compiled(b), model(b)[0], rtol=0, atol=1e-5)
        assert not torch.equal(compiled(b), base)
        detach(model)
        assert torch.equal(compiled(b), base)


def test_a_plan_visits_each_block_once():
    """One set of adapters a block is one a visit. A plan that repeats a block needs adapters by visit first."""
    for build in PRESETS.values():
        blocks = [step.block for step in plan.build(build().model)]
        assert len(set(blocks)) == len(blocks)


@pytest.mark.parametrize(
    "targets, change, message",
    [
        (["q", "out"], {}, r"adapter targets \['out'\]: expected some of q, k, v, o, mlp, head"),
        (["q"], {"rank": 0}, "rank=0, .* expected rank, slots >= 1"),
        (["q"], {"slots": 0}, "slots=0, .* expected rank, slots >= 1"),
        (["q"], {"alpha": 0.0}, "alpha=0.0, .* alpha > 0"),
    ],
)
def test_settings_that_cannot_work(targets, change, message):
    model = awake()
    with pytest.raises(ConfigError, match=message):
        attach(model, targets, **{**SETTINGS, **change})
    assert not any(isinstance(m, Lora) for m in model.modules())


def test_a_taken_slot_is_left_alone():
    model = awake()
    observer = torch.nn.Identity()
    model.blocks[1].attn.v.adapter = observer
    with pytest.raises(ValueError, match="1 of 6 slots are taken, adapter first: detach that first"):
        attach(model, ["q", "v"], **SETTINGS)
    detach(model)
    assert model.blocks[1].attn.v.adapter is observer and model.blocks[0].attn.q.adapter is None
