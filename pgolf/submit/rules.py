"""A check's rules: what a rule finds, how all are run, and the table of their ids, which stay what they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pgolf.submit.folder import Folder

OK, WARN, FAIL, SKIP = "ok", "warn", "fail", "skip"


class Finding(NamedTuple):
    """status: OK, WARN, FAIL, or SKIP: not checked, with the reason. fix: what mends it."""

    status: str
    what: str
    fix: str = ""


def ok(what: str) -> Finding:
    return Finding(OK, what)


def fail(what: str, fix: str = "") -> Finding:
    return Finding(FAIL, what, fix)


def warn(what: str, fix: str = "") -> Finding:
    return Finding(WARN, what, fix)


def skip(why: str) -> Finding:
    return Finding(SKIP, f"not checked: {why}")


def record_only(folder: Folder, what: str, fix: str = "") -> Finding:
    """A fault on the record track; elsewhere worth a note."""
    return fail(what, fix) if folder.is_record else warn(what, fix)


class Rule(NamedTuple):
    """title: what holds when it is ok. budget: whether breaking it is being over a budget (exit code 5)."""

    title: str
    check: Callable[[Folder], Finding]
    budget: bool = False


class Result(NamedTuple):
    """One rule's finding on one folder."""

    id: str
    title: str
    status: str
    what: str
    fix: str
    budget: bool


def run(rules: dict[str, Rule], folder: Folder) -> list[Result]:
    """Every rule's finding. One that raises is a warning: a defect of ours must not pass for a good folder."""
    out = []
    for name, rule in rules.items():
        try:
            found = rule.check(folder)
        except Exception as err:
            found = warn(f"not checked: the rule failed: {type(err).__name__}: {err}", "please report this folder")
        out.append(Result(name, rule.title, found.status, found.what, found.fix, rule.budget))
    return out


def summary(results: Iterable[Result]) -> str:
    """How many of each status."""
    counts = Counter(r.status for r in results)
    return f"{counts[OK]} ok, {counts[WARN]} warn, {counts[FAIL]} fail, {counts[SKIP]} not checked"
