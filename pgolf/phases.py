"""What changes during a run: "from this point on, do that". Idempotent; each phase starts once and says so.

A phase that is to change the forward pass is watched doing so, on fixed batches: several of the challenge's entries
trained with late QAT that never ran (see pgolf/quant/fake_quant.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pgolf.errors import NumericalError
from pgolf.model.gpt import GPT
from pgolf.model.roles import ParamInfo
from pgolf.quant import fake_quant
from pgolf.quant.config import QuantConfig
from pgolf.quant.crown_q import CrownQ
from pgolf.quant.weight_cast import WeightCast

Probe = Callable[[], list[list[float]]]  # the losses of fixed batches as the weights and switches are now, by rank


@dataclass
class Phase:
    """due(lr_scale) says when; start() does it and returns the line for the log; undo() restores the state before.

    in_forward: the losses of a batch are other ones from here on.
    """

    name: str
    due: Callable[[float], bool]
    start: Callable[[], str]
    undo: Callable[[], None]
    in_forward: bool
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

    return Phase("late_qat", lambda scale: scale < quant.late_qat.threshold, start, undo, in_forward=True)


def crown_q(penalty: CrownQ, threshold: float) -> Phase:
    """The penalty's gradient joins the loss's, outside of the graph."""

    def start() -> str:
        penalty.active = True
        return f"{len(penalty)} matrices pay for their rounding noise, now {penalty.value():.3e}"

    def undo() -> None:
        penalty.active = False

    return Phase("crown_q", lambda scale: scale < threshold, start, undo, in_forward=False)


class Phases:
    """The phases of a run. They go by the lr scale, which is rank 0's: ranks never decide alone.

    probe: what `start` and `verify` look at; None watches nothing.
    """

    def __init__(
        self,
        model: GPT,
        infos: list[ParamInfo],
        quant: QuantConfig,
        cast: WeightCast | None = None,
        penalty: CrownQ | None = None,
        probe: Probe | None = None,
    ):
        self.phases = [late_qat(model, infos, quant, cast)] if quant.late_qat else []
        if penalty:
            self.phases.append(crown_q(penalty, quant.crown_q.threshold))
        self.probe = probe

    def apply(self, lr_scale: float) -> list[tuple[str, str]]:
        """Starts every phase that is due and has not started; returns (name, what happened) of those."""
        due = [phase for phase in self.phases if not phase.started and phase.due(lr_scale)]
        return [(phase.name, self.start(phase)) for phase in due]

    def start(self, phase: Phase) -> str:
        """Starts it for good. Raises NumericalError when it should change the forward and does not. A collective."""
        phase.started = True
        return self._watched(phase, phase.start)

    def undo(self) -> None:
        """Takes every phase back; for the export, whose weights are the masters."""
        for phase in self.phases:
            phase.undo()

    def variants(self) -> Iterator[str]:
        """Yields once per combination of started phases that a run can reach, for warm-up; restores afterwards."""
        yield "start"
        for phase in self.phases:
            phase.start()
            yield phase.name
        self.undo()

    def verify(self) -> None:
        """Starts each phase to see that it does something, and takes all back. Raises like `start`. A collective."""
        for phase in self.phases:
            self._watched(phase, phase.start)
        self.undo()

    def _watched(self, phase: Phase, act: Callable[[], str]) -> str:
        if not (phase.in_forward and self.probe):
            return act()
        before = self.probe()
        said = act()
        after = self.probe()
        if idle := [rank for rank, (a, b) in enumerate(zip(before, after, strict=True)) if a == b]:
            raise NumericalError(
                f"{phase.name} ({said}) does not change the forward pass: on rank {idle[0]} the losses of fixed batches"
                f" are {before[idle[0]]} without it and with it\nA run would train without it and say that it did not."
                f" Turn it off (quant.{phase.name}=none), or find what keeps the compiled step from seeing it:"
                " COMPILE_ENABLED=0 or kernels.weight_cast=off may go round it."
            )
        return said
