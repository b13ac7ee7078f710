"""`pgolf data`: what it finds in good and broken data, its exit codes, and the data sets that it makes."""

import json

import numpy as np
import pytest

from pgolf import cli
from pgolf.__main__ import main
from pgolf.data import case_ops, corpus, export, overlap, sidecar
from pgolf.data.shards import read_shard, write_shard
from pgolf.data.tokenizer import load_tokenizer, piece_bytes
from pgolf.errors import DataError
from pgolf.eval.windowed import PlainWindows

pytest.importorskip("sentencepiece")
WORDS = ["The", "quick", "BROWN", "fox", "jumpsOver", "12", "lazy", "Dogs", "in", "NewYork,", "said", "iVan;"]


def texts(n, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(5, 120))) + f" {i}" for i in range(n)]


def jsonl(path, documents):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in documents))
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set of `pgolf data case-ops`: (folder, tokenizer)."""
    folder = tmp_path_factory.mktemp("made")
    source = jsonl(folder / "docs.jsonl", texts(150))
    args = ["data", "case-ops", source, str(folder / "out"), "--vocab-size", "330", "--val-docs", "40"]
    assert main([*args, "--shard-tokens", "4000"], {}) == 0
    return folder / "out", folder / "out" / "tokenizer.model"


def copy(made, to):
    for path in made[0].iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def checked(capsys, folder, tokenizer, *options):
    """(exit code, {row: (status, what)}) of a check."""
    capsys.readouterr()
    code = main(["data", "check", str(folder), "--tokenizer", str(tokenizer), "--json", *options], {})
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] == (code == 0)
    return code, {row["name"]: (row["status"], row["what"]) for row in found["checks"]}


def test_embedded_corpus_is_clean(capsys):
    assert main(["data", "check"], {}) == 0
    out = " ".join(capsys.readouterr().out.split())  # lines are broken where the machine's paths want it
    assert "0 warn, 0 fail" in out and "table and pieces agree in each of" in out


def test_a_made_data_set_is_clean(made, capsys):
    code, rows = checked(capsys, *made, "--all")
    assert code == 0 and {status for status, _ in rows.values()} <= {"ok", "n/a"}
    assert "with the operators worked off" in rows["sidecar"][1]
    assert rows["transform"] == ("ok", "40 of 40 val documents come back from the case operators (of 40)")
    assert "the split's 40 val documents" in rows["provenance"][1] and "all shard(s)" in rows["overlap"][1]
    assert "TITLE 4, ALLCAPS 5, CAPNEXT 6, ESC 7" in rows["tokenizer"][1]


def test_training_scores_by_the_sidecar(made, tmp_path):
    """The trainer opens it; the score's denominator is the UTF-8 length of the original documents."""
    from pgolf import config
    from pgolf.clock import TimeLedger
    from pgolf.dist import Dist
    from pgolf.log import RunLog
    from pgolf.train import Trainer

    environ = {"PRESET": "smoke", "DATA_PATH": str(made[0]), "TOKENIZER_PATH": str(made[1]), "VOCAB_SIZE": "330",
               "CASEOPS_ENABLED": "1"}  # fmt: skip
    got = config.load([f"train.out_dir={tmp_path}", "train.device=cpu"], environ)
    assert any("CASEOPS_ENABLED=1 has no effect: case operators follow from" in note for note in got.notes)
    trainer = Trainer(got.config, Dist(), RunLog(tmp_path, console=False), TimeLedger())
    scored = trainer.validate(PlainWindows(64), limit=0)
    assert scored.bytes == sum(len(t.encode()) for t in texts(150)[:40])
    assert scored.targets == len(trainer.data.val) - 1


BROKEN = {
    "leak": ("overlap", "val documents (100.00 %)"),
    "sidecar missing": ("bytes", "no byte sidecar"),
    "sidecar of other bytes": ("bytes", "in 1 of 40 documents"),
    "truncated": ("val shards", "is truncated"),
    "id": ("val shards", "but the vocabulary has 330"),
    "manifest": ("provenance", "says 50,000 val documents, the split has 40"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_data_fail_at_their_row(made, tmp_path, capsys, fault):
    folder = copy(made, tmp_path)
    val = sorted(folder.glob("fineweb_val_0*.bin"))
    side = [sidecar.sidecar_of(f) for f in val]
    ids, counts = read_shard(val[0]).copy(), read_shard(side[0]).copy()
    if fault == "leak":
        stream = np.concatenate([read_shard(f) for f in val])
        write_shard(folder / "fineweb_train_000099.bin", stream)
    elif fault == "sidecar missing":
        for path in side:
            path.unlink()
    elif fault == "sidecar of other bytes":
        counts[np.flatnonzero(counts)[3]] += 1
        write_shard(side[0], counts)
    elif fault == "truncated":
        val[0].write_bytes(val[0].read_bytes()[:-2])
    elif fault == "id":
        ids[7] = 400
        write_shard(val[0], ids)
    else:
        (folder / "manifest.json").write_text('{"docs_val": 50000}')
    code, rows = checked(capsys, folder, made[1], "--all")
    name, told = BROKEN[fault]
    assert code == DataError.exit_code
    assert rows[name][0] == "fail" and told in rows[name][1]
    assert [n for n, (status, _) in rows.items() if status == "fail"] == [name]


def plain_set(folder, documents, vocab=320):
    """Shards without operators."""
    docs = [corpus.Document(str(i), t) for i, t in enumerate(documents)]
    (folder / "tokenizer.model").write_bytes(corpus.train_tokenizer(docs, vocab))
    sp = load_tokenizer(folder / "tokenizer.model", vocab)
    streams = [[1, *sp.encode(t)] for t in documents]
    write_shard(folder / "fineweb_val_000000.bin", np.concatenate(streams[:60]))
    write_shard(folder / "fineweb_train_000000.bin", np.concatenate(streams[60:]))
    return folder, folder / "tokenizer.model"


def test_case_folded_text_is_refused(tmp_path, capsys):
    """Byte counts of a poorer text are right by themselves; capitals that are not there tell."""
    documents = [f"{t} {t}" for t in texts(160, seed=1)]
    code, rows = checked(capsys, *plain_set(tmp_path, documents))
    assert code == 0 and rows["transform"][0] == "ok" and rows["official"][0] == "n/a"
    code, rows = checked(capsys, *plain_set(tmp_path, [t.lower() for t in documents]))
    assert code == DataError.exit_code and "case-folded" in rows["transform"][1]


def test_marks_of_the_leaking_export_are_told(made, tmp_path, capsys):
    folder = tmp_path / "datasets" / "datasets"
    folder.mkdir(parents=True)
    code, rows = checked(capsys, copy(made, folder), made[1])
    assert code == 0 and rows["provenance"][0] == "warn" and "datasets/datasets" in rows["provenance"][1]


def test_a_split_that_begins_inside_a_document(tmp_path, capsys):
    folder, tokenizer = plain_set(tmp_path, texts(90))
    write_shard(folder / "fineweb_val_000000.bin", read_shard(folder / "fineweb_val_000000.bin")[5:])
    code, rows = checked(capsys, folder, tokenizer)
    assert code == 0 and rows["documents"][0] == "warn"


def test_documents_that_are_not_kept_stop_the_export(tmp_path, made):
    sp = load_tokenizer(made[1], None)
    with pytest.raises(DataError, match="document 1 holds a lone surrogate, at character 2"):
        export.export(["ok", "ab\ud800"], sp, tmp_path, 1)
    with pytest.raises(DataError, match=r"in 1 of 1 documents; first in document 0, "):
        export.export(["said the fox, " * 9 + "\u2581", "b"], sp, tmp_path, 1)  # read back as a space
    with pytest.raises(DataError, match="no documents for the train split"):
        export.export(["a"], sp, tmp_path, 5)


def test_a_tokenizer_without_operators_is_refused(tmp_path):
    _, tokenizer = plain_set(tmp_path, texts(90))
    with pytest.raises(DataError, match=r"no user-defined piece for TITLE, ALLCAPS, CAPNEXT, ESC"):
        export.make(lambda: ["a", "b"], tmp_path / "out", 1, tokenizer=tokenizer)


def test_shards_are_cut_and_join_again(made):
    sp = load_tokenizer(made[1], None)
    pieces = piece_bytes(sp)
    for split, expected in (("val", texts(150)[:40]), ("train", texts(150)[40:])):
        files = sorted(made[0].glob(f"fineweb_{split}_0*.bin"))
        assert len(files) > 1 and all(len(read_shard(f)) == 4000 for f in files[:-1])
        stream = np.concatenate([read_shard(f) for f in files])
        parts = np.split(stream, np.flatnonzero(stream == 1)[1:])
        assert [case_ops.decode(b"".join(pieces[t] for t in p[1:]).decode()) for p in parts] == expected


@pytest.mark.parametrize(
    ("line", "told"), [('{"x": 1}', "line 2"), ("no", "line 2"), ('{"text": 5}', "a int, expected a string")]
)
def test_bad_lines_are_named(tmp_path, line, told):
    (tmp_path / "d.jsonl").write_text('{"text": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=told):
        list(export.read_jsonl(tmp_path / "d.jsonl"))


@pytest.mark.parametrize("argv", [["check", "/x"], ["check", "--tokenizer", "t"], ["case-ops", "a", "b", "--vocab-size",
                                  "9", "--val-docs", "0"]])  # fmt: skip
def test_wrong_arguments_are_errors_of_use(argv):
    with pytest.raises(cli.ConfigError):
        from pgolf.dataset.command import main as run

        run(argv, {})


def test_missing_folder_is_one_row(tmp_path, capsys, made):
    code, rows = checked(capsys, tmp_path / "none", made[1])
    assert (
        code == DataError.exit_code
        and rows["train shards"][0] == "fail"
        and "does not exist" in rows["train shards"][1]
    )
    assert rows["overlap"][0] == "n/a" and rows["tokenizer"][0] == "ok"


def test_thresholds_are_ordered():
    assert overlap.NOTED_SHARE < overlap.LEAK_SHARE < 0.8
