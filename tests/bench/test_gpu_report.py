"""The report of a GPU: parts and their jobs, whatever becomes of them. On a CPU, at the smallest sizes."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import TOY

pytest.importorskip("triton", reason="triton is not installed: nothing to tune")

from bench import gpu_parts, gpu_report
from bench.cases.case import PRODUCTION
from bench.providers import Failure
from bench.timing import Timing

# -- jobs that do as they are told -----------------------------------------------------------------------------------

JOB = """
import json, os, signal, subprocess, sys, time
part, job, out = sys.argv[1:]
def emit(**message):
    with open(out + "/messages.jsonl", "a") as file:
        file.write(json.dumps(message) + "\\n")
emit(facts={"card": {"name": "G" + part}, "roofs": {"copy": 1.0}})
if part != "card":
    emit(row={"job": job})
print("begun", part, job)
if job == "crash":
    raise RuntimeError("the device is lost")
if job == "hang":
    subprocess.Popen(["sleep", "60"])
    time.sleep(60)
if job == "no_gpu":
    print("needs a GPU")
    sys.exit(3)
if job == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if job == "stop":
    assert json.load(open(out + "/report.json"))["parts"][part]["status"] == "running"
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
"""


@pytest.fixture
def jobs(monkeypatch, tmp_path):
    """jobs(part=[...]) says which jobs a part has; the others have one that works."""
    script, told = tmp_path / "job.py", {}
    script.write_text(JOB)
    command = lambda part, job, device, size, out, seconds: [sys.executable, str(script), part, job, str(out)]
    monkeypatch.setattr(gpu_report, "command_of", command)
    monkeypatch.setattr(gpu_parts, "jobs_of", lambda part, size: told.get(part, ["good"]))
    return told.update


def report(tmp_path, *args):
    code = gpu_report.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--size", "small", *args])
    return code, json.loads((tmp_path / "out" / "report.json").read_text())


def test_all_parts_are_done(jobs, tmp_path, capsys):
    code, found = report(tmp_path)
    assert code == 0 and {part: e["status"] for part, e in found["parts"].items()} == dict.fromkeys(
        gpu_report.PARTS, "done"
    )
    assert found["kernels"] == [{"job": "good"}] and found["schema"] == 1 and found["size"] == "small"
    assert found["card"] == {"name": "Gcard"} and found["roofs"] == {"copy": 1.0}
    assert found["parts"]["steps"]["jobs"]["good"]["card"] == {"name": "Gsteps"}
    assert "begun steps good" in (tmp_path / "out" / "steps.log").read_text()
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.suffix != ".log") == ["report.json"]


def test_a_failing_job_takes_nothing_with_it(jobs, tmp_path):
    jobs(attention=["crash", "good"], steps=["killed"], tune=["no_gpu"])
    code, found = report(tmp_path)
    parts = found["parts"]
    assert code == 1 and parts["attention"]["status"] == "failed" == parts["steps"]["status"]
    assert parts["attention"]["reason"] == "crash: RuntimeError: the device is lost"
    assert found["attention"] == [{"job": "crash"}, {"job": "good"}]  # what came before is kept
    assert parts["attention"]["jobs"]["good"]["status"] == "done"
    assert "killed by signal 9" in parts["steps"]["reason"]
    assert parts["kernels"]["status"] == "done"
    assert parts["tune"]["status"] == "not run" and parts["tune"]["reason"] == "no_gpu: needs a GPU"


@pytest.mark.alone
def test_time_is_shared_out(jobs, tmp_path):
    """A job that hangs is ended, its part's further jobs are not begun, and the next part has its time."""
    jobs(attention=["hang", "good"])
    code, found = report(tmp_path, "--only", "attention,steps", "--minutes", "0.1")
    parts = found["parts"]
    assert code == 1 and parts["steps"]["status"] == "done"
    assert parts["attention"]["reason"] == "hang: out of time after 2 s; good: not begun, out of time"
    assert found["attention"] == [{"job": "hang"}] and 1 < parts["attention"]["seconds"] < 4
    assert parts["kernels"] == {"jobs": {}, "status": "not run", "reason": "not asked for", "seconds": 0.0}


def test_sigterm_leaves_a_whole_report(jobs, tmp_path):
    jobs(attention=["good", "stop"])
    code, found = report(tmp_path, "--only", "card,attention,steps")
    parts = found["parts"]
    assert code == 143 and parts["card"]["status"] == "done"
    assert parts["attention"]["status"] == "failed" and parts["attention"]["reason"] == "stopped by SIGTERM"
    assert found["attention"] == [{"job": "good"}, {"job": "stop"}]
    assert parts["steps"]["reason"] == "stopped by SIGTERM before"


def test_parts_that_are_not_asked_for_stay(jobs, tmp_path):
    report(tmp_path, "--only", "attention,steps")
    jobs(steps=["other"])
    _, found = report(tmp_path, "--only", "steps")
    assert found["steps"] == [{"job": "other"}] and found["attention"] == [{"job": "good"}]
    assert found["parts"]["attention"]["status"] == "done"


@pytest.mark.parametrize("text", ['{"schema": 1, "device": "cuda", "size": "small"}', "{", "[]"])
def test_a_report_of_another_kind_is_left_alone(jobs, tmp_path, text, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.json").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        report(tmp_path)
    assert stopped.value.code == 2 and "give another --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "report.json").read_text() == text


def test_half_a_message_waits(tmp_path):
    reader = gpu_report.Reader(tmp_path / "m")
    assert reader.new() == []
    (tmp_path / "m").write_text('{"a": 1}\n{"b"')
    assert reader.new() == [{"a": 1}]
    with (tmp_path / "m").open("a") as file:
        file.write(": 2}\n")
    assert reader.new() == [{"b": 2}] and reader.new() == []


# -- the real jobs ---------------------------------------------------------------------------------------------------


def run_part(tmp_path, part, job):
    options = ["--out", str(tmp_path), "--device", "cpu", "--size", "small"]
    code = gpu_parts.main([part, job, *options])
    messages = [json.loads(line) for line in (tmp_path / "messages.jsonl").read_text().splitlines()]
    facts = {key: value for m in messages for key, value in m.get("facts", {}).items()}
    return code, [m["row"] for m in messages if "row" in m], facts


def test_card(tmp_path):
    code, rows, facts = run_part(tmp_path, "card", "card")
    assert code == 0 and rows == [] and facts["card"]["device"] == "cpu"
    assert facts["roofs"].keys() == {"copy", "gemm", "gemm_large", "attention"}


def test_attention(tmp_path):
    code, rows, _ = run_part(tmp_path, "attention", "attention")
    assert code == 0 and {r["case"] for r in rows} == {"attention-xsa_bound", "attention-plain"}
    assert {r["mode"] for r in rows} == {"forward", "backward", "both"} and {r["provider"] for r in rows} == {"eager"}
    assert all(r["ms"] > 0 and r["p20"] <= r["ms"] <= r["p80"] and r["percent_of_roof"] > 0 for r in rows)


def test_steps(tmp_path):
    code, rows, _ = run_part(tmp_path, "steps", "smoke")
    assert code == 0 and [(r["preset"], r["variant"], r["optimizer"]) for r in rows] == [
        ("smoke", "eager", True), ("smoke", "eager", False)
    ]  # fmt: skip
    assert all(r["ms"] > 0 and r["tokens_per_s"] > 0 for r in rows)


def test_checks_without_pytest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_parts.importlib.util, "find_spec", lambda name: None)
    assert gpu_parts.jobs_of("tests", "production") == ["checks"]
    code, rows, facts = run_part(tmp_path, "tests", "checks")
    assert code == 0 and "pytest is not installed" in facts["note"] and all(r["passed"] == r["tests"] > 0 for r in rows)
    wrong = replace(TOY, fn=lambda x, w: (x + w, x.sum(-1)))
    monkeypatch.setattr("bench.cases.CASES", [wrong])
    code, rows, _ = run_part(tmp_path, "tests", "checks")
    assert code == 1 and rows[-1]["passed"] == 0 and "error" in rows[-1]["failures"][0]["message"]


def test_tests_through_pytest(tmp_path, monkeypatch, capsys):
    (tmp_path / "test_x.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\ndef test_c(): pytest.skip('no')\n"
        "@pytest.fixture\ndef broken(): raise ValueError('setup')\ndef test_d(broken): pass\n"
    )
    monkeypatch.setattr(gpu_parts, "ROOT", tmp_path)
    code, rows, _ = run_part(tmp_path, "tests", "test_x.py")
    (row,) = rows
    assert code == 1 and (row["tests"], row["passed"], row["skipped"]) == (4, 1, 1)
    assert [f["test"] for f in row["failures"]] == ["test_x.test_b", "test_x.test_d"]
    assert "1 == 2" in row["failures"][0]["message"]
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 4 failed, first test_x.test_b"
    (tmp_path / "test_x.py").write_text("import os\nos._exit(9)\n")
    assert run_part(tmp_path, "tests", "test_x.py")[0] == 1
    assert "pytest ended with 9 and no result" in capsys.readouterr().out


def test_tuning_needs_a_gpu(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_part(tmp_path, "tune", "residual")
    assert stopped.value.code == 3 and "needs a GPU" in capsys.readouterr().out


def test_tuning_adds_to_the_proposal(tmp_path, monkeypatch):
    """Each op's winners are added to what the ops before it left."""
    from bench import launch_table, search, tune
    from pgolf.kernels._tuned import TABLE, Launch

    def run(cases, device, minutes):
        kernel = {"residual": "residual_fwd", "int6": "int6_cast"}[cases[0].op]
        target = search.Target(kernel, (90, "D512"), TABLE[kernel][80, "*"], ((cases[0], "forward"),))
        return [search.Outcome(target, Launch(4, 1, dict.fromkeys(target.launch.blocks, 2)), (2.0, 1.0))]

    monkeypatch.setattr(tune, "unusable", lambda device: "")
    monkeypatch.setattr(tune, "run", run)
    for op in ("residual", "int6"):
        code, rows, _ = run_part(tmp_path, "tune", op)
    assert code == 0 and [r["won"] for r in rows] == [True, True]
    found = launch_table.parse((tmp_path / "_tuned.py").read_text())
    assert found["residual_fwd"][90, "D512"].num_warps == found["int6_cast"][90, "D512"].num_warps == 4


def test_a_time_that_cannot_be_is_none():
    t = Timing(1.0, 0.9, 1.1, 3, 1, 0.1, (1.0,) * 3)
    roofs = {"copy": 1e9, "gemm": 1e12, "attention": 1e12}
    case = replace(TOY, sizes={PRODUCTION: {"n": 50_000}})
    row = gpu_parts.timed_row(case, PRODUCTION, "forward", "pgolf", t, roofs)
    assert row["ms"] == 1.0 and row["bytes"] == 600_000 and row["percent_of_roof"] == 60.0
    fast = gpu_parts.timed_row(case, PRODUCTION, "forward", "pgolf", replace(t, median=0.1), roofs)
    assert "work is skipped" in fast["failed"] and "ms" not in fast
    failed = gpu_parts.timed_row(case, PRODUCTION, "forward", "pgolf", Failure("Error: x", ""), roofs)
    assert failed == {"case": "toy-toy", "mode": "forward", "provider": "pgolf", "failed": "Error: x"}


def test_a_step_that_cannot_be_is_none():
    t = Timing(50.0, 49.0, 51.0, 3, 1, 0.1, (50.0,) * 3)
    measured = SimpleNamespace(timing=t, facts=lambda flops, peak: {"mfu": flops / peak})
    row = gpu_parts.step_row(measured, 98.94e12, "h100", allowed=30.0)
    assert row["ms"] == 50.0 and row["mfu"] == pytest.approx(0.1)
    assert "work is skipped" in gpu_parts.step_row(measured, 1.0, "h100", allowed=130.0)["failed"]
    assert gpu_parts.step_row(Failure("OutOfMemoryError: x", ""), 1.0, None, 1.0) == {"failed": "OutOfMemoryError: x"}


def test_pgolf_failing_fails_the_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("bench.providers.available", lambda case, device: ["pgolf", "torch.compile"])
    monkeypatch.setattr("bench.providers.measure", lambda case, names, size, **o: {
        ("forward", name): Failure("AssertionError: wrong", "") for name in names})  # fmt: skip
    code, rows, _ = run_part(tmp_path, "kernels", "residual")
    assert code == 1 and all("failed" in r for r in rows) and "AssertionError: wrong" in capsys.readouterr().out


def test_jobs_of_production():
    tests = gpu_parts.jobs_of("tests", "production")
    assert tests[0] == "tests/kernels/test_cases.py" and tests[-1] == "tests/test_kernels_in_model.py"
    assert all((gpu_parts.ROOT / name).exists() for name in tests)
    from bench.cases import CASES

    assert set(gpu_parts.jobs_of("kernels", "production")) == {case.op for case in CASES}
    assert gpu_parts.jobs_of("steps", "production")[0] == "rat_rod_green"
    assert set(gpu_parts.PARTS) == set(gpu_report.PARTS)


# -- the command -----------------------------------------------------------------------------------------------------


def test_command_line(root, tmp_path):
    args = ["--out", str(tmp_path), "--device", "cpu", "--size", "small", "--only", "kernels"]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu_report", *args], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "report.json").read_text())
    assert len(found["kernels"]) > 10 and "kernels done" in done.stdout


@pytest.mark.parametrize(
    "args, message",
    [(["--only", "card,cake"], "got 'cake', expected some of card"), (["--minutes", "0"], "expected more than 0"),
     (["--device", "cpu"], "expected cuda, or cpu with --size small")],
)  # fmt: skip
def test_bad_arguments(args, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        gpu_report.main(["--out", str(tmp_path), *args])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch, "cuda", SimpleNamespace(is_available=lambda: False))
    assert gpu_report.main(["--out", str(tmp_path)]) == 3 and "needs a GPU" in capsys.readouterr().err
