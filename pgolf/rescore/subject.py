"""What is evaluated: an artifact, a finished run, or a checkpoint; with the settings that it came from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pgolf import checkpoint, tree
from pgolf.artifact.model_io import load
from pgolf.errors import ArtifactError, ConfigError
from pgolf.model.gpt import GPT
from pgolf.model.roles import roles_of
from pgolf.optim.average import Averager
from pgolf.resume import tensors_below
from pgolf.schema import RunConfig
from pgolf.snapshot import FOLDER

ARTIFACT, SETTINGS = "model.pgolf", "config.json"


@dataclass(frozen=True)
class Subject:
    """A model to score. extras: what its artifact holds besides weights. sha256: of the bytes that it came from.

    tokenizer: sha256 of the tokenizer's file that it was trained with, "" where that is not known.
    """

    name: str
    model: GPT
    extras: Mapping[str, Any]
    sha256: str
    tokenizer: str

    def fit_length(self, length: int) -> None:
        """Makes rotary tables for rows of `length`, where those of the run were shorter."""
        if length > self.model.max_length:
            self.model.max_length = length
            self.model.set_rope_()


def locate(path: Path) -> Path:
    """The artifact's file or the checkpoint's folder that `path` means. Raises ConfigError when there is neither."""
    if path.is_file():
        return path
    if (path / ARTIFACT).is_file():
        return path / ARTIFACT
    if (path / checkpoint.MANIFEST).is_file():
        return path
    for folder in (path / FOLDER, path):
        if folder.is_dir() and (found := checkpoint.newest(folder, say=lambda text: None)):
            return found
    raise ConfigError(
        f"{path} holds nothing to evaluate: expected an artifact ({ARTIFACT}), a run's folder, or a checkpoint"
    )


def settings_of(found: Path) -> RunConfig | None:
    """The settings of the run that it belongs to; None where an artifact lies alone. Raises ArtifactError."""
    if found.is_dir():
        return tree.from_dict(RunConfig, checkpoint.verify(found)["facts"]["config"])
    beside = found.parent / SETTINGS
    if not beside.is_file():
        return None
    try:
        return tree.from_dict(RunConfig, json.loads(beside.read_text(encoding="utf-8"))["config"])
    except (OSError, ValueError, KeyError, TypeError, ConfigError) as err:
        raise ArtifactError(f"{beside} cannot be used ({err}); move it away to go by variables alone") from err


def open_subject(found: Path, cfg: RunConfig, device: torch.device, dtype: torch.dtype) -> Subject:
    """The model. Raises ArtifactError when its bytes are damaged."""
    if found.is_dir():
        return _of_checkpoint(found, cfg, device, dtype)
    try:
        data = found.read_bytes()
    except OSError as err:
        raise ArtifactError(f"{found} cannot be read: {err.strerror}") from err
    loaded = load(data, device=device, compute_dtype=dtype)
    return Subject(f"artifact {found}", loaded.model, loaded.extras, hashlib.sha256(data).hexdigest(), loaded.tokenizer)


def _of_checkpoint(found: Path, cfg: RunConfig, device: torch.device, dtype: torch.dtype) -> Subject:
    """The float weights that a run would export from here: averaged as its settings say."""
    tensors, facts = checkpoint.read(found)
    length = cfg.eval.seq_len or cfg.data.seq_len
    model = GPT(cfg.model, train_length=cfg.data.seq_len, max_length=length, compute_dtype=dtype)
    params = {info.name: info.param for info in roles_of(model)}
    weights = tensors_below(tensors, "model.", params)
    averager = Averager(params, cfg.average)
    state = averager.state_dict()
    for kind in ("ema", "swa_sum"):
        if state[kind] is not None:
            state[kind] = tensors_below(tensors, f"average.{kind}.", params)
    averager.load_state_dict({**state, "swa_count": facts["swa_count"]})
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
        source, exported = averager.averaged()
        for name, param in params.items():
            param.copy_(exported[name])
    name = f"checkpoint {found}, step {facts['step']}, {source} weights"
    tokenizer = str(facts.get("data", {}).get("tokenizer_sha256", ""))
    sha256 = checkpoint.verify(found)["files"][checkpoint.STATE]["sha256"]
    return Subject(name, model.to(device).eval(), {}, sha256, tokenizer)
