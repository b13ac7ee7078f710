"""The model as a whole: counts, start, causality, storage, every lever."""

import math
from dataclasses import replace

import pytest
import torch

from pgolf.data.batch import Batch
from pgolf.model import plan
from pgolf.model.attention import rope_base, rope_tables
from pgolf.model.config import (
    ACTIVATION_NAMES,
    AttentionConfig,
    BackoutConfig,
    BigramConfig,
    CoefConfig,
    EmbedConfig,
    HeadDiversityConfig,
    InitConfig,
    LossConfig,
    MileConfig,
    MlpConfig,
    ModelConfig,
    PlanConfig,
    ResidLambdaConfig,
    RopeConfig,
    SkipConfig,
    SmearConfig,
    TrigramConfig,
    ValueEmbedConfig,
    ValueResidualConfig,
    WiringConfig,
    XsaConfig,
)
from pgolf.model.gpt import GPT, parameter_count
from pgolf.model.objective import Objective, mile_gamma
from pgolf.model.roles import Role, roles_of

VOCAB = 96
SMALL = ModelConfig(
    dim=32,
    embed=EmbedConfig(vocab_size=VOCAB),
    plan=PlanConfig(num_layers=4),
    attn=AttentionConfig(num_heads=4, num_kv_heads=2),
    init=InitConfig(kind="orthogonal"),
)
EVERYTHING = replace(
    SMALL,
    embed=EmbedConfig(
        vocab_size=VOCAB,
        bigram=BigramConfig(rows=64, dim=8, trigram=True),
        trigram=TrigramConfig(rows=64, dim=8),
        smear=SmearConfig(),
    ),
    attn=replace(
        SMALL.attn,
        rope=RopeConfig(dims=4, ntk_reference=16),
        value_embed=ValueEmbedConfig(dim=8, layers=(1, 3)),
        value_residual=ValueResidualConfig(),
        xsa=XsaConfig(2),
    ),
    plan=PlanConfig(num_layers=4, skips=SkipConfig(gated=True)),
    wiring=WiringConfig(ln_scale=True, resid_lambdas=ResidLambdaConfig(), backout=BackoutConfig(layer=2)),
)


def batch(length=32, rows=2, seed=0):
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, length + 1), generator=gen)
    return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def awake(cfg, length=32, seed=1, **kw):
    """A model whose zero-initialised weights are random, so that every path carries signal."""
    model = GPT(cfg, train_length=length, **kw).init_weights(seed)
    gen = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=gen) * 0.1)
    return model


def with_embed(**kw):
    return replace(SMALL, embed=replace(SMALL.embed, **kw))


def with_attn(**kw):
    return replace(SMALL, attn=replace(SMALL.attn, **kw))


def with_wiring(**kw):
    return replace(SMALL, wiring=replace(SMALL.wiring, **kw))


LEVERS = {
    "bigram": with_embed(bigram=BigramConfig(rows=64, dim=8)),
    "bigram mul1009": with_embed(bigram=BigramConfig(rows=64, dim=8, hash="mul1009")),
    "shared trigram": with_embed(bigram=BigramConfig(rows=64, dim=8, trigram=True)),
    "own trigram": with_embed(trigram=TrigramConfig(rows=64, dim=8)),
    "smear": with_embed(smear=SmearConfig()),
    "untied": with_embed(tied=False),
    "mqa": with_attn(num_kv_heads=1),
    "mha": with_attn(num_kv_heads=4),
    "rope dims": with_attn(rope=RopeConfig(dims=4)),
    "rope base": with_attn(rope=RopeConfig(base=100.0)),
    "ntk": with_attn(rope=RopeConfig(ntk_reference=8)),
    "gain": with_attn(qk_gain_init=3.0),
    "value embed": with_attn(value_embed=ValueEmbedConfig(dim=8, layers=(1,))),
    "value residual add": with_attn(value_residual=ValueResidualConfig("add")),
    "value residual mix": with_attn(value_residual=ValueResidualConfig("mix")),
    "xsa": with_attn(xsa=XsaConfig(2)),
    "parallel": with_wiring(parallel=True),
    "sandwich": with_wiring(sandwich_norm=True),
    "ln scale": with_wiring(ln_scale=True),
    "resid lambdas": with_wiring(resid_lambdas=ResidLambdaConfig()),
    "backout": with_wiring(backout=BackoutConfig(layer=1)),
    "no encoder": replace(SMALL, plan=PlanConfig(num_layers=4, encoder_layers=0)),
    "one encoder": replace(SMALL, plan=PlanConfig(num_layers=4, encoder_layers=1)),
    "gated skips": replace(SMALL, plan=PlanConfig(num_layers=4, skips=SkipConfig(gated=True))),
    "no skips": replace(SMALL, plan=PlanConfig(num_layers=4, skips=None)),
    "softcap": replace(SMALL, softcap=2.0),
    "leaky slope": replace(SMALL, mlp=MlpConfig(activation="leaky_relu2", leaky_slope=0.1)),
    **{f"act {a}": replace(SMALL, mlp=MlpConfig(activation=a)) for a in ACTIVATION_NAMES if a != "relu2"},
}


@pytest.mark.parametrize("name", LEVERS)
def test_every_lever_changes_the_loss_and_trains_all_its_parameters(name):
    """A lever that moves nothing is dead code; a parameter without a gradient is dead weight."""
    off, on = awake(SMALL), awake(LEVERS[name])
    keep = {"gain"} if name == "gain" else set()  # the one lever that is nothing but an initial value
    common = {k: v for k, v in off.state_dict().items() if k.split(".")[-1] not in keep}
    fits = {k: v for k, v in common.items() if k in on.state_dict() and on.state_dict()[k].shape == v.shape}
    on.load_state_dict(fits, strict=False)
    b = batch()
    loss_off, loss_on = off(b)[0].mean(), on(b)[0].mean()
    assert abs(loss_on.item() - loss_off.item()) > 1e-5, f"{name} does not change the loss"
    loss_on.backward()
    for info in roles_of(on):
        assert info.param.grad is not None and info.param.grad.abs().max() > 0, f"{name}: {info.name} has no gradient"


@pytest.mark.parametrize("rows, dim", [(64, 8), (64, 64), (2048, 128)])
def test_hash_table_and_projection_both_train_from_the_start(rows, dim):
    """Table and projection both at zero could never leave it, whatever the width. The table must move at step one, and
    the projection as soon as the table is not zero."""
    for cfg in (with_embed(bigram=BigramConfig(rows=rows, dim=dim)), with_embed(trigram=TrigramConfig(rows, dim))):
        model = GPT(cfg, train_length=32).init_weights(0)
        part = model.embed.bigram or model.embed.trigram
        with torch.no_grad():  # the blocks' outputs start at zero; the tied head alone carries the gradient
            part.table.normal_(std=0.01)
        model(batch())[0].mean().backward()
        assert part.table.grad.abs().max() > 0 and part.proj.weight.grad.abs().max() > 0


def test_untrained_loss_is_uniform():
    for cfg in (SMALL, EVERYTHING, with_embed(tied=False), replace(SMALL, dim=128)):
        loss = GPT(cfg, train_length=32).init_weights(3)(batch(rows=8))[0].mean().item()
        assert loss == pytest.approx(math.log(VOCAB), abs=0.02)


@pytest.mark.parametrize(
    "cfg", [SMALL, EVERYTHING, with_wiring(parallel=True)], ids=["small", "everything", "parallel"]
)
def test_future_tokens_cannot_change_the_past(cfg):
    model, b = awake(cfg), batch()
    before = model(b)[0]
    for t in (1, 13, 31):
        ids = b.ids.clone()
        ids[:, t:] = (ids[:, t:] + 1) % VOCAB
        after = model(Batch(ids, b.targets))[0]
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_rows_are_independent():
    model, b = awake(EVERYTHING), batch(rows=3)
    one = model(Batch(b.ids[1:2], b.targets[1:2]))[0]
    torch.testing.assert_close(model(b)[0][1:2], one, rtol=1e-5, atol=1e-5)


def test_plan_of_the_baseline_and_of_a_pure_decoder():
    steps = plan.build(replace(SMALL, plan=PlanConfig(num_layers=9)))
    assert [s.skip_from for s in steps] == [None] * 4 + [3, 2, 1, 0, None]
    assert [s.keep for s in steps] == [True] * 4 + [False] * 5
    steps = plan.build(replace(SMALL, plan=PlanConfig(num_layers=9, encoder_layers=6)))
    assert [s.skip_from for s in steps] == [None] * 6 + [5, 4, 3]  # the first encoders' outputs are unused
    assert all(s.skip_from is None for s in plan.build(LEVERS["no encoder"]))
    assert len(plan.table(steps)) == 10


def test_rope_ntk_base():
    """22,082 for 16 rotated channels and 20,452 for 64 at T = 2,048 (base 10,000, reference 1,024)."""
    assert rope_base(RopeConfig(ntk_reference=1024), 16, 2048) == pytest.approx(22082, abs=1)
    assert rope_base(RopeConfig(ntk_reference=1024), 64, 2048) == pytest.approx(20452, abs=1)
    assert rope_base(RopeConfig(ntk_reference=1024), 64, 1024) == 10000
    cos, sin = rope_tables(RopeConfig(base=100.0, dims=4), 8, 16, 5)
    assert cos.shape == (5, 2) and cos[3, 1].item() == pytest.approx(math.cos(3 * 100**-0.5))
    assert sin[2, 0].item() == pytest.approx(math.sin(2.0))


def test_roles_cover_every_parameter_and_know_their_block():
    infos = roles_of(GPT(EVERYTHING, train_length=32))
    assert len(infos) == len(list(GPT(EVERYTHING, train_length=32).parameters()))
    by_name = {i.name: i for i in infos}
    assert by_name["blocks.2.attn.q.weight"].role is Role.MATRIX and by_name["blocks.2.attn.q.weight"].block == 2
    assert by_name["embed.bigram.proj.weight"].role is Role.SIDE_MATRIX
    assert by_name["embed.weight"].role is Role.EMBED and by_name["embed.weight"].block is None
    assert by_name["blocks.1.resid_lambda"].role is Role.RESID_LAMBDA
    frozen = replace(EVERYTHING, wiring=WiringConfig(resid_lambdas=ResidLambdaConfig(frozen=True)))
    assert {i.role for i in roles_of(GPT(frozen, train_length=32)) if "lambda" in i.name} == {Role.FROZEN}


def test_undeclared_parameter_is_an_error():
    model = GPT(SMALL, train_length=32)
    model.blocks[0].attn.surprise = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match=r"Attention\.surprise has no role"):
        roles_of(model)


def test_start_does_not_depend_on_build_device():
    """Built on meta, materialised, initialised: the same weights and rotary tables as built directly."""
    direct = GPT(EVERYTHING, train_length=32).init_weights(5)
    with torch.device("meta"):
        late = GPT(EVERYTHING, train_length=32)
    assert parameter_count(late) == parameter_count(direct)
    late.to_empty(device="cpu").set_rope_()
    late.init_weights(5)
    for (name, a), b in zip(direct.state_dict().items(), late.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(direct.cos, late.cos)


def test_bf16_storage_and_compute():
    """Gathered tables follow the compute dtype, everything else stays fp32; the loss stays close to fp32's."""
    model, full = awake(EVERYTHING, compute_dtype=torch.bfloat16), awake(EVERYTHING)
    for info in roles_of(model):
        assert info.param.dtype == (torch.bfloat16 if info.role is Role.EMBED else torch.float32), info.name
    nll = model(batch())[0]
    assert nll.dtype == torch.float32
    assert nll.mean().item() == pytest.approx(full(batch())[0].mean().item(), rel=0.02)


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(mile=MileConfig()),
        LossConfig(head_diversity=HeadDiversityConfig(coef=1.0)),
        LossConfig(head_diversity=HeadDiversityConfig(coef=1.0, groups="columns")),
        LossConfig(z_loss=CoefConfig(0.1)),
        LossConfig(logit_penalty=CoefConfig(0.1)),
        LossConfig(label_smooth=0.1),
        LossConfig(focal_gamma=2.0),
    ],
    ids=["mile", "diversity", "diversity columns", "z", "penalty", "smooth", "focal"],
)
def test_objective_terms_change_gradients_but_not_the_reported_loss(loss):
    def grads(cfg):
        model = awake(SMALL)
        objective = Objective(cfg, model)
        objective.set_progress(0.4)
        value, plain = objective(batch())
        value.backward()
        return value.item(), plain.item(), torch.cat([p.grad.flatten() for p in model.parameters()])

    value, plain, grad = grads(loss)
    value0, plain0, grad0 = grads(LossConfig())
    assert plain == plain0 == pytest.approx(value0)
    assert (grad - grad0).norm() > 1e-3 * grad0.norm()
    assert value != pytest.approx(plain, abs=1e-6)


def test_mile_schedule_and_weight():
    cfg = MileConfig()
    assert [mile_gamma(cfg, p) for p in (0, 0.2, 0.4, 0.7, 1)] == pytest.approx([0, 0.375, 0.75, 0.375, 0])
    model = awake(SMALL)
    nll, _, h = model(batch(), entropy=True)
    objective = Objective(LossConfig(mile=cfg), model)
    objective.set_progress(0.2)
    want = (((1 - torch.exp(-h)) ** 0.375).clamp_min(0.2) * nll).mean()
    torch.testing.assert_close(objective(batch())[0], want)


def test_compiles_as_one_graph():
    """No graph break anywhere: traced with fullgraph, run by the eager back end."""
    model = awake(EVERYTHING)
    objective = Objective(LossConfig(mile=MileConfig()), model)
    objective.set_progress(0.4)
    compiled = torch.compile(objective.__call__, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(batch())[0], objective(batch())[0])
