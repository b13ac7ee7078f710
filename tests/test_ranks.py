"""A rank that dies, hangs, fails or is told to stop: the job ends in bounded time and says which rank it was, and why.

With torchrun, two processes and gloo; tests/faulty.py is train_gpt.py with one fault on one rank.
"""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as tdist

from pgolf.dist import Dist, Rank
from pgolf.errors import ConfigError, DistributedError, NumericalError
from pgolf.heartbeat import Heartbeat

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.alone


# -- signs of life, without processes ----------------------------------------------------------------------------------


STARTED = []


@pytest.fixture(autouse=True)
def closed():
    """No thread outlives its test."""
    yield
    while STARTED:
        STARTED.pop().close()
    assert not [thread for thread in threading.enumerate() if thread.name == "heartbeat"]


def hearts(n, store=None):
    store = store or tdist.HashStore()
    STARTED[:] = [Heartbeat(store, r, n, every=0.01, tell_after=0.05) for r in range(n)]
    return list(STARTED)


def beating(*some):
    for heart in some:
        heart.start()


def places(some, steps, waits=()):
    for heart, step in zip(some, steps, strict=True):
        heart.where = lambda step=step: ("train", step)
        heart.waits_for = "a sum" if heart.rank in waits else ""
        heart.beat()


def test_a_silent_rank_is_named_with_its_last_place():
    some = hearts(3)
    places(some, [7, 7, 6], waits=[0, 1])
    beating(some[0], some[1])
    said = some[0].late()
    assert said.startswith("rank 2 gives no sign of life") and "phase train, after step 6, working" in said
    assert "rank 1" not in said


def test_a_rank_that_works_while_the_others_wait_is_late():
    some = hearts(3)
    places(some, [7, 7, 7], waits=[0, 2])
    beating(*some)
    assert some[0].late() == "rank 1 is late: phase train, after step 7, working."


def test_of_ranks_that_all_wait_the_one_with_fewest_steps_is_late():
    some = hearts(3)
    places(some, [7, 5, 7], waits=[0, 1, 2])
    beating(*some)
    assert some[2].late() == "rank 1 is late: phase train, after step 5, waiting in a sum."
    places(some, [7, 7, 7], waits=[0, 1, 2])
    assert some[2].late() == "No rank is behind the others."


def test_many_late_ranks_are_counted():
    some = hearts(9)
    assert some[0].late().endswith("; and 4 more.")


def test_a_long_wait_is_told_by_one_rank():
    some, said = hearts(3), []
    places(some, [7, 7, 6])
    for heart in some:
        heart.say = said.append
    for heart in some[:2]:
        heart.waiting("the ranks' meeting")
    beating(*some)
    time.sleep(0.5)
    (text,) = said
    assert re.match(r"rank [01] has waited \d+ s in the ranks' meeting. rank 2 is late", text)


def test_the_first_to_fail_keeps_its_error_the_others_name_it(monkeypatch):
    monkeypatch.setattr("pgolf.dist.FOLLOW_AFTER", 0.0)
    ranks = [Dist(Rank(r, 3, r), heart) for r, heart in enumerate(hearts(3))]
    first, same, other = NumericalError("nan\nmore"), NumericalError("nan"), KeyError("x")
    assert ranks[1].blame(first) is first
    told = ranks[0].blame(same), ranks[2].blame(other)
    assert [str(t) for t in told] == [
        f"rank {r} stopped; the first to fail was rank 1: NumericalError: nan" for r in (0, 2)
    ]
    assert all(isinstance(t, DistributedError) for t in told) and [t.exit_code for t in told] == [6, 8]
    wrong = ConfigError("same on all")
    assert ranks[2].blame(wrong) is wrong  # rank 0 says it
    assert Dist().blame(other) is other


def test_a_store_that_is_gone_is_survived():
    store = tdist.TCPStore("127.0.0.1", 0, is_master=True)
    client = tdist.TCPStore("127.0.0.1", store.port, is_master=False)
    heart = Heartbeat(client, 0, 1, every=0.01)
    del store
    time.sleep(0.1)
    assert heart.claim("an error") == "rank 0: an error" and heart.failed() == ""
    assert "Nobody can say" in heart.late()


# -- real processes ----------------------------------------------------------------------------------------------------


def torchrun(out, fault, *overrides, **environ):
    args = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    common = ["train.device=cpu", f"train.out_dir={out}", "train.run_id=r", "quant.late_qat=none"]
    return subprocess.Popen(
        [*args, str(ROOT / "tests" / "faulty.py"), *common, *overrides],
        env={**os.environ, "PRESET": "smoke", "OMP_NUM_THREADS": "1", "FAULT": fault, **environ},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


ENDLESS = ("train.iterations=1000000", "train.val_loss_every=0", "train.train_log_every=0")


def finish(process, seconds=60) -> str:
    """The job's whole output; it must end within `seconds`."""
    try:
        return process.communicate(timeout=seconds)[0]
    finally:
        process.kill()
        process.wait()


def codes(text) -> dict[int, int]:
    """{rank: exit code} of torchrun's table."""
    return {int(r): int(c) for r, c in re.findall(r"rank +: (\d+).*\n +exitcode +: (-?\d+)", text)}


def root_cause(text) -> int:
    return int(re.search(r"Root Cause(?:.|\n)*?rank +: (\d+)", text)[1])


@pytest.mark.dist
@pytest.mark.slow
def test_an_error_on_one_rank_is_shown_once(tmp_path):
    text = finish(torchrun(tmp_path, "numerical:1:12", *ENDLESS))
    assert codes(text) == {0: 8, 1: 6} and root_cause(text) == 1
    assert text.count("error: ") == 2 and text.count("A second line.") == 1
    assert "error: rank 0 stopped; the first to fail was rank 1: NumericalError: step 5" in text
    assert "Traceback" not in text.split("ChildFailedError")[0].rpartition("E1")[0]


@pytest.mark.dist
@pytest.mark.slow
def test_a_killed_rank_ends_the_job(tmp_path):
    text = finish(torchrun(tmp_path, "kill:1:12", *ENDLESS))
    assert codes(text) == {0: 8, 1: -9} and root_cause(text) == 1
    assert text.count("error: ") == 1
    assert re.search(
        r"rank 1 gives no sign of life: killed \(out of memory\?\).*; last in phase \w+, after step \d", text
    )
    assert text.count("gives no sign of life") == 1


@pytest.mark.dist
@pytest.mark.slow
def test_a_stopped_rank_and_a_slow_one_are_named_after_the_timeout(tmp_path):
    """Two jobs side by side. torchrun would kill the stopped process after 30 s; the test does so at once."""
    stopped = torchrun(tmp_path / "a", "stop:1:12", *ENDLESS, "train.collective_timeout_s=3")
    slow = torchrun(tmp_path / "b", "sleep:1:12", *ENDLESS, "train.collective_timeout_s=3")
    seen = []
    for line in stopped.stdout:
        seen.append(line)
        if "gives no sign of life" in line:
            break
    pid = int(re.search(r"fault in process (\d+)", "".join(seen))[1])
    os.kill(pid, signal.SIGKILL)
    text = "".join(seen) + finish(stopped)
    assert codes(text)[0] == 8
    assert "rank 1 gives no sign of life" in text and "Timed out waiting 3000ms" in text
    text = finish(slow)
    assert codes(text)[0] == 8
    assert "rank 1 is late: phase train, after step 12, working." in text


@pytest.mark.dist
@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path):
    text = finish(torchrun(tmp_path, "term:1:12", *ENDLESS))
    assert codes(text) == {0: 143, 1: 143}
    (step,) = re.findall(r"stopped: SIGTERM after step (\d+)", text)
    assert 13 <= int(step) < 20 and "error:" not in text  # a thread reads the signal, so perhaps not in the very step
    assert text.count(f"checkpoint: step {step}, ") == 1
    assert (tmp_path / "r" / "checkpoints" / f"step-{int(step):08d}").is_dir()


@pytest.mark.dist
@pytest.mark.slow
def test_waiting_for_rank_0_to_pack_or_for_a_slow_validation_is_no_failure(tmp_path):
    """Both take longer than the limit that holds in steps of training."""
    limit = "train.collective_timeout_s=2"
    process = torchrun(tmp_path, "none:0:0", "train.iterations=2", limit, SLOW="5")
    text = finish(process)
    assert process.returncode == 0, text[-2000:]
    assert json.loads((tmp_path / "r" / "result.json").read_text())["steps"] == 2
    assert text.count("slow validation") == 2 and text.count("slow pack") == 1
