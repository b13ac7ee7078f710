"""The embedded corpus: faithful, deterministic, verified, and never half-made."""

import json
import os
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from pgolf.data import corpus as corpus_module
from pgolf.data.corpus import build_or_load, read_documents, source_files, split_of
from pgolf.data.shards import read_shard, sha256
from pgolf.errors import DataError, SetupError

pytest.importorskip("sentencepiece")
ROOT = Path(__file__).resolve().parents[2]
VOCAB = 384


@pytest.fixture(scope="module")
def small_root(tmp_path_factory):
    """A source tree of 20 real library files, about 0.3 MB: builds in half a second."""
    root, stdlib = tmp_path_factory.mktemp("sources"), Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.glob("[a-c]*.py"))[:20]:
        (root / path.name).write_bytes(path.read_bytes())
    return root


def tokens_of(paths, split):
    return read_shard(paths.data_dir / f"fineweb_{split}_000000.bin")


def test_every_document_comes_back_byte_for_byte(corpus, tokenizer):
    from pgolf.data.tokenizer import piece_bytes

    root = Path(sysconfig.get_path("stdlib"))
    names = [d.name for d in read_documents(root, source_files(root)) if split_of(d.name) == "val"]
    val, pieces = tokens_of(corpus, "val"), piece_bytes(tokenizer)
    starts = np.flatnonzero(val == 1)
    assert len(starts) == len(names) == corpus.manifest["splits"]["val"]["documents"]
    for name, ids in zip(names, np.split(val, starts[1:]), strict=True):
        assert b"".join(pieces[i] for i in ids[1:].tolist()) == (root / name).read_bytes(), name


def test_default_corpus_is_of_use(corpus, tokenizer):
    counts = corpus.manifest["splits"]
    assert counts["train"]["bytes"] > 5e6 and 0.02 < counts["val"]["bytes"] / counts["train"]["bytes"] < 0.12
    assert len(tokens_of(corpus, "train")) == counts["train"]["tokens"]
    assert counts["train"]["bytes"] / counts["train"]["tokens"] > 2.2, "indentation must not cost a token per space"
    assert tokenizer.piece_to_id("\u2581") != tokenizer.unk_id()
    assert [tokenizer.pad_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.unk_id()] == [0, 1, 2, 3]


def test_splits_share_no_file():
    root = Path(sysconfig.get_path("stdlib"))
    names = [p.relative_to(root).as_posix() for p in source_files(root)]
    assert names == sorted(set(names))
    assert not [n for n in names if {"test", "tests", "site-packages", "__pycache__"} & set(n.split("/"))]
    assert 0.03 < np.mean([split_of(n) == "val" for n in names]) < 0.1


def test_unfaithful_files_are_left_out(tmp_path):
    files = {"ok.py": "é\tx\r\n  y\n".encode(), "latin.py": b"\xe9", "mark.py": "a\u2581".encode(), "nul.py": b"a\0"}
    files |= dict.fromkeys(("test/t.py", "_sysconfigdata_x.py", "a.txt"), b"x")
    files |= {"space.py": b" a", "empty.py": b""}
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    documents = read_documents(tmp_path, source_files(tmp_path))
    assert [(d.name, d.text.encode()) for d in documents] == [("ok.py", files["ok.py"])]


def test_two_builds_are_identical_and_the_third_is_a_load(small_root, tmp_path):
    lines = []
    one = build_or_load(tmp_path / "a", VOCAB, root=small_root)
    two = build_or_load(tmp_path / "b", VOCAB, lines.append, root=small_root)
    assert one.manifest == two.manifest and one.manifest["vocab_size"] == VOCAB
    assert all(sha256(one.data_dir / n) == h for n, h in one.manifest["sha256"].items())
    assert len(lines) >= 5 and any("tokeni" in line for line in lines), "a user must see life"
    before = one.tokenizer_path.stat().st_mtime_ns
    again = build_or_load(tmp_path / "a", VOCAB, lambda line: pytest.fail(line), root=small_root)
    assert again == one and one.tokenizer_path.stat().st_mtime_ns == before


def test_key_follows_sources_and_vocabulary(small_root, tmp_path):
    base = build_or_load(tmp_path, VOCAB, root=small_root)
    other = build_or_load(tmp_path, VOCAB + 16, root=small_root)
    assert base.data_dir != other.data_dir and base.data_dir.exists()


@pytest.mark.parametrize(
    "name,how",
    [("fineweb_val_000000.bin", "flip"), ("tokenizer.model", "cut"), ("tokenizer.model", "remove"),
     ("manifest.json", "cut"), ("manifest.json", "remove")],
)  # fmt: skip
def test_damage_is_noticed_and_mended(small_root, tmp_path, name, how):
    whole = build_or_load(tmp_path, VOCAB, root=small_root)
    victim = whole.data_dir / name
    content = victim.read_bytes()
    if how == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[:-3] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
    lines = []
    mended = build_or_load(tmp_path, VOCAB, lines.append, root=small_root)
    assert "damaged" in lines[0] and mended == whole and victim.read_bytes() == content
    assert os.listdir(tmp_path) == [whole.data_dir.name]


CHILD = textwrap.dedent("""
    import sys, time
    sys.path.insert(0, {repo!r})
    from pgolf.data.corpus import build_or_load
    def progress(line):
        print(line, flush=True)
        if {stop!r} and line.startswith({stop!r}):
            time.sleep(60)
    print("done", build_or_load({cache!r}, {vocab}, progress, root={root!r}).manifest["sha256"], flush=True)
""")


def child(root, cache, stop=""):
    code = CHILD.format(repo=str(ROOT), stop=stop, cache=str(cache), vocab=VOCAB, root=str(root))
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("stage", ["training", "tokenising val"])
def test_killed_build_leaves_nothing_that_looks_valid(small_root, tmp_path, stage):
    process = child(small_root, tmp_path, stage)
    assert any(line.startswith(stage) for line in process.stdout)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not list(tmp_path.glob("corpus-*"))
    left = list(tmp_path.iterdir())
    built = build_or_load(tmp_path, VOCAB, root=small_root)
    assert built.data_dir.is_dir() and left[0].exists(), "a young folder may be another process's"
    os.utime(left[0], (time.time() - 2 * 86400,) * 2)
    (built.data_dir / "manifest.json").write_text("{}")
    build_or_load(tmp_path, VOCAB, root=small_root)
    assert os.listdir(tmp_path) == [built.data_dir.name], "an old one is swept by the next build"


def test_concurrent_builds_agree(small_root, tmp_path):
    children = [child(small_root, tmp_path) for _ in range(2)]
    outputs = [c.communicate(timeout=60)[0].splitlines() for c in children]
    assert [c.returncode for c in children] == [0, 0]
    assert outputs[0][-1] == outputs[1][-1] and outputs[0][-1].startswith("done")
    assert len(os.listdir(tmp_path)) == 1


def test_loser_of_the_race_uses_the_winners_folder(small_root, tmp_path):
    """Another process finishes while this one is at its last stage."""
    winner = []

    def progress(line):
        if line.startswith("tokenising val") and not winner:
            winner.append(None)
            winner[0] = build_or_load(tmp_path, VOCAB, root=small_root)
            winner.append(winner[0].tokenizer_path.stat().st_ino)

    found = build_or_load(tmp_path, VOCAB, progress, root=small_root)
    assert found == winner[0] and found.tokenizer_path.stat().st_ino == winner[1]
    assert len(os.listdir(tmp_path)) == 1


def test_unwritable_cache_names_the_option(small_root, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match=r"not writable.*\n.*data\.cache_dir"):
        build_or_load(tmp_path / "file" / "cache", VOCAB, root=small_root)


def test_full_disk_names_the_option(small_root, tmp_path, monkeypatch):
    def full(path, tokens):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(corpus_module, "write_shard", full)
    with pytest.raises(SetupError, match=r"No space left on device\n.*data\.cache_dir"):
        build_or_load(tmp_path, VOCAB, root=small_root)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("vocab", [100, 60000])
def test_impossible_vocabulary(small_root, tmp_path, vocab):
    with pytest.raises(DataError, match=rf"vocabulary of {vocab} pieces"):
        build_or_load(tmp_path, vocab, root=small_root)
    assert not list(tmp_path.iterdir())


def test_no_sources(tmp_path):
    with pytest.raises(DataError, match="0 usable Python sources"):
        build_or_load(tmp_path / "cache", VOCAB, root=tmp_path)


def test_manifest_on_disk_is_what_is_returned(corpus):
    assert json.loads((corpus.data_dir / "manifest.json").read_text()) == corpus.manifest


@pytest.mark.parametrize(
    "edit",
    [
        lambda m: m.update(sha256={}),  # names no file, so none fails
        lambda m: m["sha256"].update({"../x": "0"}),
        lambda m: m["splits"]["val"].update(bytes=1),
        lambda m: m.update(vocab_size=1024),
        lambda m: m.pop("self"),
    ],
)
def test_an_edited_manifest_is_noticed(small_root, tmp_path, edit):
    whole = build_or_load(tmp_path, VOCAB, root=small_root)
    manifest = json.loads((whole.data_dir / "manifest.json").read_text())
    edit(manifest)
    (whole.data_dir / "manifest.json").write_text(json.dumps(manifest))
    assert corpus_module._load(whole.data_dir) is None


@pytest.mark.parametrize("content", [b"[" * 100_000, b"[1]", b'{"self": 1}', b"\xff", b"1" * 5000])
def test_a_manifest_that_is_something_else_is_noticed(tmp_path, content):
    (tmp_path / "manifest.json").write_bytes(content)
    assert corpus_module._load(tmp_path) is None
