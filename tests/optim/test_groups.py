"""Which parameter gets which rate: every trained one in exactly one group."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from pgolf.model.roles import ParamInfo, Role, roles_of
from pgolf.optim.config import AdamWConfig, MuonConfig, OptimConfig
from pgolf.optim.groups import build_groups

CFG = OptimConfig(
    muon=MuonConfig(lr=0.02, weight_decay=0.04),
    adamw=AdamWConfig(
        embed_lr=0.6, tied_embed_lr=0.03, head_lr=0.008, scalar_lr=0.01, resid_lambda_mult=5, weight_decay=0.1
    ),
)
ROLES = [Role.MATRIX, Role.SIDE_MATRIX, Role.EMBED, Role.HEAD, Role.VECTOR, Role.RESID_LAMBDA]


def info(name: str, role: Role, block: int | None = None, shape=None, grad: bool = True) -> ParamInfo:
    shape = shape or ((3,) if role in (Role.VECTOR, Role.RESID_LAMBDA) else (3, 2))
    return ParamInfo(name, nn.Parameter(torch.ones(shape), requires_grad=grad), role, block)


def one_of_each(block: int | None = None) -> list[ParamInfo]:
    return [info(r.value, r, block) for r in ROLES]


def treatment(groups) -> dict[str, tuple[str, str, float, float]]:
    return {i.name: (g.name, g.kind, g.lr, g.weight_decay) for g in groups for i in g.infos}


def test_every_role_has_its_rate_and_decay():
    got = treatment(build_groups(one_of_each(), CFG, (4, 2), tied=True))
    assert got == {
        "matrix": ("muon", "muon", 0.02, 0.04),
        "side_matrix": ("muon", "muon", 0.02, 0.04),
        "embed": ("adamw.embed", "adamw", 0.03, 0.1),
        "head": ("adamw.head", "adamw", 0.008, 0.0),
        "vector": ("adamw.scalar", "adamw", 0.01, 0.1),
        "resid_lambda": ("adamw.resid_lambda", "adamw", 0.05, 0.0),
    }
    untied = treatment(build_groups(one_of_each(), CFG, (4, 2), tied=False))
    assert untied["embed"][2] == 0.6


def test_side_matrix_can_go_to_the_scalar_group():
    got = treatment(build_groups(one_of_each(), replace(CFG, side_matrix="adamw"), (4, 2), tied=True))
    assert got["side_matrix"] == ("adamw.scalar", "adamw", 0.01, 0.1) and got["matrix"][0] == "muon"


def by_block(cfg: OptimConfig, plan: tuple[int, int]) -> tuple[list, list, dict]:
    blocks = [i for b in range(plan[0]) for i in (info(f"m{b}", Role.MATRIX, b), info(f"v{b}", Role.VECTOR, b))]
    rest = [info("skip", Role.VECTOR), info("table", Role.EMBED), info("lam", Role.RESID_LAMBDA, plan[0] - 1)]
    got = treatment(build_groups(blocks + rest, cfg, plan, tied=True))
    rates = [[got[f"{kind}{b}"][2] for b in range(plan[0])] for kind in "mv"]
    return *rates, got


def test_late_rates_start_at_the_middle_block():
    cfg = replace(CFG, muon=replace(CFG.muon, lr_late=0.5), adamw=replace(CFG.adamw, scalar_lr_late=0.7))
    matrices, vectors, got = by_block(cfg, (11, 2))  # PR #1130: blocks 0-4 early, 5-10 late
    assert matrices == [0.02] * 5 + [0.5] * 6 and vectors == [0.01] * 5 + [0.7] * 6
    assert got["m5"][0] == "muon.late" and got["v10"][0] == "adamw.scalar.late"
    assert got["skip"][:3] == ("adamw.scalar", "adamw", 0.01)  # outside blocks: early
    only_muon, vectors, _ = by_block(replace(CFG, muon=replace(CFG.muon, lr_late=0.0)), (11, 2))
    assert only_muon == [0.02] * 5 + [0.0] * 6 and vectors == [0.01] * 11  # 0 is a rate, None is none


def test_decoder_factor_is_on_blocks_behind_the_encoder_only():
    matrices, vectors, got = by_block(replace(CFG, decoder_lr_mult=2.0), (9, 1))
    assert matrices == [0.02] + [0.04] * 8 and vectors == [0.01] + [0.02] * 8
    assert got["skip"][2] == 0.01 and got["table"][2] == 0.03 and got["lam"][2] == 0.05
    both = replace(CFG, decoder_lr_mult=2.0, muon=replace(CFG.muon, lr_late=0.5))
    matrices, _, got = by_block(both, (4, 3))
    assert matrices == [0.02, 0.02, 0.5, 1.0] and got["m3"][0] == "muon.late.decoder"


def test_untrained_parameters_have_no_group():
    infos = [
        info("frozen", Role.FROZEN, grad=False),
        info("adapt", Role.ADAPT_ONLY),
        info("empty", Role.VECTOR, shape=(0, 8)),
        info("vector", Role.VECTOR),
    ]
    assert list(treatment(build_groups(infos, CFG, (4, 2), tied=True))) == ["vector"]


def test_refuses_orphans_doubles_and_vectors_for_muon():
    with pytest.raises(ValueError, match="no optimiser"):
        build_groups([info("w", Role.FROZEN, grad=True)], CFG, (4, 2), tied=True)
    twice = info("a", Role.VECTOR)
    with pytest.raises(ValueError, match="stepped twice"):
        build_groups([twice, ParamInfo("b", twice.param, Role.EMBED, None)], CFG, (4, 2), tied=True)
    with pytest.raises(ValueError, match="2 axes"):
        build_groups([info("w", Role.MATRIX, shape=(3,))], CFG, (4, 2), tied=True)


def test_real_model_is_covered_exactly_once():
    from pgolf.model.config import AttentionConfig, BigramConfig, EmbedConfig, ModelConfig, PlanConfig
    from pgolf.model.gpt import GPT

    cfg = ModelConfig(
        dim=16,
        embed=EmbedConfig(vocab_size=32, tied=False, bigram=BigramConfig(rows=8, dim=4)),
        plan=PlanConfig(num_layers=3),
        attn=AttentionConfig(num_heads=2, num_kv_heads=1),
    )
    model = GPT(cfg, train_length=8)
    infos = roles_of(model)
    grouped = [id(p) for g in build_groups(infos, CFG, (3, cfg.plan.n_encoder), tied=False) for p in g.params]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters()) and len(set(grouped)) == len(grouped)
