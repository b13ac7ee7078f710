"""A signal ends a run at its next safe point with the documented code; a second Ctrl-C ends it at once."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pgolf import cli, signals, snapshot, train
from pgolf.errors import Stopped
from pgolf.scoring import Scoring
from pgolf.signals import CODES, Stop, catching

ROOT = Path(__file__).resolve().parent.parent


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def raise_and_wait(stop: Stop, name: str):
    os.kill(os.getpid(), getattr(signal, name))
    wait_for(lambda: stop.code)


@pytest.fixture(autouse=True)
def as_in_the_foreground():
    """A shell's background job ignores SIGINT, and nohup SIGHUP; what is ignored stays so."""
    before = {name: signal.getsignal(getattr(signal, name)) for name in CODES}
    for name in CODES:
        signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(getattr(signal, name), handler)


@pytest.mark.parametrize("name", CODES)
def test_a_signal_sets_its_code_and_handlers_are_given_back(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with catching(speak=False) as stop:
        assert stop.code == 0 and signal.getsignal(number) is not before
        raise_and_wait(stop, name)
    assert stop.code == 128 + number == CODES[name]
    assert signal.getsignal(number) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_the_largest_code_of_several_counts_and_foreign_signals_do_not():
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with catching(speak=False) as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.05)
            assert stop.code == 0
            raise_and_wait(stop, "SIGTERM")
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.code == 143
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_what_was_ignored_stays_ignored():
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with catching(speak=False) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.05)
            assert stop.code == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_process_that_leaves_ignores_further_signals():
    before = signal.getsignal(signal.SIGTERM)
    try:
        with catching(speak=False) as stop:
            stop.leaving = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        for name in CODES:
            signal.signal(getattr(signal, name), signal.default_int_handler if name == "SIGINT" else signal.SIG_DFL)
        signal.signal(signal.SIGTERM, before)


@pytest.mark.alone
def test_a_forked_child_is_on_its_own():
    with catching(speak=False) as stop:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.2)  # it has got its own handlers by then
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == signal.SIGTERM  # it died of it
        time.sleep(0.05)
        assert stop.code == 0


def test_in_another_thread_nothing_is_caught():
    found = []

    def body():
        with catching() as stop:
            found.append((stop.code, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert found == [(0, signal.getsignal(signal.SIGTERM))]


STUCK = """
import ctypes, sys
sys.path.insert(0, {root!r})
from pgolf.signals import catching
libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
with catching():
    print("ready", flush=True)
    for _ in range(2):
        libc.pthread_mutex_lock(mutex)  # the second call never returns, as a collective whose peer hangs
"""


@pytest.mark.alone
def test_second_ctrl_c_ends_a_process_that_is_stuck_outside_python():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK.format(root=str(ROOT))], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # one is a wish
            process.wait(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(5) == 130
        assert (
            process.stderr.read() == "stopping at the next safe point; Ctrl-C again exits at once and saves nothing\n"
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


# -- in a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saves(monkeypatch):
    """[(step, stop code)] of the checkpoints that were written."""
    written = []
    take = snapshot.snapshot

    def patched(trainer):
        written.append((trainer.step_number, trainer.stop.code))
        return take(trainer)

    monkeypatch.setattr(snapshot, "snapshot", patched)
    return written


def command(out, *overrides) -> tuple[int, Path]:
    """Runs the smoke preset in this process; returns (exit code, run directory)."""
    code = cli.main(["train.device=cpu", f"train.out_dir={out}", "train.run_id=r", *overrides], {"PRESET": "smoke"})
    return code, Path(out) / "r"


def send_when(monkeypatch, owner, method, name, when):
    """Sends signal `name` to this process in the call of owner.method for which when(arguments) holds."""
    original, sent = getattr(owner, method), []

    def patched(self, *args, **kwargs):
        if not sent and when(self, *args):
            sent.append(1)
            raise_and_wait(self.stop, name)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, patched)
    return sent


@pytest.mark.parametrize("name", CODES)
def test_training_finishes_the_step_saves_and_ends_with_the_code(name, tmp_path, monkeypatch, capsys, saves):
    sent = send_when(monkeypatch, train.Trainer, "step", name, lambda self, scale, n: n == self.step_number == 3)
    code, path = command(tmp_path, "train.val_loss_every=0")
    assert sent and code == CODES[name]
    assert saves == [(4, CODES[name])]
    assert f"stopped: {name} after step 4" in capsys.readouterr().err
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["kind"] == "step"][-1] == 4
    assert [e["code"] for e in events if e["kind"] == "stopped"] == [CODES[name]]
    assert not [e for e in events if e["kind"] == "error"]
    assert not (path / "result.json").exists()


def test_warm_up_ends_without_a_checkpoint(tmp_path, monkeypatch, capsys, saves):
    send_when(monkeypatch, train.Trainer, "step", "SIGTERM", lambda self, scale, n: True)
    code, _ = command(tmp_path, "train.warmup_steps=3")
    assert code == 143 and saves == []
    assert "SIGTERM during warm-up, at 1 of 3 steps (start)" in capsys.readouterr().err


def test_a_validation_is_dropped_and_the_step_before_it_saved(tmp_path, monkeypatch, capsys, saves):
    send_when(monkeypatch, train.Trainer, "validate", "SIGTERM", lambda self, *_: self.step_number == 10)
    code, path = command(tmp_path, "eval.batch_tokens=64", "train.val_loss_every=10")
    assert code == 143 and saves == [(10, 143)]
    assert "SIGTERM during validation, at 1 of " in capsys.readouterr().err
    assert "val_loss:" not in (path / "train.log").read_text()


@pytest.mark.parametrize(
    "where, method", [("before packing", "safe_point"), ("during int6_brotli_roundtrip, at 1 of ", "score")]
)
def test_the_export_ends_between_its_stages(where, method, tmp_path, monkeypatch, capsys, saves):
    """Training has been saved before it: no further checkpoint."""
    if method == "safe_point":
        send_when(monkeypatch, train.Trainer, method, "SIGTERM", lambda self, place: place == where)
    else:
        score = Scoring.score

        def patched(self, *args):
            raise_and_wait(self.stop, "SIGTERM")
            return score(self, *args)

        monkeypatch.setattr(Scoring, "score", patched)
    code, path = command(tmp_path, "eval.batch_tokens=64", "train.iterations=2")
    assert code == 143 and saves == [(2, 0)]
    assert f"SIGTERM {where}" in capsys.readouterr().err
    assert (path / "model.pgolf").exists() == (where != "before packing") and not (path / "result.json").exists()


def test_check_is_silent_without_a_code():
    signals.check(0, "anywhere")
    with pytest.raises(Stopped, match="SIGHUP here") as caught:
        signals.check(129, "here")
    assert caught.value.exit_code == 129


def launch(out, **environ):
    """tests/faulty.py as a process that says its steps on stderr, and never ends by itself."""
    overrides = ["train.device=cpu", f"train.out_dir={out}", "train.iterations=1000000", "train.val_loss_every=0"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "faulty.py"), *overrides],
        env={**os.environ, "PRESET": "smoke", "OMP_NUM_THREADS": "1", "SAY_STEPS": "1", **environ},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def until(process, text):
    """Reads the process's stderr up to a line that holds `text`."""
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"{text!r} did not come")


@pytest.mark.alone
@pytest.mark.slow
def test_a_process_ends_with_143_of_sigterm_and_130_of_two_interrupts(tmp_path):
    """The second interrupt comes while the first one's checkpoint is being written."""
    terminated, interrupted = launch(tmp_path / "a"), launch(tmp_path / "b", SLOW_SAVE="1")
    try:
        until(terminated, "reached step 3")
        terminated.send_signal(signal.SIGTERM)
        until(interrupted, "reached step 3")
        interrupted.send_signal(signal.SIGINT)
        until(interrupted, "saving slowly")
        interrupted.send_signal(signal.SIGINT)
        began = time.monotonic()
        assert interrupted.wait(5) == 130 and time.monotonic() - began < 2
        assert "Traceback" not in interrupted.stderr.read()
        assert terminated.wait(30) == 143
        assert "stopped: SIGTERM after step" in terminated.stderr.read()
    finally:
        for process in (terminated, interrupted):
            process.kill()
            process.wait()
            process.stderr.close()
