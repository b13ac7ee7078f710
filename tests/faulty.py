"""train_gpt.py with a fault: FAULT=kind:rank:step happens on that rank when it starts that step. Run under torchrun.

SAY_STEPS prints "rank R reached step N" to stderr, for tests that wait for it. SLOW and SLOW_SAVE: see below.
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from pgolf import checkpoint, cli, finish
from pgolf.errors import NumericalError
from pgolf.train import Trainer


def numerical():
    raise NumericalError("step 5: the loss of this rank is nan\nA second line.")


def defect():
    raise KeyError("a defect")


def huge():
    torch.empty(1 << 50)


FAULTS = {
    "numerical": numerical,
    "defect": defect,
    "oom": huge,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(12),
    "term": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "none": lambda: None,
}
kind, rank, at = os.environ.get("FAULT", "none:0:0").split(":")
take_step = Trainer.step
me = os.environ.get("RANK", "0")


def step(self, lr_scale, step_number):
    if "SAY_STEPS" in os.environ:
        print(f"rank {me} reached step {step_number}", file=sys.stderr, flush=True)
    if (me, step_number) == (rank, int(at)) and self.step_number == step_number:
        print(f"fault in process {os.getpid()}", flush=True)
        FAULTS[kind]()
    return take_step(self, lr_scale, step_number)


def save_slowly(folder, *args):
    """A checkpoint that takes a minute more."""
    print("saving slowly", file=sys.stderr, flush=True)
    time.sleep(60)
    return write(folder, *args)


def slowly(function, what, rank):
    """`function` that takes SLOW seconds more on that rank."""

    def wrapped(*args, **kwargs):
        if me == rank:
            print(f"slow {what}", flush=True)
            time.sleep(float(os.environ["SLOW"]))
        return function(*args, **kwargs)

    return wrapped


Trainer.step = step
finish.bundle = lambda: b"code"  # 5 s a run, and nothing that starts this asks for them
if "SLOW" in os.environ:
    finish.write_submission = slowly(finish.write_submission, "pack", "0")
    Trainer.validate = slowly(Trainer.validate, "validation", "1")
write = checkpoint.write
if "SLOW_SAVE" in os.environ:
    checkpoint.write = save_slowly
if __name__ == "__main__":
    sys.exit(cli.main())
