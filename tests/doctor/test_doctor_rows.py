"""No check can crash the doctor or keep it waiting; the table is for every console."""

import time

import pytest
from stand_ins import machine

from pgolf.doctor.rows import FAIL, NONE, OK, WARN, Row, run, summary, table


def raising(machine):
    yield Row("first", OK, "seen")
    raise RuntimeError("two\nlines")


def hanging(machine):
    time.sleep(30)
    yield Row("never", OK, "")


def test_a_check_that_raises_is_a_row_and_the_next_one_runs():
    rows = list(run({"bad": raising, "good": lambda m: [Row("good", OK, "")]}, machine()))
    assert [r.name for r in rows] == ["first", "bad", "good"]  # what was said before is kept
    assert rows[1].status == WARN and rows[1].what == "could not be checked: RuntimeError: two"


@pytest.mark.alone
def test_a_check_that_hangs_is_a_row_in_time():
    began = time.monotonic()
    rows = list(run({"slow": hanging, "good": lambda m: [Row("good", OK, "")]}, machine(), limit_s=0.3))
    assert time.monotonic() - began < 3
    assert [(r.name, r.status) for r in rows] == [("slow", FAIL), ("good", OK)]
    assert "no answer within 0.3 s" in rows[0].what


def test_table_is_ascii_wraps_words_and_says_what_mends():
    fix = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu128"
    rows = [Row("gpu 0", FAIL, "gr\u00fc\u00dfe " * 30, fix), Row("x", NONE, "nothing", "unused fix")]
    lines = table(rows, pad=8, width=100)
    assert all(line.isascii() and len(line) <= 100 for line in lines)
    assert lines[0].startswith("fail  gpu 0 ") and lines[-1] == "n/a   x         nothing"
    text = " ".join(" ".join(lines).split())
    assert f"-> {fix}" in text and "unused fix" not in text
    assert "--index-url" in text and "https://download.pytorch.org/whl/cu128" in "\n".join(lines)


def test_summary_counts():
    rows = [Row("", s, "") for s in (OK, OK, WARN, FAIL, NONE, NONE, NONE)]
    assert summary(rows) == "2 ok, 1 warn, 1 fail, 3 n/a"
