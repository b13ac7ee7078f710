"""Bytes of the compiled step: right for graphs counted by hand, and a step that moves more is refused."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from bench import step_bytes
from bench.step_bytes import CORE, GEMM, GLUE, Moved, Step
from pgolf.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
LAYERS, TOKENS, DIM = 2, 8 * 256, 512  # of the step in lowered.py
STREAM = TOKENS * DIM * 2  # bytes of a bf16 (B, T, D)
MB = 2**20


def run(*args, **environ):
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environ}
    )


@pytest.fixture(scope="module")
def lowered():
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = str(Path(__file__).with_name("lowered.py"))
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, cwd=ROOT, env=environ)
    if done.returncode == 3:
        pytest.skip(f"step bytes are NOT tested: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def step(lowered, name):
    return Step("two layers", name, [Moved(*k) for k in lowered["steps"][name]])


def sizes(kernels):
    return sorted(size for _, size in kernels)


# -- small graphs, by hand: x is 1024 x 512 in bf16, 1 MB; w is 512 x 256 ---------------------------------------------


def test_neighbouring_pointwise_operations_are_one_kernel(lowered):
    forward, backward = lowered["pointwise"]
    assert sizes(forward) == [2 * MB]  # x, y
    assert sizes(backward) == [3 * MB]  # dy, x, dx


def test_products_and_their_classes(lowered):
    forward, backward = lowered["product"]
    product = MB + MB // 4 + MB // 2  # x or dx, w or dw, y or dy
    assert sorted(forward) == [[GEMM, product], ["rest", MB]]
    assert sorted(backward) == [[GEMM, product], [GEMM, product], ["rest", 3 * MB // 2]]


def test_an_op_counts_its_own_launches(lowered):
    forward, backward = lowered["op"]
    row = 1024 * 4  # one fp32 a row
    assert sizes(forward) == [2 * MB, 4 * MB + row]  # tanh; two terms, sum, norm
    assert sizes(backward) == [3 * MB, 3 * MB + row]  # tanh; gradient, sum, gradient


# -- a step -----------------------------------------------------------------------------------------------------------


def test_ops_move_what_the_traced_step_says(lowered):
    """The compiled graph calls the ops that eager calls, none twice and none dropped."""
    of_ops = [k for k in step(lowered, "kernels").kernels if ": " in k.name and not k.name.startswith("fused")]
    compiled = Counter((k.phase, k.name.split(": ")[1], k.bytes) for k in of_ops)
    traced = Counter(map(tuple, lowered["traced"]))
    differ = (compiled - traced) + (traced - compiled)
    assert {name for _, name, _ in differ} == {"qk_prep_bwd"}  # steps over the values, which the trace counts
    over = [sum(size * n for (_, name, size), n in c.items() if name == "qk_prep_bwd") for c in (traced, compiled)]
    assert over[0] - over[1] == LAYERS * TOKENS * 4 * 64 * 2


def test_classes_of_both_paths(lowered):
    reference, kernels = step(lowered, "reference"), step(lowered, "kernels")
    assert reference.count([GEMM]) == kernels.count([GEMM])
    assert reference.count([CORE]) == 2 * LAYERS  # opaque, one kernel each way
    assert kernels.bytes(["MLP activation"]) == 0 < reference.bytes(["MLP activation"])
    for kind in ("residual, norm", "qk prep", "XSA", "cross-entropy", "embeddings"):
        assert reference.bytes([kind]) > 0 and kernels.bytes([kind]) > 0, kind
    assert kernels.bytes(GLUE) < 0.75 * reference.bytes(GLUE)
    assert kernels.bytes() == kernels.bytes(phase="forward") + kernels.bytes(phase="backward")


def test_library_attention_adds_a_pass_over_the_stream(lowered):
    own, library = step(lowered, "kernels"), step(lowered, "library")
    assert library.count([CORE]) == 2 * LAYERS and own.count([CORE]) == 3 * LAYERS
    xsa = sorted(k.name for k in library.kernels if k.kind == "XSA")
    names = ("attention: exclude_fwd", "attention_bwd: add_", "attention_bwd: exclude_bwd")
    assert xsa == sorted(names * LAYERS)
    same = [k for k in GLUE if k != "XSA"]
    assert library.bytes(same) == own.bytes(same) and library.bytes(["XSA"]) > own.bytes(["XSA"]) + 2 * LAYERS * STREAM


def test_one_more_pass_is_counted_and_refused(lowered):
    more = step(lowered, "grown").bytes(GLUE) - step(lowered, "kernels").bytes(GLUE)
    assert more == LAYERS * (2 + 3) * STREAM  # tanh reads and writes; its gradient reads two and writes one
    before, now = lowered["figures"]["kernels"], lowered["figures"]["grown"]
    assert step_bytes.problem("x", before, {"x": before}) == ""
    assert "glue" in step_bytes.problem("x", now, {"x": before})


# -- committed figures and the command line ---------------------------------------------------------------------------


def figures(glue: float) -> dict:
    return dict.fromkeys(step_bytes.CLASSES, 0.0) | {"XSA": glue, "glue": glue, "kernels": 1}


@pytest.mark.parametrize("glue, refused", [(10.0, False), (10.19, False), (10.21, True), (5.0, False)])
def test_two_per_cent_are_allowed(glue, refused):
    assert bool(step_bytes.problem("p kernels", figures(glue), {"p kernels": figures(10.0)})) == refused


def test_the_class_that_grew_is_named():
    assert "{'XSA': 5.0}" in step_bytes.problem("p kernels", figures(15.0), {"p kernels": figures(10.0)})
    assert "not in step_bytes.json" in step_bytes.problem("q kernels", figures(1.0), {"p kernels": figures(10.0)})


def test_figures_of_another_torch_are_not_compared(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(step_bytes, "COMMITTED", tmp_path / "step_bytes.json")
    step_bytes.COMMITTED.write_text(json.dumps({"torch": "0.0", "figures": {"p kernels": figures(1.0)}}))
    assert step_bytes.problem("p kernels", figures(9.0), step_bytes.committed()) == ""
    assert "not compared" in capsys.readouterr().out


def test_check_and_update(monkeypatch, tmp_path, capsys):
    """The exit codes of a whole run, the compiler aside."""
    from bench import _pretend

    glue = [Moved("forward", "XSA", "attention: exclude_fwd", 10**9)]
    monkeypatch.setattr(_pretend, "install", lambda: None)
    monkeypatch.setattr(step_bytes, "COMMITTED", tmp_path / "step_bytes.json")
    monkeypatch.setattr(step_bytes, "compiled_step", lambda cfg, path, library: Step(cfg.preset, path, glue))
    assert step_bytes.main(["--update", "--preset", "smoke"]) == 0
    assert step_bytes.main(["--check", "--preset", "smoke"]) == 0
    glue.append(Moved("backward", "XSA", "attention_bwd: exclude_bwd", 10**9))
    assert step_bytes.main(["--preset", "smoke"]) == 0
    assert step_bytes.main(["--check", "--preset", "smoke"]) == 1
    assert "FAULT smoke kernels: glue 2.00 GB, committed 1.00" in capsys.readouterr().out
    assert step_bytes.main(["--check", "--preset", "smoke", "--fold"]) == 1  # nothing committed for it


def test_committed_figures_are_of_the_presets():
    saved = json.loads(step_bytes.COMMITTED.read_text())["figures"]
    assert {"rat_rod_green kernels", "rat_rod_green reference"} <= saved.keys()
    for key, row in saved.items():
        assert key.split()[0] in PRESETS and row["glue"] == pytest.approx(sum(row[k] for k in GLUE), abs=0.01)


@pytest.mark.skipif(bool(torch.version.cuda), reason="a CUDA build of torch needs no stub, and so no compiler")
def test_without_a_compiler_it_says_so_and_exits_with_3():
    done = run("-m", "bench.step_bytes", PATH="")
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stderr.startswith("cannot pretend a GPU:") and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "args, message",
    [
        (("--preset", "nonsense"), "invalid choice"),
        (("--top", "-1"), "must not be negative"),
        (("--path", "reference", "--fold"), "expected kernels or both"),
    ],
)
def test_bad_arguments(args, message):
    done = run("-m", "bench.step_bytes", *args)
    assert done.returncode == 2 and message in done.stderr
