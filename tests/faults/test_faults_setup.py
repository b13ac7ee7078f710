"""What a machine or a launch may lack: packages, devices, ranks. Exit codes 3 and 8, before the first step."""

import subprocess
import sys

import pytest
import torch
from helpers import ROOT
from provoke import launch, refused

from pgolf import cli, node, runtime
from pgolf.artifact import pack
from pgolf.artifact.model_io import load_model
from pgolf.errors import ArtifactError, SetupError


@pytest.mark.parametrize("codec,package", [("brotli", "brotli"), ("zstd", "zstandard")])
def test_missing_codec(shards, tmp_path, capsys, monkeypatch, codec, package):
    """Not after the training that it would waste."""
    monkeypatch.setitem(sys.modules, package, None)
    code = launch(shards, tmp_path, "train.run_id=r", COMPRESSOR=codec)
    assert code == refused(capsys, 3, f"codec {package} is not installed", f"pip install {package}")
    assert '"train"' not in (tmp_path / "r" / "events.jsonl").read_text()


def test_level_that_the_codec_does_not_have(shards, tmp_path, capsys):
    code = launch(shards, tmp_path, "train.run_id=r", "quant.codec=zlib", "quant.level=11")
    assert code == refused(capsys, 2, "quant.level=11", "1..9")
    assert '"train"' not in (tmp_path / "r" / "events.jsonl").read_text()


def test_missing_safetensors(shards, tmp_path, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "safetensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert launch(shards, tmp_path, "train.run_id=r") == refused(capsys, 3, "pip install safetensors")
    assert '"train"' not in (tmp_path / "r" / "events.jsonl").read_text()


@pytest.mark.parametrize(
    ("version", "said"), [("2.8.0+cu128", "torch 2.8.0+cu128 is too old, expected 2.9"), (None, "")]
)
def test_old_torch(version, said, shards, tmp_path, monkeypatch, capsys):
    """Before anything of it is imported. None: no metadata, as in a build from source, which is tried."""
    monkeypatch.setattr(node, "version_of", lambda name: version)
    code = launch(shards, tmp_path, "train.run_id=r", "train.iterations=1")
    assert code == (3 if said else 0) and said in capsys.readouterr().err


def test_missing_torch(monkeypatch, capsys):
    monkeypatch.setattr(node, "version_of", lambda name: None)
    monkeypatch.setattr(node.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["--describe"], {"PRESET": "smoke"}) == 3
    assert capsys.readouterr().err == "error: torch is not installed: pip install 'torch>=2.9'\n"


def test_missing_sentencepiece(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert launch(shards, tmp_path) == refused(capsys, 3, "pip install sentencepiece")


def test_missing_triton():
    """Everything works without it on a CPU, and asking for its kernels is told."""
    code = (
        "import sys\nsys.modules['triton'] = None\n"
        "import torch\nfrom pgolf import runtime\nfrom pgolf.errors import SetupError\n"
        "cpu = torch.device('cpu')\n"
        "print(runtime.choose(cpu, ops={'mlp': 'auto'}).kernels['mlp'].value)\n"
        "try: runtime.choose(cpu, ops={'mlp': 'triton'})\n"
        "except SetupError as err: print(err.exit_code)\n"
        "torch.cuda.get_device_capability = lambda device: (9, 0)\n"
        "print(runtime._no_kernels(torch.device('cuda')))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["reference", "3", "triton is not installed: pip install 'pgolf[cuda]'"], done


def test_bf16_on_an_old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    cuda = torch.device("cuda")
    assert runtime._dtype(cuda, "auto") == runtime.Choice("fp32", "no bf16 on this GPU")
    with pytest.raises(SetupError, match=r"bf16 on Tesla T4 \(sm_75\).*use train\.dtype=fp32") as caught:
        runtime._dtype(cuda, "bf16")
    assert caught.value.exit_code == 3


def test_rank_outside_the_world(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert launch(shards, tmp_path) == refused(capsys, 8, "RANK=9", "0..7", "torchrun")
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_gpus(shards, tmp_path, capsys, monkeypatch):
    for name, value in {"RANK": "3", "LOCAL_RANK": "3", "WORLD_SIZE": "8"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    code = launch(shards, tmp_path, "train.device=auto")
    assert code == refused(capsys, 8, "LOCAL_RANK=3", "only 2 are visible", "--nproc_per_node=2")


@pytest.mark.parametrize("rename", [lambda n: f"_orig_mod.{n}", lambda n: n.replace("embed", "embd")])
def test_artifact_with_other_names(undisturbed, rename):
    """As torch.compile's wrapper or another version would name them; an artifact never holds such names of ours."""
    records, meta = pack.unpack((undisturbed / "model.pgolf").read_bytes())
    assert not any("_orig_mod" in r.name for r in records)
    renamed = [pack.Record(rename(r.name), r.role, r.kind, r.shape, r.parts) for r in records]
    with pytest.raises(ArtifactError, match=r"\d+ missing \(.*; \d+ unexpected \(") as caught:
        load_model(pack.pack(renamed, meta, "zlib"))
    assert caught.value.exit_code == 9
