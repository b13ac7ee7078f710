"""What a run says: an event stream for programs, a log file for the challenge's tools, a console for people.

`train.log` keeps the challenge's lines to the letter, because parsers of them exist; what they do not know goes on
lines of its own, and on the console behind the known fields. Only rank 0 speaks. No failure to write stops a run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

from pgolf.errors import SetupError, Stopped


def step_line(step: int, total: int, train_loss: float, train_ms: float) -> str:
    times = f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"
    return f"step:{step}/{total} train_loss:{train_loss:.4f} {times}"


def val_line(step: int, total: int, val_loss: float, val_bpb: float, train_ms: float) -> str:
    times = f"train_time:{train_ms:.0f}ms step_avg:{train_ms / max(step, 1):.2f}ms"
    return f"step:{step}/{total} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} {times}"


def final_lines(name: str, val_loss: float, val_bpb: float, eval_ms: float) -> list[str]:
    """name: as in "int8_zlib_roundtrip". The `_exact` line is the one that tools read."""
    return [
        f"final_{name} val_loss:{val_loss:.4f} val_bpb:{val_bpb:.4f} eval_time:{eval_ms:.0f}ms",
        f"final_{name}_exact val_loss:{val_loss:.8f} val_bpb:{val_bpb:.8f}",
    ]


def size_lines(model_bytes: int, code_bytes: int, codec: str = "") -> list[str]:
    """codec: as in "int8+zlib"; empty for uncompressed weights."""
    of = f" {codec}" if codec else ""
    return [
        f"Serialized model{of}: {model_bytes} bytes",
        f"Code size: {code_bytes} bytes",
        f"Total submission size{of}: {model_bytes + code_bytes} bytes",
    ]


class RunLog:
    """Writes `run_dir`/events.jsonl and train.log, and the console. On ranks other than 0 all methods do nothing.

    console: True = live line, False = plain lines, None = live when `stream` (default: stdout) is a terminal; without
    rich installed always plain. Existing files are continued, so that a resumed run keeps its history. Raises
    SetupError when `run_dir` cannot be written at the start; later failures (full disk, closed stdout) give one warning
    and the run goes on.
    """

    def __init__(self, run_dir: str | Path, rank: int = 0, console: bool | None = None, stream: TextIO | None = None):
        self.active = rank == 0
        self._began = time.monotonic()
        self._spoke = -math.inf  # when progress() last printed a plain line
        if not self.active:
            return
        try:
            Path(run_dir).mkdir(parents=True, exist_ok=True)
            self._events = _File(Path(run_dir) / "events.jsonl")
            self._log = _File(Path(run_dir) / "train.log")
        except OSError as err:
            raise SetupError(
                f"{run_dir}: cannot write the run's log ({err.strerror}).\n"
                "Set train.out_dir to a folder that can be written, or free some space."
            ) from err
        self._console = _open_console(console, stream or sys.stdout)

    def event(self, kind: str, **fields: Any) -> None:
        """One JSON object on one line: {"t": seconds since the start, "kind": kind, ...}. "final" reaches the disk."""
        if self.active:
            record = {"t": round(time.monotonic() - self._began, 4), "kind": kind, **fields}
            self._events.write(json.dumps(_plain(record)), sync=kind == "final")

    def line(self, text: str, console: bool = True) -> None:
        """Text to train.log and, unless console is False (long dumps), to the console."""
        if self.active:
            self._log.write(text)
            if console:
                self._console.line(text)

    def step(
        self,
        step: int,
        total: int,
        train_loss: float,
        train_ms: float,
        *,
        lr_scale: float,
        tokens_per_second: float,
        time_left_s: float | None = None,
        **more: Any,
    ) -> None:
        """A training step worth telling. `more` goes to the event only. time_left_s: of the budget; None = no cap."""
        if not self.active:
            return
        known = {"step": step, "train_loss": train_loss, "lr_scale": lr_scale, "tokens_per_second": tokens_per_second}
        self.event("step", total=total, train_ms=train_ms, time_left_s=time_left_s, **known, **more)
        text = step_line(step, total, train_loss, train_ms)
        self._log.write(text)
        left = "" if time_left_s is None else f" time_left:{time_left_s:.0f}s"
        by_time = 0.0 if time_left_s is None else train_ms / max(train_ms + 1000 * time_left_s, 1e-9)
        state = f"step {step}/{total}  loss {train_loss:.4f}  lr {lr_scale:.3f}  {tokens_per_second:,.0f} tok/s"
        if time_left_s is not None:
            state += f"  {int(time_left_s) // 60}:{int(time_left_s) % 60:02d} left"
        extra = f" lr_scale:{lr_scale:.4f} tokens/s:{tokens_per_second:.0f}{left}"
        self._console.status(state, max(step / max(total, 1), by_time), text + extra)

    def val(self, step: int, total: int, val_loss: float, val_bpb: float, train_ms: float, **more: Any) -> None:
        """A validation during training."""
        self.event("val", step=step, total=total, val_loss=val_loss, val_bpb=val_bpb, train_ms=train_ms, **more)
        if self.active:
            self._console.val_bpb = val_bpb
        self.line(val_line(step, total, val_loss, val_bpb, train_ms))

    def final(self, name: str, val_loss: float, val_bpb: float, eval_ms: float, **more: Any) -> None:
        """A final score; its event is forced to the disk."""
        self.event("final", name=name, val_loss=val_loss, val_bpb=val_bpb, eval_ms=eval_ms, **more)
        for text in final_lines(name, val_loss, val_bpb, eval_ms):
            self.line(text)

    def sizes(self, model_bytes: int, code_bytes: int, codec: str = "") -> None:
        self.event("sizes", model_bytes=model_bytes, code_bytes=code_bytes, codec=codec)
        for text in size_lines(model_bytes, code_bytes, codec):
            self.line(text)

    def stopping_early(self, train_ms: float, step: int, total: int) -> None:
        """The wall-clock cap ended training before the last step."""
        self.event("stopping_early", train_ms=train_ms, step=step, total=total)
        self.line(f"stopping_early: wallclock_cap train_time:{train_ms:.0f}ms step:{step}/{total}")

    def peak_memory(self, allocated: int, reserved: int) -> None:
        """Bytes of the device's memory at their highest."""
        self.event("peak_memory", allocated=allocated, reserved=reserved)
        self.line(f"peak memory allocated: {allocated >> 20} MiB reserved: {reserved >> 20} MiB")

    def progress(self, label: str, done: int, total: int) -> None:
        """Life sign of long work such as an evaluation: updates the live line, or a plain line every 10 s."""
        if not self.active or total <= 0:
            return
        now = time.monotonic()
        if self._console.live or now - self._spoke >= 10:
            self._spoke = now
            text = f"{label} {done:,}/{total:,} ({100 * done / total:.0f} %)"
            self._console.status(text, done / total, text)

    @contextmanager
    def phase(self, name: str, ledger=None) -> Iterator[None]:
        """Announces a phase, and how long it took; also books it in `ledger` (`pgolf.clock.TimeLedger`) if given."""
        began = time.monotonic()
        self.event("phase_start", name=name)
        self.line(f"phase:{name} started")
        ended = "failed"
        try:
            with ledger.phase(name) if ledger is not None else nullcontext():
                yield
            ended = "done"
        except Stopped:
            ended = "stopped"
            raise
        finally:
            seconds = time.monotonic() - began
            self.event("phase_end", name=name, seconds=seconds, ok=ended == "done")
            self.line(f"phase:{name} {ended} after {seconds:.2f}s")

    def close(self) -> None:
        """Ends the live line and closes the files. Safe to call twice."""
        if self.active:
            self._console.close()
            self._events.close()
            self._log.close()
            self.active = False

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()


def _plain(value: Any) -> Any:
    """`value` as strict JSON: non-finite numbers as "nan", "inf", "-inf"; scalars of torch and numpy as numbers."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (str, int)):
        return value
    return _plain(value.item()) if getattr(value, "ndim", None) == 0 else str(value)


def _warn(text: str) -> None:
    """Last resort of a log that cannot log; must not raise itself."""
    with suppress(OSError, ValueError, AttributeError):
        print(f"warning: {text}", file=sys.stderr, flush=True)


class _File:
    """Appends whole lines, unbuffered, so that a killed run loses none. A failed write warns once; later ones retry."""

    def __init__(self, path: Path):
        self._path, self._warned = path, False
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  lives as long as the run
        # a run killed in the middle of a line, or a full disk, leaves a torn one: never glue to it
        self._torn = False
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            self._torn = self._file.read(1) != b"\n"

    def write(self, text: str, sync: bool = False) -> None:
        data = ("\n" if self._torn else "") + text + "\n"
        try:
            raw = data.encode("utf-8", "replace")
            written = self._file.write(raw) or 0
            self._torn = written < len(raw) and (self._torn or written > 0)
            if written < len(raw):
                raise OSError(f"only {written} of {len(raw)} bytes were written")
            if sync:
                os.fsync(self._file.fileno())
        except OSError as err:
            if not self._warned:
                _warn(f"{self._path}: {err}; the run goes on, this log has gaps")
            self._warned = True

    def close(self) -> None:
        self._file.close()


def _open_console(live: bool | None, stream: TextIO) -> _Console:
    if live is None:
        live = _is_terminal(stream)
    if live:
        with suppress(ImportError):
            return _LiveConsole(stream)
    return _Console(stream)


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False


class _Console:
    """Plain lines. A stream that fails (closed pipe) is given up after one warning."""

    live = False
    val_bpb: float | None = None

    def __init__(self, stream: TextIO):
        self._stream, self._dead = stream, False
        self._encoding = getattr(stream, "encoding", None) or "utf-8"

    def safe(self, text: str) -> str:
        """`text` with "?" for what the terminal's encoding cannot print."""
        return text.encode(self._encoding, "replace").decode(self._encoding)

    def line(self, text: str) -> None:
        self._guarded(lambda: print(self.safe(text), file=self._stream, flush=True))

    def status(self, state: str, fraction: float, plain: str) -> None:
        """state and fraction (0..1) for a live line; plain for everyone else."""
        self.line(plain)

    def close(self) -> None:
        pass

    def _guarded(self, write) -> None:
        if self._dead:
            return
        try:
            write()
        except (OSError, ValueError) as err:  # ValueError: the stream was closed
            self._dead = True
            _warn(f"the console cannot be written ({err}); the run goes on, train.log has everything")


class _LiveConsole(_Console):
    """One live line at the bottom, drawn by rich; other lines scroll above it."""

    live = True

    def __init__(self, stream: TextIO):
        from rich.console import Console
        from rich.live import Live

        super().__init__(stream)
        self._unicode = self._encoding.lower().startswith("utf")
        self._rich = Console(file=stream, force_terminal=True, highlight=False)
        # Drawn when told to: a refreshing thread could neither see a closed stdout nor stay out of the step's way.
        self._live = Live(console=self._rich, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._guarded(self._live.start)

    def line(self, text: str) -> None:
        self._guarded(lambda: self._rich.print(self.safe(text), markup=False, soft_wrap=True))

    def status(self, state: str, fraction: float, plain: str) -> None:
        if self.val_bpb is not None:
            state += f"  val {self.val_bpb:.4f} bpb"
        self._guarded(lambda: self._live.update(self._draw(state, fraction), refresh=True))

    def _draw(self, state: str, fraction: float):
        from rich.text import Text

        full, empty = "━─" if self._unicode else "#-"
        cells = max(min(30, self._rich.width - len(state) - 8), 5)
        filled = round(cells * min(max(fraction, 0.0), 1.0))
        parts = [(full * filled, "green"), (empty * (cells - filled), "dim"), f" {100 * fraction:3.0f}%  ", state]
        return Text.assemble(*parts, no_wrap=True, overflow="crop")

    def close(self) -> None:
        self._guarded(self._live.stop)
