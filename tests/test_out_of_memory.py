"""Out of memory, and a compiler that fails, as messages: phase, need, have, and the setting that mends it."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pgolf import cli, faults
from pgolf.errors import DataError, OutOfMemoryError, SetupError
from pgolf.presets import PRESETS
from pgolf.train import Trainer

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
CFG = PRESETS["smoke"]()
CUDA_TEXT = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.20 GiB is free."
    " Process 12 has 3 GiB memory in use. If reserved but unallocated memory is large try setting ..."
)


def real(make) -> Exception:
    with pytest.raises((MemoryError, RuntimeError)) as caught:
        make()
    return caught.value


STAND_INS = {
    "cuda": (lambda: torch.OutOfMemoryError(CUDA_TEXT), int(2.5 * (1 << 30))),
    "cpu": (lambda: real(lambda: torch.empty(1 << 50)), 4 << 50),
    "numpy": (lambda: real(lambda: np.empty(1 << 50, np.uint8)), 1 << 50),
    "python": (lambda: MemoryError(), None),
    "driver": (lambda: RuntimeError("CUDA error: out of memory"), None),
    "cublas": (
        lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        None,
    ),
}


@pytest.mark.parametrize("name", STAND_INS)
def test_every_kind_is_recognised(name):
    make, need = STAND_INS[name]
    told = faults.explain(make(), "train", CFG, CPU)
    assert isinstance(told, OutOfMemoryError) and told.exit_code == 7
    assert faults.needed(str(make())) == need
    asked = f"{need / (1 << 30):,.2f} GiB more on cpu" if need else "more on cpu"
    assert f"out of memory in phase train: {asked} was needed; " in str(told)
    assert re.search(r"; [\d.,]+ GiB of the machine's is available", str(told))


def test_other_errors_stay_what_they_are():
    for err in (KeyError("x"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), DataError("out of memory")):
        assert faults.explain(err, "train", CFG, CPU) is err


def test_a_gpu_tells_free_total_own_and_others_memory(monkeypatch):
    gib = 1 << 30
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 * gib, 80 * gib))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60 * gib)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70 * gib)
    said = faults.available(torch.device("cuda", 0))
    assert said == ("1.00 GiB of 80.00 GiB is free, this run's tensors hold 60.00 GiB, other use is 9.00 GiB")


def test_the_advice_is_a_setting_that_works():
    assert faults.advice("train", CFG).startswith("Take a step in smaller parts: data.micro_batches=4 (MICRO_BATCHES)")
    one_row = replace(CFG, data=replace(CFG.data, micro_batches=8))
    assert "one row already" in faults.advice("compile", one_row)
    for phase in ("evaluate", "evaluate_float", "validate", "adapt"):
        assert "eval.batch_tokens=1024 (VAL_BATCH_SIZE); it is 2048" in faults.advice(phase, CFG)
    assert "Free memory" in faults.advice("pack", CFG)


@pytest.mark.parametrize("phase, method", [("compile", "step"), ("train", "step"), ("validate", "validate")])
def test_a_run_names_the_phase(phase, method, tmp_path, capsys, monkeypatch):
    original = getattr(Trainer, method)

    def patched(self, *args, **kwargs):
        if self.ledger.current == phase:
            torch.empty(1 << 50)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, method, patched)
    environ = {"PRESET": "smoke"}
    code = cli.main(["train.device=cpu", f"train.out_dir={tmp_path}", "train.run_id=r", "train.iterations=2"], environ)
    err = capsys.readouterr().err
    assert code == 7 and f"out of memory in phase {phase}: 4,194,304.00 GiB more" in err and "Traceback" not in err
    events = [json.loads(line) for line in (tmp_path / "r" / "events.jsonl").read_text().splitlines()]
    (error,) = [e for e in events if e["kind"] == "error"]
    assert error["error"] == "OutOfMemoryError" and error["phase"] == phase


LIMITED = """
import resource, sys
sys.path.insert(0, {root!r})
sys.argv = ["train_gpt.py", *{args!r}]
import pgolf.train
from pgolf.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
sys.exit(main())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and sets RLIMIT_AS")
@pytest.mark.parametrize(
    "args, phase, setting",
    [
        # 262,144 tokens have logits of 1 GiB
        (["data.batch_tokens=262144", "data.micro_batches=1", "train.warmup_steps=0"], "train", "data.micro_batches=2"),
        (["eval.batch_tokens=262144", "eval.max_tokens=0", "train.iterations=1"], "validate", "batch_tokens=131072"),
    ],
)  # fmt: skip
def test_a_real_allocation_that_fails_under_ulimit(args, phase, setting, tmp_path):
    args = ["train.device=cpu", f"train.out_dir={tmp_path}", *args]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED.format(root=str(ROOT), args=args)],
        capture_output=True, text=True, timeout=100, env={**os.environ, "PRESET": "smoke", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 7, done.stderr
    assert f"error: out of memory in phase {phase}: " in done.stderr and "GiB (ulimit -v) and uses" in done.stderr
    assert setting in done.stderr and "Traceback" not in done.stderr


def test_a_compiler_that_fails_points_to_no_compile():
    from torch._dynamo.exc import Unsupported
    from torch._inductor.exc import InvalidCxxCompiler

    for err in (Unsupported("graph break\nmuch more"), InvalidCxxCompiler()):
        told = faults.explain(err, "compile", CFG, CPU)
        assert isinstance(told, SetupError) and "--no-compile" in str(told) and "much more" not in str(told)
        assert f"torch.compile failed in phase compile: {type(err).__name__}: " in str(told)


def test_no_compile_is_a_flag(capsys):
    assert cli.main(["--describe", "--no-compile"], {"PRESET": "smoke"}) == 0
    assert json.loads(capsys.readouterr().out)["config"]["train"]["compile"] == "off"
    cli.main(["--describe"], {"PRESET": "smoke"})
    assert json.loads(capsys.readouterr().out)["config"]["train"]["compile"] == "auto"
    assert "--no-compile" in cli.help_text()
