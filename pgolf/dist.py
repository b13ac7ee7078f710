"""Ranks and their collectives.

A run without torchrun is one rank and needs no process group. Under torchrun small control messages (clock, stop flags,
objects) travel on gloo over the CPU, so that they never wait for the GPU's queue; gradients travel on NCCL.
"""

from __future__ import annotations

import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as tdist
from torch import Tensor

from pgolf.errors import DistributedError, PgolfError, SetupError
from pgolf.heartbeat import Heartbeat

# Seconds. Ranks meet after compiling, which takes 3 to 7 minutes and not equally long everywhere; they also wait for
# rank 0 while it packs. Steps of training have a shorter limit of their own.
PATIENCE = 900.0
# NCCL ends the process from within, without a word of ours; so gloo, over which ranks meet each step, gives up first
NCCL_EXTRA = 60.0
# Seconds by which the others end after the first rank that fails: torchrun takes who ends first for the cause
FOLLOW_AFTER = 1.5


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
            limit = timedelta(seconds=PATIENCE)
            tdist.init_process_group(backend, rank=me.rank, world_size=me.world_size, timeout=limit)
            heartbeat = _heartbeat(me)
        except (ValueError, RuntimeError) as err:
            raise DistributedError(
                f"rank {me.rank} of {me.world_size} could not join the others: {str(err).splitlines()[0]}\n"
                "Start with: torchrun --standalone --nproc_per_node=N train_gpt.py"
            ) from err
        dist = Dist(me, heartbeat)
        dist.barrier()  # now every rank has given a sign of life
        heartbeat.start()
        return dist
    return Dist(me)


def _heartbeat(me: Rank) -> Heartbeat:
    """Through a connection of its own: one that the process group shares may be blocked by what the group waits for."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = tdist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=30))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a restarted job finds its predecessor's keys there
    return Heartbeat(tdist.PrefixStore(f"pgolf/{attempt}", store), me.rank, me.world_size)


class Dist:
    """Collectives of one rank. With one rank each is the identity. All ranks must call them in the same order.

    A collective that fails raises DistributedError: as a rule another rank has stopped and has said why.
    """

    def __init__(self, me: Rank | None = None, heartbeat: Heartbeat | None = None):
        self.me = me or Rank()
        self.heartbeat, self._patience = heartbeat, PATIENCE
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

    def mean_grads_(self, grads: list[Tensor]) -> None:
        """Averages each tensor over the ranks, in place. Same list (shapes, dtypes, order) on every rank."""
        self.start_mean_(grads).wait()

    @torch.no_grad()
    def start_mean_(self, grads: list[Tensor]) -> Pending:
        """Starts to average each tensor over the ranks, in place; they are averaged when the result's `wait` returns.

        One flat fp32 buffer (fp64 if a tensor is) and one all-reduce: one large message instead of a hundred small
        ones, which cost their latency each. The sum of bf16 tensors is fp32's, rounded once.
        """
        if self.world_size == 1 or not grads:
            return Pending()
        wide = torch.float64 if any(g.dtype == torch.float64 for g in grads) else torch.float32
        # Dividing first is exact when the number of ranks is a power of two.
        flat = torch.cat([g.reshape(-1).to(wide) for g in grads]).div_(self.world_size)
        pieces = [p.view(g.shape) for p, g in zip(flat.split([g.numel() for g in grads]), grads, strict=True)]
        work = self._start("mean of gradients", lambda: tdist.all_reduce(flat, async_op=True))
        return Pending(self, "mean of gradients", work, lambda: torch._foreach_copy_(grads, pieces))

    def reduce_scatter(self, shard: Tensor, full: Tensor) -> Pending:
        """Starts to make `shard` the sum over ranks of this rank's part of `full` (ranks * len(shard), ...)."""
        scatter = getattr(tdist, "reduce_scatter_single", None) or tdist.reduce_scatter_tensor  # renamed in torch 2.13
        work = self._start("reduce-scatter", lambda: scatter(shard, full, async_op=True))
        return Pending(self, "reduce-scatter", work)

    def all_gather(self, full: Tensor, shard: Tensor) -> Pending:
        """Starts to make `full` (ranks * len(shard), ...) the shards of all ranks, in order."""
        gather = getattr(tdist, "all_gather_single", None) or tdist.all_gather_into_tensor  # renamed in torch 2.13
        work = self._start("all-gather", lambda: gather(full, shard, async_op=True))
        return Pending(self, "all-gather", work)

    def _start(self, what: str, begin: Callable[[], Any]) -> Any:
        with self._collective(what):
            return begin()

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

    def on_main(self, work: Callable[[], Any]) -> Any:
        """What `work` gives on rank 0 (picklable), on every rank; a PgolfError that it raises there, too."""
        value, error = None, None
        if self.is_main:
            try:
                value = work()
            except PgolfError as err:
                err.on_all_ranks, error = True, err
        value, error = self.broadcast_object((value, error))
        if error is not None:
            raise error
        return value

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's `value` (picklable), by rank, on all of them; travels on the CPU."""
        if self.world_size == 1:
            return [value]
        box: list[Any] = [None] * self.world_size
        with self._collective("gathering of objects"):
            tdist.all_gather_object(box, value)
        return box

    def broadcast_float(self, value: float) -> float:
        """Rank 0's number on every rank, bit for bit; it may not be NaN."""
        return self.first_and_max(value, 0)[0]

    def first_and_max(self, value: float, code: int) -> tuple[float, int]:
        """Rank 0's `value`, bit for bit, and the largest `code` of all ranks; one small CPU message."""
        if self.world_size == 1:
            return value, code
        box = torch.tensor([value if self.is_main else -math.inf, code], dtype=torch.float64)
        with self._collective("the ranks' meeting"):
            tdist.all_reduce(box, tdist.ReduceOp.MAX)
        return box[0].item(), int(box[1].item())

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

    @contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Inside, a collective that some rank does not join within `seconds` fails. `PATIENCE` outside."""
        before = self._patience
        self._limit_waits(seconds)
        try:
            yield
        finally:
            self._limit_waits(before)

    def patient(self) -> AbstractContextManager:
        """Inside, ranks may wait long for each other: where one works alone, or compiles."""
        return self.within(PATIENCE)

    def _limit_waits(self, seconds: float) -> None:
        self._patience = seconds
        if self.world_size > 1 and tdist.is_initialized():
            for kind in {"cpu", self.device.type}:
                extra = 0.0 if kind == "cpu" else NCCL_EXTRA
                backend = tdist.group.WORLD._get_backend(torch.device(kind))
                backend._set_default_timeout(timedelta(seconds=seconds + extra))

    def report(self, where: Callable[[], tuple[str, int]], say: Callable[[str], None]) -> None:
        """where(): phase and steps taken, for the sign of life; say(text): where rank 0 tells who is late."""
        if self.heartbeat:
            self.heartbeat.where = where
            if self.is_main:
                self.heartbeat.say = say

    def blame(self, err: Exception) -> Exception:
        """Tells the other ranks of `err`. Returns what this rank should raise: `err` if it was the first to fail, else
        one line that names the first. Settings that are wrong are so on all ranks, and rank 0 says it (`pgolf.cli`)."""
        if self.heartbeat is None:
            return err
        what = f"{type(err).__name__}: {(str(err).splitlines() or [''])[0]}"
        first = self.heartbeat.claim(what)
        if getattr(err, "on_all_ranks", False) or first == f"rank {self.rank}: {what}":
            return err
        time.sleep(FOLLOW_AFTER)
        line = DistributedError(f"rank {self.rank} stopped; the first to fail was {first}")
        if isinstance(err, PgolfError):
            line.exit_code = err.exit_code
        return line

    def close(self) -> None:
        """Leaves the process group. Safe to call twice."""
        if self.heartbeat:
            self.heartbeat.close()
        if self.world_size > 1 and tdist.is_initialized():
            tdist.destroy_process_group()

    def abandon(self) -> None:
        """Leaves without the others, after a failure. What still hangs half a minute later is killed with the process:
        a GPU's queue may hold a collective that will never end."""
        if self.world_size > 1:
            if hasattr(signal, "alarm"):
                signal.alarm(30)
            if self.device.type == "cuda" and tdist.is_initialized():
                with suppress(Exception):  # the failure that led here is the one to report
                    tdist.distributed_c10d._abort_process_group()
        self.close()

    @contextmanager
    def _collective(self, what: str) -> Iterator[None]:
        if self.heartbeat:
            self.heartbeat.waiting(what)
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as err:
            raise DistributedError(self._why(what, err)) from err
        if self.heartbeat:  # not after a failure: to the others this rank was not late
            self.heartbeat.waiting("")

    def _why(self, what: str, err: RuntimeError) -> str:
        """Why a collective failed: which rank does not answer, unless one has said why itself."""
        # gloo's text without its source file in front and its advice behind
        reason = re.sub(r"^\[[^]]*\] *|\. This is .*", "", (str(err).splitlines() or [type(err).__name__])[0])
        text = f"rank {self.rank} of {self.world_size}: {what} failed: {reason}"
        if self.heartbeat is None:
            return f"{text}\nAnother rank has probably stopped; look for its message above, it names the cause."
        return text if self.heartbeat.failed() else f"{text}\n{self.heartbeat.late()}"


class Pending:
    """A collective under way; without arguments one that has nothing to do."""

    def __init__(self, dist: Dist | None = None, what: str = "", work: Any = None, then: Callable | None = None):
        self.dist, self.what, self.work, self.then = dist, what, work, then

    @torch.no_grad()
    def wait(self) -> None:
        """Returns when the result may be used: on a CPU when it is there, on a GPU when its stream will wait for it."""
        if self.work is not None:
            with self.dist._collective(self.what):
                self.work.wait()
        if self.then:
            self.then()
