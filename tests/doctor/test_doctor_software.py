"""Versions, torch against the GPU, Triton, attention: each fault gives its row, and a sound machine gives none."""

import re
import sys
from pathlib import Path

import pytest
import torch
from stand_ins import Smi, gpu, machine, no_smi, one

from pgolf import node, runtime
from pgolf.config import load
from pgolf.doctor import software
from pgolf.doctor.rows import FAIL, NONE, OK, WARN, run
from pgolf.errors import SetupError

ROOT = Path(__file__).resolve().parents[2]


def rows(check, m):
    return {r.name: r for r in check(m)}


def test_minima_are_those_of_setup_py():
    text = (ROOT / "setup.py").read_text()
    listed = dict(re.findall(r'"([a-z]+)>=([\d.]+)"', text.split("install_requires")[1].split("]")[0]))
    mine = {name: minimum for name, (minimum, _) in software.REQUIRED.items()} | {"torch": node.TORCH}
    assert len(listed) >= 7 and listed.items() <= mine.items()
    assert f"triton>={software.TRITON}" in text
    assert f'python_requires=">={".".join(map(str, software.PYTHON))}"' in text


def test_this_environment_passes():
    m = machine(version=torch.__version__)
    assert {r.status for check in (software.python, software.packages, software.settings) for r in check(m)} == {OK}


@pytest.mark.parametrize(
    ("version", "expected"),
    [("2.9.0", (2, 9, 0)), ("2.13.0+cpu", (2, 13, 0)), ("2.10.0a0+gitabc", (2, 10, 0)), ("odd", ())],
)
def test_numbers_of_versions(version, expected):
    assert node.release(version) == expected


def test_versions_are_compared_as_numbers():
    assert rows(software.packages, machine(version="2.13.0"))["torch"].status == OK
    old = rows(software.packages, machine(version="2.4.0"))["torch"]
    assert old.status == FAIL and "2.4.0" in old.what and "pip install -U 'torch>=2.9'" in old.fix


def test_missing_old_and_broken_packages(monkeypatch):
    real = node.version_of
    monkeypatch.setattr(node, "version_of", lambda n: {"zstandard": None, "numpy": "1.19.5"}.get(n, real(n)))
    monkeypatch.setitem(sys.modules, "brotli", None)
    found = rows(software.packages, machine())
    assert found["zstandard"].status == FAIL and found["zstandard"].fix == "pip install 'zstandard>=0.22'"
    assert found["numpy"].status == FAIL and "1.19.5" in found["numpy"].what
    assert found["brotli"].status == FAIL and "cannot be imported" in found["brotli"].what
    assert found["sentencepiece"].status == OK


def test_settings_that_make_no_configuration():
    m = machine()
    m.settings_error = "NUM_LAYERS=x must be int"
    assert one(software.settings(m)).status == FAIL


# -- CUDA ------------------------------------------------------------------------------------------------------------


def cuda(**kw):
    return one(software.cuda(machine(**kw)))


def test_cuda_as_it_should_be():
    row = cuda(gpus=[gpu()], smi=Smi())
    assert row.status == OK and "driver 550.54.15" in row.what and "CUDA 12.8" in row.what
    assert "1 GPU visible of 2" in cuda(gpus=[gpu()], smi=Smi([{"driver_version": "1"}] * 2)).what


def test_no_gpu_is_no_fault_unless_asked_for():
    assert cuda(smi=no_smi).status == NONE
    asked = load(["train.device=cuda"], {"PRESET": "cpu"}).config
    assert cuda(config=asked).status == FAIL


def test_torch_without_cuda_on_a_machine_with_gpus():
    row = cuda(smi=Smi(), cuda=None)
    assert row.status == FAIL and "built without CUDA" in row.what and "pip install" in row.fix


def test_driver_too_old_for_torch():
    row = cuda(smi=Smi(), init_error="The NVIDIA driver on your system is too old (found version 11040).\nMore")
    assert row.status == FAIL and "too old (found version 11040)" in row.what


def test_hidden_gpus():
    row = cuda(smi=Smi(), environ={"CUDA_VISIBLE_DEVICES": ""})
    assert row.status == WARN and "CUDA_VISIBLE_DEVICES=''" in row.what


def test_no_torch_at_all():
    m = machine()
    m.torch, m.torch_error = None, "OSError: libcudart.so.12"
    assert rows(software.packages, m)["torch"].what == "OSError: libcudart.so.12"
    assert one(software.cuda(m)).status == NONE and m.gpus == []


# -- architectures ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arches", "capability", "runs"),
    [
        (["sm_80", "sm_90"], (9, 0), True),
        (["sm_80"], (8, 9), True),  # same major, later minor
        (["sm_89"], (8, 6), False),
        (["sm_80", "sm_90"], (12, 0), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_80", "compute_90"], (12, 0), True),  # compiled by the driver
        (["sm_120"], (12, 1), True),
        (["sm_80", "sm_90"], (7, 5), False),
        (["compute_90"], (8, 0), False),
        ([], (9, 0), False),
        (["gfx942"], (9, 0), False),
    ],
)
def test_which_code_runs_on_which_gpu(arches, capability, runs):
    assert runtime.runs_on(arches, capability) is runs


def test_a_run_stops_at_start_on_a_gpu_that_torch_has_no_code_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA GeForce RTX 5090")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "sm_90"])
    with pytest.raises(SetupError, match=r"RTX 5090 \(sm_120\).* only sm_80 sm_90\n.*pgolf doctor"):
        runtime.choose(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_80", "compute_90"])
    assert runtime.choose(torch.device("cuda")).dtype.value == "bf16"
    runtime.check_arch(torch.device("cpu"))


def arch_row(capability, arches):
    return one(software.architectures(machine([gpu(capability=capability)], arches=arches)))


def test_gpu_newer_than_the_wheel():
    row = arch_row((12, 0), ["sm_80", "sm_90"])
    assert row.status == FAIL and "sm_120" in row.what and "sm_80 sm_90" in row.what and row.fix.endswith("/cu128")


def test_gpu_older_than_the_wheel():
    row = arch_row((6, 1), ["sm_75", "sm_80"])
    assert row.status == FAIL and "sm_61" in row.what and row.fix.endswith("/cu126")


def test_gpu_without_bf16():
    row = arch_row((7, 5), ["sm_75", "sm_80"])
    assert row.status == WARN and "no bf16" in row.what


def test_sound_gpus_each_have_a_row():
    found = list(software.architectures(machine([gpu(0), gpu(1)])))
    assert [(r.name, r.status) for r in found] == [("gpu 0", OK), ("gpu 1", OK)] and "80 GiB" in found[0].what
    assert one(software.architectures(machine())).status == NONE


# -- Triton, attention, a kernel -------------------------------------------------------------------------------------


@pytest.fixture
def versions(monkeypatch):
    """Sets versions of distributions; None = not installed."""
    real, said = node.version_of, {}
    monkeypatch.setattr(node, "version_of", lambda name: said.get(name, real(name)))
    return said


def test_triton_without_gpu_is_not_needed(versions):
    assert one(software.triton(machine())).status == NONE
    versions["triton"] = None
    assert one(software.triton(machine())).status == NONE


def test_triton_faults_on_a_gpu(versions, monkeypatch, tmp_path):
    m = machine([gpu()], environ={"CC": str(tmp_path / "missing-cc")})
    versions["triton"] = "3.6.0"
    row = one(software.triton(m))
    assert row.status == FAIL and "no C compiler" in row.what
    m.environ = {"CC": sys.executable}  # something that can be run
    monkeypatch.setattr(software, "python_header", lambda: tmp_path / "Python.h")
    row = one(software.triton(m))
    assert row.status == FAIL and "headers are missing" in row.what and "-dev" in row.fix
    versions["triton"] = "3.1.0"
    assert "expected 3.5" in one(software.triton(m)).what
    versions["triton"] = None
    row = one(software.triton(m))
    assert row.status == WARN and "pip install" in row.fix


def test_triton_without_an_active_driver_is_a_row(versions, monkeypatch, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("a driver is here")
    pytest.importorskip("triton")
    (tmp_path / "Python.h").write_text("")
    monkeypatch.setattr(software, "python_header", lambda: tmp_path / "Python.h")
    row = one(run({"triton": software.triton}, machine([gpu()], environ={"CC": sys.executable})))
    assert row.status == WARN and "could not be checked" in row.what and "driver" in row.what


@pytest.fixture
def hopper(monkeypatch, tmp_path):
    """A machine with an H100 for the code that asks the real torch; and a folder for modules."""
    from pgolf.kernels import _attention_peers

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    _attention_peers.fa3_installed.cache_clear()
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("flash_attn_interface", None)
    _attention_peers.fa3_installed.cache_clear()


def flash_rows():
    return rows(software.attention, machine([gpu()]))


def test_flash_attention_missing(hopper):
    found = flash_rows()
    assert found["attention"].status == OK and "flash_attn_interface is not installed" in found["attention"].what
    row = found["flash-attn-3"]
    assert row.status == WARN and row.fix.startswith("pip install flash-attn-3 --index-url https://")
    assert row.fix.endswith("/cu126")
    newer = rows(software.attention, machine([gpu()], cuda="13.0"))["flash-attn-3"]
    assert newer.fix.endswith("/cu130")


def test_flash_attention_there(hopper):
    (hopper / "flash_attn_interface.py").write_text("")
    found = flash_rows()
    assert found["attention"].what.startswith("fa3 on sm_90") and found["flash-attn-3"].status == OK


def test_flash_attention_of_another_torch(hopper):
    (hopper / "flash_attn_interface.py").write_text("raise ImportError('_C.abi3.so: undefined symbol: _ZN3c10')")
    row = flash_rows()["flash-attn-3"]
    assert row.status == FAIL and "undefined symbol" in row.what and "kernels.attention=cudnn" in row.fix


def test_flash_attention_of_another_layout(hopper):
    (hopper / "flash_attn_3").mkdir()
    (hopper / "flash_attn_3" / "__init__.py").write_text("")
    assert "flash_attn_3 is there, without the module" in flash_rows()["flash-attn-3"].what


def test_attention_without_hopper_or_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    found = rows(software.attention, machine([gpu(capability=(8, 9))]))
    assert found["flash-attn-3"].status == NONE and found["attention"].status == OK
    assert {r.status for r in software.attention(machine())} == {NONE}


def test_a_kernel_is_run_and_compared(monkeypatch):
    from pgolf.kernels import cross_entropy as module

    assert software.try_kernel("cpu").status == OK
    assert one(software.kernel(machine())).status == NONE
    monkeypatch.setattr(module, "cross_entropy", lambda x, t, cap: (torch.zeros(256), None))
    wrong = software.try_kernel("cpu")
    assert wrong.status == FAIL and "off its reference" in wrong.what

    def no_compiler(*a, **k):
        raise RuntimeError("Failed to find C compiler.\nmore")

    monkeypatch.setattr(module, "cross_entropy", no_compiler)
    broken = software.try_kernel("cpu")
    assert broken.status == FAIL and broken.what.endswith("RuntimeError: Failed to find C compiler.")
