"""The fingerprint of a node: quick, whole, stable, and honest about what it does not know."""

import json
import os
import subprocess
import sys
import time

import pytest
import torch
from stand_ins import H100, UUID, Smi, fake_torch, gpu, no_smi

from pgolf import node


@pytest.fixture
def h100(monkeypatch):
    monkeypatch.setattr(node, "nvidia_smi", Smi([H100, H100]))
    return fake_torch([gpu(0), gpu(1)])


@pytest.mark.alone
def test_real_machine_is_quick_and_json():
    best, here = 9.0, {}
    for _ in range(3):
        began = time.perf_counter()
        here = node.fingerprint(torch=torch)
        best = min(best, time.perf_counter() - began)
    assert best < 0.3
    assert json.loads(json.dumps(here)) == here
    assert here["versions"]["torch"] == torch.__version__ and here["host"]["cores"] >= 1
    assert here["host"]["cpu"] and len(here["digest"]) == 64


def test_gpu_facts(h100):
    here = node.fingerprint(torch=h100)
    want = {"name": "NVIDIA H100 80GB HBM3", "capability": "9.0", "sms": 132, "memory_gib": 80.0,
            "clock_max_mhz": 1980.0, "memory_clock_max_mhz": 2619.0, "power_limit_w": 700.0}  # fmt: skip
    assert here["gpus"] == [want, want] and here["driver"] == "550.54.15"
    assert here["versions"]["cuda"] == "12.8" and here["versions"]["cudnn"] == "91002"
    assert here["now"]["clock_mhz"] == [345.0, 345.0]


def test_visible_gpus_are_matched_by_name_not_by_place(monkeypatch):
    """CUDA_VISIBLE_DEVICES=1: torch's device 0 is the driver's second."""
    monkeypatch.setattr(node, "nvidia_smi", Smi([H100, {**H100, "power.limit": "350.00"}]))
    assert node.fingerprint(torch=fake_torch([gpu(1)]))["gpus"][0]["power_limit_w"] == 350.0


def test_without_nvidia_smi_gpus_are_still_there(monkeypatch):
    monkeypatch.setattr(node, "nvidia_smi", no_smi)
    (found,) = node.fingerprint(torch=fake_torch([gpu()]))["gpus"]
    assert found["name"].startswith("NVIDIA H100") and found["power_limit_w"] is None


def test_a_driver_that_raises_and_no_torch(monkeypatch):
    def broken():
        raise RuntimeError("driver")

    ill = fake_torch([gpu()])
    ill.cuda.is_available = broken
    assert node.fingerprint(torch=ill)["gpus"] == []
    monkeypatch.setattr(node, "import_torch", lambda: None)
    assert node.fingerprint()["versions"]["torch"] is None


def test_a_field_that_the_driver_does_not_know_costs_only_itself():
    smi = Smi([{k: v for k, v in H100.items() if k != "power.limit"}] * 2)
    rows = node.smi_gpus(node.GPU_FIELDS, smi)
    assert [r["uuid"] for r in rows] == [f"GPU-{UUID.format(i)}" for i in (0, 1)]
    assert all("power_limit_w" not in r and r["clock_max_mhz"] == "1980" for r in rows)


def test_no_nvidia_smi_is_asked_twice_at_most():
    asked = []
    assert node.smi_gpus(node.GPU_FIELDS, lambda *a: asked.append(a)) == []
    assert len(asked) <= 2


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda f: f.update(driver="570.1"), False),
        (lambda f: f["gpus"][1].update(power_limit_w=350.0), False),
        (lambda f: f["host"].update(cores=4), False),
        (lambda f: f["versions"].update(triton="3.7.0"), False),
        (lambda f: f.update(git={"commit": "0", "dirty": True}), True),
        (lambda f: f["now"].update(clock_mhz=[1980.0, 1980.0], load=9.0), True),
    ],
)
def test_digest_covers_what_speed_depends_on(h100, change, same):
    here = node.fingerprint(torch=h100)
    other = json.loads(json.dumps(here))
    change(other)
    assert (node.digest(other) == here["digest"]) is same


@pytest.mark.alone
def test_output_of_programs_that_fail_hang_or_are_not_there():
    run = lambda code, seconds=20: node.output(sys.executable, "-c", code, seconds=seconds)
    assert run("print(7)") == "7"
    assert run("import sys; print(7); sys.exit(1)") is None
    began = time.monotonic()
    assert run("import time; time.sleep(30)", seconds=0.5) is None and time.monotonic() - began < 5
    assert node.output("no-such-program-here", seconds=1) is None


def test_git(tmp_path):
    if node.output("git", "--version", seconds=5) is None:
        pytest.skip("git is not installed")
    assert node.git(tmp_path) is None
    git = lambda *a: subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *a],
                                    check=True, capture_output=True, text=True).stdout.strip()  # fmt: skip
    git("init")
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "-m", "first")
    (tmp_path / "untracked").write_text("1")
    assert node.git(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert node.git(tmp_path)["dirty"] is True
    inside = tmp_path / "env" / "site-packages"  # an installed pgolf in another project's checkout
    inside.mkdir(parents=True)
    assert node.git(inside) is None


@pytest.fixture
def cgroup(tmp_path):
    """(sys, proc) of a machine of 64 GiB, and a function that writes one of their files."""
    files = {"proc/meminfo": f"MemTotal: {64 << 20} kB\n", "proc/cpuinfo": "model name\t: Fast CPU @ 3 GHz\n"}

    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    for name, text in files.items():
        write(name, text)
    return tmp_path / "sys", tmp_path / "proc", write


def test_limits_of_a_container(cgroup):
    sys_fs, proc, write = cgroup
    plain = node.cores(sys_fs, proc)
    assert plain == len(os.sched_getaffinity(0)) and node.memory_bytes(sys_fs, proc) == 64 << 30
    assert node.cpu_model(proc) == "Fast CPU @ 3 GHz"
    write("sys/cpu.max", "max 100000\n")
    write("sys/memory.max", "max\n")
    assert node.cores(sys_fs, proc) == plain and node.memory_bytes(sys_fs, proc) == 64 << 30
    write("sys/cpu.max", "50000 100000\n")
    write("sys/memory.max", f"{8 << 30}\n")
    assert node.cores(sys_fs, proc) == 0.5 and node.memory_bytes(sys_fs, proc) == 8 << 30


def test_limits_of_an_older_container(cgroup):
    sys_fs, proc, write = cgroup
    write("proc/self/cgroup", "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n")
    write("sys/cpu/docker/x/cpu.cfs_quota_us", "75000\n")
    write("sys/cpu/docker/x/cpu.cfs_period_us", "100000\n")
    write("sys/memory/docker/x/memory.limit_in_bytes", f"{4 << 30}\n")
    assert node.cores(sys_fs, proc) == 0.75 and node.memory_bytes(sys_fs, proc) == 4 << 30
    write("sys/cpu/docker/x/cpu.cfs_quota_us", "-1\n")
    write("sys/memory/docker/x/memory.limit_in_bytes", "9223372036854771712\n")
    assert node.cores(sys_fs, proc) >= 1 and node.memory_bytes(sys_fs, proc) == 64 << 30


def test_a_system_that_tells_nothing(tmp_path):
    assert node.memory_bytes(tmp_path, tmp_path) == 0 and node.cpu_model(tmp_path)
    assert node.cores(tmp_path, tmp_path) >= 1


def test_record_writes_what_it_returns(tmp_path):
    here = node.record(tmp_path)
    assert json.loads((tmp_path / "node.json").read_text()) == here and os.listdir(tmp_path) == ["node.json"]
