"""Sidecars: found or refused, proven on two paths, and what a wrong one is told to be."""

import io
import itertools

import numpy as np
import pytest

from pgolf.data import case_ops, export, sidecar, source, wire
from pgolf.data.config import DataConfig
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.tokenizer import load_tokenizer, piece_bytes
from pgolf.errors import DataError

TEXTS = [
    "The NASA of McDonald",
    "iPhone OK, 3D Über \U0001f600",
    "the end",
    "",
    "  Two  spaces\n",
    "\ue001 kept \ue004",
]


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    """A small data set with case operators, from the standard library's text and awkward documents."""
    sp = load_tokenizer(corpus.tokenizer_path, 1024)
    val = read_shard(corpus.data_dir / "fineweb_val_000000.bin")
    pieces, starts = piece_bytes(sp), np.flatnonzero(val == 1)
    documents = [b"".join(pieces[t] for t in val[s : s + 900]).decode(errors="ignore") for s in starts[:24]]
    folder = tmp_path_factory.mktemp("case_ops")
    return export.make(lambda: [*TEXTS, *documents], folder, 12, vocab_size=512, shard_tokens=4000)


@pytest.fixture(scope="module")
def loaded(made):
    """(processor, tokens, counts) of the val split."""
    files = sorted(made.folder.glob("fineweb_val_0*.bin"))
    tokens = np.concatenate([read_shard(f) for f in files])
    return load_tokenizer(made.tokenizer_path, 512), tokens, sidecar.read_sidecar(files)


def test_the_split_is_its_documents_to_the_byte(made, loaded):
    sp, tokens, counts = loaded
    proof = sidecar.prove_sidecar(sp, tokens, counts)
    assert proof.bytes == proof.piece_bytes == made.counts["val"]["bytes"] and proof.differing == 0
    ends = np.append(np.flatnonzero(tokens == 1), len(tokens))
    sums = [int(counts[a:b].sum()) for a, b in itertools.pairwise(ends[:7])]
    assert sums == [len(t.encode()) for t in TEXTS]
    operators = case_ops.operator_pieces(sp)
    assert operators == dict(zip(case_ops.CONTROLS, (4, 5, 6, 7), strict=True))
    assert made.counts["val"]["shards"] > 1 and made.counts["train"]["shards"] > 1


def test_open_data_gives_bytes_by_position(made, loaded):
    import torch

    cfg = DataConfig(path=str(made.folder), tokenizer_path=str(made.tokenizer_path), seq_len=64)
    data = source.open_data(cfg, 512, torch.device("cpu"), print)
    assert data.val_bytes.dtype == torch.uint16 and len(data.val_bytes) == len(data.val)
    assert int(data.val_bytes[1:].long().sum()) == made.counts["val"]["bytes"]
    assert any("bytes of all val tokens proven" in line for line in data.lines)
    with pytest.raises(DataError, match=r"val_bytes, not byte_counts"):
        data.byte_counts(data.val[:-1], data.val[1:])


def test_one_byte_off_names_the_document(loaded):
    sp, tokens, counts = loaded
    starts = np.flatnonzero(tokens == 1)
    letters = [i for i, t in enumerate(tokens.tolist()) if starts[7] < i < starts[8] and counts[i] > 1]
    wrong = counts.copy()
    wrong[letters[3]] += 1
    with pytest.raises(
        DataError, match=r"\(\+1\), in 1 of 12 documents; first in document 7, .* sidecar [\d,]+, pieces"
    ):
        sidecar.prove_sidecar(sp, tokens, wrong)


def test_bytes_moved_between_documents_do_not_cancel(loaded):
    sp, tokens, counts = loaded
    wrong, (a, b) = counts.copy(), np.flatnonzero(counts > 1)[[2, -2]]
    wrong[a] += 1
    wrong[b] -= 1
    with pytest.raises(DataError, match=r"\(\+0\), in 2 of 12 documents; first in document 0"):
        sidecar.prove_sidecar(sp, tokens, wrong)


def test_bytes_of_a_stream_without_a_sidecar(made, loaded):
    """Training text: the same per document, and per token but for the bytes of one character."""
    sp, tokens, counts = loaded
    found, starts = sidecar.stream_bytes(sp, tokens), np.flatnonzero(tokens == 1)
    assert found.dtype == np.uint16
    assert np.add.reduceat(found, starts).tolist() == np.add.reduceat(counts, starts).tolist()
    whole = np.array([not sp.is_byte(t) for t in tokens.tolist()])
    assert (found == counts)[whole].all() and (tokens == 7).any() and not (found == counts).all()
    twice = [1, 7, 7, 7, 4, 5, 8 + ord("A")]  # ESC ESC is a literal ESC, ESC TITLE a literal TITLE
    assert sidecar.stream_bytes(sp, np.array(twice)).tolist() == [0, 0, 3, 0, 3, 0, 1]
    plain = np.array([1, 7, 4, 9])
    assert sidecar.stream_bytes(sp, plain[:2]).tolist() == [0, 0] and len(sidecar.stream_bytes(sp, plain[:0])) == 0


@pytest.mark.parametrize("by", [1, -1])
def test_a_shifted_sidecar_is_refused(loaded, by):
    """Indexed by the input and not by the target: sums are all but the same."""
    sp, tokens, counts = loaded
    with pytest.raises(DataError, match=r"is no text, and counts|it is shifted"):
        sidecar.prove_sidecar(sp, tokens, np.roll(counts, by))


def test_an_operator_that_counts_is_refused(loaded):
    sp, tokens, counts = loaded
    wrong = np.where(tokens == 4, np.uint16(3), counts)
    with pytest.raises(DataError, match=r"token \d+ is '\\ue001', which is no text, and counts 3"):
        sidecar.prove_sidecar(sp, tokens, wrong)


def test_operators_in_wrong_places_name_the_document(loaded):
    sp, tokens, counts = loaded
    at = int(np.flatnonzero(tokens == 1)[2])
    twice = np.insert(tokens, at + 2, 4)  # behind a letter of the third document
    with pytest.raises(DataError, match=r"invalid case operators in val document 2, .* TITLE in a wrong place"):
        sidecar.prove_sidecar(sp, twice, np.insert(counts, at + 2, 0))


def test_no_bos_is_refused(loaded):
    sp, tokens, counts = loaded
    with pytest.raises(DataError, match=r"not with BOS"):
        sidecar.prove_sidecar(sp, tokens[1:], counts[1:])


def copy(made, to):
    for path in made.folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return sorted(to.glob("fineweb_val_0*.bin"))


def test_files_that_do_not_fit(made, tmp_path):
    files = copy(made, tmp_path)
    sides = sorted(tmp_path.glob("fineweb_val_bytes_*.bin"))
    write_shard(sides[-1], read_shard(sides[-1])[:-1])
    with pytest.raises(DataError, match=r"entries, its shard .* tokens"):
        sidecar.read_sidecar(files)
    sides[-1].unlink()
    with pytest.raises(DataError, match=r"is missing"):
        sidecar.read_sidecar(files)
    for path in sides[:-1]:
        path.unlink()
    assert sidecar.read_sidecar(files) is None
    with pytest.raises(DataError, match=r"has case operators .* no byte sidecar"):
        source.count_bytes(load_tokenizer(made.tokenizer_path, 512), 512, read_shard(files[0]), files)
    write_shard(tmp_path / "fineweb_val_bytes_000009.bin", np.zeros(3, np.uint16))
    with pytest.raises(DataError, match=r"missing|belongs to no val shard"):
        sidecar.read_sidecar(files)
    sides[0].write_bytes(b"x")
    with pytest.raises(DataError):
        sidecar.read_sidecar(files)


def test_wrong_tokenizer_is_refused(made, loaded, corpus):
    _, tokens, counts = loaded
    with pytest.raises(DataError):
        sidecar.prove_sidecar(load_tokenizer(corpus.tokenizer_path, 1024), tokens, counts)


@pytest.fixture(scope="module")
def folding():
    """A tokenizer of the challenge's settings, with operators: its normaliser folds text."""
    spm = pytest.importorskip("sentencepiece")
    lines = [
        case_ops.encode(f"The {w} Number {i} is NAÏVE, {i * 37 % 101} times.") for i, w in enumerate("abcdef" * 40)
    ]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=350, character_coverage=0.999,
        byte_fallback=True, split_digits=True, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, pad_id=0,
        bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=2,
        user_defined_symbols=list(case_ops.CONTROLS),
    )  # fmt: skip
    return spm.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_folding_normaliser(folding):
    """The sidecar counts the original; pieces the folded text. An accent joins its letter behind TITLE."""
    odd = ["1\u00bd cups  \ufb01ne", "E\u0301cole \uff21b"]
    plain = ["The cat sat.", "a number is naive, 12 times"] * 3000
    streams = [export.tokenise(folding, t, 0) for t in [*plain, *odd]]
    tokens, counts = (np.concatenate(part).astype(np.uint16) for part in zip(*streams, strict=True))
    assert not sidecar.keeps_text(folding)
    proof = sidecar.prove_sidecar(folding, tokens, counts)
    assert (
        proof.differing == 2 and proof.first.startswith("document 6,000, ") and "another length in 2 of" in str(proof)
    )
    assert proof.bytes == sum(len(t.encode()) for t in plain) + len(
        "1\u00bd cups  \ufb01neE\u0301cole \uff21b".encode()
    )
    wrong = counts.copy()
    wrong[np.flatnonzero(counts)[::400]] += 1
    with pytest.raises(DataError, match=r"bytes cannot be proven: the byte sidecar"):
        sidecar.prove_sidecar(folding, tokens, wrong)
    with pytest.raises(DataError, match=r"is no text|shifted"):
        sidecar.prove_sidecar(folding, tokens, np.roll(counts, 1))


def test_surfaces_are_the_text_itself(folding, loaded):
    for text in ["a\u00bd \ufb01ne", "naïve \U0001f600 x", "the end"]:
        ids, parts = wire.surfaces(folding, text)
        assert ids == folding.encode(text) and b"".join(parts).decode() == text
    assert wire.surfaces(loaded[0], "") == ([], [])


def test_damaged_messages():
    for message in (b"\x0a", b"\x0a\x05ab", b"\xff", b"\x0b"):
        with pytest.raises(ValueError):
            list(wire.fields(message))
    assert list(wire.fields(b"\x08\x96\x01\x15abcd")) == [(1, 150), (2, b"abcd")]
