"""Ranks, their collectives, and the one clock that all of them obey.

A run without torchrun is one rank and needs no process group. Under torchrun small control messages (clock, stop flags,
objects) travel on gloo over the CPU, so that they never wait for the GPU's queue; gradients travel on NCCL.

Ranks never decide alone: whatever comes from time is read on rank 0 and broadcast (`Clock.tick`). In the challenge's
scripts each rank scaled its learning rate by its own clock, and replicas drifted apart by fractions of a step.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor

from pgolf.errors import DistributedError, SetupError

# Ranks meet after compiling, which takes 3 to 7 minutes and not equally long everywhere.
TIMEOUT = timedelta(minutes=15)


@dataclass(frozen=True)
class Rank:
    """Who this process is: global rank, number of ranks, rank on this machine, its device."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @staticmethod
    def from_environ(device: str = "auto", environ: Mapping[str, str] = os.environ) -> Rank:
        """Reads torchrun's RANK, WORLD_SIZE and LOCAL_RANK; without them, one rank.

        device: "auto" (a GPU when there is one), "cpu" or "cuda". Raises SetupError for "cuda" without CUDA and
        DistributedError for variables that contradict each other or name a GPU that is not visible.
        """
        world = _int_variable(environ, "WORLD_SIZE", 1)
        rank = _int_variable(environ, "RANK", 0)
        local = _int_variable(environ, "LOCAL_RANK", 0)
        if not 0 <= rank < world or not 0 <= local < world:
            raise DistributedError(
                f"RANK={rank} and LOCAL_RANK={local} must lie in 0..{world - 1} (WORLD_SIZE={world}).\n"
                "Start with: torchrun --standalone --nproc_per_node=N train_gpt.py"
            )
        return Rank(rank, world, local, _pick_device(device, local))


def _int_variable(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "") or str(default)
    try:
        return int(text)
    except ValueError:
        raise DistributedError(f"{name}={text!r} must be a whole number; torchrun sets it, so unset yours") from None


def _pick_device(device: str, local_rank: int) -> torch.device:
    if device not in ("auto", "cpu", "cuda"):
        raise SetupError(f"device={device!r} must be auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"torch {torch.__version__} sees no GPU" if built else f"torch {torch.__version__} is built without CUDA"
        raise SetupError(f"device=cuda, but {why}.\nUse device=auto or cpu, or install a CUDA build of torch.")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    visible = torch.cuda.device_count()
    if local_rank >= visible:
        raise DistributedError(
            f"LOCAL_RANK={local_rank} needs GPU {local_rank}, but only {visible} are visible here (0..{visible - 1}).\n"
            f"Start one process per GPU: torchrun --standalone --nproc_per_node={visible} train_gpt.py"
        )
    return torch.device("cuda", local_rank)


def start(device: str = "auto") -> Dist:
    """Joins the other ranks (if any) and selects this rank's device. Call once per process; `close()` at the end."""
    me = Rank.from_environ(device)
    if me.device.type == "cuda":
        torch.cuda.set_device(me.device)
    if me.world_size > 1:
        # Its functions keep the process group of the moment of import as a default argument. torch imports it some time
        # later by itself; then `close` could not end gloo's threads, and one that freed the last collective's tensors
        # while the interpreter shut down aborted the process (SIGABRT in 2 of 16 runs of two ranks).
        from torch.distributed.nn import functional  # noqa: F401

        backend = "cpu:gloo,cuda:nccl" if me.device.type == "cuda" else "gloo"
        try:
            tdist.init_process_group(backend, rank=me.rank, world_size=me.world_size, timeout=TIMEOUT)
        except (ValueError, RuntimeError) as err:
            raise DistributedError(
                f"rank {me.rank} of {me.world_size} could not join the others: {str(err).splitlines()[0]}\n"
                "Start with: torchrun --standalone --nproc_per_node=N train_gpt.py"
            ) from err
    return Dist(me)


class Dist:
    """Collectives of one rank. With one rank each is the identity. All ranks must call them in the same order.

    A collective that fails raises DistributedError: as a rule another rank has stopped and has said why.
    """

    def __init__(self, me: Rank | None = None):
        self.me = me or Rank()
        self.rank, self.world_size, self.device = self.me.rank, self.me.world_size, self.me.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` (any shape, CPU or this rank's GPU) over the ranks, in place; returns it."""
        if self.world_size > 1:
            with self._collective("sum over ranks"):
                tdist.all_reduce(tensor)
        return tensor

    @torch.no_grad()
    def mean_grads_(self, grads: list[Tensor]) -> None:
        """Averages each tensor over the ranks, in place. Same list (shapes, dtypes, order) on every rank.

        One flat buffer and one all-reduce per dtype: a few large messages instead of a hundred small ones. Costs one
        copy of the gradients in memory.
        """
        if self.world_size == 1 or not grads:
            return
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for grad in grads:
            by_dtype.setdefault(grad.dtype, []).append(grad)
        for group in by_dtype.values():
            flat = torch.cat([g.reshape(-1) for g in group])
            # Dividing first keeps fp16 sums in range, and is exact when the number of ranks is a power of two.
            self.all_reduce_sum_(flat.div_(self.world_size))
            pieces = flat.split([g.numel() for g in group])
            torch._foreach_copy_(group, [p.view(g.shape) for p, g in zip(pieces, group, strict=True)])

    @torch.no_grad()
    def broadcast_params_(self, params: list[Tensor]) -> None:
        """Overwrites each tensor with rank 0's."""
        if self.world_size > 1:
            with self._collective("broadcast of parameters"):
                for param in params:
                    tdist.broadcast(param.data, 0)

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value` (picklable) on every rank; travels on the CPU."""
        if self.world_size == 1:
            return value
        box = [value]
        with self._collective("broadcast of an object"):
            tdist.broadcast_object_list(box, 0, device=torch.device("cpu"))
        return box[0]

    def broadcast_float(self, value: float) -> float:
        """Rank 0's number on every rank, bit for bit; one small CPU message, cheap enough for every step."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64)
        with self._collective("broadcast of a number"):
            tdist.broadcast(box, 0)
        return box.item()

    def max_int(self, value: int) -> int:
        """Largest `value` over the ranks, as for stop flags; travels on the CPU."""
        if self.world_size == 1:
            return value
        box = torch.tensor([value], dtype=torch.int64)
        with self._collective("maximum over ranks"):
            tdist.all_reduce(box, tdist.ReduceOp.MAX)
        return int(box.item())

    def barrier(self) -> None:
        """Returns when every rank has come here. By a CPU message: torch's own barrier would use the GPU."""
        self.max_int(0)

    def synchronize(self) -> None:
        """Waits for the work queued on this rank's GPU; nothing to do on a CPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leaves the process group. Safe to call twice."""
        if self.world_size > 1 and tdist.is_initialized():
            tdist.destroy_process_group()

    @contextmanager
    def _collective(self, what: str) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as err:
            raise DistributedError(
                f"rank {self.rank} of {self.world_size}: {what} failed: {str(err).splitlines()[0]}\n"
                "Another rank has probably stopped; look for its message above, it names the cause."
            ) from err


class Clock:
    """Training time in milliseconds: rank 0's, the same on all ranks, without the pauses (validation).

    dist: the ranks. cap_ms: where training ends; None = no cap. now: seconds, monotonic; only rank 0's is read.
    """

    def __init__(self, dist: Dist, cap_ms: float | None = None, now: Callable[[], float] = time.monotonic):
        self.dist, self.cap_ms, self._now = dist, cap_ms, now
        self._done_ms = 0.0  # of the stretches that have ended
        self._since: float | None = None  # start of the running stretch; None while paused
        self.elapsed_ms = 0.0  # at the last tick

    def start(self, at_ms: float = 0.0) -> None:
        """Starts the clock at `at_ms`: the time already spent when a run is resumed."""
        self._done_ms = self.elapsed_ms = at_ms
        self._since = None
        self.resume()

    def pause(self) -> None:
        """Stops the clock after the queued training work, which counts as training."""
        if self._since is not None:
            self.dist.synchronize()
            self._done_ms += 1000.0 * (self._now() - self._since)
            self._since = None

    def resume(self) -> None:
        """Lets the clock go on after the queued other work, which does not count."""
        if self._since is None:
            self.dist.synchronize()
            self._since = self._now()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """`with clock.paused():` around validation. A clock that was not running stays so."""
        was_running = self._since is not None
        self.pause()
        try:
            yield
        finally:
            if was_running:
                self.resume()

    def tick(self) -> float:
        """Milliseconds of training so far. A collective: every rank gets rank 0's reading, bit for bit."""
        running = 0.0 if self._since is None else 1000.0 * (self._now() - self._since)
        self.elapsed_ms = self.dist.broadcast_float(self._done_ms + running)
        return self.elapsed_ms

    @property
    def expired(self) -> bool:
        """Whether the last tick had reached the cap."""
        return self.cap_ms is not None and self.elapsed_ms >= self.cap_ms

    @property
    def left_ms(self) -> float | None:
        """Budget left at the last tick; None without a cap."""
        return None if self.cap_ms is None else max(self.cap_ms - self.elapsed_ms, 0.0)


# The challenge's two budgets of 600 s. Compilation, serialisation and compression count for neither in practice; what
# reads training data to change the weights (calibration) counts as training.
COUNTED = {"train": "training", "calibrate": "training", "evaluate": "evaluation", "adapt": "evaluation"}


class TimeLedger:
    """Seconds per named phase, and which budget each phase counts for (`COUNTED`; other names count for none).

    A phase inside a phase stops the outer one, so that no second is booked twice: validation within "train" is not
    training. now: seconds, monotonic.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._seconds: dict[str, float] = {}
        self._stack: list[str] = []
        self._since = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        self._book()
        self._seconds.setdefault(name, 0.0)
        self._stack.append(name)
        try:
            yield
        finally:
            self._book()
            self._stack.pop()

    def _book(self) -> None:
        now = self._now()
        if self._stack:
            self._seconds[self._stack[-1]] += now - self._since
        self._since = now

    def seconds(self, name: str) -> float:
        """Seconds booked for `name` so far; 0 if it has not run."""
        self._book()
        return self._seconds.get(name, 0.0)

    def to_dict(self) -> dict[str, dict]:
        """{phase: {"seconds": float, "counted": "training" | "evaluation" | None}} in order of first entry."""
        self._book()
        return {name: {"seconds": s, "counted": COUNTED.get(name)} for name, s in self._seconds.items()}

    def lines(self) -> list[str]:
        """The ledger as aligned text: a line a phase, then the sum of each budget and of all."""
        return ledger_lines(self.to_dict())


def ledger_lines(ledger: Mapping[str, Mapping]) -> list[str]:
    """Text of a ledger in the form of `TimeLedger.to_dict()`, as a saved result holds it."""
    rows = [(name, row["seconds"], row["counted"] or "not counted") for name, row in ledger.items()]
    for budget in ("training", "evaluation"):
        rows.append((f"= {budget}", sum(r["seconds"] for r in ledger.values() if r["counted"] == budget), ""))
    rows.append(("= all", sum(r["seconds"] for r in ledger.values()), ""))
    width = max(len(name) for name, _, _ in rows)
    return [f"{name:<{width}}  {seconds:10.2f} s  {note}".rstrip() for name, seconds, note in rows]
