"""Cores, memory, folders by writing, limits, torchrun's variables."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from stand_ins import gpu, machine, one

from pgolf import node
from pgolf.config import load
from pgolf.doctor import host
from pgolf.doctor.rows import FAIL, NONE, OK, WARN

MB = 1_000_000


@pytest.fixture
def tmpfs(tmp_path):
    """tmpfs("size=2m") mounts one and returns its path; skips where mounting is not allowed."""
    mounted = []

    def mount(options):
        path = tmp_path / f"mount{len(mounted)}"
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount if shutil.which("mount") else lambda options: pytest.skip("no mount command here")
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def row(path, nbytes=MB, code=False):
    return host.folder_row("out_dir", path, nbytes, FAIL, "elsewhere", code)


def test_a_good_folder_and_nothing_left_behind(tmp_path):
    found = row(tmp_path, 50 * MB, code=True)
    assert found.status == OK and "50.0 MB reserved and written" in found.what
    assert os.listdir(tmp_path) == []


def test_a_folder_that_will_be_made_is_not_made(tmp_path):
    found = row(tmp_path / "a" / "b")
    assert found.status == OK and "(will be made)" in found.what and os.listdir(tmp_path) == []


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    found = row(tmp_path / "file" / "runs")
    assert found.status == FAIL and "not a folder" in found.what


def test_a_link_to_a_mount_that_is_gone(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "gone")
    found = row(tmp_path / "runs" / "x")
    assert found.status == FAIL and "a link to" in found.what and "not there" in found.what


def test_a_full_disk(tmpfs):
    path = tmpfs("size=2m")
    assert row(path, MB).status == OK
    found = row(path, 4 * MB)
    assert found.status == FAIL and "no space for 4.0 MB; 2.1 MB free" in found.what
    assert os.listdir(path) == []
    (path / "ballast").write_bytes(bytes(2 * MB))
    assert row(path, MB).status == FAIL


def test_a_full_disk_without_fallocate(tmpfs, monkeypatch):
    def unsupported(*a):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    path = tmpfs("size=3m")
    assert row(path, MB).status == OK and "no space" in row(path, 5 * MB).what
    monkeypatch.delattr(os, "posix_fallocate")
    assert row(path, MB).status == OK and "no space" in row(path, 5 * MB).what


def test_a_quota_is_told_from_a_full_disk(tmp_path, monkeypatch):
    def over(*a):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", over)
    found = row(tmp_path, 5 * MB)
    assert found.status == FAIL and "quota leaves no 5.0 MB" in found.what and "free" in found.what


def test_a_folder_mounted_noexec(tmpfs):
    path = tmpfs("size=2m,noexec")
    assert row(path).status == OK
    found = row(path, code=True)
    assert found.status == FAIL and "noexec" in found.what
    assert row(tmpfs("size=2m"), code=True).status == OK


def test_a_folder_mounted_read_only(tmpfs):
    found = row(tmpfs("size=2m,ro"))
    assert found.status == FAIL and "read-only" in found.what


@contextmanager
def not_root():
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_a_folder_without_permission():
    with tempfile.TemporaryDirectory() as folder:  # not pytest's, whose parents are private
        os.chmod(folder, 0o555)
        with not_root():
            found = row(folder)
        os.chmod(folder, 0o755)
    assert found.status == FAIL and "no permission to write" in found.what


def test_all_folders_of_a_run(tmp_path):
    config = load([f"train.out_dir={tmp_path}/runs", f"data.cache_dir={tmp_path}/cache"], {"PRESET": "cpu"}).config
    (tmp_path / "file").write_text("")
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "file"), "TRITON_CACHE_DIR": str(tmp_path / "t")}
    m = machine(environ=environ, config=config)
    found = {r.name: r for r in host.folders(m)}
    assert list(found) == ["out_dir", "cache_dir", "temp", "inductor cache", "triton cache"]
    assert f"{tmp_path}/runs" in found["out_dir"].what and f"{tmp_path}/t" in found["triton cache"].what
    assert found["inductor cache"].status == WARN  # a run on this CPU compiles nothing
    with_gpu = machine([gpu()], environ=environ, config=config)
    assert {r.name: r.status for r in host.folders(with_gpu)}["inductor cache"] == FAIL


# -- cores, memory, limits -------------------------------------------------------------------------------------------


@pytest.mark.alone
def test_busy_cores_are_seen():
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert host.busy_cores(seconds=0.5) > 0.4
    finally:
        spinning.kill()
        spinning.wait()


def test_busy_and_few_cores_warn(monkeypatch):
    monkeypatch.setattr(node, "cores", lambda **k: 4)
    monkeypatch.setattr(host, "busy_cores", lambda *a: 0.2)
    assert one(host.cores(machine())).status == OK
    assert one(host.cores(machine(environ={"WORLD_SIZE": "8"}))).status == WARN
    monkeypatch.setattr(host, "busy_cores", lambda *a: 3.5)
    row = one(host.cores(machine()))
    assert row.status == WARN and "3.5 busy" in row.what


@pytest.mark.parametrize(("gib", "status"), [(0.5, FAIL), (2, WARN), (20, OK)])
def test_memory(tmp_path, gib, status):
    (tmp_path / "meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemAvailable: {int(gib * 2**20)} kB\n")
    m = machine()
    m.proc = tmp_path
    assert one(host.memory(m)).status == status


def test_shared_memory_matters_with_several_gpus(monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: (64 << 20, 0, 64 << 20))
    assert one(host.shared_memory(machine([gpu()]))).status == OK
    row = one(host.shared_memory(machine([gpu(0), gpu(1)])))
    assert row.status == WARN and "--shm-size" in row.fix


def test_open_files(monkeypatch):
    resource = pytest.importorskip("resource")
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 4096))
    row = one(host.open_files(machine()))
    assert row.status == WARN and "256 allowed" in row.what and row.fix == "ulimit -n 4096"
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY,) * 2)
    assert one(host.open_files(machine())).what == "unlimited"


# -- torchrun --------------------------------------------------------------------------------------------------------

GOOD = {
    "WORLD_SIZE": "2",
    "RANK": "0",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("environ", "gpus", "status", "word"),
    [
        ({}, 0, OK, "one process"),
        ({}, 1, OK, "one process"),
        ({}, 8, WARN, "one of 8 GPUs"),
        (GOOD, 0, OK, "2 in all, 2 on this machine"),
        (GOOD, 2, OK, "2 in all"),
        (GOOD, 1, FAIL, "2 processes on this machine, 1 visible GPU"),
        ({**GOOD, "RANK": "5"}, 0, FAIL, "RANK=5"),
        ({**GOOD, "WORLD_SIZE": "two"}, 0, FAIL, "WORLD_SIZE='two'"),
        ({"WORLD_SIZE": "4"}, 0, FAIL, "RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not set"),
    ],
)
def test_ranks(environ, gpus, status, word):
    row = one(host.ranks(machine([gpu(i) for i in range(gpus)], environ=environ)))
    assert row.status == status and word in row.what
    if status == FAIL:
        assert "torchrun" in row.fix


def test_more_processes_than_gpus_on_the_cpu_is_no_fault():
    config = load(["train.device=cpu"], {"PRESET": "cpu"}).config
    assert one(host.ranks(machine([gpu()], environ=GOOD, config=config))).status == OK


def test_systems_without_proc_or_shm(monkeypatch, tmp_path):
    monkeypatch.setattr(host, "Path", lambda p: SimpleNamespace(is_dir=lambda: False))
    assert one(host.shared_memory(machine())).status == NONE
    monkeypatch.delattr(os, "sched_getaffinity")
    assert host.busy_cores() is None
