"""The table of scorers. All give a probability distribution, and every one can score a run that is submitted."""

from __future__ import annotations

from pgolf.ngram.config import NgramConfig
from pgolf.ngram.hedge import EXPERTS, Hedge
from pgolf.ngram.mixer import Mixer
from pgolf.ngram.scorer import Scorer
from pgolf.ngram.vector import Geometric, PpmC


def build_scorer(cfg: NgramConfig, vocab_size: int) -> Scorer:
    """The scorer of the settings."""
    return SCORERS[cfg.scorer](cfg, vocab_size)


SCORERS: dict[str, type[Scorer]] = EXPERTS | {cls.name: cls for cls in (PpmC, Geometric, Hedge, Mixer)}
