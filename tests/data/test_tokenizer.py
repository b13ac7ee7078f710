"""Bytes per token: table against concatenation against the real files, and what must be refused."""

import dataclasses
import io

import numpy as np
import pytest
import torch

from pgolf.data import tokenizer as tok
from pgolf.data.shards import read_shard
from pgolf.data.tokenizer import ByteTable
from pgolf.errors import DataError, SetupError

MARK = "\u2581"


class FakeSp:
    """A processor of (piece, kind) pairs: kind is "normal", "control", "unknown", "unused" or "byte"."""

    PIECES = [
        ("<pad>", "control"), ("<s>", "control"), ("</s>", "control"), ("<unk>", "unknown"),
        ("<0x41>", "byte"), ("<0xE2>", "byte"), (MARK, "normal"), (MARK + "the", "normal"), ("the", "normal"),
        ("é", "normal"), (MARK + MARK + "x", "normal"), ("a" + MARK + "b", "normal"), ("gone", "unused"),
    ]  # fmt: skip

    def __init__(self, pieces=None):
        self.pieces = pieces or self.PIECES

    def _is(self, i, kind):
        return self.pieces[i][1] == kind

    def vocab_size(self):
        return len(self.pieces)

    def id_to_piece(self, i):
        return self.pieces[i][0]

    def piece_to_id(self, piece):
        return next((i for i, (p, _) in enumerate(self.pieces) if p == piece), self.unk_id())

    def is_control(self, i):
        return self._is(i, "control")

    def is_unknown(self, i):
        return self._is(i, "unknown")

    def is_unused(self, i):
        return self._is(i, "unused")

    def is_byte(self, i):
        return self._is(i, "byte")

    def bos_id(self):
        return 1

    def unk_id(self):
        return 3


def test_table_of_every_kind_of_piece():
    table = ByteTable.from_sentencepiece(FakeSp(), 15)
    assert table.base.dtype == np.int16 and len(table.base) == 15
    assert table.base.tolist() == [0, 0, 0, 0, 1, 1, 0, 3, 3, 2, 2, 3, 0, 0, 0]
    assert np.flatnonzero(table.lead).tolist() == [6, 7, 10]
    assert np.flatnonzero(table.boundary).tolist() == [0, 1, 2, 3, 12, 13, 14]


def test_count_by_hand():
    table = ByteTable.from_sentencepiece(FakeSp(), 13)
    stream = np.array([1, 7, 7, 6, 8, 1, 6, 4, 5, 1, 1, 9, 11])
    by_hand = [3, 4, 1, 3, 0, 0, 1, 1, 0, 0, 2, 3]  # a leading space after BOS is free, BOS is free
    assert table.count(stream[:-1], stream[1:]).tolist() == by_hand
    assert tok.brute_force_bytes(FakeSp(), stream) == sum(by_hand)
    assert tok.prove_bytes(FakeSp(), table, stream) == sum(by_hand)


@pytest.mark.parametrize("start", range(8))
def test_streams_that_start_inside_a_document(start):
    sp, stream = FakeSp(), np.array([7, 7, 8, 1, 7, 9, 1, 10, 1])[start:]
    pieces = {7: " the", 8: "the", 9: "é", 10: "  x", 1: ""}
    text, expected = [pieces[t] for t in stream[1:].tolist()], 0
    for before, piece in zip(stream[:-1].tolist(), text, strict=True):
        expected += len(piece.encode()) - (before == 1 and piece.startswith(" "))
    assert tok.prove_bytes(sp, ByteTable.from_sentencepiece(sp, 13), stream) == expected


@pytest.mark.parametrize("stream", [[], [1], [7]])
def test_no_targets_no_bytes(stream):
    sp = FakeSp()
    stream = np.array(stream, dtype=np.uint16)
    assert tok.prove_bytes(sp, ByteTable.from_sentencepiece(sp, 13), stream) == 0


def test_torch_counterpart_equals_numpy():
    table = ByteTable.from_sentencepiece(FakeSp(), 13)
    rng = np.random.default_rng(0)
    prev, targets = rng.integers(0, 13, (2, 4, 50))
    counted = table.torch()(torch.from_numpy(prev), torch.from_numpy(targets))
    assert counted.dtype == torch.int64 and counted.shape == (4, 50)
    np.testing.assert_array_equal(counted.numpy(), table.count(prev, targets))
    assert table.count(prev, targets).dtype == np.int64


def test_real_val_split_is_its_files_to_the_byte(corpus, tokenizer):
    """Three ways: table, concatenated pieces, and the sizes of the source files themselves."""
    val = read_shard(corpus.data_dir / "fineweb_val_000000.bin")
    table = ByteTable.from_sentencepiece(tokenizer, 1024)
    table_sum = int(table.count(val[:-1], val[1:]).sum())
    assert table_sum == tok.brute_force_bytes(tokenizer, val) == tok.prove_bytes(tokenizer, table, val)
    assert table_sum == corpus.manifest["splits"]["val"]["bytes"]
    ids = torch.from_numpy(val.astype(np.int64))
    assert int(table.torch()(ids[:-1], ids[1:]).sum()) == table_sum


def test_chunked_proof_is_the_same(corpus, tokenizer, monkeypatch):
    val = read_shard(corpus.data_dir / "fineweb_val_000000.bin")
    table = ByteTable.from_sentencepiece(tokenizer, 1024)
    whole = tok.prove_bytes(tokenizer, table, val)
    monkeypatch.setattr(tok, "CHUNK", 999)
    assert tok.prove_bytes(tokenizer, table, val) == whole


def test_one_byte_off_is_refused_and_blamed(corpus, tokenizer):
    val = read_shard(corpus.data_dir / "fineweb_val_000000.bin")
    table = ByteTable.from_sentencepiece(tokenizer, 1024)
    rare = int(np.argmin(np.where(table.base > 1, np.bincount(val, minlength=1024) + 10**9 * (
        np.bincount(val, minlength=1024) == 0), 10**10)))  # fmt: skip
    base = table.base.copy()
    base[rare] += 1
    with pytest.raises(DataError, match=r"\(\+\d+\); .* bytes, table"):
        tok.prove_bytes(tokenizer, dataclasses.replace(table, base=base), val)


def test_special_inside_a_document_is_refused():
    sp = FakeSp()
    with pytest.raises(DataError, match="special token stands inside a document"):
        tok.prove_bytes(sp, ByteTable.from_sentencepiece(sp, 13), np.array([1, 8, 3, 7]))


def test_no_lone_space_is_refused():
    sp = FakeSp([p if p[0] != MARK else ("y", "normal") for p in FakeSp.PIECES])
    with pytest.raises(DataError, match="no lone"):
        tok.prove_bytes(sp, ByteTable.from_sentencepiece(sp, 13), np.array([1, 8]))


def test_byte_piece_of_three_is_refused():
    """U+FFFD for an undecodable byte was counted as three in public (PR #1271)."""
    table = ByteTable.from_sentencepiece(FakeSp(), 13)
    table.base[5] = 3
    with pytest.raises(DataError, match=r"<0xE2> \(id 5\) counts 3"):
        tok.prove_bytes(FakeSp(), table, np.array([1, 8]))


def test_ids_beyond_the_tokenizer_are_refused():
    with pytest.raises(DataError, match=r"token id 14 .* 13 pieces"):
        tok.prove_bytes(FakeSp(), ByteTable.from_sentencepiece(FakeSp(), 20), np.array([1, 14]))


def test_challenge_settings_tokenizer_is_proven():
    """nmt_nfkc, no interior marks: the published table, on normalised text of several scripts with byte fallback."""
    spm = pytest.importorskip("sentencepiece")
    lines = [f"The {w} of number {i} is naïve, {i * 37 % 101} times." for i, w in enumerate(["cat", "dog", "sun"] * 60)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=360, character_coverage=0.999,
        byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False,
        pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    sp = spm.SentencePieceProcessor(model_proto=model.getvalue())
    docs = ["The cat sat.", "Zürich 12 日本語 ﬁne  ™", "the sun", "\U0001f600 end "]
    stream = np.array([t for d in docs for t in [1, *sp.encode(d)]])
    expected = sum(len(sp.normalize(d).replace(MARK, " ").encode()) for d in docs)
    table = ByteTable.from_sentencepiece(sp, 360)
    assert tok.prove_bytes(sp, table, stream) == expected


def test_load_tokenizer_faults(corpus, tmp_path):
    assert tok.load_tokenizer(corpus.tokenizer_path, 1024).vocab_size() == 1024
    with pytest.raises(
        DataError, match=r"1024 pieces in tokenizer .*tokenizer\.model, 2048 in model\.embed\.vocab_size"
    ):
        tok.load_tokenizer(corpus.tokenizer_path, 2048)
    with pytest.raises(DataError, match=r"not a file.*\n.*did you mean, in .*tokenizer\.model"):
        tok.load_tokenizer(corpus.tokenizer_path.with_name("tokeniser.model"), 1024)
    for content, kind in ((b"version https://git-lfs.github.com/spec/v1\n", "Git-LFS"), (b"\xff" * 50, "something")):
        (tmp_path / "bad.model").write_bytes(content)
        with pytest.raises(DataError, match=f"no SentencePiece model: it looks like .*{kind}"):
            tok.load_tokenizer(tmp_path / "bad.model", 1024)


def test_missing_sentencepiece_says_the_pip_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    with pytest.raises(SetupError, match="pip install sentencepiece"):
        tok.sentencepiece()


@pytest.mark.parametrize("old,new", [(b"<0x41>", b"<0xZZ>"), (b"<0x41>", b"<0x4\xff>")])
def test_damaged_piece_is_a_clear_error(corpus, tmp_path, old, new):
    """sentencepiece itself loads these, and fails when the piece is asked for."""
    data = corpus.tokenizer_path.read_bytes()
    assert data.count(old) == 1
    (tmp_path / "t.model").write_bytes(data.replace(old, new))
    with pytest.raises(DataError, match="no SentencePiece model"):
        tok.load_tokenizer(tmp_path / "t.model", 1024)
