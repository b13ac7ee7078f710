"""The static gate catches what it is for, and compiles what production launches."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed: nothing to compile")

from bench import static
from bench.cases import CASES
from bench.cases.case import PRODUCTION

HERE = Path(__file__).resolve().parent
GOOD = static.Figures(
    kernel=f"k[{CASES[0].id}]", arch=90, launch="", registers=40, spills=0, shared=1024, wgmma=1, mma=0, tcgen05=0,
    tma=2, wide=4, global_access=4, atomics=0, is_product=True,
)  # fmt: skip


def run(*args):
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=environ, cwd=HERE.parents[1])


def test_bad_kernels_are_refused():
    done = run(str(HERE / "bad_kernels.py"))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {name: static.Figures(**row) for name, row in json.loads(done.stdout.splitlines()[-1]).items()}
    faults = {name: row.faults(allowed_atomics=False) for name, row in rows.items()}
    assert faults["good"] == []
    assert any("spill" in f for f in faults["spills"])
    assert any("atomics" in f for f in faults["scatter"])
    assert any("atomics" in f for f in faults["atomic"]) and not rows["atomic"].faults(allowed_atomics=True)
    assert faults["no_wgmma"] == ["a product without wgmma"]
    assert rows["good"].wide > 0 and rows["good"].registers > 0


@pytest.mark.parametrize("arch, limit", static.SMEM_LIMIT.items())
def test_shared_memory_limit_of_each_arch(arch, limit):
    assert replace(GOOD, arch=arch, shared=limit).faults(False) == []
    assert len(replace(GOOD, arch=arch, shared=limit + 1).faults(False)) == 1


def test_worse_than_committed_is_a_fault(monkeypatch):
    saved = {"sm_90 " + GOOD.kernel: {"registers": 40, "shared": 1024, "spills": 0, "atomics": 0}}
    monkeypatch.setattr(static, "committed", lambda: saved)
    assert static.problems(GOOD) == []
    assert static.problems(replace(GOOD, registers=41)) == ["registers 41, committed 40"]
    assert static.problems(replace(GOOD, shared=2048)) == ["shared 2048, committed 1024"]
    assert static.problems(replace(GOOD, registers=32)) == []
    assert "not in static.json" in static.problems(replace(GOOD, arch=100))[0]


def test_figures_of_another_triton_are_not_compared(monkeypatch, tmp_path, capsys):
    path = tmp_path / "static.json"
    path.write_text(json.dumps({"triton": "0.0", "kernels": {}}))
    monkeypatch.setattr(static, "COMMITTED", path)
    assert static.problems(GOOD) == []
    assert "not compared" in capsys.readouterr().out


def test_committed_figures_cover_every_production_case():
    """A case without committed figures would fail the gate; a figure without a case is a leftover."""
    of_case = {name.split("[")[1].rstrip("]") for name in static.committed()}
    launching = {c.id for c in CASES if PRODUCTION in c.sizes}
    assert of_case <= launching
    archs = {int(name.split()[0].removeprefix("sm_")) for name in static.committed()}
    assert archs == set(static.ARCHS)
    assert not [name for name, figures in static.committed().items() if figures["spills"]]


def test_command_line(tmp_path):
    done = run("-m", "bench.static", "--arch", "90", "--op", "residual-add", "--json", str(tmp_path / "x.json"))
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((tmp_path / "x.json").read_text())
    assert {r["kernel"].split("[")[0] for r in rows} == {"residual_fwd", "residual_bwd"}
    assert all(r["arch"] == 90 and r["spills"] == 0 for r in rows) and "0 faults" in done.stdout


@pytest.mark.parametrize(
    "args, message", [(("--arch", "70"), "known are 80"), (("--op", "nonsense"), "no case of that name")]
)
def test_bad_arguments(args, message):
    done = run("-m", "bench.static", *args)
    assert done.returncode == 2 and message in done.stderr
