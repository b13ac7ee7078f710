"""Benchmarks of the data side, on a CPU: loaders, shards, tokenising, byte accounting."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf.data import corpus as embedded
from pgolf.data.batch import Batch
from pgolf.data.config import DataConfig
from pgolf.data.loaders import LOADERS, Loader
from pgolf.data.shards import HEADER_BYTES, Shard, check_split
from pgolf.data.tokenizer import ByteTable, brute_force_bytes
from pgolf.errors import DataError

from .fixtures import VOCAB, corpus, one_thread, random_shards, scratch  # noqa: F401
from .ratios import gate, rates

SEED = 3
EVAL_BATCH = 16384  # tokens that the cpu preset scores at a time
Places = list[tuple[int, int]]  # (shard, first token) of windows


def raw(files: list[Path]) -> list[np.ndarray]:
    """The shards' ids, read without the code that is timed."""
    return [np.fromfile(f, np.uint16)[HEADER_BYTES // 2 :] for f in files]


# -- loaders ---------------------------------------------------------------------------------------------------------


def loader(name: str, files: list[Path], rows: int, length: int) -> Loader:
    size = {"seq_len": length, "batch_tokens": rows * length, "micro_batches": 1}
    config = DataConfig(loader=name, shard_hold_steps=2, **size)
    return LOADERS[name](files, config, rank=0, world_size=1, seed=SEED)


def windows_of(batch: Batch) -> np.ndarray:
    """(rows, T + 1): a batch's inputs with their targets, which must be the inputs moved by one."""
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    assert torch.equal(batch.ids[:, 1:], batch.targets[:, :-1])
    return torch.cat((batch.ids, batch.targets[:, -1:]), 1).numpy()


def locate(shards: list[np.ndarray], window: np.ndarray) -> tuple[int, int]:
    """Where a window is from: looked for everywhere by its first token, then compared in full. It may straddle."""
    stream = np.concatenate([*shards, shards[0][: len(window)]])
    for at in np.flatnonzero(stream == window[0]):
        if np.array_equal(stream[at : at + len(window)], window):
            return divmod(int(at), len(shards[0]))
    raise AssertionError("a window that is nowhere in the shards")


def sequential_rule(places: Places, rows: int, length: int, size: int) -> None:
    """Batch k begins at token k (rows length + 1) of the stream, its windows lie end to end."""
    starts = [i // rows * (rows * length + 1) + i % rows * length for i in range(len(places))]
    assert places == [divmod(at, size) for at in starts]


def coprime_a_rule(places: Places, rows: int, length: int, size: int) -> None:
    """Every batch draws from all 8 shards; a shard's windows lie on one grid, and none comes twice."""
    assert all({shard for shard, _ in places[i : i + rows]} == set(range(8)) for i in range(0, len(places), rows))
    assert len(set(places)) == len(places)
    assert len({(shard, at % length) for shard, at in places}) == 8


def coprime_b_rule(places: Places, rows: int, length: int, size: int) -> None:
    """The published formula: shards by turns, each for two batches, window (131 seed + 17 s + k stride) mod n."""
    coprime = lambda salt, n: next(s for s in range(salt % n or 1, 2 * n) if math.gcd(s, n) == 1)
    blocks, visits = (size - 1) // length, [0] * 8
    for i, place in enumerate(places):
        s = i // rows // 2 * coprime(41 * SEED + 3, 8) % 8
        block = (131 * SEED + 17 * s + visits[s] * coprime(29 * SEED + 7 * s + 1, blocks)) % blocks
        assert place == (s, block * length), f"window {i} is {place}, expected {(s, block * length)}"
        visits[s] += 1


# name: (its rule, largest time / time of a copy of the batch)
RULES = {"sequential": (sequential_rule, 8.0), "coprime_a": (coprime_a_rule, 35.0), "coprime_b": (coprime_b_rule, 15.0)}


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.benchmark(group="loader")
def test_loader(benchmark, name):
    """next_batch of 262,144 tokens as int64 inputs and targets, against a copy of these tensors."""
    rule, at_most = RULES[name]
    files, rows, length, size = random_shards(1 << 15), 32, 64, 1 << 15
    small = loader(name, files, rows, length)
    windows = np.concatenate([windows_of(small.next_batch()) for _ in range(6)])
    rule([locate(raw(files), w) for w in windows], rows, length, size)

    files, rows, length = random_shards(1 << 20), 256, 1024  # 4 MB a batch: a smaller copy would stay in the caches
    large, shards = loader(name, files, rows, length), raw(files)
    batch = large.next_batch()
    pair = torch.stack((batch.ids, batch.targets))
    some = lambda got: [locate(shards, w) for w in windows_of(got)[:: rows - 1]]  # the first and the last one
    gate(benchmark, ("next_batch", large.next_batch), ("memcpy", pair.clone), at_most=at_most, check=some)
    benchmark(large.next_batch)
    rates(benchmark, tokens=rows * length)


# -- shards ----------------------------------------------------------------------------------------------------------


def assert_refused(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    """A copy of the folder whose last shard is damaged must not pass."""
    copy = shutil.copytree(folder, scratch() / "damaged")
    try:
        last = max(copy.iterdir())
        last.write_bytes(damage(last.read_bytes()))
        with pytest.raises(DataError):
            check_split(copy, "train", VOCAB)
    finally:
        shutil.rmtree(copy)


@pytest.mark.benchmark(group="shards")
def test_shard_validation(benchmark):
    """check_split of two shards of 2 M tokens, headers and every id, against a copy of their bytes."""
    files = random_shards(1 << 21, count=2, vocab=VOCAB)
    folder, contents = files[0].parent, [f.read_bytes() for f in files]
    validate = lambda: check_split(folder, "train", VOCAB)
    assert validate() == files
    assert_refused(folder, lambda data: data[:-2])  # a token short
    assert_refused(folder, lambda data: data[:-2] + VOCAB.to_bytes(2, "little"))  # the last id is one too large
    copies = lambda: [np.frombuffer(c, np.uint8).copy() for c in contents]
    gate(benchmark, ("check_split", validate), ("memcpy", copies), at_most=4.0)
    benchmark(validate)
    rates(benchmark, tokens=2 << 21)


@pytest.mark.benchmark(group="shards")
def test_shard_opening(benchmark):
    """Shard() of two shards of 4 MB: their headers, so far less than reading them."""
    files = random_shards(1 << 21, count=2, vocab=VOCAB)
    opened = lambda: [Shard(f) for f in files]
    assert all(np.array_equal(got[:], ids) for got, ids in zip(opened(), raw(files), strict=True))
    gate(benchmark, ("open", opened), ("read", lambda: raw(files)), at_most=0.6)
    benchmark(opened)
    rates(benchmark, shards=len(files))


# -- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.benchmark(group="text")
def test_tokenising(benchmark):
    """The corpus builder's tokenising, all documents in one call, against one by one."""
    c = corpus()
    together = lambda: embedded._tokenise(c.sp, c.documents)
    one_by_one = lambda: np.concatenate([[c.sp.bos_id(), *c.sp.encode(d.text)] for d in c.documents])
    expected = one_by_one()
    assert np.array_equal(together(), expected) and np.array_equal(c.tokens, expected)
    parts = np.split(expected, np.flatnonzero(expected == c.sp.bos_id()))[1:]
    assert [c.sp.decode(p[1:].tolist()) for p in parts] == [d.text for d in c.documents]
    gate(benchmark, ("together", together), ("one by one", one_by_one), at_most=2.0)
    benchmark.pedantic(together, rounds=3)
    rates(benchmark, tokens=len(expected), bytes=c.n_bytes)


@pytest.mark.benchmark(group="text")
def test_byte_accounting(benchmark):
    """Bytes of all targets by the evaluator's table, against putting the pieces together."""
    c = corpus()
    table = ByteTable.from_sentencepiece(c.sp, VOCAB)
    tokens, count = torch.from_numpy(c.tokens.astype(np.int64)), table.torch()
    chunks = list(zip(tokens[:-1].split(EVAL_BATCH), tokens[1:].split(EVAL_BATCH), strict=True))
    by_table = lambda: sum(int(count(ids, targets).sum()) for ids, targets in chunks)
    by_pieces = lambda: brute_force_bytes(c.sp, c.tokens)
    assert by_pieces() == c.n_bytes == int(table.count(c.tokens[:-1], c.tokens[1:]).sum())  # c.n_bytes: of the files

    def check(got: int) -> None:
        assert got == c.n_bytes

    gate(benchmark, ("table", by_table), ("pieces", by_pieces), at_most=0.3, check=check)
    benchmark(by_table)
    rates(benchmark, tokens=len(tokens) - 1)
