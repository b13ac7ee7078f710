"""The watch on files and sockets."""

import contextlib
import os
import socket

import numpy as np

from pgolf.audit.isolation import EVALUATION, Watch, isolation
from pgolf.audit.result import FAILED, PASSED, Sizes
from pgolf.audit.valid import Uniform


def test_files_by_phase(tmp_path):
    val, train = tmp_path / "val.bin", tmp_path / "train.bin"
    for path in (val, train):
        path.write_bytes(bytes(64))
    with Watch() as watch:
        watch.phase = "training"
        np.fromfile(train, dtype=np.uint8)
        watch.phase = EVALUATION
        np.memmap(val, dtype=np.uint8, mode="r")
    assert watch.problems([val], [train]) == []
    assert watch.strangers() == [str(val)]
    with Watch() as watch:
        watch.phase = "training"
        val.read_bytes()
        watch.phase = EVALUATION
        os.close(os.open(train, os.O_RDONLY))
    early, late = watch.problems([val], [train])
    assert early == f"training: opens the validation file {val}"
    assert late == f"{EVALUATION}: opens the training file {train}"


def test_sockets_are_seen_and_nothing_after_the_end(tmp_path):
    with Watch() as watch:
        watch.phase = EVALUATION
        with socket.socket() as s, contextlib.suppress(OSError):
            s.settimeout(0.2)
            s.connect(("127.0.0.1", 9))
    assert len(watch.problems()) == 1 and "socket.connect" in watch.problems()[0]
    before = len(watch.events)
    (tmp_path / "x").write_text("x")
    assert len(watch.events) == before


def test_a_warm_up_must_not_open_validation_data(tmp_path):
    val = tmp_path / "val.bin"
    val.write_bytes(bytes(8))

    class Peeks(Uniform):
        early = True

        def data_files(self):
            return {"val": [val]}

        def warm_up(self):
            if self.early:
                val.read_bytes()

        def nats(self, tokens):
            val.read_bytes()
            return super().nats(tokens)

    scorer = Peeks()
    found = isolation(scorer, Sizes())
    assert found.status == FAILED and "warm-up: opens the validation file" in found.detail
    scorer.early = False
    assert isolation(scorer, Sizes()).status == PASSED
