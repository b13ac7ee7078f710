"""Kills one run again and again, resuming it each time, until it is through; beside it the same run undisturbed.

    python tests/kill_driver.py OUT SEED path=value ...    prints {"kills": n, "by": {what: n}} as JSON

Each start is a fork of this process, which has imported everything and computed nothing: 0.3 s instead of 3. A child is
killed by SIGKILL: from outside at a random time while it starts, by its own timer at a random moment of a step, at
named points inside the writing of a checkpoint, and at points behind the training.
"""

import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import matplotlib.figure  # noqa: F401  what a child would import
import safetensors.torch  # noqa: F401
import torch
import torch._dynamo  # an optimiser imports it

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pgolf import checkpoint, config, finish, scoring
from pgolf.checkpoint import MANIFEST, STATE
from pgolf.run import run
from pgolf.train import Trainer

torch.set_num_threads(1)
finish.bundle = lambda: b"code"  # 5 s a run, and nothing of it is asked here


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def counted(module, name, nth, action, keep=lambda *args: True):
    """Replaces module.name by one whose nth call (of those that `keep`) is `action(original, *args)`."""
    original, seen = getattr(module, name), [0]

    def wrapper(*args, **kwargs):
        if keep(*args):
            seen[0] += 1
            if seen[0] == nth:
                return action(original, *args, **kwargs)
        return original(*args, **kwargs)

    setattr(module, name, wrapper)


def half(_original, path, data):
    """Half of a file, then death."""
    with open(path, "wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
    die()


def then_die(original, *args, **kwargs):
    original(*args, **kwargs)
    die()


def half_removed(_original, path, **_kwargs):
    """An old checkpoint that lost one of its files."""
    next(iter(Path(path).iterdir())).unlink()
    die()


WRITING = {
    "before the folder": lambda n: counted(checkpoint, "_make_folder", n, die),
    "half of the tensors": lambda n: counted(checkpoint, "_write_file", n, half, lambda p, _: p.name == STATE),
    "before the manifest": lambda n: counted(checkpoint, "_write_file", n, die, lambda p, _: p.name == MANIFEST),
    "half of the manifest": lambda n: counted(checkpoint, "_write_file", n, half, lambda p, _: p.name == MANIFEST),
    "before the rename": lambda n: counted(checkpoint, "_put_in_place", n, die),
    "after the rename": lambda n: counted(checkpoint, "_put_in_place", n, then_die),
    "before the pruning": lambda n: counted(checkpoint, "_prune", n, die),
    "half of the pruning": lambda n: counted(
        checkpoint.shutil, "rmtree", n, half_removed, lambda p, *_: "old-" in p.name and any(Path(p).iterdir())
    ),
}
BEHIND = {
    "before the packing": lambda: counted(finish, "write_submission", 1, die),
    "while scoring": lambda: counted(scoring.Scoring, "score", 2, die),
    "before the result": lambda: counted(finish.result, "write_result", 1, die),
}


def in_a_step(nth, delay):
    """Death `delay` seconds after the nth step began: in it, in the save behind it, or in what comes next."""

    def start_timer(original, *args):
        def wait():
            time.sleep(delay)
            die()

        threading.Thread(target=wait, daemon=True).start()
        return original(*args)

    counted(Trainer, "step", nth, start_timer)


def child(out, run_id, overrides, prepare, seconds=None):
    """Runs in a fork. True when it came through, False when it was killed; anything else ends the driver."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            random.seed(0)  # Python seeds it anew in a fork
            prepare()
            settings = config.load(
                [f"train.out_dir={out}", f"train.run_id={run_id}", "train.resume=auto", *overrides], dict(os.environ)
            )
            run(settings)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False
    if os.WEXITSTATUS(status):
        sys.exit("the run failed by itself, see above")
    return True


def main(out, seed, overrides):
    rng = random.Random(seed)
    began = time.monotonic()
    assert child(out, "whole", overrides, lambda: None)
    startup = 0.1 * (time.monotonic() - began)
    plans = [("starting", lambda: None, rng.uniform(0, startup)) for _ in range(5)]
    for _ in range(18):
        nth, delay = rng.choice((1, 1, 2)), rng.uniform(0, 0.06)
        plans.append(("stepping", lambda nth=nth, delay=delay: in_a_step(nth, delay), None))
    for name, hook in WRITING.items():
        nth = rng.choice((1, 2))
        plans.append((name, lambda hook=hook, nth=nth: hook(nth), None))
    rng.shuffle(plans)
    plans += [(name, hook, None) for name, hook in BEHIND.items()]
    by = {}
    for name, prepare, seconds in plans:
        if child(out, "killed", overrides, prepare, seconds):
            sys.exit(f"the run came through a kill: {name}, after {by}")
        by[name] = by.get(name, 0) + 1
    assert child(out, "killed", overrides, lambda: None)
    print(json.dumps({"kills": sum(by.values()), "by": by}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
