"""Runs a reader on damaged inputs: it must accept rightly or refuse clearly, soon, and within its memory."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from mutate import Files, mutant

from pgolf.errors import PgolfError

FAST = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # files of a hundred thousand inputs, in memory
SECONDS = 2.0  # of CPU time for one input; the largest is 100 KB
STUCK = 20.0  # of wall time: waiting for something that never comes
FLOOR, FACTOR = 64 << 20, 20  # an input of N bytes may allocate FLOOR + FACTOR N
MESSAGE = 10_000  # characters


class Hang(BaseException):
    """Not an Exception: no reader may swallow it."""


@dataclass(frozen=True)
class Reader:
    """A row. valid(folder): good inputs. read(folder, files): what a run does with one; files need writing by `spill`.
    check(files, result): asserts that an accepted input is right. refuses: errors that it may raise.
    """

    name: str
    valid: Callable[[Path], list[Files]]
    read: Callable[[Path, Files], Any]
    check: Callable[[Files, Any], None]
    refuses: tuple[type[Exception], ...] = (PgolfError,)
    count: int = 10_000
    accepts: tuple[float, float] = (0.0, 0.9)  # share of mutants that is accepted: neither `check` nor damage is idle


def spill(folder: Path, files: Files) -> Path:
    """Writes the files of one input and removes those of the one before; names are the row's own."""
    for old in os.listdir(folder):
        if old not in files:
            os.unlink(folder / old)
    for name, data in files.items():
        with open(folder / name, "wb", buffering=0) as file:
            file.write(data)
    return folder


def fuzz(reader: Reader, folder: Path, seed: int, count: int) -> dict[str, int]:
    """Reads `count` mutants. Returns {"accepted": n, error class: n}; raises AssertionError on the first bad one."""
    valid = reader.valid(folder / "valid")
    seen: dict[str, int] = {}
    with TemporaryDirectory(prefix="fuzz-", dir=FAST) as name:
        work = Path(name)
        for files in valid:  # also loads what is loaded on first use, so that it is not booked on an input
            reader.check(files, reader.read(work, files))
        for index in range(count):
            files, recipe = mutant(valid, seed, reader.name, index)
            try:
                outcome = attempt(reader, work, files)
            except (Exception, Hang) as err:
                saved = folder / f"bad-{index}"
                saved.mkdir()
                spill(saved, files)
                pytest.fail(
                    f"{reader.name}, seed {seed}, input {index} ({recipe}): {type(err).__name__}: {str(err)[:500]}\n"
                    f"files: {saved}; again: mutate.mutant(reader.valid(folder), {seed}, {reader.name!r}, {index})"
                )
            seen[outcome] = seen.get(outcome, 0) + 1
    return seen


def attempt(reader: Reader, work: Path, files: Files) -> str:
    """ "accepted" or the name of the error. Raises AssertionError, Hang or what the reader should not have raised."""
    size = sum(map(len, files.values()))
    began, result, error = time.process_time(), None, None
    try:
        with bounded(FLOOR + FACTOR * size):
            result = reader.read(work, files)
    except reader.refuses as err:
        error = err
    took = time.process_time() - began
    assert took < SECONDS, f"{took:.1f} s of CPU time for {size:,} bytes"
    if error is None:
        reader.check(files, result)
        return "accepted"
    check_message(error)
    return type(error).__name__


def check_message(err: BaseException) -> None:
    text = str(err)
    assert text.strip() and len(text) <= MESSAGE, f"a message of {len(text):,} characters: {text[:200]!r}"
    cause: BaseException | None = err
    while cause is not None:
        assert not isinstance(cause, MemoryError), f"over the memory bound, hidden behind: {text[:300]}"
        cause = cause.__cause__ or cause.__context__


@contextmanager
def bounded(more: int) -> Iterator[None]:
    """At most `more` bytes of new address space and of new resident memory, and STUCK seconds."""

    def stuck(*_):
        raise Hang(f"no end after {STUCK:.0f} s")

    size, resident = memory("VmSize", "VmRSS")
    old, hard = resource.getrlimit(resource.RLIMIT_AS)
    previous = signal.signal(signal.SIGALRM, stuck)
    with open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"5")  # the high-water mark starts anew
    resource.setrlimit(resource.RLIMIT_AS, (size + more + SLACK, hard))
    signal.setitimer(signal.ITIMER_REAL, STUCK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, (old, hard))
        peak = memory("VmHWM")[0] - resident
        assert peak <= more, f"{peak >> 20} MiB allocated, {more >> 20} MiB allowed"


SLACK = 80 << 20  # of address space only: a new thread takes a stack and a heap of it without touching them


def memory(*names: str) -> list[int]:
    """Bytes of this process: fields of /proc/self/status."""
    with open("/proc/self/status", "rb", buffering=0) as file:
        text = file.read(4096)
    starts = [text.index(name.encode()) + len(name) + 1 for name in names]
    return [int(text[at : text.index(b"kB", at)]) << 10 for at in starts]


def available() -> str:
    """Why the bounds cannot be watched here, or ""."""
    try:
        memory("VmHWM")
        return "" if os.access("/proc/self/clear_refs", os.W_OK) else "/proc/self/clear_refs cannot be written"
    except (OSError, ValueError) as err:
        return f"memory is watched through Linux's /proc/self/status: {err}"
