"""The downloader against a hub made of a folder: what it fetches, what it checks, what it says."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from pgolf.data import download
from pgolf.data.shards import sha256, write_shard
from pgolf.errors import DataError

DATASET = "datasets/datasets/fineweb10B_sp1024"
MANIFEST = {
    "datasets": [
        {"name": "fineweb10B_sp1024", "tokenizer_name": "sp1024", "stats": {"files_train": 3, "files_val": 1}},
        {"name": "fineweb10B_byte260", "tokenizer_name": "bytes", "stats": {"files_train": 1, "files_val": 1}},
    ],
    "tokenizers": [{"name": "sp1024", "model_path": "tokenizers/fineweb_1024_bpe.model"}, {"name": "bytes"}],
}


class Hub:
    """Stands in for huggingface_hub: serves the files below `root`, remembers what was fetched."""

    def __init__(self, root):
        self.root, self.fetched = root, []

    def hf_hub_download(self, repo_id, filename, repo_type, revision, local_dir):
        assert repo_type == "dataset"
        self.fetched.append(filename)
        if not (self.root / filename).is_file():
            raise ConnectionError("404 Client Error\nmore lines")
        (local_dir / filename).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(self.root / filename, local_dir / filename)

    def HfApi(self):
        return self

    def get_paths_info(self, repo_id, paths, repo_type, revision):
        for path in paths:
            file = self.root / path
            if file.is_file():
                lfs = SimpleNamespace(sha256=sha256(file)) if path.endswith(".bin") else None
                yield SimpleNamespace(path=path, size=file.stat().st_size, lfs=lfs)


@pytest.fixture
def hub(tmp_path):
    root = tmp_path / "hub"
    (root / DATASET).mkdir(parents=True)
    (root / "datasets/tokenizers").mkdir()
    (root / "datasets/manifest.json").write_text(json.dumps(MANIFEST))
    (root / "datasets/tokenizers/fineweb_1024_bpe.model").write_bytes(b"model")
    for name in ("val_000000", "train_000000", "train_000001", "train_000002"):
        write_shard(root / DATASET / f"fineweb_{name}.bin", np.arange(500))
    return Hub(root)


def run(hub, out, *args):
    return download.main([*args, "--out", str(out)], hub)


def test_fetches_only_what_is_needed_and_says_so(hub, tmp_path, capsys):
    assert run(hub, tmp_path / "out", "sp1024", "--train-shards", "2") == 0
    names = [f.rsplit("/", 1)[1] for f in hub.fetched]
    assert names == ["manifest.json", "fineweb_val_000000.bin", "fineweb_train_000000.bin",
                     "fineweb_train_000001.bin", "fineweb_1024_bpe.model"]  # fmt: skip
    said = capsys.readouterr().out
    assert "4 of 4 files to fetch" in said.splitlines()[0] and f"DATA_PATH={tmp_path / 'out' / DATASET}" in said


def test_repeating_fetches_only_what_is_missing_or_cut(hub, tmp_path):
    run(hub, tmp_path, "sp1024", "--train-shards", "2")
    cut = tmp_path / DATASET / "fineweb_train_000001.bin"
    cut.write_bytes(cut.read_bytes()[:100])
    hub.fetched.clear()
    assert run(hub, tmp_path, "sp1024", "--train-shards", "2") == 0
    assert hub.fetched == ["datasets/manifest.json", f"{DATASET}/fineweb_train_000001.bin"]


def test_right_size_wrong_content_is_noticed(hub, tmp_path, capsys):
    run(hub, tmp_path, "sp1024")
    file = tmp_path / DATASET / "fineweb_train_000000.bin"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    assert run(hub, tmp_path, "sp1024") == 4
    assert "is damaged: SHA-256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args,said",
    [
        (["sp9999"], "variant sp9999 is not hosted; expected one of: byte260, sp1024"),
        (["sp1024", "--train-shards", "4"], "sp1024 has 0..3 train shards"),
        (["sp1024", "--train-shards", "-1"], "0..3"),
        (["byte260"], "no SentencePiece model"),
        (["sp1024", "--offline"], "run once without --offline"),
        (["sp1024", "--prefix", "elsewhere"], "ConnectionError: 404 Client Error\nfix: check network"),
    ],
)
def test_error_texts(hub, tmp_path, capsys, args, said):
    assert run(hub, tmp_path / "out", *args) == 4
    assert said in capsys.readouterr().err


def test_listed_but_not_hosted(hub, tmp_path, capsys):
    (hub.root / DATASET / "fineweb_train_000000.bin").unlink()
    assert run(hub, tmp_path, "sp1024") == 4
    assert "lists but does not host" in capsys.readouterr().err


def test_offline_checks_what_is_there(hub, tmp_path, capsys):
    run(hub, tmp_path, "sp1024")
    hub.fetched.clear()
    assert run(hub, tmp_path, "sp1024", "--offline") == 0 and not hub.fetched
    assert run(hub, tmp_path, "sp1024", "--train-shards", "2", "--offline") == 4
    assert "1 of 4 files are missing" in capsys.readouterr().err


def test_full_disk_is_noticed_before_anything_is_fetched(hub, tmp_path, capsys, monkeypatch):
    def full(fd, offset, size):
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(download.os, "posix_fallocate", full)
    assert run(hub, tmp_path, "sp1024") == 3
    assert "Disk quota exceeded" in capsys.readouterr().err
    assert hub.fetched == ["datasets/manifest.json"]


def test_without_the_hub_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert download.main(["sp1024", "--out", str(tmp_path)]) == 3
    assert "pip install huggingface_hub" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content,words",
    [(b"<!DOCTYPE html>", "HTML"), (b"", "empty"), (b"[" * 100_000, "no JSON"), (b"[1]", "no JSON object"),
     (b"\xff\xfe", "no JSON")],
)  # fmt: skip
def test_a_listing_that_is_something_else(tmp_path, content, words):
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=words):
        download.read_listing(tmp_path / "manifest.json")


@pytest.mark.parametrize("path", ["../../.ssh/key", "/etc/passwd", "a//b", "a\nb", 7, ["x"]])
def test_a_listing_may_not_name_files_outside(path):
    listing = json.loads(json.dumps(MANIFEST))
    listing["tokenizers"][0]["model_path"] = path
    with pytest.raises(DataError, match="not of the form"):
        download.wanted(listing, "sp1024", 1, "datasets")


@pytest.mark.parametrize("count", [10**12, -1, 2.5, True, None, "3"])
def test_a_listing_may_not_name_a_trillion_files(count):
    listing = json.loads(json.dumps(MANIFEST))
    listing["datasets"][0]["stats"]["files_val"] = count
    with pytest.raises(DataError, match="not of the form"):
        download.wanted(listing, "sp1024", 1, "datasets")
