"""Val documents in training shards are found wherever they stand; repetition is told from a leak."""

from itertools import pairwise

import numpy as np
import pytest

from pgolf.data import overlap
from pgolf.data.overlap import WINDOW, check, reading_order
from pgolf.data.shards import write_shard
from pgolf.errors import DataError

BOS = 1


def documents(n, seed, low=5, high=300):
    rng = np.random.default_rng(seed)
    return [[BOS, *rng.integers(3, 1000, rng.integers(low, high)).tolist()] for _ in range(n)]


def write(folder, docs, cuts=()):
    """The documents' stream as shards that end at `cuts` (shares of the stream)."""
    stream = np.array([t for d in docs for t in d], np.uint16)
    ends = [0, *(int(len(stream) * c) for c in cuts), len(stream)]
    files = []
    for i, (a, b) in enumerate(pairwise(ends)):
        files.append(folder / f"fineweb_train_{i:06d}.bin")
        write_shard(files[-1], stream[a:b])
    return files


def stream(docs):
    return np.array([t for d in docs for t in d], np.uint16)


def test_disjoint_splits_have_none(tmp_path):
    found = check(stream(documents(50, 0)), write(tmp_path, documents(400, 1), (0.3, 0.6)), BOS)
    assert (found.documents, found.train_documents, found.overlapping, found.longest_run) == (50, 400, 0, 0)
    assert found.shards_read == found.shards == 3 and not found.leaks and not found.noted


@pytest.mark.parametrize("cut", [0.2, 0.4999, 0.5, 0.5001, 0.503])
def test_each_equal_document_is_found_once_with_its_place(tmp_path, cut):
    """Short ones, the last one of the stream, and one that straddles two shards."""
    val, train = documents(60, 0, low=1), documents(200, 1)
    planted = {3: 10, 20: 100, 41: 101, 59: 199}
    for v, t in planted.items():
        train[t] = val[v]
    train[150] = val[7][:-1]  # a prefix of a short document is another document
    val[7] = val[7][:20]
    train[150] = val[7][:-1]
    files = write(tmp_path, train, (cut,))
    found = check(stream(val), files, BOS)
    starts = np.cumsum([0, *map(len, train)])
    first = int(starts[-1] * cut)
    place = lambda m: starts[planted[m.document]] - (first if m.shard == files[1].name else 0)
    places = {m.document: place(m) for m in found.matches}
    assert {m.document: m.position for m in found.matches} == places and places.keys() == planted.keys()
    assert found.longest_run == 1 and found.leaks  # by its share: 4 of 60


def test_longer_documents_are_equal_by_their_beginning(tmp_path):
    val, train = documents(5, 0, 200, 300), documents(9, 1)
    train[4] = [*val[2][: WINDOW + 1], 7, 8, 9]
    train[5] = [*val[3][:WINDOW], 2]
    assert [m.document for m in check(stream(val), write(tmp_path, train), BOS).matches] == [2]


def test_the_precedent_is_a_leak(tmp_path):
    """80 % of val at the front of training, in order (PR #2127)."""
    val = documents(100, 0)
    found = check(stream(val), write(tmp_path, [*val[20:], *documents(500, 1)], (0.1, 0.5)), BOS)
    assert found.overlapping == 80 and found.longest_run >= 10 and found.leaks
    assert "80 of 100 val documents (80.00 %)" in str(found)


def test_neighbours_are_a_leak_however_few(tmp_path):
    val, train = documents(2000, 0, 5, 9), documents(300, 1)
    scattered = train.copy()
    train[100:104] = val[700:704]
    for i in range(5):
        scattered[50 * i] = val[300 * i]
    leaks = check(stream(val), write(tmp_path, train), BOS)
    assert leaks.longest_run == 4 and leaks.leaks and leaks.share < overlap.LEAK_SHARE
    chance = check(stream(val), write(tmp_path, scattered), BOS)
    assert chance.overlapping == 5 and not chance.leaks and chance.noted


def test_repetition_inside_training_counts_a_document_once(tmp_path):
    val, train = documents(10, 0), documents(40, 1)
    train[5] = train[6] = train[30] = val[4]
    found = check(stream(val), write(tmp_path, train), BOS)
    assert len(found.matches) == 3 and found.overlapping == 1 and not found.leaks


def test_a_time_limit_reads_the_first_shards_first(tmp_path):
    files = write(tmp_path, documents(300, 1), [i / 20 for i in range(1, 20)])
    found = check(stream(documents(10, 0)), files, BOS, seconds=0.0)
    assert found.shards_read == 1 and found.shards == 20 and "1 of 20 shard(s)" in str(found)


@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 80, 1499])
def test_reading_order_is_a_permutation(n):
    order = reading_order(n)
    assert sorted(order) == list(range(n)) and order[:4] == list(range(min(n, 4)))
    assert n < 80 or order[4] == n - 1


def test_the_quick_check_of_each_run(tmp_path):
    val, train = documents(100, 0), documents(300, 1)
    overlap.quick(stream(val), write(tmp_path, train)[0], BOS)
    train[3] = train[200] = val[5]
    overlap.quick(stream(val), write(tmp_path, train)[0], BOS)
    with pytest.raises(DataError, match=r"81 of the first 279 documents .* stand in the val split too"):
        overlap.quick(stream(val), write(tmp_path, [*val[20:], *train[:200]])[0], BOS)


@pytest.mark.parametrize("tokens", [[], [5, 6, 7], [BOS], [BOS, 5]])
def test_streams_without_whole_documents(tmp_path, tokens):
    found = check(np.array(tokens, np.uint16), write(tmp_path, documents(9, 1)), BOS)
    assert found.documents == tokens.count(BOS) and found.overlapping == 0
