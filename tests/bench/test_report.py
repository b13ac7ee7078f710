"""The page of results, from made-up reports: no number here was measured."""

import json
import struct
import subprocess
import sys

import pytest

from bench import gpus, ledger, plots, report

CARD = {"name": "NVIDIA H100 80GB HBM3", "commit": "abc1234", "date": "2000-01-01T00:00:00Z", "power_limit_w": 700.0}
ROOFS = {"copy": 2.9e12, "gemm": 6.2e14, "gemm_large": 7.5e14, "attention": 4.3e14}


def timed(ms, **what):
    return {**what, "ms": ms, "p20": 0.9 * ms, "p80": 1.1 * ms}


def kernel(case, mode, provider, ms, **what):
    rates = {"gb_per_s": 2000.0, "percent_of_roof": 69.0} | what
    return timed(ms, case=case, mode=mode, provider=provider, **rates)


def step(variant, optimizer, ms):
    facts = {"tokens_per_s": 98304e3 / ms, "mfu": 0.38, "peak_bytes": 31.5e9, "compile_s": 40.0}
    return timed(ms, preset="smoke", variant=variant, optimizer=optimizer, **facts)


def made_up(**changes):
    done = {"status": "done", "reason": "", "seconds": 1.0, "jobs": {}}
    parts = {"card": done, "kernels": {**done, "status": "failed", "reason": "mlp: out of time after 60 s"}}
    attention = [kernel("attention-plain", "both", name, ms, tflop_per_s=400.0)
                 for name, ms in (("pgolf", 1.25), ("pgolf:triton", 1.5), ("torch.compile", 2.5))]  # fmt: skip
    kernels = [kernel("residual-mix", mode, name, ms) for mode in ("both", "forward")
               for name, ms in (("pgolf", 0.25), ("torch.compile", 0.75))]  # fmt: skip
    kernels.append({"case": "residual-mix", "mode": "both", "provider": "eager", "failed": "OutOfMemoryError: x"})
    steps = [step("compile", True, 80.0), step("compile", False, 75.0), step("compile+kernels", True, 62.5)]
    steps.append({"preset": "smoke", "variant": "eager", "optimizer": True, "failed": "OutOfMemoryError: x"})
    tests = [{"file": "tests/kernels/test_x.py", "tests": 9, "passed": 7, "skipped": 1, "failures": [{"test": "a"}]}]
    row = {"kernel": "residual_fwd", "class": "D512", "committed": "w8 s1 BLOCK_T=8", "won": True, "ms": [0.5, 0.25]}
    tune = [row | {"best": "w4 s1 BLOCK_T=4"}, row | {"best": "w8 s1 BLOCK_T=8", "won": False, "ms": None}]
    tables = {"attention": attention, "kernels": kernels, "steps": steps, "tests": tests, "tune": tune}
    head = {"schema": 1, "device": "cuda", "size": "production", "card": CARD, "roofs": ROOFS, "parts": parts}
    return head | tables | changes


def write(folder, name="h100-20000101-abc1234.json", text=None, **changes):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(made_up(**changes)) if text is None else text)
    return folder / name


def line_of(page, start):
    return next(line for line in page.splitlines() if line.startswith(f"| {start} |"))


def test_page_has_every_table(tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "draw", lambda result, folder: ["x.png"])
    assert report.main([str(write(tmp_path / "in")), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "README.md").read_text()
    assert "## NVIDIA H100 80GB HBM3, commit abc1234" in page and "power limit 700 W" in page and "a trial" not in page
    assert "- kernels: failed, mlp: out of time after 60 s" in page and "card: done" not in page
    assert "copy 2900 GB/s, gemm 620 TFLOP/s" in page and "![x.png](x.png)" in page
    head = "| case | pgolf, ms | torch.compile, ms | eager, ms | GB/s | TFLOP/s | % of roof |"
    assert head in page
    assert line_of(page, "residual-mix both") == (
        "| residual-mix both | 0.25 (0.225 to 0.275) | 0.75 (0.675 to 0.825) | failed | 2000 | - | 69 |"
    )
    assert line_of(page, "residual-mix forward").count(" - ") == 2  # eager was not tried, no FLOPs
    assert "1.5 (1.35 to 1.65) | 2.5" in line_of(page, "attention-plain both")
    assert line_of(page, "smoke compile") == (
        "| smoke compile | 80 (72 to 88) | 75 (67.5 to 82.5) | 1,228,800 | 38.0 | 31.5 | 40 |"
    )
    assert line_of(page, "smoke eager") == "| smoke eager | failed | - | failed | failed | failed | failed |"
    assert line_of(page, "tests/kernels/test_x.py") == "| tests/kernels/test_x.py | 7 | 1 | 1 |"
    assert "1 of 2 rows of the launch table were beaten" in page
    assert line_of(page, "residual_fwd D512").endswith("| w8 s1 BLOCK_T=8 | w4 s1 BLOCK_T=4 | 0.5 | 0.25 |")


def test_nothing_measured_yet(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "README.md").write_text("no result")
    assert report.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["README.md"]
    assert "Not measured yet." in (tmp_path / "out" / "README.md").read_text()


def test_committed_page_is_current(root, tmp_path):
    """Regenerate with: python -m bench.report"""
    report.main(["--out", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == (root / "docs" / "measured" / "README.md").read_text()


def test_trials_are_marked(tmp_path):
    (result,) = report.load([write(tmp_path, size="small")])
    assert "a trial, no measurement" in report.page([result], {})


@pytest.mark.parametrize(
    "text, message",
    [("{", "Expecting property name"), ("[]", "got schema 'list', expected 1"), ('{"schema": 7}', "got schema 7"),
     ('{"schema": 1, "device": "cuda"}', "size is None, expected str")],
)  # fmt: skip
def test_damaged_files_are_one_clear_error(tmp_path, capsys, text, message):
    write(tmp_path / "in", "a.json")
    write(tmp_path / "in", "b.json", text)
    assert_refused(tmp_path, capsys, message, "b.json")


@pytest.mark.parametrize(
    "changes, message",
    [({"kernels": [{"case": "x", "mode": "both"}]}, "kernels[0]: provider is None, expected str"),
     ({"kernels": [kernel("x", "both", "pgolf", 1.0) | {"ms": "1.0"}]}, "kernels[0]: ms is '1.0', expected a number"),
     ({"kernels": [kernel("x", "sideways", "pgolf", 1.0)]}, "mode is 'sideways', expected one of forward"),
     ({"steps": [step("compile", True, 1.0) | {"mfu": "x"}]}, "steps[0]: mfu is 'x', expected a number"),
     ({"steps": [step("compile", 1, 1.0)]}, "optimizer is 1, expected bool"),
     ({"attention": {}}, "attention is dict, expected a list"), ({"tests": [3]}, "tests[0] is int"),
     ({"card": []}, "card is list"), ({"parts": {"card": {"status": "done"}}}, "part card: reason is None"),
     ({"tune": [{"kernel": "k", "class": "c", "committed": "a", "best": "b", "won": True}]}, "expected two numbers")],
)  # fmt: skip
def test_damaged_rows_are_one_clear_error(tmp_path, capsys, changes, message):
    write(tmp_path / "in", **changes)
    assert_refused(tmp_path, capsys, message, "h100-20000101-abc1234.json")


def assert_refused(tmp_path, capsys, message, name):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path / "in"), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and message in said and name in said
    assert not (tmp_path / "out").exists()


def test_missing_file(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path / "nothing.json")])
    assert stopped.value.code == 2 and "no such file" in capsys.readouterr().err


# -- plots -----------------------------------------------------------------------------------------------------------


def test_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    file = write(tmp_path / "in")
    report.main([str(file), "--out", str(tmp_path / "out")])
    names = {p.name for p in (tmp_path / "out").glob("*.png")}
    assert names == {f"{file.stem}-{what}.png" for what in ("roofline", "step", "changes")}
    page = (tmp_path / "out" / "README.md").read_text()
    for name in names:
        data = (tmp_path / "out" / name).read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and width > 400 and height > 200 and len(data) > 5000
        assert f"]({name})" in page


def test_no_plot_without_numbers(tmp_path):
    pytest.importorskip("matplotlib")
    failed = [{"case": "x", "mode": "both", "provider": "pgolf", "failed": "y"}]
    (result,) = report.load([write(tmp_path / "in", attention=[], kernels=failed, steps=[])])
    assert plots.draw(result, tmp_path) == [] and not list(tmp_path.glob("*.png"))
    assert "| x both | failed | failed | failed | failed |" in report.page([result], {})


def test_waterfall_adds_up_to_the_ledger(tmp_path):
    (result,) = report.load([write(tmp_path)])
    parts = plots.planned(result, "smoke")
    found = ledger.ledger(preset_of("smoke"), gpus.with_roofs(gpus.GPUS["h100"], result.path))
    phases = ("forward", "backward", "optimizer")
    assert sum(parts.values()) == pytest.approx(found.total("ms", phases))
    assert parts["optimizer"] == pytest.approx(found.total("ms", ("optimizer",))) and parts["residual"] > 0
    (unknown,) = report.load([write(tmp_path, card={"name": "AMD EPYC"})])
    assert plots.planned(unknown, "smoke") == {}


def preset_of(name):
    from pgolf.presets import PRESETS

    return PRESETS[name]()


def test_without_matplotlib_there_are_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.main([str(write(tmp_path / "in")), "--out", str(tmp_path / "out")]) == 0
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["README.md"]
    assert "tables only" in capsys.readouterr().out


def test_help_is_quick(root):
    code = "import sys; from bench import report, tune, gpu_report, gpu_parts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout.strip() == "False", done.stdout + done.stderr
