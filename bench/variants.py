"""Ways to run a training step, as settings, and the presets whose steps are timed. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from pgolf.config import RunConfig


@dataclass(frozen=True)
class Variant:
    """Settings of a run: train.compile, kernels.default, kernels.weight_cast, kernels.fold_scales."""

    compile: str
    kernels: str
    weight_cast: str
    fold_scales: bool = False

    def of(self, cfg: RunConfig) -> RunConfig:
        """`cfg` run in this way."""
        kernels = replace(cfg.kernels, default=self.kernels, weight_cast=self.weight_cast, fold_scales=self.fold_scales)
        return replace(cfg, train=replace(cfg.train, compile=self.compile), kernels=kernels)


VARIANTS = {
    "eager": Variant("off", "reference", "off"),
    "compile": Variant("on", "reference", "off"),
    "kernels": Variant("off", "triton", "on"),
    "compile+kernels": Variant("on", "triton", "on"),
    "compile+kernels+fold": Variant("on", "triton", "on", fold_scales=True),
}
DEFAULT = {"cuda": "compile+kernels", "cpu": "eager"}  # what a run does unless told otherwise: budgets hold for it
ON_CPU = ("eager", "compile")  # kernels would be interpreted there
TIMED = ("rat_rod_green", "pr401", "kitchen_sink_v2", "naive_baseline", "h1")
SMALL = ("smoke",)  # --bench-size small
WORLD = {"production": 8, "small": 1}  # GPUs that share a step, by size
