"""Ranks that are threads of one process, each with its own model: how test 9 runs an evaluation on eight of them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pgolf.dist import Dist, Pending

PATIENCE = 60.0  # seconds that ranks wait for each other


class LocalRank(Dist):
    """A rank that is a thread; collectives go through shared memory and a barrier."""

    def __init__(self, rank: int, world_size: int, meeting: threading.Barrier, slots: list[Any]):
        super().__init__()
        self.rank, self.world_size, self._meeting, self._slots = rank, world_size, meeting, slots

    def gather_objects(self, value: Any) -> list[Any]:
        """The values of all ranks, on each."""
        self._slots[self.rank] = value
        self._meeting.wait()
        out = list(self._slots)
        self._meeting.wait()
        return out

    def barrier(self) -> None:
        self._meeting.wait()

    def all_reduce_sum_(self, tensor: Tensor) -> Tensor:
        parts = self.gather_objects(tensor.clone())
        return tensor.copy_(sum(parts[1:], parts[0]))

    def start_mean_(self, grads: list[Tensor]) -> Pending:
        parts = self.gather_objects([g.clone() for g in grads])
        for i, grad in enumerate(grads):
            grad.copy_(torch.stack([p[i].float() for p in parts]).mean(0))
        return Pending()

    def broadcast_object(self, value: Any) -> Any:
        return self.gather_objects(value)[0]

    def broadcast_params_(self, params: list[Tensor]) -> None:
        for param, first in zip(params, self.gather_objects([p.detach().clone() for p in params])[0], strict=True):
            param.data.copy_(first)

    def first_and_max(self, value: float, code: int) -> tuple[float, int]:
        parts = self.gather_objects((value, code))
        return parts[0][0], max(p[1] for p in parts)

    def max_int(self, value: int) -> int:
        return max(self.gather_objects(value))


def on_ranks(world_size: int, work: Callable[[Dist], Any]) -> list[Any]:
    """[work(dist)] of all ranks. What a rank raises is raised here, and ends the others."""
    if world_size == 1:
        return [work(Dist())]
    meeting, slots = threading.Barrier(world_size, timeout=PATIENCE), [None] * world_size
    out: list[Any] = [None] * world_size
    failed: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            out[rank] = work(LocalRank(rank, world_size, meeting, slots))
        except BaseException as err:
            failed.append(err)
            meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise next((e for e in failed if not isinstance(e, threading.BrokenBarrierError)), failed[0])
    return out
