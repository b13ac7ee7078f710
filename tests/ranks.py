"""Ranks that are threads of one process: collectives without processes."""

import threading

import torch

from pgolf.dist import Dist, Pending
from pgolf.errors import PgolfError


class ThreadRank(Dist):
    """A rank that is a thread; its collectives go through shared memory and a barrier."""

    def __init__(self, rank, world, barrier, slots):
        super().__init__()
        self.rank, self.world_size, self._barrier, self._slots = rank, world, barrier, slots

    def gather_objects(self, value):
        self._slots[self.rank] = value
        self._barrier.wait()
        out = list(self._slots)
        self._barrier.wait()
        return out

    def all_reduce_sum_(self, tensor):
        parts = self.gather_objects(tensor.clone())
        return tensor.copy_(sum(parts[1:], parts[0]))

    def start_mean_(self, grads):
        parts = self.gather_objects([g.clone() for g in grads])
        for i, grad in enumerate(grads):
            grad.copy_(torch.stack([p[i].float() for p in parts]).mean(0))
        return Pending()

    def broadcast_object(self, value):
        return self.gather_objects(value)[0]

    def broadcast_params_(self, params):
        for param, first in zip(params, self.gather_objects([p.detach().clone() for p in params])[0], strict=True):
            param.data.copy_(first)

    def first_and_max(self, value, code):
        parts = self.gather_objects((value, code))
        return parts[0][0], max(p[1] for p in parts)

    def max_int(self, value):
        return max(self.gather_objects(value))


def on_ranks(world, work):
    """[work(dist)] of all ranks; a PgolfError is returned, not raised."""
    barrier, slots, out = threading.Barrier(world, timeout=60), [None] * world, [None] * world

    def run(rank):
        try:
            out[rank] = work(ThreadRank(rank, world, barrier, slots))
        except PgolfError as err:
            out[rank] = err

    threads = [threading.Thread(target=run, args=(r,)) for r in range(world)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    return out
