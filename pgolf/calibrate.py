"""Between the last step and packing, on the training clock: Hessians and GPTQ, EGGROLL, and the time kept for both.

What reads training data to change the weights is training, and ends where the budget ends: a trial in the warm-up
measures how long it will take, training stops that much earlier, and what does not fit all the same is left out.
Public entries kept a fixed time whose sufficiency nobody logged (PR #1130: 14 s), or none (PR #609).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pgolf import signals
from pgolf.clock import Clock
from pgolf.data.batch import Batch
from pgolf.dist import Dist
from pgolf.errors import NumericalError
from pgolf.model.gpt import GPT
from pgolf.model.mlp import ACTIVATIONS
from pgolf.quant import eggroll, generate, gptq
from pgolf.quant.hessian import Hessians
from pgolf.quant.policy import Storage, candidate_clips, grid_of, quantize_state, rows_to_round, storage_of
from pgolf.quant.records import Parts
from pgolf.quant.weight_cast import linears_of
from pgolf.signals import Stop

if TYPE_CHECKING:
    from pgolf.train import Trainer

MARGIN = 1.25  # reserve over measured time; batches that do not fit are left out, so this need not cover everything


@dataclass(frozen=True)
class Cost:
    """Seconds, the most of any rank: a round of batches, GPTQ, all around EGGROLL's search, one of its losses."""

    round: float = 0.0
    solve: float = 0.0
    search: float = 0.0
    loss: float = 0.0


class Deadline:
    """When calibration must end. Rank 0's clock, so the same on every rank. seconds: infinite without a cap."""

    def __init__(self, dist: Dist, stop: Stop, seconds: float, now: Callable[[], float] = time.monotonic):
        self.clock, self.stop, self.seconds = Clock(dist, now=now), stop, seconds
        self.clock.start()

    def left(self) -> float:
        """Seconds, after the queued work. A collective; raises Stopped when a signal has reached a rank."""
        self.clock.dist.synchronize()
        left = self.seconds - self.clock.tick(self.stop.code) / 1000
        signals.check(self.clock.stop_code, "during calibration")
        return left


def targets(model: GPT, storage: dict[str, Storage], skip_mlp: bool) -> list[str]:
    """Weights that GPTQ quantises: those of linear layers that are stored as integers."""
    mlps = tuple(set(ACTIVATIONS.values()))
    skipped = {id(layer) for m in model.modules() if skip_mlp and isinstance(m, mlps) for layer in m.children()}
    layers = linears_of(model).items()
    return [name for name, layer in layers if grid_of(storage[name].kind) and id(layer) not in skipped]


class Calibration:
    """What `trainer`'s settings ask for: `keep_reserve` before training, `run` after it.

    facts: what `run` did, JSON values; diagonals: {name: mean square of each input (cols,)}, of GPTQ's layers. Both are
    empty before and without calibration.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.dist, self.model = trainer, trainer.dist, trainer.model
        self.quant, self.seed = trainer.cfg.quant, trainer.cfg.train.seed
        self.storage = storage_of(trainer.infos, self.quant)
        self.weights = {info.name: info.param for info in trainer.infos}
        skip = self.quant.gptq is not None and self.quant.gptq.skip_mlp
        # the costly first, so that dealing them out in turn gives every rank about as much
        work = lambda name: self.weights[name].numel() * self.weights[name].shape[1]
        self.names = sorted(targets(self.model, self.storage, skip), key=work, reverse=True)
        self.cost, self.facts = Cost(), {}
        self.deadline = Deadline(self.dist, trainer.stop, math.inf)  # until `run` knows better
        self.diagonals: dict[str, Tensor] = {}

    @property
    def on(self) -> bool:
        return bool(self.quant.gptq or self.quant.eggroll)

    @property
    def rounds(self) -> int:
        """Batches of the rank that has most of them."""
        g = self.quant.gptq
        batches = -(-g.generated.sequences // g.generated.rows) if g.generated else g.batches
        return -(-batches // self.dist.world_size)

    # -- the reserve -------------------------------------------------------------------------------------------------

    def keep_reserve(self) -> None:
        """Measures a trial on the weights as they are and takes what calibration needs off the training budget, unless
        train.reserve_ms says how much. A collective, after the warm-up."""
        if not self.on or self.trainer.clock.cap_ms is None:
            return
        self.cost = self._measure()
        needed = self._after_batches() + (self.rounds * self.cost.round if self.quant.gptq else 0.0)
        if not self.trainer.cfg.train.reserve_ms:
            half = self.trainer.cfg.train.max_wallclock_seconds / 2
            self.trainer.keep_reserve(1000 * min(MARGIN * needed, half))
        kept = self.trainer.reserve_ms / 1000
        few = ", which is too little: batches will be left out" if kept < needed else ""
        self.trainer.log.event("reserve", seconds=kept, expected=needed)
        self.trainer.log.line(f"calibration takes about {needed:.2f} s; {kept:.2f} s of training are kept for it{few}")

    def _measure(self) -> Cost:
        """The second time of everything counts: the first one allocates, loads libraries and may compile."""
        round_s = solve = search = loss_s = 0.0
        if self.quant.gptq:
            hessians, batches = Hessians(self.model, self.names), self._batches()
            first = next(batches, None)  # none, where there are more ranks than batches
            if first is not None:
                hessians.add(first)
                round_s = self._timed(lambda: hessians.add(next(batches, first)))
            batches.close()
            solve = self._timed(lambda: hessians.reduce_(self.dist)) + self._measure_gptq(hessians)
        if self.quant.eggroll:
            setup = self._timed(self._search_model)
            _, _, loss, _ = self._search_model()
            loss_s = [self._timed(loss) for _ in range(2)][1]
            search = setup + 6 * loss_s  # the first, two controls, and a trial that began in time
        slowest = lambda s: self.dist.max_int(round(1e6 * s)) / 1e6
        return Cost(slowest(round_s), slowest(solve), slowest(search), slowest(loss_s))

    def _after_batches(self) -> float:
        """Seconds that all behind the Hessians is to take."""
        searching = self.quant.eggroll.seconds if self.quant.eggroll else 0.0
        return self.cost.solve + self.cost.search + searching

    def _measure_gptq(self, hessians: Hessians) -> float:
        """Of this rank's matrices; each shape is tried twice."""
        seconds: dict[torch.Size, float] = {}
        for name in self._share():
            shape = self.weights[name].shape
            for _ in range(0 if shape in seconds else 2):
                seconds[shape] = self._timed(lambda name=name: self.solve(name, hessians.of(name)))
        return sum(seconds[self.weights[name].shape] for name in self._share())

    def _timed(self, work: Callable[[], object]) -> float:
        self.dist.synchronize()
        began = time.monotonic()
        work()
        self.dist.synchronize()
        return time.monotonic() - began

    # -- the run -----------------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Parts]:
        """{name: parts} of the parameters that it has quantised, from the weights as they are; empty when off.

        A collective; the same on every rank.
        """
        if not self.on:
            return {}
        trainer, given = self.trainer, {}
        cap = trainer.cfg.train.max_wallclock_seconds
        spent = trainer.clock.elapsed_ms / 1000 + self.dist.broadcast_float(trainer.ledger.seconds("calibrate"))
        self.deadline = Deadline(self.dist, trainer.stop, cap - spent if cap else math.inf)
        with trainer.log.phase("calibrate", trainer.ledger):
            if trainer.cast:
                trainer.cast.refresh_()
            if self.quant.gptq:
                given = self._gptq()
            if self.quant.eggroll:
                given = given | self._eggroll(given)
            self.facts["seconds"] = self.deadline.clock.tick() / 1000
        self.facts["reserve_seconds"] = trainer.reserve_ms / 1000
        trainer.log.event("calibration", **self.facts)
        kept = f"reserve {trainer.reserve_ms / 1000:.2f} s" if cap else "no limit"
        trainer.log.line(f"calibration: {self.facts['seconds']:.2f} s of training time, {kept}")
        return given

    def _gptq(self) -> dict[str, Parts]:
        hessians, rounds, tokens = self.collect()
        hessians.reduce_(self.dist)
        self.deadline.left()
        collected = self.deadline.clock.elapsed_ms / 1000
        found = {name: hessians.of(name) for name in self.names}
        self.diagonals = {name: h.diagonal().cpu() for name, h in found.items() if h is not None}
        mine: dict[str, Parts] = {}
        share, longest = self._share(), 0.0
        for i in range(-(-len(self.names) // self.dist.world_size)):
            if self.deadline.left() < longest:
                break
            if i < len(share) and (h := found[share[i]]) is not None:
                mine[share[i]] = self.solve(share[i], h)
            self.deadline.left()
            longest = max(longest, self.deadline.clock.last_ms / 1000)
        given = {name: parts for some in self.dist.gather_objects(mine) for name, parts in some.items()}
        source = "text of its own" if self.quant.gptq.generated else "the training stream"
        self.facts |= {
            "source": "generated" if self.quant.gptq.generated else "train", "rounds": rounds, "of": self.rounds,
            "tokens": tokens, "matrices": len(given), "hessian_seconds": collected,
        }  # fmt: skip
        self.trainer.log.line(
            f"gptq: {len(given)} matrices by {tokens:,} tokens of {source}; Hessians {collected:.2f} s"
        )
        self._tell_rest(given, rounds)
        return given

    def _tell_rest(self, given: dict[str, Parts], rounds: int) -> None:
        """What was left out, and why."""
        say, names = self.trainer.log.line, self.names
        if rounds < self.rounds:
            say(f"warning: time for {rounds} of {self.rounds} rounds of calibration batches; raise train.reserve_ms")
        if late := [name for name in names if name not in given]:
            say(f"warning: no time for GPTQ of {len(late)} matrices ({late[0]}, ...), which are rounded plainly")
        rest = [name for name, s in self.storage.items() if grid_of(s.kind) and name not in names]
        if rest:
            say(f"gptq: rounded plainly, being tables or left out by setting: {', '.join(rest)}")

    def collect(self) -> tuple[Hessians, int, int]:
        """(Hessians, rounds of batches that there was time for, tokens over all ranks)."""
        hessians, rounds, tokens = Hessians(self.model, self.names), 0, 0
        batches, rest = self._batches(), self._after_batches()
        while rounds < self.rounds and self.deadline.left() >= rest + self.cost.round:
            if batch := next(batches, None):
                hessians.add(batch)
                tokens += batch.ids.numel()
            rounds += 1
        batches.close()
        return hessians, rounds, int(self.dist.all_reduce_sum_(torch.tensor(tokens)))

    def _batches(self) -> Iterator[Batch]:
        """This rank's part of the batches to calibrate on. The training stream begins anew, as in PR #1130."""
        g, length = self.quant.gptq, self.trainer.cfg.data.seq_len
        rank, world = self.dist.rank, self.dist.world_size
        if g.generated:
            yield from generate.batches(self.model, g.generated, length, self.seed, rank, world)
            return
        loader = self.trainer.new_loader()
        try:
            for _ in range(rank, g.batches, world):
                yield loader.next_batch()
        finally:
            loader.close()

    def _share(self) -> list[str]:
        """This rank's matrices."""
        return self.names[self.dist.rank :: self.dist.world_size]

    def solve(self, name: str, h: Tensor) -> Parts:
        storage = self.storage[name]
        # a rotation mixes rows, so that the input side, and with it the Hessian, stays what it is
        w = rows_to_round(self.weights[name].detach().float(), storage)
        clips = candidate_clips(w, storage)
        try:
            q, step = gptq.quantize(w, h, grid_of(storage.kind), clips, self.quant.scale_floor, self.quant.gptq)
        except ValueError as err:
            raise NumericalError(f"{name}: cannot be quantised as {storage.kind}: {err}") from err
        return {"q": q.cpu().numpy(), "scale": step.cpu().numpy()}

    # -- EGGROLL -----------------------------------------------------------------------------------------------------

    def _eggroll(self, given: dict[str, Parts]) -> dict[str, Parts]:
        cfg = self.quant.eggroll
        if self.deadline.left() <= self.cost.search:
            self.trainer.log.line("warning: no time for EGGROLL; raise train.reserve_ms")
            return {}
        records, entries, loss, control = self._search_model(given)
        before = control()
        time_left = self.deadline.left() - 4 * self.cost.loss  # one trial over, and the control behind it
        until = Deadline(self.dist, self.trainer.stop, min(cfg.seconds, time_left))
        done = eggroll.search(list(entries.values()), loss, lambda: until.left() > 0, cfg, self.seed)
        after = control()
        self.facts["eggroll"] = {
            "trials": done.trials, "kept": done.kept, "loss": [done.before, done.after], "control": [before, after],
        }  # fmt: skip
        self.trainer.log.line(
            f"eggroll: {done.kept} of {done.trials} trials kept; loss on its sequences {done.before:.5f} ->"
            f" {done.after:.5f}, on others of the training stream {before:.5f} -> {after:.5f}"
        )
        changed = eggroll.with_integers(records, entries)
        return {record.name: record.parts for record in changed if record.name in entries}

    def _search_model(self, given: dict[str, Parts] | None = None):
        """(records of the export so far, their integers, the loss that decides, the loss of an independent slice)."""
        state = {name: w.detach().float().cpu() for name, w in self.weights.items()}
        records = quantize_state(state, self.trainer.infos, self.quant, given, self.diagonals)
        model = eggroll.exported(self.model, records)
        loader = self.trainer.new_loader()
        rows = -(-self.quant.eggroll.sequences // self.dist.world_size)
        deciding, other = (eggroll.take(loader, rows) for _ in range(2))
        loader.close()
        mean = lambda batch: eggroll.mean_loss(model, batch, self.dist)
        return records, eggroll.entries_of(model, records), lambda: mean(deciding), lambda: mean(other)
