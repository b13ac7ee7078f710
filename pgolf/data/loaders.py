"""Training data: which windows of the shards each rank sees, and in what order.

All loaders have one signature and one step arithmetic. With W ranks, a rank accumulates A = ceil(micro_batches / W)
micro-batches; each holds rows = floor(floor(batch_tokens / (W A)) / T) windows of T + 1 tokens. `tokens_per_step` says
the true number, for what floor cuts off is not trained on (PR #1130 asked for 548,864 tokens a step and got 540,672).
Ranks never talk to each other: each computes from rank, seed and file names alone what is its own.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pgolf.data.batch import Batch
from pgolf.data.config import DataConfig
from pgolf.data.shards import Shard
from pgolf.errors import DataError


class Loader:
    """Base: step arithmetic, opened shards, conversion to tensors. Subclasses give `_windows` and `reset`.

    files: the shards, sorted. device: where batches go; CUDA copies run from pinned memory without blocking.
    Attributes: rows (per micro-batch and rank), seq_len. Raises DataError when a micro-batch would hold no whole window
    or no shard holds one.
    """

    def __init__(self, files: list[Path], config: DataConfig, *, rank: int, world_size: int, seed: int, device="cpu"):
        self.files, self.config, self.seed = list(files), config, seed
        self.rank, self.world_size, self.seq_len = rank, world_size, config.seq_len
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device(
                "cuda", torch.cuda.current_device()
            )  # a prefetching thread has its own "current"
        self.rows = config.batch_tokens // (world_size * self.micro_steps) // self.seq_len
        if self.rows < 1:
            need = world_size * self.micro_steps * self.seq_len
            raise DataError(
                f"data.batch_tokens={config.batch_tokens} holds no whole sequence for each of {world_size} ranks x "
                f"{self.micro_steps} micro-batches at data.seq_len={self.seq_len}\n"
                f"fix: the nearest valid data.batch_tokens is {need}"
            )
        self.shards = [Shard(f) for f in self.files]
        longest = max((len(s) for s in self.shards), default=0)
        if longest <= self.seq_len:
            raise DataError(
                f"the longest of {len(files)} train shards has {longest} tokens, a window needs data.seq_len + 1 = "
                f"{self.seq_len + 1}\nfix: give longer shards or a data.seq_len below {longest}"
            )
        self.reset()

    @property
    def micro_steps(self) -> int:
        """Micro-batches that a rank accumulates per step."""
        return -(-self.config.micro_batches // self.world_size)

    @property
    def tokens_per_step(self) -> int:
        """Targets per optimiser step, all ranks and micro-batches together."""
        return self.world_size * self.micro_steps * self.rows * self.seq_len

    def next_batch(self) -> Batch:
        """The next micro-batch of this rank: ids and targets (rows, seq_len) int64 on `device`."""
        windows = torch.from_numpy(self._windows().astype(np.int64))
        pair = torch.stack((windows[:, :-1], windows[:, 1:]))
        if self.device.type == "cuda":
            pair = pair.pin_memory()
        ids, targets = pair.to(self.device, non_blocking=True).unbind()
        return Batch(ids, targets)

    def _windows(self) -> np.ndarray:
        """The next windows, (rows, seq_len + 1) uint16; advances the state."""
        raise NotImplementedError

    def reset(self) -> None:
        """Back to the first batch."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        """Everything that the coming batches depend on beside files, settings and rank; fit for JSON."""
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict) -> None:
        """Continues where `state_dict` was taken. Raises DataError when the state is another loader's."""
        if state.keys() != self._state.keys():
            raise DataError(
                f"the saved loader state has {sorted(state)}, {type(self).__name__} needs {sorted(self._state)}\n"
                "fix: resume with the data.loader of the saved run"
            )
        self._state = copy.deepcopy(state)

    def resume(self, states: list[dict], micro_steps: int) -> None:
        """Continues from the states of all ranks of a run that had `len(states)` of them and accumulated `micro_steps`
        micro-batches; with another number of ranks as `_merged` says. Raises DataError like `load_state_dict`."""
        same = len(states) == self.world_size
        self.load_state_dict(states[self.rank] if same else self._merged(states, micro_steps))

    def _merged(self, states: list[dict], micro_steps: int) -> dict:
        """This rank's state after a change of the number of ranks. Here: the state is the same on every rank."""
        return states[0]


class SequentialLoader(Loader):
    """One cursor over the shards end to end, round and round; nothing is shuffled, documents are not looked at.

    Slice k of the stream is tokens [k (n+1), (k+1) (n+1)), n = rows * T, the last of them only a target. Micro-batch m
    of rank r is slice m W + r, so a step takes the same slices for every W that leaves W * A unchanged. (The
    challenge's baseline.)

    The state is the number of tokens that all ranks together have taken: a run that goes on with another number of
    ranks goes on at the very next token.
    """

    def reset(self) -> None:
        self._state = {"tokens": 0}
        self._ends = np.cumsum([len(s) for s in self.shards])

    def _windows(self) -> np.ndarray:
        length = self.rows * self.seq_len + 1
        tokens = self._read(self._state["tokens"] + self.rank * length, length)
        self._state["tokens"] += self.world_size * length
        return np.lib.stride_tricks.sliding_window_view(tokens, self.seq_len + 1)[:: self.seq_len]

    def _read(self, start: int, length: int) -> np.ndarray:
        """`length` tokens of the endless stream from position `start`."""
        out, filled, total = np.empty(length, np.uint16), 0, int(self._ends[-1])
        while filled < length:
            at = (start + filled) % total
            shard = int(np.searchsorted(self._ends, at, side="right"))
            piece = self.shards[shard][at - int(self._ends[shard]) + len(self.shards[shard]) :][: length - filled]
            out[filled : filled + len(piece)] = piece
            filled += len(piece)
        return out


class CoprimeALoader(Loader):
    """Coprime strides through many shards at once (PRs #726, #1060, #1130).

    Each shard is cut into blocks of T tokens from a random phase on and walked with a random stride that is coprime
    with their number, so every block comes once before the shard is cut anew. A micro-batch draws from 8 shards at
    first and from 8 per rank (at least 32) later. All ranks draw the same windows; rank r keeps every W-th.

    The generator is seeded by a hash of the paths as given, not by the run's seed, as published: to change the order of
    the data change the folder's name.

    The state is the same on every rank. With another number of ranks the walks go on where they were, so every block
    still comes once a walk; how many windows a draw takes, and with it the mix, follow the new number.
    """

    RAMP = 1800  # batches over which the mix widens

    def reset(self) -> None:
        n = len(self.shards)
        self._rng = np.random.Generator(np.random.PCG64(self._path_hash()))
        # blocks = 0 marks a shard whose walk has not begun
        cursor = {k: [0] * n for k in ("phase", "blocks", "next", "start", "stride")}
        self._state = {"built": 0, "rng": self._rng.bit_generator.state, **cursor}
        fresh = np.array([(len(s) - 1) // self.seq_len for s in self.shards])
        self._eligible = np.flatnonzero(fresh > 0)
        self._fresh_blocks = fresh[self._eligible]

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        self._rng.bit_generator.state = self._state["rng"]

    def _path_hash(self) -> int:
        """FNV's prime, but offset basis 0, over the bytes of all paths.

        Over the names alone for the embedded corpus: where a user's cache lies must not change the order of the data.
        """
        value = 0
        paths = self.files if self.config.path else [f.name for f in self.files]
        for byte in "".join(map(str, paths)).encode():
            value = ((value ^ byte) * 1099511628211) % 2**64
        return value

    def _windows(self) -> np.ndarray:
        T, mine = self.seq_len, self._draw()[self.rank :: self.world_size]
        self._state["built"] += 1
        self._state["rng"] = self._rng.bit_generator.state
        return np.stack([self.shards[shard][at : at + T + 1] for shard, at in mine])

    def _draw(self) -> list[tuple[int, int]]:
        """All ranks' (shard, first token) of one micro-batch, in order. The order of draws is part of the format."""
        rng, total = self._rng, self.rows * self.world_size
        weights = self._weights()
        mix = self._mix(total)
        chosen = rng.choice(len(self._eligible), size=mix, replace=False, p=weights)
        share = weights[chosen]
        share /= share.sum()
        counts = np.ones(mix, np.int64)
        if total > mix:
            counts += rng.multinomial(total - mix, share)
        order = rng.permutation(mix)
        lists = []
        for shard, count in zip(self._eligible[chosen[order]].tolist(), counts[order].tolist(), strict=True):
            windows = self._take(shard, count)
            lists.append([windows[i] for i in rng.permutation(count)] if count > 1 else windows)
        return self._interleave(lists)

    def _weights(self) -> np.ndarray:
        """Probability of each eligible shard: (blocks left) ** (0.9 - 0.4 p), flatter as p goes from 0 to 1."""
        blocks, done = (np.array(self._state[k])[self._eligible] for k in ("blocks", "next"))
        left = np.where(blocks > 0, np.maximum(blocks - done, 1), self._fresh_blocks)
        weights = left.astype(np.float64) ** (0.90 - 0.40 * self._progress())
        return weights / weights.sum()

    def _progress(self) -> float:
        return min(self._state["built"] / self.RAMP, 1.0)

    def _mix(self, total: int) -> int:
        """Shards to draw from, of E eligible, for `total` windows."""
        most = min(len(self._eligible), total)
        low, high = min(max(8, self.world_size), most), min(max(32, 8 * self.world_size), most)
        return max(1, min(round(low + self._progress() * (high - low)), most))

    def _take(self, shard: int, count: int) -> list[tuple[int, int]]:
        """The next `count` windows of a shard's walk, which is begun anew where it ends."""
        s, out = self._state, []
        while len(out) < count:
            if s["next"][shard] >= s["blocks"][shard]:
                self._restart(shard)
            phase, blocks, done, start, stride = (s[k][shard] for k in ("phase", "blocks", "next", "start", "stride"))
            take = min(count - len(out), blocks - done)
            out += [(shard, phase + (start + (done + j) * stride) % blocks * self.seq_len) for j in range(take)]
            s["next"][shard] += take
        return out

    def _restart(self, shard: int) -> None:
        """Draws phase, start and stride of a new walk, in this order."""
        rng, n, T = self._rng, len(self.shards[shard]), self.seq_len
        widest = min(T - 1, max(0, n - T - 1))
        phase = int(rng.integers(widest + 1)) if widest else 0
        blocks = (n - 1 - phase) // T
        start = int(rng.integers(blocks)) if blocks > 1 else 0
        stride = 1
        while blocks > 1 and math.gcd(stride := int(rng.integers(1, blocks)), blocks) != 1:
            pass
        walk = {"phase": phase, "blocks": blocks, "next": 0, "start": start, "stride": stride}
        for key, value in walk.items():
            self._state[key][shard] = value

    def _interleave(self, lists: list[list]) -> list:
        """Pops one window of every list in a random order, again and again until all are empty."""
        out = []
        while lists:
            order = self._rng.permutation(len(lists))
            out += [lists[i].pop() for i in order]
            lists = [lists[i] for i in order if lists[i]]
        return out


class CoprimeBLoader(Loader):
    """Coprime strides, one shard (or `shards_per_batch`) a rank, held for `shard_hold_steps` micro-batches (PR #1120).

    Draws nothing at random: offsets and strides follow from the seed. Held shards are read whole into memory, at most
    `max_loaded_shards` at a time. Ranks stay disjoint within a batch while each has a shard to itself, with one shard
    per batch; more shards per batch make neighbouring ranks share them, as published.
    """

    def reset(self) -> None:
        sizes = [(s, (len(x) - 1) // self.seq_len) for s, x in enumerate(self.shards) if len(x) > self.seq_len]
        if len(sizes) < self.world_size:
            raise DataError(
                f"data.loader=coprime_b: {len(sizes)} usable train shards for {self.world_size} ranks, expected one for"
                " each, or ranks would train on the same windows\nfix: set data.loader=coprime_a or sequential"
            )
        self._walks = [  # (shard, blocks, offset, stride) of usable shards; salts use the shard's place among all
            (s, n, (131 * self.seed + 17 * s) % n, _coprime_from(29 * self.seed + 7 * s + 1, n)) for s, n in sizes
        ]
        self._shard_stride = _coprime_from(41 * self.seed + 3, len(sizes))
        self._loaded: OrderedDict[int, np.ndarray] = OrderedDict()
        self._state = {"batches": 0, "visits": [0] * len(sizes)}

    def _windows(self) -> np.ndarray:
        s, n, c = self._state, len(self._walks), self.config
        slots = min(c.shards_per_batch, n, self.rows)
        first = s["batches"] // c.shard_hold_steps * self.world_size + self.rank
        parts = []
        for slot in range(slots):
            count = self.rows // slots + (slot < self.rows % slots)
            parts.append(self._take((first + slot) * self._shard_stride % n, count))
        s["batches"] += 1
        return np.concatenate(parts)

    def _take(self, which: int, count: int) -> np.ndarray:
        shard, blocks, offset, stride = self._walks[which]
        at = (offset + (self._state["visits"][which] + np.arange(count)) * stride) % blocks * self.seq_len
        self._state["visits"][which] += count
        return self._tokens(shard)[at[:, None] + np.arange(self.seq_len + 1)]

    def _merged(self, states: list[dict], micro_steps: int) -> dict:
        """Same place in the order of shards, by steps; in each shard the walk goes on from the rank that was furthest.

        Each rank walks a shard by its own count, so this repeats no window of the furthest rank and may leave some out.
        """
        steps = states[0]["batches"] // micro_steps
        visits = [max(counts) for counts in zip(*(s["visits"] for s in states), strict=True)]
        return {"batches": steps * self.micro_steps, "visits": visits}

    def _tokens(self, shard: int) -> np.ndarray:
        """The shard in memory: one sequential read instead of a page fault per window while it is held."""
        if shard not in self._loaded:
            while len(self._loaded) >= max(self.config.max_loaded_shards, 1):
                self._loaded.popitem(last=False)
            self._loaded[shard] = self.shards[shard][:]
        self._loaded.move_to_end(shard)
        return self._loaded[shard]


def _coprime_from(salt: int, n: int) -> int:
    """The first stride >= |salt| mod n that is coprime with n; 0 counts as 1, and the search wraps round to 1."""
    stride = abs(salt) % n or 1
    while math.gcd(stride, n) != 1:
        stride = stride + 1 if stride + 1 < n else 1
    return stride


class Prefetcher:
    """A loader that works `depth` batches ahead in one thread; same interface otherwise.

    `state_dict` belongs to the batches handed out, not to those made ahead. An exception of the loader is raised by the
    `next_batch` that would have returned the batch; the loader is then back at the last batch handed out.
    """

    def __init__(self, loader: Loader, depth: int = 2):
        self.loader, self.depth = loader, depth
        self._state = loader.state_dict()
        self._pending: deque = deque()
        self._pool = ThreadPoolExecutor(1, "prefetch", initializer=self._enter_thread)

    @property
    def micro_steps(self) -> int:
        return self.loader.micro_steps

    @property
    def tokens_per_step(self) -> int:
        return self.loader.tokens_per_step

    def next_batch(self) -> Batch:
        while len(self._pending) <= self.depth:
            self._pending.append(self._pool.submit(self._make))
        try:
            batch, self._state = self._pending.popleft().result()
        except BaseException:
            self.load_state_dict(self._state)
            raise
        return batch

    def state_dict(self) -> dict:
        return copy.deepcopy(self._state)

    def load_state_dict(self, state: dict) -> None:
        self._drain()
        self.loader.load_state_dict(state)
        self._state = self.loader.state_dict()

    def resume(self, states: list[dict], micro_steps: int) -> None:
        self._drain()
        self.loader.resume(states, micro_steps)
        self._state = self.loader.state_dict()

    def reset(self) -> None:
        self._drain()
        self.loader.reset()
        self._state = self.loader.state_dict()

    def close(self) -> None:
        """Ends the thread. The prefetcher gives no batches afterwards."""
        self._drain()
        self._pool.shutdown()

    def _make(self) -> tuple[Batch, dict]:
        return self.loader.next_batch(), self.loader.state_dict()

    def _enter_thread(self) -> None:
        # A new thread's current device is GPU 0: pinning memory there would make every rank open a context on it
        if self.loader.device.type == "cuda":
            torch.cuda.set_device(self.loader.device)

    def _drain(self) -> None:
        """Waits for what is under way and forgets it."""
        for future in self._pending:
            future.cancel()
        for future in self._pending:
            if not future.cancelled():
                future.exception()
        self._pending.clear()


LOADERS = {"sequential": SequentialLoader, "coprime_a": CoprimeALoader, "coprime_b": CoprimeBLoader}
