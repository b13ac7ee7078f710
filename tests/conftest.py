"""Shared by all tests: the repository on the path, two CPU threads at most (one beside other tests), small models."""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # as pgolf/cli.py does; read when torch loads

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported: jit decides then

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# Taken away, so that a pytest that a test starts does not believe to be a worker of this one
BESIDE_OTHERS = os.environ.pop("PYTEST_XDIST_WORKER", None) is not None
torch.set_num_threads(1 if BESIDE_OTHERS else 2)
if BESIDE_OTHERS:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device; torch.cuda.is_available() is False here"))


@pytest.fixture
def kernels_on():
    """Every op on its Triton kernel, in the interpreter where there is no GPU."""
    pytest.importorskip("triton", reason="triton is not installed: no kernels to test")
    if not torch.cuda.is_available():
        import interp_shim

        interp_shim.install()
    from helpers import KERNELS

    from pgolf.kernels import _op

    with _op.paths(**dict.fromkeys(KERNELS, "triton")):
        yield


@pytest.fixture
def poisoned():
    """torch.empty is full of NaN (integers: of the largest value): an output that is not written cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session", autouse=True)
def one_bundle():
    """Runs and `pgolf size` count the real code, which is made once and not once a run: that was 5 s of every run.

    What makes it is tested in tests/artifact and tests/submit, which do not pass here.
    """
    from helpers import made

    from pgolf import finish
    from pgolf.size import command

    with pytest.MonkeyPatch.context() as patch:
        for module in (finish, command):
            patch.setattr(module, "bundle", lambda: made().data)
        yield


@pytest.fixture
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(scope="session")
def shards(tmp_path_factory):
    """A small data set that is the same on every machine: the licence's text, tokenised, cut into two shards."""
    import numpy as np
    import sentencepiece as spm
    from helpers import VOCAB

    from pgolf.data.shards import write_shard

    folder = tmp_path_factory.mktemp("licence_sp400")
    text = (ROOT / "LICENSE").read_text()
    paragraphs = [" ".join(p.split()) for p in text.split("\n\n") if p.strip()]
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(paragraphs), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=VOCAB, byte_fallback=True, split_digits=True, add_dummy_prefix=False, pad_id=0, bos_id=1,
        eos_id=2, unk_id=3, character_coverage=0.999, minloglevel=2, num_threads=1, hard_vocab_limit=False,
    )  # fmt: skip
    sp = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokens = np.concatenate([[1, *sp.encode(p)] for p in paragraphs]).astype(np.uint16)
    cut = len(tokens) // 4
    write_shard(folder / "fineweb_val_000000.bin", tokens[:cut])
    write_shard(folder / "fineweb_train_000000.bin", tokens[cut : 2 * cut])
    write_shard(folder / "fineweb_train_000001.bin", tokens[2 * cut :])
    return folder
