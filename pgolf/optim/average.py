"""Weight averaging: EMA, SWA, and the choice of which weights are exported."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pgolf.errors import ConfigError
from pgolf.optim.config import AverageConfig


class Averager:
    """Follows `model_params` (name -> parameter, not copied) in fp32 on their device.

    EMA: e <- d e + (1 - d) w after every step, from the weights at construction, no bias correction (PR #401).
    SWA: a running sum of the EMA or the raw weights, for snapshots at the end of training.
    """

    def __init__(self, model_params: Mapping[str, Tensor], cfg: AverageConfig):
        self.cfg = cfg
        self.live = dict(model_params)
        self.ema = self._snapshot() if cfg.ema else None
        self.swa_sum = [torch.zeros_like(w) for w in self._snapshot()] if cfg.swa else None
        self.swa_count = 0

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().to(torch.float32, copy=True) for p in self.live.values()]

    @torch.no_grad()
    def update(self, step: int, lr_scale: float) -> None:
        """Call after optimiser step number `step` (the first is 1), which ran at `lr_scale`. No host sync."""
        live = [p.detach().float() for p in self.live.values()]  # no copy of what is fp32 already
        if self.ema is not None:
            torch._foreach_lerp_(self.ema, live, 1.0 - self.cfg.ema.decay)
        swa = self.cfg.swa
        if swa is not None and lr_scale < swa.threshold and step % swa.every == 0:
            torch._foreach_add_(self.swa_sum, self.ema if swa.source == "ema" else live)
            self.swa_count += 1

    @torch.no_grad()
    def averaged(self) -> tuple[str, dict[str, Tensor]]:
        """What to export: (source, name -> fresh tensor in the parameter's dtype).

        The source is "swa(ema)" or "swa(raw)" if SWA is on and has at least two snapshots, else "ema" if EMA is on,
        else "raw".
        """
        if self.swa_sum is not None and self.swa_count >= 2:
            source, values = f"swa({self.cfg.swa.source})", torch._foreach_div(self.swa_sum, float(self.swa_count))
        elif self.ema is not None:
            source, values = "ema", self.ema
        else:
            source, values = "raw", [p.detach() for p in self.live.values()]
        pairs = zip(self.live.items(), values, strict=True)
        return source, {name: value.to(p.dtype, copy=True) for (name, p), value in pairs}

    def state_dict(self) -> dict:
        """The averages by parameter name, None where one is off. References: deep-copy to keep them over an update."""
        named = lambda values: None if values is None else dict(zip(self.live, values, strict=True))
        return {"ema": named(self.ema), "swa_sum": named(self.swa_sum), "swa_count": self.swa_count}

    @torch.no_grad()
    def load_state_dict(self, saved: dict) -> None:
        """Restores the averages. Raises ConfigError if the saved run averaged something else."""
        for key, mine in (("ema", self.ema), ("swa_sum", self.swa_sum)):
            theirs = saved[key]
            if (theirs is None) != (mine is None) or (mine is not None and list(theirs) != list(self.live)):
                raise ConfigError(
                    f"weight averages do not fit: {key} of the saved run is {_state(theirs)}, here {_state(mine)};"
                    " resume with the average and model settings of the saved run"
                )
        for key, mine in (("ema", self.ema), ("swa_sum", self.swa_sum)):
            if mine is not None:
                torch._foreach_copy_(mine, list(saved[key].values()))
        self.swa_count = saved["swa_count"]


def _state(average: object) -> str:
    return "off" if average is None else f"on with {len(average)} tensors"
