"""The n-gram kernels against dictionaries and Python integers: keys, counts, tables, and the legacy scorer's defect."""

import math
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
import torch

from pgolf.kernels import _ngram_legacy as legacy
from pgolf.kernels._ngram_tables import GOLDEN, SLOTS, home_of
from pgolf.kernels._op import paths
from pgolf.kernels.ngram_hash import (
    BASE,
    MAX_ORDER,
    NO_CONTEXT,
    build_table,
    count_before,
    document_starts,
    hash_collisions,
    lookup,
    merge_runs,
    ngram_hash,
    pair_runs,
)

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEN = torch.Generator().manual_seed(0)
ONLY = torch.arange(1, device=DEVICE)


def ids(n: int, vocab: int) -> torch.Tensor:
    return torch.randint(0, vocab, (n,), generator=GEN).to(DEVICE)


def cpu_path():
    return paths(ngram_hash="reference")


# -- keys ------------------------------------------------------------------------------------------------------------


def python_key(tokens: list[int], t: int, order: int, start: int, base: int) -> int:
    """The contract's formula in Python integers, as a signed 64-bit number."""
    if t - start < order:
        return NO_CONTEXT
    key = sum((tokens[t - i] + 1) * base ** (i - 1) for i in range(1, order + 1)) % 2**64
    key -= 2**64 if key >= 2**63 else 0
    return -2 if key == NO_CONTEXT else key


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int32, torch.int64])
@pytest.mark.parametrize("base", [BASE, 5, -1])
def test_keys_are_the_polynomial_modulo_two_to_the_64(dtype, base):
    high = 2**16 if dtype == torch.uint16 else 2**31 - 1
    tokens = torch.randint(0, high, (41,), generator=GEN)
    tokens[7:14] = torch.arange(12, 5, -1)  # base -1: neighbours a + 1, a hash to -1, the reserved key
    starts = torch.tensor([0] * 9 + [9] * 20 + [29] * 12, dtype=torch.int32)
    orders = (1, 2, 5, MAX_ORDER)
    listed = tokens.tolist()
    for doc_start in (None, starts.to(DEVICE)):
        begin = [0] * 41 if doc_start is None else starts.tolist()
        want = [[python_key(listed, t, n, begin[t], base) for t in range(41)] for n in orders]
        assert ngram_hash(tokens.to(DEVICE, dtype), orders, doc_start=doc_start, base=base).tolist() == want
    if base == -1:
        assert -2 in want[1]


def test_one_order_gives_one_row_and_any_layout():
    tokens = ids(60, 9)
    assert torch.equal(ngram_hash(tokens[::2], 3), ngram_hash(tokens[::2].clone(), [1, 3])[1])
    assert ngram_hash(tokens[:0], [1, 2]).shape == (2, 0)


def test_document_starts():
    tokens = torch.tensor([5, 0, 3, 4, 0, 0, 7], device=DEVICE)
    assert document_starts(tokens, 0).tolist() == [0, 1, 1, 1, 4, 5, 5]
    assert document_starts(tokens.to(torch.uint16), 0).dtype == torch.int32


def shortest_gram_schmidt(basis: list[list[int]]) -> float:
    """Length of the shortest Gram-Schmidt vector after LLL: no vector of the lattice is shorter."""
    b, k = [row[:] for row in basis], 1
    dot = lambda u, v: sum(x * y for x, y in zip(u, v, strict=True))

    def gram_schmidt():
        ortho, mu = [], []
        for row in b:
            m = [Fraction(dot(row, o)) / dot(o, o) for o in ortho]
            mu.append(m)
            ortho.append([x - sum(c * o[i] for c, o in zip(m, ortho, strict=True)) for i, x in enumerate(row)])
        return ortho, mu

    while k < len(b):
        for j in range(k - 1, -1, -1):
            q = round(gram_schmidt()[1][k][j])
            b[k] = [x - q * y for x, y in zip(b[k], b[j], strict=True)]
        ortho, mu = gram_schmidt()
        if dot(ortho[k], ortho[k]) >= (Fraction(99, 100) - mu[k][k - 1] ** 2) * dot(ortho[k - 1], ortho[k - 1]):
            k += 1
        else:
            b[k], b[k - 1], k = b[k - 1], b[k], max(k - 1, 1)
    return math.sqrt(min(dot(o, o) for o in gram_schmidt()[0]))


@pytest.mark.parametrize("order, vocab", [(2, 2**31), (3, 1_460_000), (4, 31_616), (5, 2_952)])
def test_short_contexts_cannot_collide(order, vocab):
    """Two contexts share a key only if their differences d solve sum d_i base^i = 0 mod 2^64: a lattice's vectors."""
    basis = [[2**64] + [0] * (order - 1)]
    basis += [[-pow(BASE, i, 2**64)] + [int(i == j) for j in range(1, order)] for i in range(1, order)]
    longest_difference = (vocab - 1) * math.sqrt(order)
    assert shortest_gram_schmidt(basis) > longest_difference


def test_collisions_are_found():
    tokens = ids(300, 20)
    assert int(hash_collisions(tokens, ngram_hash(tokens, 2), 2)) == 0
    assert int(hash_collisions(tokens, ngram_hash(tokens, 2, base=1), 2)) > 0  # base 1 adds: (a, b) and (b, a) collide


# -- counts ----------------------------------------------------------------------------------------------------------


def sequential(keys: list[int], targets: list[int], chunk: int = 0) -> list[list[int]]:
    """What a program sees that inserts each pair after scoring it (or each chunk after scoring the chunk)."""
    counts, leaders, out, waiting = defaultdict(Counter), {}, [], []

    def insert(key, x):
        counts[key][x] += 1
        if counts[key][x] > counts[key].get(leaders.get(key), 0) or key not in leaders:
            leaders[key] = x

    for t, (key, x) in enumerate(zip(keys, targets, strict=True)):
        if chunk and t % chunk == 0:
            for pair in waiting:
                insert(*pair)
            waiting = []
        seen, leader = counts[key] if key in counts else Counter(), leaders.get(key, -1)
        out.append([seen.total(), seen[x], sum(c > 0 for c in seen.values()), leader, seen[leader]])
        if key == NO_CONTEXT:
            out[-1] = [0, 0, 0, -1, 0]
        elif chunk:
            waiting.append((key, x))
        else:
            insert(key, x)
    return [list(column) for column in zip(*out, strict=True)]


def counted(keys, targets, **how) -> list[list[int]]:
    return [c.tolist() for c in count_before(keys, targets, **how)]


@pytest.mark.parametrize("contexts, vocab", [(1, 2), (1, 40), (3, 4), (30, 3), (200, 2)])
@pytest.mark.parametrize("chunk", [0, 1, 9])
def test_counts_equal_a_sequential_program(contexts, vocab, chunk):
    """Groups from one element to all 100; several blocks of 8; few targets, so that leaders tie and change."""
    keys, targets = ids(100, contexts) - contexts // 2, ids(100, vocab)
    keys = torch.where(keys == NO_CONTEXT, 2**62, keys)
    want = sequential(keys.tolist(), targets.tolist(), chunk)
    assert counted(keys, targets, chunk=chunk) == want
    with cpu_path():
        assert counted(keys, targets, chunk=chunk) == want


def test_reference_equals_a_sequential_program_on_a_long_stream():
    tokens = ids(3000, 6).cpu()
    with cpu_path():
        for keys in ngram_hash(tokens, [1, 2, 4]):
            assert counted(keys, tokens) == sequential(keys.tolist(), tokens.tolist())
            assert counted(keys, tokens, chunk=512) == sequential(keys.tolist(), tokens.tolist(), 512)


def test_the_leader_changes_only_when_exceeded():
    targets = torch.tensor([4, 9, 9, 4, 4, 9, 9], device=DEVICE)
    counts = count_before(torch.zeros(7, dtype=torch.int64, device=DEVICE), targets)
    assert counts.leader.tolist() == [-1, 4, 4, 9, 9, 4, 4]
    assert counts.leader_count.tolist() == [0, 1, 1, 2, 2, 3, 3]


def test_largest_targets_and_keys():
    keys = torch.tensor([2**63 - 1, -(2**63)] * 6, device=DEVICE)
    targets = torch.tensor([2**31 - 1, 0, 2**31 - 1] * 4, device=DEVICE)
    assert counted(keys, targets) == sequential(keys.tolist(), targets.tolist())


def test_invalid_positions_count_for_nothing():
    keys, targets, valid = ids(50, 3), ids(50, 3), ids(50, 2) == 1
    masked = torch.where(valid, keys, NO_CONTEXT)
    assert counted(keys, targets, valid=valid) == counted(masked, targets.to(torch.int32))
    assert counted(masked, targets) == sequential(masked.tolist(), targets.tolist())


def test_non_contiguous_counts():
    keys, targets = ids(80, 3), ids(80, 5)
    assert counted(keys[::2], targets[::2]) == sequential(keys[::2].tolist(), targets[::2].tolist())


def test_the_future_does_not_show():
    keys, targets = ids(60, 3), ids(60, 3)
    before = counted(keys, targets)
    other_keys, other_targets = keys.clone(), targets.clone()
    other_keys[33:], other_targets[33:] = ids(27, 5), ids(27, 3)
    other_targets[32] = (targets[32] + 1) % 3
    after = counted(other_keys, other_targets)
    for name, a, b in zip(("context", "pair", "distinct", "leader", "leader count"), before, after, strict=True):
        end = 32 if name == "pair" else 33  # a pair's count is of the target itself
        assert a[:end] == b[:end], name
    assert [c[:40] for c in before] == counted(keys[:40], targets[:40])


# -- tables ----------------------------------------------------------------------------------------------------------


def as_dict(keys, targets) -> dict[int, Counter]:
    found = defaultdict(Counter)
    for key, x in zip(keys.tolist(), targets.tolist(), strict=True):
        if key != NO_CONTEXT:
            found[key][x] += 1
    return found


def check_rows(table, keys: torch.Tensor, want: dict[int, Counter]):
    tokens, counts, totals = lookup(table, keys)
    assert tokens.shape == counts.shape == (keys.numel(), table.chain * SLOTS)
    assert torch.equal(counts.sum(1), totals.long())
    for key, row, count, total in zip(keys.tolist(), tokens.tolist(), counts.tolist(), totals.tolist(), strict=True):
        expected = sorted(want.get(key, {}).items())
        assert total == sum(c for _, c in expected)
        n = len(expected)
        assert list(zip(row[:n], count[:n], strict=True)) == expected
        assert set(row[n:]) <= {-1} and set(count[n:]) <= {0}


@pytest.mark.parametrize("order, vocab, n", [(1, 3, 90), (2, 4, 90), (3, 5, 60), (1, 45, 400)])
@pytest.mark.parametrize("load", [0.3, 1.0])
def test_rows_equal_a_dictionary(order, vocab, n, load):
    tokens = ids(n, vocab)
    keys = ngram_hash(tokens, order)
    table = build_table(*pair_runs(keys, tokens), load=load)
    asked = torch.cat([keys.unique(), keys[n // 2 :][:5], ids(6, 1000)])  # known, repeated, NO_CONTEXT, unknown
    check_rows(table, asked, as_dict(keys, tokens))
    with cpu_path():
        check_rows(table, asked, as_dict(keys, tokens))
        assert torch.equal(build_table(*pair_runs(keys, tokens), load=load).lines, table.lines)


def key_of_home(home: int, bits: int, low: int) -> int:
    """A key whose home among 2^bits lines is `home`."""
    key = ((home << (64 - bits)) + low) * pow(GOLDEN, -1, 2**64) % 2**64
    return key - 2**64 if key >= 2**63 else key


def test_contexts_of_one_home_probe_and_do_not_wrap():
    """All contexts want one of the last two lines: they move on past the hashed area's end."""
    keys = torch.tensor(sorted(key_of_home(14 + i % 2, 4, 77 * i) for i in range(12)), device=DEVICE)
    assert set(home_of(keys, 4).tolist()) == {14, 15}
    tokens, counts = torch.arange(12, device=DEVICE).int(), torch.arange(1, 13, device=DEVICE).int()
    table = build_table(keys, tokens, counts, load=1.0)
    assert table.bits == 4 and table.probes >= 11
    others = [key_of_home(14, 4, 1), key_of_home(15, 4, 5), key_of_home(3, 4, 5)]
    want = {k: Counter({t: c}) for k, t, c in zip(keys.tolist(), tokens.tolist(), counts.tolist(), strict=True)}
    check_rows(table, torch.cat([keys, torch.tensor(others, device=DEVICE)]), want)


@pytest.mark.parametrize("followers", [SLOTS - 1, SLOTS, SLOTS + 1, 3 * SLOTS, 3 * SLOTS + 1])
def test_overflow_lines(followers):
    sizes = {-5: 2, 0: followers, 9: 1, 10: SLOTS + 2}
    want = {key: Counter({3 * v: v + 1 for v in range(size)}) for key, size in sizes.items()}
    entries = [(k, v, c) for k, row in want.items() for v, c in row.items()]
    contexts = torch.tensor([e[0] for e in entries], device=DEVICE)
    tokens, counts = (torch.tensor([e[i] for e in entries], device=DEVICE, dtype=torch.int32) for i in (1, 2))
    table = build_table(contexts, tokens, counts)
    assert table.chain == max(2, -(-followers // SLOTS))
    check_rows(table, torch.tensor([0, -5, 10, 9, 1], device=DEVICE), want)


def test_empty_table():
    none = torch.empty(0, dtype=torch.int32, device=DEVICE)
    table = build_table(none.long(), none, none)
    check_rows(table, ids(5, 9), {})
    full = build_table(ONLY, ONLY.int(), ONLY.int() + 1)
    assert lookup(full, none.long())[0].shape == (0, SLOTS)


def test_merged_runs_are_the_runs_of_the_whole():
    keys, targets = ids(70, 4) - 1, ids(70, 3)  # key -1 is NO_CONTEXT
    whole, parts = (
        pair_runs(keys, targets),
        merge_runs(pair_runs(keys[:30], targets[:30]), pair_runs(keys[30:], targets[30:])),
    )
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))
    want = {(k, x): c for k, row in as_dict(keys, targets).items() for x, c in row.items()}
    got = zip(*(c.tolist() for c in whole), strict=True)
    assert [((k, x), c) for k, x, c in got] == sorted(want.items())
    assert NO_CONTEXT not in whole.contexts.tolist()


def test_target_only_counts_are_entries_of_the_whole_row():
    """The lemma behind target-only scores: c(s) and c(s, x_t) of the sorted stream are the total and one entry of a row
    that holds every token's count, so what is read for x_t is one entry of a normalised vector."""
    tokens = ids(120, 5)
    keys = ngram_hash(tokens, 2)
    counts = count_before(keys, tokens)
    for t in (3, 40, 77, 119):
        table = build_table(*pair_runs(keys[:t], tokens[:t]))
        row_tokens, row_counts, total = lookup(table, keys[t : t + 1])
        assert total.item() == row_counts.sum().item() == counts.context_count[t].item()
        assert row_counts[row_tokens == tokens[t]].sum().item() == counts.pair_count[t].item()
        assert (row_counts > 0).sum().item() == counts.distinct[t].item()
        assert row_counts.max().item() == counts.leader_count[t].item()


# -- the legacy scorer -----------------------------------------------------------------------------------------------


def legacy_dictionary(tokens: list[int], start: int, end: int, buckets: int) -> dict[int, tuple[Counter, Counter]]:
    out = {}
    for n in range(2, 10):
        context, pair = Counter(), Counter()
        for j in range(start + n - 1, end):
            h = 0
            for k in range(n - 1):
                h ^= tokens[j - (n - 1) + k] * legacy.PRIMES[k % 7]
            context[h % buckets] += 1
            pair[(h ^ tokens[j] * legacy.PRIMES[(n - 1) % 7]) % buckets] += 1
        out[n] = context, pair
    return out


@pytest.mark.parametrize("dtype", [torch.uint16, torch.int64])
def test_legacy_tables_equal_a_dictionary(dtype):
    tokens = ids(50, 2**16)
    tables = legacy.legacy_tables(32, DEVICE)
    for start, end in ((0, 21), (21, 21), (21, 50)):  # n-grams across 21 belong to neither chunk
        legacy.legacy_update(tables, tokens.to(dtype), start, end)
    chunks = [legacy_dictionary(tokens.tolist(), a, b, 32) for a, b in ((0, 21), (21, 50))]
    for i, n in enumerate(range(2, 10)):
        for which in range(2):
            total = chunks[0][n][which] + chunks[1][n][which]
            assert tables[i, which].tolist() == [total[b] for b in range(32)]
    got = legacy.legacy_lookup(tables, tokens.to(dtype), 4, 50)
    for i, n in enumerate(range(2, 10)):
        for j in range(4, 50):
            alone = (
                legacy_dictionary(tokens.tolist(), j - n + 1, j + 1, 32)[n] if j >= n - 1 else (Counter(), Counter())
            )
            for which, bucket in enumerate(alone):  # a chunk of one n-gram names its two buckets
                assert got[which][i, j - 4] == sum(tables[i, which, b] for b in bucket), (n, j)


def test_legacy_scores_of_one_context_sum_to_far_more_than_one():
    """The reason for its name: on uniform random tokens each of the V candidates is credited with strangers' counts."""
    vocab, buckets, n = 256, 1024, 60_000
    stream = ids(n, vocab).cpu()
    tables = legacy.legacy_tables(buckets)
    with cpu_path():
        legacy.legacy_update(tables, stream, 0, n)
        context = ids(8, vocab).cpu()
        candidates = torch.stack([torch.cat([context, v[None]]) for v in torch.arange(vocab)])
        scores = []
        for row in candidates:
            c, f = legacy.legacy_lookup(tables, row, 8, 9)
            scores.append((torch.minimum(f, c) / c.clamp(min=1))[7, 0].item())  # order 9
        assert sum(scores) > 0.5 * vocab
        keys = ngram_hash(stream, 1)
        _, counts, totals = lookup(build_table(*pair_runs(keys, stream)), keys[100:200])
    torch.testing.assert_close(counts.sum(1) / totals, torch.ones(100))


# -- bad input -------------------------------------------------------------------------------------------------------

EVEN = r"base 0x6 is even, expected an odd one"


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x: ngram_hash(x.float(), 2),
            r"tokens are \(6,\) torch.float32, expected \(N,\) uint16, int32 or int64",
        ),
        (lambda x: ngram_hash(x[None], 2), r"tokens are \(1, 6\)"),
        (lambda x: ngram_hash(x, []), r"orders \(\), expected ascending ones within 1 to 16"),
        (lambda x: ngram_hash(x, [3, 2]), r"orders \(3, 2\), expected ascending"),
        (lambda x: ngram_hash(x, [2, 2]), r"orders \(2, 2\), expected ascending"),
        (lambda x: ngram_hash(x, [0, 1]), r"orders \(0, 1\)"),
        (lambda x: ngram_hash(x, 17), r"orders \(17,\)"),
        (lambda x: ngram_hash(x, 2, base=6), EVEN),
        (lambda x: ngram_hash(x, 2, doc_start=x), r"doc_start is \(6,\) torch.int64, expected \(6,\) int32"),
        (lambda x: ngram_hash(x, 2, doc_start=x.int().to("meta")), "doc_start is on meta, expected"),
        (lambda x: count_before(x.int(), x), r"keys are \(6,\) torch.int32, expected \(N,\) int64"),
        (lambda x: count_before(x, x[:3]), r"targets are \(3,\) torch.int64, expected \(6,\) int32 or int64"),
        (lambda x: count_before(x, x, x), r"valid is \(6,\) torch.int64, expected \(6,\) bool"),
        (lambda x: count_before(x, x, chunk=-1), "chunk -1, expected 0 or a number of positions"),
        (lambda x: count_before(x, x.to("meta")), "targets is on meta, expected"),
        (lambda x: build_table(x, x, x.int()), r"tokens are \(6,\) torch.int64, expected \(6,\) int32"),
        (lambda x: build_table(x, x.int(), x.int()), "a count below 1, expected non-zero counts"),
        (lambda x: build_table(x - 1, x.int(), x.int() + 1), "got NO_CONTEXT among the contexts"),
        (lambda x: build_table(-x - 2, x.int(), x.int() + 1), "entries are not in order"),
        (lambda x: build_table(x * 0, x.int() * 0, x.int() + 1), "entries are not in order"),
        (lambda x: build_table(x, x.int(), x.int() + 1, load=0.0), r"load 0.0, expected one in \(0, 1\]"),
        (lambda x: lookup(build_table(x, x.int(), x.int() + 1), x.int()), r"keys are \(6,\) torch.int32, expected"),
        (lambda x: legacy.legacy_tables(12), "12 buckets, expected a power of two"),
        (lambda x: legacy.legacy_update(x, x, 0, 6), r"tables are \(6,\) torch.int64, expected \(8, 2, a power of two"),
        (
            lambda x: legacy.legacy_lookup(legacy.legacy_tables(4, DEVICE), x, 3, 7),
            "positions 3 to 7, expected within 0 to 6",
        ),
        (
            lambda x: legacy.legacy_update(legacy.legacy_tables(4, DEVICE), x.float(), 0, 6),
            r"tokens are \(6,\) torch.float32",
        ),
        (
            lambda x: legacy.legacy_update(torch.zeros(8, 4, 2, device=DEVICE).int().transpose(1, 2), x, 0, 6),
            "expected contiguous ones: they change in place",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.arange(6, device=DEVICE))


@pytest.mark.gpu
def test_kernels_equal_the_reference_at_the_size_of_an_evaluation():
    """62 M tokens: offsets of keys (8 rows) and of count rows pass 2^31 bytes; groups span thousands of blocks."""
    n = 62_000_000
    tokens = torch.randint(0, 1024, (n,), device="cuda", dtype=torch.int32)
    keys = ngram_hash(tokens, [1, 2])
    for row, order in zip(keys, (1, 2), strict=True):
        got = count_before(row, tokens)
        with cpu_path():
            assert torch.equal(row, ngram_hash(tokens, order))
            want = count_before(row, tokens)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), order
    runs = pair_runs(keys[1], tokens)
    table = build_table(*runs)
    got = lookup(table, keys[1, -1000:])
    with cpu_path():
        want = lookup(table, keys[1, -1000:])
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
def test_legacy_atomics_lose_nothing():
    tokens = torch.randint(0, 1024, (1_048_576,), device="cuda")
    got, want = legacy.legacy_tables(2**10, "cuda"), legacy.legacy_tables(2**10, "cuda")
    legacy.legacy_update(got, tokens, 0, tokens.numel())  # 1,024 buckets: each is hit a thousand times at once
    legacy.legacy_update_ref(want, tokens, 0, tokens.numel())
    assert torch.equal(got, want)
