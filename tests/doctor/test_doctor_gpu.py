"""Clocks, memory, and who else is on a GPU, from what nvidia-smi and /proc would say."""

import os
import subprocess
import sys

import pytest
from stand_ins import H100, UUID, Smi, gpu, machine, one

from pgolf import neighbours
from pgolf.doctor import gpu as checks
from pgolf.doctor.rows import NONE, OK, WARN

ID = f"GPU-{UUID.format(0)}"


@pytest.mark.parametrize(
    ("text", "bits", "words"),
    [
        ("0x0000000000000001", 1, "idle"),
        ("0x0000000000000048", 0x48, "hardware slowdown, too hot (hardware)"),
        ("0x0000000000000000", 0, ""),
        ("0x0000000000001004", 0x1004, "power cap, 0x1000"),
        ("[N/A]", 0, ""),
        (None, 0, ""),
    ],
)
def test_reasons(text, bits, words):
    assert checks.reasons(text) == (bits, words)


def clock_row(**change):
    return one(checks.clocks(machine([gpu()], smi=Smi([{**H100, **change}]))))


def test_clocks_of_a_sound_gpu():
    row = clock_row()
    assert row.status == OK
    assert row.what == "345 of 1980 MHz, memory 2619 MHz, 71.20 of 700.00 W, 31 C; idle"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"clocks_event_reasons.active": "0x0000000000000040"}, "too hot (hardware)"),
        ({"clocks_event_reasons.active": "0x0000000000000080"}, "power brake"),
        ({"clocks_event_reasons.active": "0x0000000000000002"}, "application clocks"),
        ({"power.limit": "500.00"}, "below the usual 700 W"),
    ],
)
def test_what_slows_a_gpu_down(change, word):
    row = clock_row(**change)
    assert row.status == WARN and word in row.what and row.fix


def test_a_power_cap_under_load_is_no_fault():
    assert clock_row(**{"clocks_event_reasons.active": "0x0000000000000004"}).status == OK


def test_older_drivers_name_the_reasons_otherwise():
    old = {k: v for k, v in H100.items() if k != "clocks_event_reasons.active"}
    row = one(checks.clocks(machine([gpu()], smi=Smi([{**old, "clocks_throttle_reasons.active": "0x20"}]))))
    assert row.status == WARN and "too hot (software)" in row.what


def test_a_driver_without_one_field_still_tells_the_rest():
    old = {k: v for k, v in H100.items() if k != "power.default_limit"}
    assert "345 of 1980 MHz" in one(checks.clocks(machine([gpu()], smi=Smi([old])))).what


def test_no_gpu_and_no_nvidia_smi():
    assert one(checks.clocks(machine())).status == NONE
    assert one(checks.memory(machine())).status == NONE
    assert one(checks.clocks(machine([gpu()]))).status == NONE


def memory(apps=(), free=79.5, environ=None):
    m = machine([gpu()], smi=Smi(apps=apps), free_gib=free, environ=environ)
    return one(checks.memory(m))


def test_free_gpu():
    row = memory()
    assert row.status == OK and row.what == "79.5 of 80.0 GiB free, no other process"


def test_another_process_is_named_and_left_alone():
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        row = memory([(ID, other.pid, "38912", "/usr/bin/python3")], free=41.0)
        assert row.status == WARN and "41.0 of 80.0 GiB free" in row.what
        assert f"pid {other.pid}" in row.what and "python3 38.0 GiB for " in row.what
        if hasattr(os, "geteuid"):
            assert neighbours.user_name(os.geteuid()) in row.what
        assert "CUDA_VISIBLE_DEVICES" in row.fix and other.poll() is None
    finally:
        other.communicate(b"\n")
    assert other.returncode == 0  # it ended by itself


def test_a_process_outside_of_this_container():
    row = memory([(ID, 999_999_999, "[N/A]", "[Not Found]")], free=40.0)
    assert row.status == WARN and "pid 999999999" in row.what and "memory unknown" in row.what


def test_memory_held_by_nobody_that_is_shown():
    row = memory(free=40.0)
    assert row.status == WARN and "40.0 GiB are held by processes that cannot be seen" in row.what


def test_this_process_and_its_sisters_do_not_count(monkeypatch):
    assert memory([(ID, os.getpid(), "500", "python")]).status == OK
    apps, ranks = [(ID, 999_999_999, "500", "python")], {"WORLD_SIZE": "2"}
    assert memory(apps, environ=ranks).status == WARN
    monkeypatch.setattr(neighbours, "told_by_proc", lambda proc, pid: ("me", 1.0, os.getppid()))
    assert memory(apps, environ=ranks).status == OK
    assert memory(apps).status == WARN  # without torchrun there are no sisters


def test_what_proc_tells_of_a_process():
    user, age, parent = neighbours.told_by_proc(machine().proc, os.getpid())
    assert user == neighbours.user_name(os.geteuid()) and parent == os.getppid() and 0 <= age < 86400


def test_processes_on_another_gpu_are_not_ours():
    assert memory([(f"GPU-{UUID.format(7)}", 999_999_999, "500", "python")]).status == OK


def test_many_processes_are_cut_short():
    text = memory([(ID, 900_000_000 + i, "500", "python") for i in range(9)]).what
    assert text.count("pid ") == 4 and "and 5 more" in text


@pytest.mark.parametrize(("seconds", "text"), [(5, "5 s"), (600, "10 min"), (7200, "2 h"), (200_000, "2 d")])
def test_age(seconds, text):
    assert neighbours.age(seconds) == text


def test_state_under_load():
    m = machine([gpu()], smi=Smi([{**H100, "clocks.sm": "1755", "clocks_event_reasons.active": "0x4"}]))
    assert checks.under_load(m) == {"clock_mhz": 1755.0, "clock_max_mhz": 1980.0, "power_w": 71.2,
                                    "power_limit_w": 700.0, "temperature_c": 31.0, "held_by": "power cap"}  # fmt: skip


GIB = 1 << 30


def process(uuid=ID, user="ann", pid=7):
    return neighbours.Process(uuid, pid, "/usr/bin/python3", 3072.0, user, 7200.0)


def test_a_run_notes_who_else_is_on_its_gpu():
    assert neighbours.note(ID, 79 * GIB, 80 * GIB, []) == ""
    assert neighbours.note(ID, 79 * GIB, 80 * GIB, [process(uuid="GPU-other"), process(user="")]) == ""
    said = neighbours.note(ID, 76 * GIB, 80 * GIB, [process(), process(user="", pid=8)])
    assert said == "not alone on the GPU, 4.0 of 80.0 GiB are held: pid 7 ann python3 3.0 GiB for 2 h"
    assert "cannot be seen from here" in neighbours.note(ID, 76 * GIB, 80 * GIB, [])
