"""What a run would hold and send, from its settings alone: no data, no weights, no GPU. `train_gpt.py --dry-run`."""

from __future__ import annotations

from collections import Counter

import torch

from pgolf.model.gpt import GPT, parameter_count
from pgolf.model.roles import roles_of
from pgolf.optim.exchange import is_split, padded, traffic_of
from pgolf.optim.groups import Group, build_groups
from pgolf.schema import RunConfig

WORLDS = (1, 8, 64, 1024)


def groups_on_paper(cfg: RunConfig, dtype: torch.dtype = torch.bfloat16) -> list[Group]:
    """The optimiser groups of a run, of parameters without storage."""
    with torch.device("meta"):
        model = GPT(cfg.model, train_length=cfg.data.seq_len, compute_dtype=dtype)
    layers = (cfg.model.plan.num_layers, cfg.model.plan.n_encoder)
    return build_groups(roles_of(model), cfg.optim, layers, cfg.model.embed.tied)


def exchanged(groups: list[Group]) -> tuple[dict[tuple[int, int], int], int]:
    """({(shorter, longer side): matrices} that Muon trains, numbers that AdamW trains)."""
    matrices = Counter(tuple(sorted(i.param.shape)) for g in groups if g.kind == "muon" for i in g.infos)
    return matrices, sum(p.numel() for g in groups if g.kind == "adamw" for p in g.params)


def lines(cfg: RunConfig) -> list[str]:
    """The text of --dry-run."""
    with torch.device("meta"):
        model = GPT(cfg.model, train_length=cfg.data.seq_len, compute_dtype=torch.bfloat16)
    groups = groups_on_paper(cfg)
    matrices, others = exchanged(groups)
    out = [
        f"{cfg.preset}: {parameter_count(model):,} parameters; Muon trains {sum(matrices.values())} matrices, "
        f"AdamW {others:,} numbers",
        f"tokens per step: {cfg.data.batch_tokens:,} asked for, in rows of {cfg.data.seq_len}",
        "",
        *memory_lines(cfg, groups),
    ]
    for world in WORLDS:
        out += ["", *traffic_lines(cfg, matrices, others, world)]
    return out


def memory_lines(cfg: RunConfig, groups: list[Group]) -> list[str]:
    """What stays on a device from step to step. Activations come on top; bench/bench_step.py measures the peak."""
    size = lambda kind: sum(p.numel() * p.element_size() for g in groups if g.kind == kind for p in g.params)
    muon, adamw = size("muon"), size("adamw")
    numbers = sum(p.numel() for g in groups for p in g.params)
    momentum = {"fp32": 1.0, "bf16": 0.5}[cfg.optim.muon.exchange_dtype]
    averages = bool(cfg.average.ema) + bool(cfg.average.swa)
    rows = {
        "weights": muon + adamw,
        "gradients": muon + adamw,
        "exchange buffers and momentum, one rank": round(2 * momentum * muon),
        "moments of AdamW": 2 * adamw,
        "bf16 casts and their gradients (with a GPU)": muon,
        "averages": 4 * averages * numbers,
    }
    text = [f"  {name:44s}{n / 1e6:9.1f} MB" for name, n in rows.items()]
    return ["on each device, without activations:", *text, f"  {'=':44s}{sum(rows.values()) / 1e6:9.1f} MB"]


def traffic_lines(cfg: RunConfig, matrices: dict[tuple[int, int], int], others: int, world: int) -> list[str]:
    """The collectives of a step on `world` ranks."""
    sent = traffic_of(matrices, others, cfg.optim.muon, world)
    shard = cfg.optim.muon.parallel == "shard"
    split = {s: n for s, n in matrices.items() if is_split(n, world, shard)}
    slots = sum(padded(n, world) for n in split.values())
    work = sum(padded(n, world) // world if s in split else n for s, n in matrices.items())
    head = f"{world} rank{'s' * (world > 1)}: each orthogonalises {work} of {sum(matrices.values())} matrices a step"
    if split:
        head += f", in {slots} slots for {sum(split.values())} split ones"
    rows = [
        f"  {s.collective:15s}{s.payload / 1e6:10.3f} MB {s.wire / 1e6:10.3f} MB on the wire  {s.what}" for s in sent
    ]
    return [head, *rows] + [f"  {'=':28s}{sum(s.wire for s in sent) / 1e6:11.3f} MB leave each rank"] * bool(sent)
