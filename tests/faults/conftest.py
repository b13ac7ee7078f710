"""Runs that the tests of faults compare with, made once."""

import shutil

import pytest
from provoke import launch

from pgolf import finish


@pytest.fixture(scope="session")
def undisturbed(shards, tmp_path_factory):
    """Folder of a finished run, with checkpoints at every second step; nothing went wrong in it."""
    out, bundle = tmp_path_factory.mktemp("undisturbed"), finish.bundle
    finish.bundle = lambda: b"code"
    try:
        assert launch(shards, out, "train.run_id=r", "train.checkpoint_every=2") == 0
    finally:
        finish.bundle = bundle
    return out / "r"


@pytest.fixture
def data(shards, tmp_path):
    """The data set once more, to be damaged."""
    return shutil.copytree(shards, tmp_path / "data")
