"""The profiler's command: its phases and ranges are where they should be, and its tables and files are written."""

import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import profile_step as P
from bench.trace import trace_step
from pgolf.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Marks are the time; whoever works lets it pass."""

    now = 0.0

    def mark(self):
        return self.now

    def wait(self):
        pass

    def ms(self, begin, end):
        return end - begin


class Part:
    """Stands in for a part of the trainer: each method takes some milliseconds."""

    def __init__(self, clock, log, **methods):
        def method(name, ms):
            def call(*args):
                log.append(name)
                clock.now += ms

            return call

        for name, ms in methods.items():
            setattr(self, name, method(name, ms))


class Steps:
    """A trainer whose step calls its parts in the real order, and 1 ms of nobody's."""

    def __init__(self, cast=True):
        self.clock, self.log = Clock(), []
        make = lambda **methods: Part(self.clock, self.log, **methods)
        self.trainer = make(compute_loss=20.0)
        self.trainer.cast = make(refresh_=2.0, collect_=3.0) if cast else None
        self.trainer.dist = make(synchronize=0.0)
        self.trainer.optim = make(set=0.0, reduce_=5.0, step=7.0)
        self.trainer.averager = make(update=8.0)

    def call(self):
        t, self.clock.now = self.trainer, self.clock.now + 1.0
        if t.cast:
            t.cast.refresh_()
        t.compute_loss(None)
        self.clock.now += 40.0  # loss.backward()
        if t.cast:
            t.cast.collect_()
        t.optim.set(1.0, 0.9)
        t.optim.reduce_(None, 0)
        t.optim.step()
        t.averager.update(1, 1.0)


def test_phases_end_where_the_next_begins():
    steps = Steps()
    before = vars(steps.trainer).copy()
    found = P.phase_times(steps, 3, steps.clock)
    want = {"cast": 5, "forward": 20, "backward": 40, "reduce": 5, "optimizer": 7, "averaging": 8, "rest": 1}
    assert found == {name: pytest.approx(ms) for name, ms in want.items()} and list(found) == [*P.PHASES, P.REST]
    assert vars(steps.trainer) == before  # nothing stays wrapped


def test_without_a_cast_there_is_no_such_phase():
    steps = Steps(cast=False)
    found = P.phase_times(steps, 1, steps.clock)
    assert found["cast"] == 0 and found["backward"] == 40 and sum(found.values()) == 81


def test_phases_of_the_real_step_are_the_same():
    """The trainer calls its parts in the order that the stand-in above assumes."""
    from dataclasses import replace

    from bench.step import Stepper, share

    cfg = share(PRESETS["smoke"](), "eager")
    cfg = replace(cfg, kernels=replace(cfg.kernels, weight_cast="on"))
    stepper, seen = Stepper(cfg, torch.device("cpu")), []
    phases = P.Phases(lambda name: seen.append(name), lambda opened: None)
    with P.marking(stepper.trainer, phases):
        stepper.call()
        phases.end()
    assert seen == ["cast", "forward", "backward", "cast", "reduce", "optimizer", "averaging"]


def test_ranges_for_nsight(monkeypatch):
    """Ranges nest, close, and lie between the calls that start and stop the profiler."""
    log = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    runtime = SimpleNamespace(
        cudaProfilerStart=lambda: log.append("START"), cudaProfilerStop=lambda: log.append("STOP")
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", log.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: log.append(")"))
    P.nsight(Steps(), 1)
    parts = ("cast", "forward", "backward", "cast", "reduce", "optimizer", "averaging")
    assert log == ["START", "step", *(x for part in parts for x in (part, ")")), ")", "STOP"]


def test_every_op_that_runs_is_in_a_range(kernels_on):
    from pgolf.kernels import _op
    from pgolf.kernels.residual import residual

    log = []

    @contextmanager
    def watch(name):
        log.append(name)
        yield
        log.append(")")

    def work(x):
        return residual([x, x], [None, None])[1].sum()

    x = torch.randn(2, 8, requires_grad=True)
    with _op.watching(watch):
        work(x).backward()
        torch.compile(work, backend="aot_eager", fullgraph=True)(x).backward()
    assert log == 2 * ["residual", ")", "residual_bwd", ")"]
    work(x).backward()
    assert len(log) == 8  # outside nothing is watched


def event(key, ms, device="CPU", count=2, own=None):
    return SimpleNamespace(
        key=key, count=count, self_cpu_time_total=1e3 * ms, self_device_time_total=1e3 * (ms if own is None else own),
        device_type=f"DeviceType.{device}",
    )  # fmt: skip


def test_rows_are_kernels_on_a_gpu_and_operators_on_a_cpu():
    """A kernel's time is also its operator's, and a range's: it is counted once."""
    events = [
        event("aten::mm", 9.0, own=30.0), event("nvjet_tst", 30.0, "CUDA"), event("forward", 40.0, "CUDA"),
        event("_residual_fwd_kernel", 10.0, "CUDA", count=48), event("step", 1.0),
    ]  # fmt: skip
    gpu = P.rows_of(events, 2, cuda=True)
    assert [(r.name, r.calls, r.ms, r.share) for r in gpu] == [
        ("nvjet_tst", 1, 15.0, 0.75), ("_residual_fwd_kernel", 24, 5.0, 0.25),
    ]  # fmt: skip
    assert [(r.name, r.ms, r.share) for r in P.rows_of(events, 2, cuda=False)] == [("aten::mm", 4.5, 1.0)]


def test_command_on_a_cpu(tmp_path, capsys):
    trace, figures = tmp_path / "t.json", tmp_path / "f.json"
    args = ["--steps", "2", "--warmup", "1", "--top", "4", "--trace", str(trace), "--json", str(figures)]
    assert P.main(args) == 0
    text = capsys.readouterr().out
    for name in (*P.PHASES, "rest", "= step"):
        assert re.search(rf"^{name} +\d+\.\d{{3}}", text, re.M), name
    assert "smoke, eager: 64 tokens" in text and len(re.findall(r"^ +\d.*%.*  aten::", text, re.M)) >= 3
    found = json.loads(figures.read_text())
    assert list(found["phases"]) == [*P.PHASES, P.REST] and found["phases"]["forward"] > 0 == found["phases"]["cast"]
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["aten::mm"]["calls"] > 10 and not rows.keys() & {"step", *P.PHASES}
    assert sum(row["share"] for row in found["rows"]) == pytest.approx(1)
    ranges = Counter(e.get("name") for e in json.loads(trace.read_text())["traceEvents"] if e.get("ph") == "X")
    assert ranges["step"] == ranges["forward"] == ranges["backward"] == ranges["averaging"] == 2


@pytest.mark.parametrize(
    "args, message",
    [
        (("--preset", "rat_rod_red"), "--preset: invalid choice"),
        (("--path", "warp"), "--path: invalid choice"),
        (("--steps", "0"), "--steps: got 0, expected at least 1"),
        (("--warmup", "0"), "--warmup: got 0, expected at least 1"),
        (("--world-size", "-1"), "--world-size: got -1"),
        (("--trace", "/no/such/folder/t.json"), "expected a file in a folder that exists"),
        (("--nsight", "--json", "x.json"), "expected it alone"),
        (("--nsight",), "got a machine without a CUDA device"),
        (("--path", "compile+kernels"), "got compile+kernels without a CUDA device, expected eager or compile"),
    ],
)
def test_bad_arguments(args, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        P.main(list(args))
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_needs_no_torch():
    code = "import sys, bench.profile_step as p; p.parser().format_help(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n", done.stderr


def test_page_finds_every_kernel_of_a_step():
    """docs/profiling.md: each launch of a step is found by one expression, and there are as many as it says."""
    table = re.findall(r"^\| [^|]+ \| `regex:(.*?)` \| ([^|]+) \|", (ROOT / "docs/profiling.md").read_text(), re.M)
    events = trace_step(PRESETS["rat_rod_green"](), 90)
    source = "".join(path.read_text() for path in ROOT.glob("kernels/*.py"))
    kernels = Counter(e.name for e in events if f"def _{e.name}_kernel(" in source)
    assert len(kernels) > 12
    for expression, counts in table:
        mine = [name for name in kernels if re.search(expression.replace("\\|", "|"), f"_{name}_kernel")]
        said = sum(int(n) for n in re.findall(r"\d+", counts.split(";")[0]))
        assert sum(kernels.pop(name) for name in mine) == said, expression
    assert not kernels, f"docs/profiling.md has no expression for {sorted(kernels)}"
