"""The table of pgolf's own scorers: every evaluator and every n-gram scorer, over a toy model or an artifact's.

The toy has every main feature and few ids, so that an audit takes seconds. Its weights are random, and its windows
short, so that streams of the audit's length have many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pgolf import presets, tree
from pgolf.artifact.model_io import load_model
from pgolf.audit.evaluators import EvaluatorScorer, Source, WithNeutral
from pgolf.audit.ngrams import NgramScorer
from pgolf.errors import ConfigError
from pgolf.eval.documents import DocumentWindows
from pgolf.eval.neural import Temperature
from pgolf.eval.windowed import PlainWindows, SlidingWindows
from pgolf.model.gpt import GPT
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.scorers import SCORERS
from pgolf.ttt.build import Frame, build
from pgolf.ttt.config import LoraConfig, PhasesConfig, SgdConfig, TttConfig

TOY_VOCAB, TOY_LENGTH = 32, 32
TOY_GAIN = 40.0  # on the tied embedding: an untrained model is nearly uniform, which would hide what adds up wrongly
# Phrases of the synthetic text have 3 to 11 tokens: contexts that the challenge's orders of 8 to 16 would never find.
# Rows of 2^4 for hundreds of contexts, so that contexts do share rows.
TOY_NGRAMS = {"orders": (1, 2, 3, 4), "hint_orders": (2, 3, 4), "hint_count": (2,), "row_bits": 4}


def toy(seed: int = 0) -> Source:
    """A GPT of the smoke preset over 32 ids with random weights, windows of 32 tokens."""
    cfg = tree.put(presets.smoke().model, "embed.vocab_size", TOY_VOCAB)
    model = GPT(cfg, train_length=TOY_LENGTH).init_weights(seed).eval()
    with torch.no_grad():
        model.embed.weight.mul_(TOY_GAIN)
    return Source(model, "toy", TOY_LENGTH, is_toy=True)


def from_artifact(path: Path) -> Source:
    """The model of an artifact, on a GPU where there is one. Raises ConfigError, ArtifactError."""
    try:
        data = path.read_bytes()
    except OSError as err:
        raise ConfigError(f"--model {path}: {err.strerror}; expected the .pgolf artifact of a run") from err
    model = load_model(data, device="cuda" if torch.cuda.is_available() else "cpu")
    return Source(model, f"{path.name} {hashlib.sha256(data).hexdigest()[:16]}", model.train_length)


# -- evaluators --------------------------------------------------------------------------------------------------------


def plain(source: Source) -> EvaluatorScorer:
    return EvaluatorScorer(source, partial(PlainWindows, source.seq_len, 4 * source.seq_len))


def sliding(source: Source) -> EvaluatorScorer:
    stride = max(source.seq_len // 4, 1)
    return WithNeutral(source, partial(SlidingWindows, source.seq_len, stride, 4 * source.seq_len))


def documents(source: Source) -> EvaluatorScorer:
    return EvaluatorScorer(source, partial(DocumentWindows, source.seq_len, 0, 4 * source.seq_len))


def tempered(source: Source) -> EvaluatorScorer:
    windows = partial(PlainWindows, source.seq_len, 4 * source.seq_len)
    return WithNeutral(source, windows, Temperature(0.9, adaptive=True))


class Learning(EvaluatorScorer):
    """Test-time training; with a rate of 0 it is the windows that it scores in."""

    def __init__(self, source: Source, cfg: TttConfig, quiet: TttConfig | None = None, world_size: int = 1):
        self.cfg, self.quiet = cfg, quiet
        frame = Frame(source.seq_len, max(source.seq_len // 4, 1), 4 * source.seq_len)
        super().__init__(source, partial(build, cfg, frame), world_size=world_size)
        self.config_digest = hashlib.sha256(f"{self.name} {sorted(tree.flatten(cfg).items())}".encode()).hexdigest()
        if quiet is not None:
            self.neutral = lambda: (Learning(source, quiet), sliding(source))


def ttt_sgd(source: Source) -> Learning:
    # The cosine's length is a setting: as many chunks as the stream has would be known at its end only
    sizes = {"chunk": 64, "epochs": 1, "lr": 0.05, "max_chunks": 8} if source.is_toy else {"max_chunks": 1893}
    return Learning(source, TttConfig(sgd=SgdConfig(**sizes)), TttConfig(sgd=SgdConfig(**sizes | {"lr": 0.0})))


def ttt_lora(source: Source) -> Learning:
    return Learning(source, TttConfig(kind="lora", lora=_lora(source)))


def ttt_phased(source: Source) -> Learning:
    phases = PhasesConfig(documents=4, count=2, chunk=32, lr=0.05) if source.is_toy else PhasesConfig()
    return Learning(source, TttConfig(kind="phased", lora=_lora(source), phases=phases))


def _lora(source: Source) -> LoraConfig:
    return LoraConfig(rank=2, alpha=2.0, chunk=8, slots=4, lr=0.01, weight_decay=0.0) if source.is_toy else LoraConfig()


# -- n-gram scorers ----------------------------------------------------------------------------------------------------


def ngram(name: str, source: Source) -> NgramScorer:
    """An n-gram scorer with its defaults, over plain windows; with settings to size over the toy."""
    cfg = NgramConfig(scorer=name)
    return NgramScorer(plain(source), replace(cfg, **TOY_NGRAMS) if source.is_toy else cfg)


PRODUCTION: dict[str, Callable[[Source], Any]] = {
    "plain": plain,
    "sliding": sliding,
    "documents": documents,
    "temperature": tempered,
    "ttt_sgd": ttt_sgd,
    "ttt_lora": ttt_lora,
    "ttt_phased": ttt_phased,
} | {name: partial(ngram, name) for name in SCORERS if name != "neural"}
