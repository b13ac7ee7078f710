"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 as a wish to stop that the run grants at its next safe point.

    with catching() as stop:    stop.code is 0, or the exit code of the signal that came

Safe points: after a step of training or warm-up, after a batch of an evaluation, between the stages of the export. At
each the ranks agree on the code (`Clock.tick`, `Dist.max_int`), since a signal may reach one of them only.

A thread reads the signals: Python's own handlers run between two instructions of the main thread, which may be waiting
in a collective or a compiler for minutes, and a second Ctrl-C is meant at once.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from pgolf.errors import Stopped

CODES = {"SIGHUP": 129, "SIGINT": 130, "SIGUSR1": 138, "SIGTERM": 143}  # 128 + number, as a shell reports them
NAMES = {code: name for name, code in CODES.items()}


_before: dict = {}  # signal -> handler, of the catching that is under way


class Stop:
    """What signals have asked for: `code` is the largest exit code of those that came, 0 = none.

    leaving: the process is about to end, with a code of its own that no further signal should replace.
    """

    code = 0
    leaving = False


def check(code: int, where: str) -> None:
    """A safe point: raises Stopped when the ranks have agreed on a stop code. where: as in "after step 57"."""
    if code:
        raise Stopped(f"{NAMES.get(code, f'signal {code - 128}')} {where}", code)


@contextmanager
def catching(speak: bool = True) -> Iterator[Stop]:
    """Catches the signals of CODES. Afterwards their handlers are what they were, or they are ignored (`stop.leaving`).

    speak: whether to answer a SIGINT on stderr. A second SIGINT ends the process at once with code 130. A signal that
    is ignored stays ignored (nohup). In a thread other than the main one, where Python allows no handlers, nothing is
    caught.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    known = [s for s in signal.Signals if s.name in CODES and signal.getsignal(s) is not signal.SIG_IGN]
    read, write = socket.socketpair()
    write.setblocking(False)
    _before.update({s: signal.signal(s, _nothing) for s in known})
    fd = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_listen, args=(read, stop, speak), name="signals", daemon=True)
    listener.start()
    try:
        yield stop
    finally:
        _restore(fd)
        for number in known if stop.leaving else ():
            signal.signal(number, signal.SIG_IGN)
        write.send(b"\0")
        listener.join()
        read.close()
        write.close()


def _nothing(number: int, frame: object) -> None:
    """A Python handler must be there for the number to reach the pipe."""


def _restore(fd: int = -1) -> None:
    """Gives the signals back to those who had them."""
    if _before:
        signal.set_wakeup_fd(fd)
    while _before:
        number, handler = _before.popitem()
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


def _listen(read: socket.socket, stop: Stop, speak: bool) -> None:
    """Reads signal numbers until a 0 comes."""
    interrupts = 0
    while number := read.recv(1)[0]:
        code = CODES.get(_name(number))
        if code is None:  # another library's signal
            continue
        interrupts += code == CODES["SIGINT"]
        if interrupts > 1:
            os._exit(CODES["SIGINT"])  # files are written under other names and renamed: none is half done
        if speak and interrupts:
            with suppress(OSError):
                os.write(2, b"stopping at the next safe point; Ctrl-C again exits at once and saves nothing\n")
        stop.code = max(stop.code, code)


def _name(number: int) -> str:
    with suppress(ValueError):
        return signal.Signals(number).name
    return ""


if hasattr(os, "register_at_fork"):  # a forked child would write its signals into our socket
    os.register_at_fork(after_in_child=_restore)
