"""What changes during a run: "from this point on, do that". Idempotent; each phase starts once and says so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pgolf.model.gpt import GPT
from pgolf.model.roles import ParamInfo
from pgolf.quant import fake_quant
from pgolf.quant.config import QuantConfig
from pgolf.quant.weight_cast import WeightCast


@dataclass
class Phase:
    """due(lr_scale) says when; start() does it and returns the line for the log; undo() restores the state before."""

    name: str
    due: Callable[[float], bool]
    start: Callable[[], str]
    undo: Callable[[], None]
    started: bool = False


def late_qat(model: GPT, infos: list[ParamInfo], quant: QuantConfig, cast: WeightCast | None) -> Phase:
    """With a weight cast an argument of it; without one a module in each layer's slot, which is a second graph."""

    def start() -> str:
        if cast:
            cast.quantize = True
        count = cast.on_grid if cast else fake_quant.attach(model, infos, quant)
        return f"{count} matrices are fake-quantised from here on"

    def undo() -> None:
        if cast:
            cast.quantize = False
        else:
            fake_quant.detach(model)

    return Phase("late_qat", lambda scale: scale < quant.late_qat.threshold, start, undo)


class Phases:
    """The phases of a run. They go by the lr scale, which is rank 0's: ranks never decide alone."""

    def __init__(self, model: GPT, infos: list[ParamInfo], quant: QuantConfig, cast: WeightCast | None = None):
        self.phases = [late_qat(model, infos, quant, cast)] if quant.late_qat else []

    def apply(self, lr_scale: float) -> list[tuple[str, str]]:
        """Starts every phase that is due and has not started; returns (name, what happened) of those."""
        happened = []
        for phase in self.phases:
            if not phase.started and phase.due(lr_scale):
                phase.started = True
                happened.append((phase.name, phase.start()))
        return happened

    def undo(self) -> None:
        """Takes every phase back; for the export, whose weights are the masters."""
        for phase in self.phases:
            phase.undo()

    def variants(self):
        """Yields once per combination of started phases that a run can reach, for warm-up; restores afterwards."""
        yield "start"
        for phase in self.phases:
            phase.start()
            yield phase.name
        self.undo()
