"""A trained model to bytes and back. The bytes describe the model completely: code and tokenizer apart, nothing else is
needed to score it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgolf import tree
from pgolf.artifact.pack import pack, unpack
from pgolf.artifact.prune import prune
from pgolf.errors import ArtifactError, ConfigError
from pgolf.model.config import ModelConfig
from pgolf.model.gpt import GPT
from pgolf.model.roles import ParamInfo, Role
from pgolf.quant.config import QuantConfig
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import Parts, dequantize

MAX_LENGTH = 1 << 20  # positions that a loaded model makes rotary tables for


class Loaded(NamedTuple):
    """A reloaded artifact. extras: what `save_model` was given, tokenizer: sha256 of the tokenizer's file."""

    model: GPT
    extras: dict[str, Any]
    tokenizer: str


def save_model(
    model: GPT,
    infos: list[ParamInfo],
    cfg: QuantConfig,
    tokenizer_sha256: str,
    phase: Callable[[str], AbstractContextManager] = nullcontext,
    given: Mapping[str, Parts] | None = None,
    diagonals: Mapping[str, Tensor] | None = None,
    code_bytes: int = 0,
    say: Callable[[str], None] = lambda text: None,
    extras: Mapping[str, Any] | None = None,
) -> bytes:
    """Quantises and packs `model`'s parameters with what is needed to rebuild it; adapters are no part of that.

    phase: entered with "quantise" while it does that, for a time ledger. given, diagonals: of `quantize_state`, as
    `pgolf.calibrate` found them. code_bytes: what else counts, for a pruning to a size. say: gets a line about that.
    extras: JSON values that scoring needs besides the weights, as `load` gives them back.
    """
    infos = [i for i in infos if i.role is not Role.ADAPT_ONLY]
    with phase("quantise"):
        state = {i.name: i.param.detach().float().cpu() for i in infos}
        records = quantize_state(state, infos, cfg, given, diagonals)
    meta = {
        "model": tree.to_dict(model.cfg),
        "train_length": model.train_length,
        "max_length": model.max_length,
        "tokenizer": tokenizer_sha256,
        **({"extras": dict(extras)} if extras else {}),
    }
    if cfg.prune:
        size = lambda kept: code_bytes + len(pack(kept, meta, cfg.codec, cfg.level))
        with phase("prune"):
            records, count = prune(records, round(1e6 * cfg.prune.target_mb), size)
        say(f"pruning to {cfg.prune.target_mb} MB: {count:,} integers of 1 or -1 became 0")
    return pack(records, meta, cfg.codec, cfg.level)


def load_model(data: bytes, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32) -> GPT:
    """The model of `load`."""
    return load(data, device=device, compute_dtype=compute_dtype).model


def load(data: bytes, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32) -> Loaded:
    """What `data` holds, the model in evaluation mode.

    Raises ArtifactError when the bytes are damaged or do not describe a model of this version.
    """
    records, meta = unpack(data)
    weights = dequantize(records)
    model = _skeleton(meta, len(records), compute_dtype)
    expected = {name: tuple(p.shape) for name, p in model.named_parameters()}
    got = {name: tuple(w.shape) for name, w in weights.items()}
    if got != expected:
        raise ArtifactError(f"artifact: its tensors are not those of the model it describes: {_odd(got, expected)}")
    model.to_empty(device="cpu").set_rope_()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(weights[name])
    extras = meta.get("extras", {})
    if not isinstance(extras, dict):
        raise ArtifactError(f"artifact: its extras are a {type(extras).__name__}, expected an object")
    return Loaded(model.to(device).eval(), extras, str(meta.get("tokenizer", "")))


def _odd(got: dict[str, tuple], expected: dict[str, tuple]) -> str:
    """What does not fit, by kind, the first of each."""
    kinds = {
        "missing": sorted(expected.keys() - got.keys()),
        "unexpected": sorted(got.keys() - expected.keys()),
        "of another shape": sorted(n for n in got.keys() & expected.keys() if got[n] != expected[n]),
    }
    return "; ".join(f"{len(names)} {kind} ({', '.join(names[:2])})" for kind, names in kinds.items() if names)


def _skeleton(meta: dict, n_tensors: int, compute_dtype: torch.dtype) -> GPT:
    """The described model without storage: a description may lie about sizes, and nothing is allocated by it."""
    try:
        cfg = tree.from_dict(ModelConfig, meta["model"])
        lengths = {k: int(meta[k]) for k in ("train_length", "max_length")}
        problems = tree.problems(cfg)
        if cfg.plan.num_layers > n_tensors or not all(1 <= n <= MAX_LENGTH for n in lengths.values()):
            problems.append(f"{cfg.plan.num_layers} layers, {lengths} for {n_tensors} tensors")
        if problems:
            raise ConfigError("; ".join(problems))
        with torch.device("meta"):
            return GPT(cfg, **lengths, compute_dtype=compute_dtype)
    except (KeyError, TypeError, ValueError, RuntimeError) as err:
        raise ArtifactError(f"artifact: its model description cannot be used: {err}") from err
