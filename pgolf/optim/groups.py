"""Which optimiser trains which parameter, how fast, with how much decay: a table keyed by role."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from pgolf.model.roles import ParamInfo, Role
from pgolf.optim.config import OptimConfig


@dataclass(frozen=True)
class Rule:
    """The treatment of a parameter. Parameters with equal rules share a group."""

    name: str
    kind: str  # "muon" or "adamw"
    lr: float  # before the schedule's factor
    weight_decay: float


@dataclass
class Group:
    """Parameters that are treated alike. `lr` is the base rate: the schedule multiplies it."""

    name: str
    kind: str  # "muon" or "adamw"
    lr: float
    weight_decay: float
    betas: tuple[float, float]  # AdamW only
    eps: float  # AdamW only
    infos: list[ParamInfo] = field(default_factory=list)

    @property
    def params(self) -> list[Tensor]:
        return [info.param for info in self.infos]


@dataclass(frozen=True)
class Site:
    """What a rule may look at besides the settings: where the parameter sits."""

    late: bool  # in the second half of the blocks
    decoder: bool  # in a block behind the encoder
    tied: bool  # the head reads the token table


def _by_depth(name: str, lr: float, lr_late: float | None, site: Site, cfg: OptimConfig) -> tuple[str, float]:
    """Name and rate after the late rate (PR #1130) and the decoder's factor."""
    if site.late and lr_late is not None:
        name, lr = f"{name}.late", lr_late
    if site.decoder and cfg.decoder_lr_mult != 1.0:
        name, lr = f"{name}.decoder", lr * cfg.decoder_lr_mult
    return name, lr


def _muon(cfg: OptimConfig, site: Site) -> Rule:
    name, lr = _by_depth("muon", cfg.muon.lr, cfg.muon.lr_late, site, cfg)
    return Rule(name, "muon", lr, cfg.muon.weight_decay)


def _scalar(cfg: OptimConfig, site: Site) -> Rule:
    name, lr = _by_depth("adamw.scalar", cfg.adamw.scalar_lr, cfg.adamw.scalar_lr_late, site, cfg)
    return Rule(name, "adamw", lr, cfg.adamw.weight_decay)


def _side(cfg: OptimConfig, site: Site) -> Rule:
    return _muon(cfg, site) if cfg.side_matrix == "muon" else _scalar(cfg, site)


def _embed(cfg: OptimConfig, site: Site) -> Rule:
    lr = cfg.adamw.tied_embed_lr if site.tied else cfg.adamw.embed_lr
    return Rule("adamw.embed", "adamw", lr, cfg.adamw.weight_decay)


def _head(cfg: OptimConfig, site: Site) -> Rule:
    return Rule("adamw.head", "adamw", cfg.adamw.head_lr, 0.0)  # plain Adam, as in the baseline


def _resid_lambda(cfg: OptimConfig, site: Site) -> Rule:
    return Rule("adamw.resid_lambda", "adamw", cfg.adamw.resid_lambda_mult * cfg.adamw.scalar_lr, 0.0)


def _site(info: ParamInfo, num_layers: int, n_encoder: int, tied: bool) -> Site:
    inside = info.block is not None
    return Site(inside and info.block >= num_layers // 2, inside and info.block >= n_encoder, tied)


def build_groups(infos: list[ParamInfo], cfg: OptimConfig, plan: tuple[int, int], tied: bool) -> list[Group]:
    """Every trained parameter in exactly one group; groups in order of first appearance.

    plan: (num_layers, n_encoder). Frozen parameters, those that only test-time adaptation trains and empty ones get no
    group. Raises ValueError if a parameter with requires_grad would be left out or is listed twice, or if one that
    Muon trains is not a matrix. Rates follow PR #401 and PR #1130; "muon.late" holds blocks >= num_layers // 2.
    """
    groups: dict[str, Group] = {}
    seen: dict[int, str] = {}
    for info in infos:
        if id(info.param) in seen:
            raise ValueError(f"{info.name} and {seen[id(info.param)]} are one parameter: it would be stepped twice")
        seen[id(info.param)] = info.name
        if info.param.numel() == 0 or info.role is Role.ADAPT_ONLY or not info.param.requires_grad:
            continue
        if info.role not in RULES:
            raise ValueError(f"{info.name} requires grad but role {info.role.name} has no optimiser: see RULES")
        rule = RULES[info.role](cfg, _site(info, *plan, tied))
        if rule.kind == "muon" and info.param.ndim != 2:
            raise ValueError(f"{info.name} is {tuple(info.param.shape)} with role {info.role.name}: Muon needs 2 axes")
        if rule.name not in groups:
            betas = (cfg.adamw.beta1, cfg.adamw.beta2)
            groups[rule.name] = Group(rule.name, rule.kind, rule.lr, rule.weight_decay, betas, cfg.adamw.eps)
        groups[rule.name].infos.append(info)
    return list(groups.values())


RULES: dict[Role, Callable[[OptimConfig, Site], Rule]] = {
    Role.MATRIX: _muon,
    Role.SIDE_MATRIX: _side,
    Role.EMBED: _embed,
    Role.HEAD: _head,
    Role.VECTOR: _scalar,
    Role.RESID_LAMBDA: _resid_lambda,
}
