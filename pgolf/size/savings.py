"""How to save bytes: settings that make an artifact smaller, the ones that cost least first."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from pgolf import tree
from pgolf.artifact.codecs import name_of
from pgolf.artifact.pack import contents
from pgolf.config import show
from pgolf.data.config import DataConfig
from pgolf.errors import PgolfError
from pgolf.model.config import ModelConfig
from pgolf.quant.config import QUANT_KINDS, QuantConfig
from pgolf.schema import RunConfig
from pgolf.size.estimate import infos_of, sizes

# Each kind with the next smaller one; those of them that this version has
SMALLER = [k for k in ("float", "fp16", "int8", "int7", "int6", "int5", "int4") if k in QUANT_KINDS]
SHOWN = 3


@dataclass(frozen=True)
class Saving:
    """Settings as users write them, and the bytes that they should save. `why`: what they cost."""

    settings: str
    saves: int
    why: str


def cheapest(cfg: RunConfig, over: int, measured: int = 0) -> list[Saving]:
    """Up to three settings that save bytes. Those that alone save `over` come first, by what they cost; where they are
    fewer, those that save most fill up.

    measured: bytes of the artifact if there is one; what is predicted is then scaled to it.
    """
    now = _predict(cfg)
    if not now:
        return []
    scale = measured / now if measured else 1.0
    found = []
    for settings, why in _candidates(cfg):
        smaller = _predict(reduce(lambda tree_, item: tree.put(tree_, *item), settings.items(), cfg))
        if smaller is not None and smaller < now:
            text = " ".join(f"{path}={show(value)}" for path, value in settings.items())
            found.append(Saving(text, round((now - smaller) * scale), why))
    enough = [s for s in found if s.saves >= over]
    rest = sorted((s for s in found if s.saves < over), key=lambda s: -s.saves)
    return (enough + rest)[:SHOWN]


def settings_of(artifact: bytes) -> RunConfig:
    """The settings that an artifact shows: its model, and how most of its matrices and tables are stored."""
    meta, tensors, streams = contents(artifact)
    model = tree.from_dict(ModelConfig, meta["model"])
    stored: dict[str, Counter[str]] = {"matrix": Counter(), "embed": Counter()}
    for _, role, kind, shape, _ in tensors:
        if role in ROLES:
            stored[ROLES[role]][kind.partition("+")[0]] += math.prod(shape)
    kinds = {name: count.most_common(1)[0][0] for name, count in stored.items() if count}
    small = [math.prod(t[3]) for t in tensors if t[1] in ROLES and t[2] == "fp16" != kinds[ROLES[t[1]]]]
    codecs = sorted({name_of(s.codec) for s in streams})
    quant = QuantConfig(codec=codecs[0] if len(codecs) == 1 else "auto", keep_numel=max(small, default=0), **kinds)
    return RunConfig(data=DataConfig(seq_len=int(meta["train_length"])), model=model, quant=quant)


# The setting that names the kind, by role
ROLES = {"matrix": "matrix", "side_matrix": "matrix", "embed": "embed", "head": "embed"}


def _candidates(cfg: RunConfig) -> Iterator[tuple[dict[str, Any], str]]:
    """(settings, what they cost), what costs least first."""
    level = {"quant.level": -1} if cfg.quant.level != -1 else {}  # levels differ from codec to codec
    if cfg.quant.codec not in ("brotli", "auto"):
        yield {"quant.codec": "brotli", **level}, "the same weights"
    if cfg.quant.codec != "auto":
        yield {"quant.codec": "auto", **level}, "the same weights; packing tries every codec"
    if smaller := _next(cfg.quant.embed):
        yield {"quant.embed": smaller}, "coarser tables"
    model = cfg.model
    if model.embed.bigram and model.embed.bigram.rows > 1024:
        yield {"model.embed.bigram.rows": model.embed.bigram.rows // 2}, "more collisions of hashed n-grams"
    if model.attn.value_embed:
        yield {"model.attn.value_embed": None}, "no value embeddings"
    yield {"model.mlp.mult": model.mlp.mult - 0.25}, "narrower MLPs"
    yield _one_layer_less(model), "a layer less; steps are faster"
    yield {"model.dim": model.dim - model.dim // 16}, "a narrower model; steps are faster"
    if smaller := _next(cfg.quant.matrix):
        yield {"quant.matrix": smaller}, "coarser matrices: they want late QAT or GPTQ"


def _one_layer_less(model: ModelConfig) -> dict[str, Any]:
    """With the settings that count layers moved along."""
    n = model.plan.num_layers - 1
    out: dict[str, Any] = {"model.plan.num_layers": n}
    if model.attn.xsa and model.attn.xsa.last_n > n:
        out["model.attn.xsa.last_n"] = n
    if model.attn.value_embed and n in model.attn.value_embed.layers:
        out["model.attn.value_embed.layers"] = tuple(i - 1 for i in model.attn.value_embed.layers)
    return out


def _next(kind: str) -> str | None:
    """The kind that takes the next fewer bits."""
    at = SMALLER.index(kind) + 1 if kind in SMALLER else len(SMALLER)
    return SMALLER[at] if at < len(SMALLER) else None


def _predict(cfg: RunConfig) -> int | None:
    """Bytes of the artifact at the high end; None if no model can be built of these settings."""
    if tree.problems(cfg):
        return None
    try:
        return sum(sizes(infos_of(cfg), cfg, "high").values())
    except (PgolfError, ValueError, TypeError):  # what a candidate may break: heads that do not divide the width, say
        return None
