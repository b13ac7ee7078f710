"""Test 12, and the watch that it is made of: which files are opened when, and whether anybody speaks to the network."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from pgolf.audit import streams
from pgolf.audit.interface import Scorer, nats_of, offers
from pgolf.audit.result import Result, Sizes, judged

SOCKETS = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
EVALUATION = "evaluation"  # the phase in which validation files may be opened, and training files may not
CODE = (".py", ".pyc", ".so", ".pyi", ".pth", ".json")  # modules that are imported late; JSON: launch tables
SYSTEM = ("/proc/", "/sys/", "/dev/")
CACHES = ("torchinductor", ".triton", "/.cache/", "__pycache__")  # compiled code


class Event(NamedTuple):
    phase: str
    kind: str  # open or a name of SOCKETS
    what: str  # absolute path, or the address


_active: list[Watch] = []
_hooked = False


def _hook(event: str, args: tuple[Any, ...]) -> None:
    """Python's own audit hook: it cannot be taken out again, so there is one, which looks who watches."""
    if _active and (event == "open" or event in SOCKETS):
        for watch in _active:
            watch.note(event, args)


class Watch:
    """Notes what is opened between `with` and its end, in all threads, phase by phase.

        with Watch() as watch:
            watch.phase = "warm-up"; ...
            watch.phase = EVALUATION; ...
        watch.problems(val=[...], train=[...])

    Sees what goes through Python: open(), numpy, torch.load, sockets. A library that opens files in C is not seen.
    """

    def __init__(self):
        self.phase, self.events = "before", []

    def __enter__(self) -> Watch:
        global _hooked
        if not _hooked:
            sys.addaudithook(_hook)
            _hooked = True
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _active.remove(self)

    def note(self, event: str, args: tuple[Any, ...]) -> None:
        """One event of the interpreter. Descriptors that are open already are not files that are opened."""
        if event != "open":
            self.events.append(Event(self.phase, event, str(args[-1])[:200]))
        elif isinstance(args[0], str | bytes | os.PathLike):
            self.events.append(Event(self.phase, "open", os.path.abspath(os.fsdecode(args[0]))))

    def problems(self, val: Iterable[Any] = (), train: Iterable[Any] = ()) -> list[str]:
        """Validation files opened too early, training files opened during evaluation, and sockets at any time."""
        early, late = ({os.path.abspath(os.fspath(p)) for p in paths} for paths in (val, train))
        out = []
        for phase, kind, what in self.events:
            if kind != "open":
                out.append(f"{phase}: {kind} {what}")
            elif phase != EVALUATION and what in early:
                out.append(f"{phase}: opens the validation file {what}")
            elif phase == EVALUATION and what in late:
                out.append(f"{phase}: opens the training file {what}")
        return list(dict.fromkeys(out))

    def strangers(self) -> list[str]:
        """Files opened during evaluation that are neither code, nor the system's, nor compiled code."""
        opened = (e.what for e in self.events if e.phase == EVALUATION and e.kind == "open")
        return list(dict.fromkeys(p for p in opened if not _is_code(p)))


def _is_code(path: str) -> bool:
    roots = (*SYSTEM, sys.prefix, sys.base_prefix)
    return path.endswith(CODE) or path.startswith(roots) or any(part in path for part in CACHES)


def isolation(scorer: Scorer, sizes: Sizes) -> Result:
    """12: while it scores it opens no file but code, as the stream is handed to it, nor a socket; before that, in
    warm_up(), no validation file that data_files() names."""
    stream = streams.text(scorer.vocab_size, sizes.length, sizes)
    files = scorer.data_files() if offers(scorer, "data_files") else {}
    with Watch() as watch:
        watch.phase = "warm-up"
        if offers(scorer, "warm_up"):
            scorer.warm_up()
        watch.phase = EVALUATION
        nats_of(scorer, stream)
    known = {os.path.abspath(os.fspath(p)) for p in files.get("val", ())}
    found = watch.problems(files.get("val", ()), files.get("train", ()))
    found += [f"{EVALUATION}: opens {p}" for p in watch.strangers() if p not in known]
    found = [f for i, f in enumerate(found) if f.split(" ")[-1] not in {g.split(" ")[-1] for g in found[:i]}]
    return judged(len(found), len(watch.events), 0, "; ".join(found[:3]) or "no file, no socket")
