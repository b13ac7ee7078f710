"""The bigram op beyond the cases: hashes bit by bit, sequence borders, the smear, table gradients by brute force."""

import numpy as np
import pytest
import torch

from pgolf.kernels import _tuned
from pgolf.kernels._documents import document_reach
from pgolf.kernels._op import paths
from pgolf.kernels._segment_sum import segment_sum
from pgolf.kernels._tuned import Launch
from pgolf.kernels.bigram import MAX_VOCAB, MAX_WIDTH, bigram, bigram_index, trigram_index

pytestmark = pytest.mark.usefixtures("kernels_on")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GEN = torch.Generator().manual_seed(0)


def rand(*shape):
    return torch.randn(shape, generator=GEN).to(DEVICE)


def random_ids(b, t, vocab):
    return torch.randint(0, vocab, (b, t), generator=GEN).to(DEVICE)


@pytest.fixture
def large_blocks(monkeypatch):
    """The blocks of a GPU in the interpreter: many rows in few programs."""
    for name, blocks in (
        ("bigram_fwd", {"BLOCK_T": 128}),
        ("bigram_bwd", {"BLOCK_T": 128}),
        ("segment_sum", {"CHUNK": 128, "BLOCK_R": 16, "BLOCK_D": 16}),
        ("segment_fold", {"BLOCK_R": 8, "BLOCK_D": 16}),
    ):
        monkeypatch.setitem(_tuned.TABLE[name], (0, "*"), Launch(1, 1, blocks))


# -- hashes: a table of unit rows shows in the output which of them were added ---------------------------------------


def numpy_places(ids, n, hash):
    """(h2, h3) in wrapping int32, one position at a time."""
    h2, h3 = np.zeros(ids.shape, np.int64), np.zeros(ids.shape, np.int64)
    p, q, s, lin = (np.int32(c) for c in (36313, 27191, 51497, 1009))
    for b, line in enumerate(ids.astype(np.int32)):
        for t, x in enumerate(line):
            if hash == "mul1009":
                h2[b, t] = (lin * (line[t - 1] if t else np.int32(0)) + x) % n
                continue
            h2[b, t] = ((p * x) ^ (q * line[t - 1])) % (n - 1) if t > 0 else n - 1
            h3[b, t] = ((p * x) ^ (q * line[t - 1]) ^ (s * line[t - 2])) % (n - 1) if t > 1 else n - 1
    return h2, h3


@pytest.mark.parametrize("hash, trigram", [("xor", False), ("xor", True), ("mul1009", False)])
@pytest.mark.parametrize("length", [1, 2, 9])
def test_hashes_equal_int32_arithmetic(hash, trigram, length):
    n, vocab = 13, MAX_VOCAB
    ids = random_ids(2, length, vocab)
    ids[0, -1] = vocab - 1
    out = bigram(ids, torch.zeros(vocab, n, device=DEVICE), torch.eye(n, device=DEVICE), hash=hash, trigram=trigram)
    h2, h3 = numpy_places(ids.cpu().numpy(), n, hash)
    want = np.zeros((2, length, n))
    for at in np.ndindex(2, length):
        want[at][h2[at]] = 1
        if trigram:
            want[at][h3[at]] += 1
    want /= np.sqrt((want**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(out.cpu().numpy(), want, rtol=1e-5)
    assert (bigram_index(ids, n, hash).cpu().numpy() == h2).all()
    if hash == "xor":
        assert (trigram_index(ids, n).cpu().numpy() == h3).all()


def test_ids_beyond_the_hash_are_refused_with_rows_only():
    ids, table = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE), torch.ones(MAX_VOCAB + 1, 2, device=DEVICE)
    assert bigram(ids, table).shape == (1, 2, 2)
    with pytest.raises(ValueError, match=rf"vocabulary {MAX_VOCAB + 1}, expected at most .* with rows, {MAX_VOCAB}"):
        bigram(ids, table, torch.ones(4, 2, device=DEVICE))


# -- borders and smear -----------------------------------------------------------------------------------------------


def test_smear_by_hand():
    ids = torch.tensor([[2, 0, 2], [1, 1, 0]], device=DEVICE)
    table, gate = rand(3, 4), rand(4)
    unit = table / (table.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    g = 1 / (1 + torch.exp(-gate))
    want = torch.stack(
        [
            torch.stack([(1 - g) * unit[2], (1 - g) * unit[0] + g * unit[2], (1 - g) * unit[2] + g * unit[0]]),
            torch.stack([(1 - g) * unit[1], unit[1], (1 - g) * unit[0] + g * unit[1]]),
        ]
    )
    torch.testing.assert_close(bigram(ids, table, gate=gate, eps=1e-5), want, rtol=1e-5, atol=1e-6)


def test_a_closed_gate_keeps_and_an_open_gate_shifts():
    ids, table, rows = random_ids(2, 6, 5), rand(5, 6), rand(4, 6)
    plain = bigram(ids, table, rows, eps=1e-6)
    closed = bigram(ids, table, rows, gate=torch.full((6,), -200.0, device=DEVICE), eps=1e-6)
    opened = bigram(ids, table, rows, gate=torch.full((6,), 200.0, device=DEVICE), eps=1e-6)
    assert torch.equal(closed, plain)
    assert (opened[:, 0] == 0).all()
    torch.testing.assert_close(opened[:, 1:], plain[:, :-1], rtol=1e-6, atol=1e-6)


def test_no_token_reaches_back_or_into_another_row():
    ids, table, rows, gate = random_ids(3, 7, 9), rand(9, 6), rand(7, 6), rand(6)
    before = bigram(ids, table, rows, trigram=True, gate=gate)
    changed = ids.clone()
    changed[1, 3] = (ids[1, 3] + 1) % 9
    after = bigram(changed, table, rows, trigram=True, gate=gate)
    same = (before == after).all(-1)
    assert same[0].all() and same[2].all() and same[1, :3].all() and not same[1, 3:5].any()
    assert same[1, 7:].all()  # the trigram of t + 3, smeared to t + 4, is the last to see it


def test_eps_zero_and_the_first_position_stay_finite():
    ids, table = torch.zeros(1, 3, dtype=torch.int64, device=DEVICE), torch.ones(1, 4, device=DEVICE)
    out = bigram(ids, table, gate=torch.zeros(4, device=DEVICE), eps=0.0)
    torch.testing.assert_close(out[0, :, 0], torch.tensor([0.5, 1.0, 1.0], device=DEVICE))


# -- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize("hash, trigram", [("xor", False), ("xor", True), ("mul1009", False)])
def test_a_packed_document_is_as_alone_in_a_row(path, hash, trigram):
    """Outputs, and gradients that are the sum of the documents'; lengths 1, 2 and 3 meet every kind of start."""
    lengths, d = ((1, 2, 4), (3, 1, 3)), 6
    cu = torch.tensor([0, 1, 3, 7, 10, 11, 14], dtype=torch.int32, device=DEVICE)
    ids, dout = random_ids(2, 7, 9), rand(2, 7, d)
    tok, rows, gate = (x.requires_grad_() for x in (rand(9, d), rand(5, d), rand(d)))
    extra, options = rand(2, 7, d), {"hash": hash, "trigram": trigram, "gate": gate, "eps": 1e-5}
    with paths(bigram=path):
        out = bigram(ids, tok, rows, extra=extra, reach=document_reach(cu, 2, 7), **options)
        got = torch.autograd.grad(out, (tok, rows, gate), dout)
    want = [torch.zeros_like(x) for x in got]
    for b in range(2):
        for i, e, g, o in zip(*(x[b].split(lengths[b]) for x in (ids, extra, dout, out)), strict=True):
            with paths(bigram="reference"):
                alone = bigram(i[None], tok, rows, extra=e[None], **options)
            torch.testing.assert_close(o, alone[0], rtol=1e-5, atol=1e-6)
            for total, part in zip(want, torch.autograd.grad(alone, (tok, rows, gate), g[None]), strict=True):
                total += part
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", ["triton", "reference"])
def test_reach_never_leaves_the_row(path):
    """Too much of it is the whole row, and what reaches nowhere is a first position."""
    ids, tok, rows, gate = random_ids(2, 5, 9), rand(9, 6), rand(5, 6), rand(6)
    far = torch.full((2, 5), 2**31 - 1, dtype=torch.int32, device=DEVICE)
    with paths(bigram=path):
        front = lambda reach: bigram(ids, tok, rows, trigram=True, gate=gate, reach=reach)
        assert torch.equal(front(far), front(None))
        assert torch.equal(front(-far), front(0 * far))
        single = bigram(ids.view(10, 1), tok, rows, trigram=True, gate=gate)
        torch.testing.assert_close(front(-far).view(10, 1, 6), single, rtol=1e-6, atol=1e-6)


# -- gradients -------------------------------------------------------------------------------------------------------


def brute_gradients(ids, tok, rows, extra, gate, dout, eps):
    """fp64: the norm and the smear spelt out position by position, then index_add into the tables."""
    tok, rows, extra, gate, dout = (x.detach().double().cpu() for x in (tok, rows, extra, gate, dout))
    ids = ids.cpu()
    h2, h3 = (torch.from_numpy(h) for h in numpy_places(ids.numpy(), rows.shape[0], "xor"))
    x = tok[ids] + rows[h2] + rows[h3] + extra
    r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    unit, g = x * r, torch.sigmoid(gate)
    dunit, dgate = torch.zeros_like(x), torch.zeros_like(gate)
    for b, t in np.ndindex(*ids.shape):
        last = unit[b, t - 1] if t else torch.zeros_like(gate)
        dunit[b, t] += (1 - g) * dout[b, t]
        if t:
            dunit[b, t - 1] += g * dout[b, t]
        dgate += dout[b, t] * (last - unit[b, t]) * g * (1 - g)
    dx = r * (dunit - unit * (dunit * unit).mean(-1, keepdim=True))
    flat = dx.reshape(-1, dx.shape[-1])
    dtok = torch.zeros_like(tok).index_add(0, ids.reshape(-1), flat)
    drows = torch.zeros_like(rows).index_add(0, h2.reshape(-1), flat).index_add(0, h3.reshape(-1), flat)
    return dtok, drows, dx, dgate


def gradients(ids, tensors, dout, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    tok, rows, extra, gate = leaves
    bigram(ids, tok, rows, trigram=True, extra=extra, gate=gate, **options).backward(dout)
    return [x.grad for x in leaves]


def test_gradients_by_brute_force():
    ids = random_ids(3, 9, 6)
    tensors, dout = (rand(8, 18), rand(5, 18), rand(3, 9, 18), rand(18)), rand(3, 9, 18)
    got = gradients(ids, tensors, dout, eps=1e-5)
    want = brute_gradients(ids, *tensors, dout, 1e-5)
    for name, g, w in zip(("tok", "rows", "extra", "gate"), got, want, strict=True):
        torch.testing.assert_close(g.cpu().double(), w, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (got[0][6:] == 0).all()  # ids 6 and 7 never came


def test_three_thousand_hits_on_one_token(large_blocks):
    ids = torch.zeros(3, 1024, dtype=torch.int64, device=DEVICE)
    ids[0, 5], ids[2, 1000] = 1, 2
    tensors, dout = (rand(4, 6), rand(3, 6), rand(3, 1024, 6), rand(6)), rand(3, 1024, 6)
    runs = [gradients(ids, tensors, dout, eps=1e-5) for _ in range(2)]
    want = brute_gradients(ids, *tensors, dout, 1e-5)
    for one, two, w in zip(*runs, want, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one.cpu().double(), w, rtol=1e-4, atol=1e-4)
    assert (runs[0][0][3] == 0).all()


@pytest.mark.parametrize("lookups", [1, 3])
@pytest.mark.parametrize("kind", ["one key", "each once", "lengths 0 to 12", "last only"])
def test_segment_sums_of_integers_are_exact(kind, lookups, poisoned):
    """Sums of small integers are exact in any order, so a row lost, doubled or misplaced shows. CHUNK is 4 here."""
    segments = 9
    keys = {
        "one key": torch.full((26,), 3),
        "each once": torch.arange(segments),
        "lengths 0 to 12": torch.arange(segments).repeat_interleave(torch.tensor([0, 4, 8, 1, 5, 0, 12, 3, 0])),
        "last only": torch.full((5,), segments - 1),
    }[kind]
    keys = keys[torch.randperm(len(keys), generator=GEN)].repeat(lookups).roll(1).int().to(DEVICE)
    x = torch.randint(-9, 10, (len(keys) // lookups, 21), generator=GEN).float().to(DEVICE)
    want = torch.zeros(segments, 21, device=DEVICE).index_add(0, keys.long(), x.repeat(lookups, 1))
    assert torch.equal(segment_sum(x, keys, [segments])[0], want)
    for got, part in zip(segment_sum(x, keys, [2, segments - 2]), (want[:2], want[2:]), strict=True):
        assert torch.equal(got, part)


def test_segment_sums_add_in_fp32(large_blocks):
    x = torch.full((1000, 3), 1.0, dtype=torch.bfloat16, device=DEVICE)  # bf16 sums of ones would stop at 256
    got = segment_sum(x, torch.zeros(1000, dtype=torch.int32, device=DEVICE), [2])[0]
    assert got.dtype == torch.bfloat16 and (got[0] == 1000).all() and (got[1] == 0).all()


def test_gradients_come_without_the_others():
    ids, tok, gate = random_ids(2, 5, 4), rand(4, 6), rand(6)
    grads = []
    for path in ("triton", "reference"):
        with paths(bigram=path):
            frozen, leaf = tok.clone(), gate.clone().requires_grad_()
            bigram(ids, frozen, gate=leaf).sum().backward()  # an expanded gradient
            grads.append(leaf.grad)
            assert frozen.grad is None
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_no_tokens_give_zero_gradients(shape, poisoned):
    tensors = (rand(4, 6), rand(3, 6), rand(*shape, 6), rand(6))
    for grad, x in zip(gradients(random_ids(*shape, 4), tensors, rand(*shape, 6)), tensors, strict=True):
        assert grad.shape == x.shape and (grad == 0).all()


# -- layouts and bad input -------------------------------------------------------------------------------------------


def test_non_contiguous_inputs():
    ids = random_ids(7, 3, 5).t()
    tok, rows, gate = rand(12, 5).t(), rand(4, 24)[:, ::2], rand(24)[::2]
    extra = rand(7, 3, 12).transpose(0, 1)
    dout = rand(7, 3, 12).transpose(0, 1)
    results = []
    for path in ("triton", "reference"):
        with paths(bigram=path):
            leaves = [x.detach().requires_grad_() for x in (tok, rows, extra, gate)]
            out = bigram(ids, leaves[0], leaves[1], trigram=True, extra=leaves[2], gate=leaves[3], eps=1e-5)
            results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


IDS = torch.zeros(2, 3, dtype=torch.int64, device=DEVICE)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: bigram(IDS.int(), x), r"ids \(2, 3\) torch.int32, expected \(B, T\) torch.int64"),
        (lambda x: bigram(IDS[0], x), r"ids \(3,\) .*, expected \(B, T\)"),
        (lambda x: bigram(IDS, x[0]), r"token_table \(8,\), expected \(V, D\)"),
        (lambda x: bigram(IDS, x[:0]), r"token_table \(0, 8\), expected .* V >= 1"),
        (lambda x: bigram(IDS, x, x[:, :4]), r"rows \(5, 4\), expected \(N, 8\)"),
        (lambda x: bigram(IDS, x, x[:1]), r"rows \(1, 8\), expected \(N, 8\) with N >= 2"),
        (lambda x: bigram(IDS, x, x, hash="crc"), "hash 'crc', trigram False: expected xor"),
        (lambda x: bigram(IDS, x, x, hash="mul1009", trigram=True), "expected .* mul1009 without trigram"),
        (lambda x: bigram(IDS, x, trigram=True), "hash 'xor', trigram True: expected"),
        (lambda x: bigram(IDS, x, extra=x), r"extra \(5, 8\), expected \(2, 3, 8\)"),
        (lambda x: bigram(IDS, x, gate=x), r"gate \(5, 8\), expected \(8,\)"),
        (lambda x: bigram(IDS, x, reach=IDS), r"reach \(2, 3\) torch.int64, expected \(2, 3\) torch.int32"),
        (lambda x: bigram(IDS, x, reach=IDS[0].int()), r"reach \(3,\) .*, expected \(2, 3\)"),
        (lambda x: bigram(IDS, x, x.half()), "rows is torch.float16, expected torch.float32 like token_table"),
        (lambda x: bigram(IDS, x.double()), "float64, expected float32, bfloat16 or float16 for the kernel"),
        (lambda x: bigram(IDS, x, x.to("meta")), "rows is on meta, expected"),
        (lambda x: bigram(IDS, x.new_ones(2, MAX_WIDTH + 1)), f"expected at most {MAX_WIDTH}"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(5, 8, device=DEVICE))


@pytest.mark.skipif(DEVICE == "cuda", reason="ids on a GPU are not looked at")
@pytest.mark.parametrize("path", ["triton", "reference"])
@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_an_id_outside_the_table_is_named(path, wrong):
    ids = torch.zeros(2, 3, dtype=torch.int64)
    ids[1, 2] = wrong
    with paths(bigram=path), pytest.raises(ValueError, match=rf"ids\[1, 2\] is {wrong}, expected 0 <= id < 5"):
        bigram(ids, torch.ones(5, 8), torch.ones(4, 8))


def clamped(ids):
    """(values and gradients of ids, those of the nearest ids in the table) with 5 tokens."""
    tensors, dout = (rand(5, 6), rand(4, 6), rand(*ids.shape, 6), rand(6)), rand(*ids.shape, 6)
    return [gradients(i, tensors, dout) for i in (ids, ids.clamp(0, 4))]


def test_the_kernel_forces_ids_into_the_table(monkeypatch):
    """What a GPU does with them, where the check would stop the host."""
    monkeypatch.setattr("pgolf.kernels.bigram._check_range", lambda ids, vocab: None)
    got, want = clamped(torch.tensor([[0, -7, 5], [2**40, 4, 1]], device=DEVICE))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31():
    length, vocab = 2**22 + 8, 1024  # times 512: the last 8 tokens lie beyond 2^31 numbers
    ids = (torch.arange(length, device="cuda") % vocab)[None]
    tok = torch.randn(vocab, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    rows = torch.zeros(2048, 512, device="cuda", dtype=torch.bfloat16).requires_grad_()
    out = bigram(ids, tok, rows, gate=torch.full((512,), -200.0, device="cuda"), eps=1e-6)
    torch.testing.assert_close(out[0, -8:], out[0, :8], rtol=0, atol=0)
    dout = torch.zeros_like(out)
    dout[0, -1] = 1.0
    out.backward(dout)
    hit = tok.grad.abs().sum(1).nonzero().flatten()
    assert hit.tolist() == [ids[0, -1].item()] and torch.isfinite(tok.grad).all()


@pytest.mark.gpu
def test_backward_does_not_wait_for_the_device():
    ids, tensors, dout = random_ids(4, 64, 50), (rand(50, 64), rand(32, 64), rand(4, 64, 64), rand(64)), rand(4, 64, 64)
    gradients(ids, tensors, dout)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients(ids, tensors, dout)
    finally:
        torch.cuda.set_sync_debug_mode("default")
