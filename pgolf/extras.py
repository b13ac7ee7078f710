"""What scoring needs besides the weights, made of training data before packing: it is part of the artifact.

A softmax temperature (`eval.temperature`) and the mixer's gate (`ngram.scorer=mixer`). Both read training data, so
their time counts as training; a trial in the warm-up measures it and as much is kept.
"""

from __future__ import annotations

import base64
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgolf.data.shards import read_shard
from pgolf.errors import ArtifactError
from pgolf.eval.base import evaluate
from pgolf.eval.neural import Neural, Temperature
from pgolf.eval.order import STREAM
from pgolf.eval.stats import Collector
from pgolf.eval.windowed import PlainWindows, SlidingWindows
from pgolf.schema import RunConfig

if TYPE_CHECKING:
    from pgolf.train import Trainer

MARGIN = 1.25  # of the kept time over the measured
MIXER_TARGETS = 1 << 18  # of training text that the mixer's gate is fitted on


def wanted(cfg: RunConfig) -> bool:
    """Whether the settings ask for anything here."""
    return bool(cfg.eval.temperature or _mixes(cfg))


def _mixes(cfg: RunConfig) -> bool:
    return cfg.ngram is not None and cfg.ngram.scorer == "mixer"


def keep_reserve(trainer: Trainer) -> None:
    """Measures a trial on the weights as they are, and takes as much off the training budget, unless train.reserve_ms
    says how much. A collective, after the warm-up."""
    cfg = trainer.cfg
    if not wanted(cfg) or trainer.clock.cap_ms is None or cfg.train.reserve_ms:
        return
    began = time.monotonic()
    make(trainer, say=lambda text: None)
    seconds = trainer.dist.broadcast_float(MARGIN * (time.monotonic() - began))
    trainer.keep_reserve(trainer.reserve_ms + 1000 * seconds)
    trainer.log.line(f"temperature and mixer: {seconds:.2f} s of training are kept for them")


def make(trainer: Trainer, say=None) -> dict[str, Any]:
    """JSON values for `save_model`: {"temperature": {value, adaptive}, "mixer": {name: base64}}. A collective."""
    cfg, say, out = trainer.cfg, say or trainer.log.line, {}
    if not wanted(cfg):
        return out
    trainer.model.eval()
    try:
        temperature = Temperature()
        if cfg.eval.temperature:
            temperature, gain = _temperature(trainer)
            out["temperature"] = {"value": temperature.value, "adaptive": temperature.adaptive}
            say(
                f"temperature {temperature.value:g}, chosen on {cfg.eval.temperature.targets:,} training targets, where"
                f" it gains {gain:.5f} nats a token"
            )
        if _mixes(cfg):
            out["mixer"] = {name: _text(w) for name, w in _mixer(trainer, temperature, say).items()}
    finally:
        trainer.model.train()
    return out


def _text(weight: Tensor) -> list:
    return [list(weight.shape), base64.b64encode(weight.numpy().tobytes()).decode()]


def _tokens(trainer: Trainer, targets: int) -> Tensor:
    """The first tokens of the last training shard."""
    shard = read_shard(trainer.data.train_files[-1])
    return torch.from_numpy(shard[: targets + 1].astype("int64"))


def _temperature(trainer: Trainer) -> tuple[Temperature, float]:
    from pgolf.eval.temperature import choose

    cfg = trainer.cfg
    length = cfg.eval.seq_len or cfg.data.seq_len
    windows = SlidingWindows(length, cfg.eval.stride or length, cfg.eval.batch_tokens)
    tokens = _tokens(trainer, cfg.eval.temperature.targets)
    return choose(Neural(trainer.model), tokens, windows, trainer.dist, cfg.eval.temperature.adaptive)


def _mixer(trainer: Trainer, temperature: Temperature, say) -> dict[str, Tensor]:
    """The gate's weights, fitted with exact counts of the training text before each of its targets."""
    from pgolf.ngram.scorers import build_scorer

    cfg, tokens = trainer.cfg, _tokens(trainer, MIXER_TARGETS)
    scorer = build_scorer(cfg.ngram, cfg.model.embed.vocab_size)
    collector = Collector(len(tokens) - 1, entropy=True)
    windows = PlainWindows(cfg.eval.seq_len or cfg.data.seq_len, cfg.eval.batch_tokens)
    ones = lambda ids, targets: torch.ones_like(targets)
    neural = Neural(trainer.model, temperature)
    result = evaluate(windows, neural, tokens, ones, trainer.dist, readers=[collector])
    stats = collector.merged(trainer.dist, STREAM, windows.name)
    losses = trainer.dist.on_main(lambda: scorer.fit(tokens.to(trainer.device), stats))
    weights = trainer.dist.broadcast_object(scorer.state() if trainer.dist.is_main else None)
    say(f"mixer fitted on {len(stats):,} training targets: {result.val_loss:.4f} -> {losses[-1]:.4f} nats a token")
    return weights


def temperature_of(extras: Mapping[str, Any]) -> Temperature:
    """Of a reloaded artifact; 1 without. Raises ArtifactError when it is no temperature."""
    found = extras.get("temperature", {"value": 1.0, "adaptive": False})
    try:
        value, adaptive = float(found["value"]), bool(found["adaptive"])
    except (KeyError, TypeError, ValueError) as err:
        raise ArtifactError(f"artifact: its temperature cannot be used: {err}") from err
    if not 0.01 <= value <= 100:
        raise ArtifactError(f"artifact: its temperature is {value}, expected a positive number near 1")
    return Temperature(value, adaptive)


def mixer_of(extras: Mapping[str, Any]) -> dict[str, Tensor] | None:
    """The mixer's weights of a reloaded artifact; None without. Raises ArtifactError when they cannot be used."""
    if "mixer" not in extras:
        return None
    try:
        return {
            name: torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.float16).reshape(shape)
            for name, (shape, data) in extras["mixer"].items()
        }
    except (AttributeError, TypeError, ValueError, RuntimeError) as err:
        raise ArtifactError(f"artifact: its mixer cannot be used: {err}") from err
