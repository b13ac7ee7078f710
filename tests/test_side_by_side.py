"""tests/run.py: every test in one of its two calls of pytest, none in both, and no failure lost."""

import re
from types import SimpleNamespace

import pytest
import run as tests_run


@pytest.fixture
def calls(monkeypatch):
    """calls(code, code): the exit codes that pytest gives, in turn; .made: the commands."""
    made = []

    def prepare(*codes):
        left = list(codes)
        call = lambda command, cwd: made.append(command[3:]) or SimpleNamespace(returncode=left.pop(0))
        monkeypatch.setattr(tests_run.subprocess, "run", call)

    prepare.made = made
    return prepare


def test_both_calls_have_the_options_and_the_second_one_no_workers(calls):
    calls(0, 0)
    assert tests_run.main(["-k", "x", "-n", "8"]) == 0
    side_by_side, alone = (" ".join(command) for command in calls.made)
    assert side_by_side == "-n 2 --dist loadfile -k x -n 8 -m not alone" and alone == "-k x -n 8 -m alone -n 0"


@pytest.mark.parametrize(
    ("codes", "expected"), [((0, 0), 0), ((1, 0), 1), ((0, 1), 1), ((2, 1), 2), ((5, 0), 0), ((0, 5), 0), ((5, 5), 5)]
)
def test_the_second_call_comes_in_any_case_and_the_first_failure_counts(calls, codes, expected):
    calls(*codes)
    assert tests_run.main([]) == expected and len(calls.made) == 2


def test_the_command_is_the_one_of_the_readme_and_of_ci(root):
    (command,) = re.findall(r"&& (\S+ tests/run.py)", (root / "README.md").read_text())
    assert f"\n{command}" in (root / ".ci" / "run").read_text()
