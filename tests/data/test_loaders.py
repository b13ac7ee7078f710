"""Loaders against a plain re-derivation from the stream, and what must hold over ranks, cycles and restarts."""

import json
import math

import numpy as np
import pytest
import torch

from pgolf.data.config import LOADER_NAMES, DataConfig
from pgolf.data.loaders import LOADERS, CoprimeALoader, Prefetcher
from pgolf.data.shards import write_shard
from pgolf.errors import DataError

T = 8
SIZES = [1000, 417, 9, 8, 2600, 300, 77, 1234]  # one shard of one block, one of none


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Eight shards whose tokens tell where they are: token i of the whole stream is i."""
    folder, first, out = tmp_path_factory.mktemp("shards"), 0, []
    for i, size in enumerate(SIZES):
        out.append(folder / f"fineweb_train_{i:06d}.bin")
        write_shard(out[-1], np.arange(first, first + size))
        first += size
    return out


FIRST = np.cumsum([0, *SIZES])
TOTAL = int(FIRST[-1])


def config(name="sequential", **kwargs):
    base = {"path": "given", "loader": name, "seq_len": T, "batch_tokens": 8 * 4 * T, "micro_batches": 8}
    return DataConfig(**base | kwargs)


def make(name, files, rank=0, world_size=1, seed=3, **kwargs):
    return LOADERS[name](files, config(name, **kwargs), rank=rank, world_size=world_size, seed=seed)


def batch_windows(batch):
    """(rows, T+1) numpy windows; checks types and that targets are ids moved by one."""
    assert batch.ids.dtype == batch.targets.dtype == torch.int64 and batch.ids.shape == batch.targets.shape
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    return np.concatenate([batch.ids.numpy(), batch.targets[:, -1:].numpy()], axis=1)


def step_windows(name, files, world_size, steps=1, **kwargs):
    """Windows of all ranks: [step][micro][rank] -> (rows, T+1)."""
    ranks = [make(name, files, r, world_size, **kwargs) for r in range(world_size)]
    return [
        [[batch_windows(loader.next_batch()) for loader in ranks] for _ in range(ranks[0].micro_steps)]
        for _ in range(steps)
    ]


def test_table_matches_the_settings():
    assert tuple(LOADERS) == LOADER_NAMES


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_sequential_is_the_stream(files, world_size):
    """Slices of all ranks and micro-batches, put end to end, are the stream, over its end and on."""
    stream = np.arange(TOTAL)
    got = [w for step in step_windows("sequential", files, world_size, 30) for micro in step for w in micro]
    flat = np.concatenate([np.append(w[:, :-1].ravel(), w[-1, -1]) for w in got])
    np.testing.assert_array_equal(flat, np.resize(stream, len(flat)))
    assert len(flat) > TOTAL


def test_sequential_step_does_not_depend_on_the_world_size(files):
    """W * A = 8 in all: the same windows per step."""
    by_world = {}
    for world_size in (1, 2, 4, 8):
        steps = step_windows("sequential", files, world_size, 3)
        by_world[world_size] = [np.concatenate([w for micro in step for w in micro]) for step in steps]
    for world_size in (2, 4, 8):
        np.testing.assert_array_equal(by_world[world_size], by_world[1])


def naive_coprime_a(files, rows, world_size, batches):
    """Written from the published description (PR #1130), window by window, with no shared code."""
    h = 0
    for path in files:
        for byte in str(path).encode():
            h = ((h ^ byte) * 1099511628211) & (2**64 - 1)
    rng, cursors = np.random.Generator(np.random.PCG64(h)), {}
    usable, total = [s for s, n in enumerate(SIZES) if (n - 1) // T > 0], rows * world_size

    def reset(s):
        limit = min(T - 1, max(0, SIZES[s] - T - 1))
        phase = int(rng.integers(0, limit, endpoint=True)) if limit else 0
        blocks = (SIZES[s] - 1 - phase) // T
        start, stride = (int(rng.integers(blocks)) if blocks > 1 else 0), 1
        if blocks > 1:
            stride = int(rng.integers(1, blocks))
            while math.gcd(stride, blocks) > 1:
                stride = int(rng.integers(1, blocks))
        cursors[s] = [phase, blocks, 0, start, stride]

    for built in range(batches):
        p = min(built / 1800, 1)
        left = [max(cursors[s][1] - cursors[s][2], 1) if s in cursors else (SIZES[s] - 1) // T for s in usable]
        w = np.array(left, float) ** (0.9 - 0.4 * p)
        w /= w.sum()
        lo = min(max(8, world_size), len(usable), total)
        hi = min(max(32, 8 * world_size), len(usable), total)
        m = min(max(round(lo + p * (hi - lo)), 1), len(usable), total)
        pick = rng.choice(len(usable), m, replace=False, p=w)
        counts = np.ones(m, int)
        if total - m > 0:
            counts = counts + rng.multinomial(total - m, w[pick] / w[pick].sum())
        lists = []
        for i in rng.permutation(m):
            s, windows = usable[pick[i]], []
            for _ in range(counts[i]):
                if s not in cursors or cursors[s][2] == cursors[s][1]:
                    reset(s)
                phase, blocks, n, start, stride = cursors[s]
                windows.append(FIRST[s] + phase + (start + n * stride) % blocks * T)
                cursors[s][2] += 1
            lists.append([windows[j] for j in rng.permutation(len(windows))])
        order_out, active = [], list(range(len(lists)))
        while active:
            visit = [active[j] for j in rng.permutation(len(active))]
            order_out += [lists[i].pop() for i in visit]
            active = [i for i in visit if lists[i]]
        yield order_out


def test_coprime_a_on_the_embedded_corpus_does_not_depend_on_where_the_cache_is(files, tmp_path):
    """With a path given, the folder's name decides the order (as published); without one it must not."""
    moved = []
    for f in files:
        moved.append(tmp_path / f.name)
        moved[-1].write_bytes(f.read_bytes())
    first = lambda where, path: batch_windows(make("coprime_a", where, path=path).next_batch()).tolist()
    assert first(files, "") == first(moved, "")
    assert first(files, "given") != first(moved, "given")


@pytest.mark.parametrize("world_size,micro_batches", [(1, 1), (2, 2), (1, 8), (4, 4)])
def test_coprime_a_is_the_published_order(files, world_size, micro_batches):
    ranks = [make("coprime_a", files, r, world_size, micro_batches=micro_batches) for r in range(world_size)]
    for starts in naive_coprime_a(files, ranks[0].rows, world_size, 60):
        for r, loader in enumerate(ranks):
            assert batch_windows(loader.next_batch())[:, 0].tolist() == starts[r::world_size]


def test_coprime_a_mix_widens_late_in_the_run(files):
    """At W=1 and E=7 of 8 shards everything is always mixed; with 40 shards 8 become 32."""
    loader = make("coprime_a", files)
    loader._eligible = np.arange(40)
    mixes = []
    for built in (0, 900, 1800, 5000):
        loader._state["built"] = built
        mixes.append(loader._mix(64))
    assert mixes == [8, 20, 32, 32]


@pytest.mark.parametrize("name", ["coprime_a", "coprime_b"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_no_window_inside_a_batch(files, name, world_size):
    for (micro,) in step_windows(name, files, world_size, 20, micro_batches=world_size, batch_tokens=world_size * T):
        starts = np.concatenate([w[:, 0] for w in micro])
        assert len(set(starts.tolist())) == len(starts)


def test_coprime_a_union_does_not_depend_on_the_world_size(files):
    """A = 1: the global list of windows of a step is the same for 1, 2 and 4 ranks."""
    found = []
    for world_size in (1, 2, 4):
        steps = step_windows("coprime_a", files, world_size, 40, micro_batches=1, batch_tokens=16 * T)
        found.append([sorted(int(x) for w in micro for x in w[:, 0]) for (micro,) in steps])
    assert found[0] == found[1] == found[2]


def test_coprime_a_cycle_visits_each_block_once(files):
    """Between two restarts of a shard every block is emitted exactly once."""
    loader = make("coprime_a", files, micro_batches=1, batch_tokens=4 * T)
    for shard in loader._eligible.tolist():
        loader._restart(shard)
        phase, blocks = loader._state["phase"][shard], loader._state["blocks"][shard]
        starts = [at for _, at in loader._take(shard, blocks)]
        assert sorted(starts) == [phase + b * T for b in range(blocks)]
        assert max(starts) + T + 1 <= SIZES[shard]


def naive_coprime_b(rank, world_size, seed, rows, batches, per_batch, hold):
    """Written from the published description (PR #1120)."""

    def stride_of(n, salt):
        s = max(abs(salt) % n, 1) if n > 1 else 1
        while math.gcd(s, n) > 1:
            s = s + 1 if s + 1 < n else 1
        return s

    usable = [s for s, n in enumerate(SIZES) if (n - 1) // T > 0]
    gamma, visits = stride_of(len(usable), 41 * seed + 3), dict.fromkeys(usable, 0)
    for b in range(batches):
        out = []
        for k in range(min(per_batch, rows)):
            s = usable[((b // hold * world_size + rank) * gamma + k * gamma) % len(usable)]
            n = (SIZES[s] - 1) // T
            for _ in range(rows // per_batch + (k < rows % per_batch)):
                block = ((131 * seed + 17 * s) % n + visits[s] * stride_of(n, 29 * seed + 7 * s + 1)) % n
                out.append(FIRST[s] + block * T)
                visits[s] += 1
        yield out


@pytest.mark.parametrize("rank,world_size", [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("per_batch,hold,seed", [(1, 64, 1337), (2, 5, 3), (3, 2, 0)])
def test_coprime_b_is_the_published_order(files, rank, world_size, per_batch, hold, seed):
    options = {"shards_per_batch": per_batch, "shard_hold_steps": hold, "max_loaded_shards": 2}
    loader = make("coprime_b", files, rank, world_size, seed, batch_tokens=8 * 5 * T, **options)
    for starts in naive_coprime_b(rank, world_size, seed, loader.rows, 150, per_batch, hold):
        assert batch_windows(loader.next_batch())[:, 0].tolist() == starts
        assert len(loader._loaded) <= 2


def test_coprime_b_cycle_visits_each_block_once(files):
    loader = make("coprime_b", files)
    for which, (shard, blocks, _, _) in enumerate(loader._walks):
        starts = loader._take(which, blocks)[:, 0] - FIRST[shard]
        assert sorted(starts.tolist()) == [b * T for b in range(blocks)]


def test_coprime_b_needs_a_shard_for_each_rank(files):
    with pytest.raises(DataError, match="1 usable train shards for 2 ranks"):
        make("coprime_b", files[:1], 0, 2)


@pytest.mark.parametrize("name", LOADER_NAMES)
@pytest.mark.parametrize("prefetch", [False, True], ids=["plain", "prefetched"])
def test_resume_is_exact(files, name, prefetch):
    def new(rank=1):
        loader = make(name, files, rank, 2, shard_hold_steps=3)
        return Prefetcher(loader) if prefetch else loader

    whole = new()
    batches = [batch_windows(whole.next_batch()) for _ in range(40)]
    for cut in (0, 1, 7, 25):
        first, second = new(), new()
        for _ in range(cut):
            first.next_batch()
        state = json.loads(json.dumps(first.state_dict()))
        for _ in range(3):
            first.next_batch()  # the state was a copy
        second.next_batch()
        second.load_state_dict(state)
        assert second.state_dict() == state
        for expected in batches[cut:]:
            np.testing.assert_array_equal(batch_windows(second.next_batch()), expected)
        first.reset()
        np.testing.assert_array_equal(batch_windows(first.next_batch()), batches[0])
        if prefetch:
            first.close(), second.close()
    if prefetch:
        whole.close()


def test_foreign_state_is_refused(files):
    with pytest.raises(DataError, match=r"data\.loader"):
        make("coprime_a", files).load_state_dict(make("sequential", files).state_dict())


def resumed(name, files, loaders, world_size, **options):
    """The loaders of a run that goes on with another number of ranks."""
    states, micro_steps = [json.loads(json.dumps(x.state_dict())) for x in loaders], loaders[0].micro_steps
    new = [make(name, files, rank, world_size, **options) for rank in range(world_size)]
    for loader in new:
        loader.resume(states, micro_steps)
    return new


@pytest.mark.parametrize("before, after", [(1, 2), (2, 1), (2, 3), (3, 2), (4, 4)])
def test_sequential_goes_on_at_the_next_token_with_other_ranks(files, before, after):
    """Also where a micro-batch of the new ranks does not divide what was taken."""
    old = [make("sequential", files, rank, before) for rank in range(before)]
    taken = 0
    for _ in range(5):
        for loader in old:
            taken += batch_windows(loader.next_batch())[:, :-1].size + 1
    whole = make("sequential", files)
    for loader in resumed("sequential", files, old, after):
        length = loader.rows * T + 1
        want = whole._read(taken + loader.rank * length, length)
        got = batch_windows(loader.next_batch())
        np.testing.assert_array_equal(got[:, 0], want[:-1:T])
        assert got[-1, -1] == want[-1]


@pytest.mark.parametrize("name", LOADER_NAMES)
@pytest.mark.parametrize("before, after", [(1, 2), (2, 1)])
def test_other_ranks_never_share_a_window(files, name, before, after):
    old = [make(name, files, rank, before) for rank in range(before)]
    for _ in range(6):
        for loader in old:
            loader.next_batch()
    new = resumed(name, files, old, after)
    for _ in range(10):
        starts = np.concatenate([batch_windows(loader.next_batch())[:, 0] for loader in new])
        assert len(set(starts.tolist())) == len(starts)


def test_coprime_a_repeats_no_block_of_a_walk_when_ranks_change(files):
    old = [make("coprime_a", files, rank, 2) for rank in range(2)]
    for _ in range(3):
        for loader in old:
            loader.next_batch()
    (new,) = resumed("coprime_a", files, old, 1)
    one, other = (old[i].state_dict() for i in range(2))
    assert one == other == new.state_dict()


def test_coprime_b_goes_on_from_the_furthest_rank(files):
    old = [make("coprime_b", files, rank, 2, shard_hold_steps=3) for rank in range(2)]
    for _ in range(10):
        for loader in old:
            loader.next_batch()
    (new,) = resumed("coprime_b", files, old, 1, shard_hold_steps=3)
    steps = old[0].state_dict()["batches"] // old[0].micro_steps
    assert new.state_dict()["batches"] == steps * new.micro_steps
    visits = [loader.state_dict()["visits"] for loader in old]
    assert new.state_dict()["visits"] == [max(pair) for pair in zip(*visits, strict=True)]
    assert visits[0] != visits[1]


@pytest.mark.parametrize("world_size,steps,tokens", [(1, 8, 540672), (8, 1, 540672), (3, 3, 540672)])
def test_true_tokens_per_step(files, world_size, steps, tokens):
    """PR #1130's 548,864 tokens at length 2048 are 33 sequences a rank on 8 ranks."""
    long = DataConfig(seq_len=2048, batch_tokens=548864, micro_batches=8)
    loader = LOADERS["sequential"]([files[4]], long, rank=0, world_size=world_size, seed=0)
    assert loader.micro_steps == steps
    per_rank = 548864 // (world_size * steps) // 2048
    assert loader.tokens_per_step == per_rank * world_size * steps * 2048
    if world_size != 3:
        assert loader.tokens_per_step == tokens and loader.rows == 33
    assert loader.next_batch().ids.shape == (per_rank, 2048)


def test_too_small_batch_names_the_nearest_valid(files):
    with pytest.raises(DataError, match=f"3 ranks x 3 micro-batches.*\n.*data.batch_tokens is {9 * T}"):
        make("sequential", files, 0, 3, batch_tokens=8 * T)


@pytest.mark.parametrize("name", LOADER_NAMES)
def test_shards_shorter_than_a_window(files, name):
    with pytest.raises(
        DataError, match=r"longest of 1 train shards has 8 tokens, a window needs data.seq_len \+ 1 = 9"
    ):
        make(name, [files[3]])
    assert make(name, [files[2]]).next_batch().ids.shape == (4, T)


class Failing(CoprimeALoader):
    fail_at = 4

    def _windows(self):
        if self._state["built"] == self.fail_at:
            self._state["built"] += 1  # half-done: must be undone
            raise OSError("the disk went away")
        return super()._windows()


def test_prefetcher_raises_where_the_batch_would_have_been(files):
    plain = make("coprime_a", files)
    loader = Failing(files, config("coprime_a"), rank=0, world_size=1, seed=0)
    ahead = Prefetcher(loader)
    for _ in range(4):
        assert torch.equal(ahead.next_batch().ids, plain.next_batch().ids)
    for _ in range(2):
        with pytest.raises(OSError, match="went away"):
            ahead.next_batch()
    loader.fail_at = -1  # the disk is back: nothing was lost
    assert torch.equal(ahead.next_batch().ids, plain.next_batch().ids)
    ahead.close()


def test_prefetcher_works_ahead_by_its_depth(files):
    loader = make("sequential", files)
    ahead = Prefetcher(loader, depth=3)
    ahead.next_batch()
    for future in ahead._pending:
        future.result()
    slice_tokens = loader.rows * T + 1
    assert loader.state_dict() == {"tokens": 4 * slice_tokens} and ahead.state_dict() == {"tokens": slice_tokens}
    assert (ahead.micro_steps, ahead.tokens_per_step) == (loader.micro_steps, loader.tokens_per_step)
    ahead.close()


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOADER_NAMES)
def test_batches_reach_the_gpu_unchanged(files, name):
    loader = LOADERS[name](files, config(name), rank=0, world_size=1, seed=3, device="cuda")
    plain, ahead = make(name, files), Prefetcher(loader)
    for _ in range(50):
        batch, expected = ahead.next_batch(), plain.next_batch()
        assert batch.ids.device == torch.device("cuda", 0)
        assert torch.equal(batch.ids.cpu(), expected.ids) and torch.equal(batch.targets.cpu(), expected.targets)
    ahead.close()
