"""Everything worth measuring on one GPU, most valuable first, in one command that may be cut off at any time.

    python -m bench.gpu_report --out DIR [--minutes 28] [--only card,attention,steps]

Parts: card (what the GPU is, and its measured roofs), tests (the kernels', on the GPU), attention (forward and backward
at head width 64, by back end), steps (each preset's step, by variant), kernels (every case, by provider), tune (better
launches; a proposal goes to DIR/_tuned.py). A part is made of jobs, each a process of its own: one that fails or hangs
takes nothing else with it. DIR/report.json is replaced whenever a row arrives, so what is there is always a whole
report, and parts that were not asked for stay in it. DIR/<part>.log has what the jobs printed.

Exits with 0 when no part failed, 1 when one did, 3 without the GPU, 130 or 143 when it was stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = 1
# part: its share of the time, relative to those that follow; what one does not use goes on to the next
PARTS = {"card": 1, "tests": 6, "attention": 3, "steps": 8, "kernels": 8, "tune": 10}
NO_GPU = 3  # exit code, of a job too: it does not apply here
GRACE = 5.0  # seconds between asking a job to end and ending it


class Stopped(BaseException):
    """SIGTERM."""


# -- the report ------------------------------------------------------------------------------------------------------


class Report:
    """DIR/report.json, whole at any time. An earlier report there is continued. ValueError if it is another kind's."""

    def __init__(self, folder: Path, device: str, size: str):
        self.path = folder / "report.json"
        kind = {"schema": SCHEMA, "device": device, "size": size}
        self.data: dict[str, Any] = kind | {"parts": {}} | {name: [] for name in PARTS if name != "card"}
        if self.path.exists():
            try:
                old = json.loads(self.path.read_text())
                same = {key: old[key] for key in kind} == kind
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise ValueError(f"{self.path} is no report of {kind}: give another --out, or remove it")
            self.data = old

    def begin(self, part: str) -> None:
        began = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.data["parts"][part] = {"status": "running", "reason": "", "began": began, "seconds": 0.0, "jobs": {}}
        if part != "card":
            self.data[part] = []
        self.save()

    def take(self, part: str, job: str, message: dict) -> None:
        """What a job says: a row of the part's table, or facts about itself."""
        if "row" in message:
            self.data[part].append(message["row"])
        facts = message.get("facts", {})
        self.data["parts"][part]["jobs"].setdefault(job, {}).update(facts)
        for what in ("card", "roofs"):
            if what in facts and (part == "card" or what not in self.data):
                self.data[what] = facts[what]

    def end(self, part: str, status: str, reason: str = "", seconds: float = 0.0) -> None:
        """status: done, failed, not run."""
        entry = self.data["parts"].setdefault(part, {"jobs": {}})
        entry |= {"status": status, "reason": reason, "seconds": round(seconds, 1)}
        self.save()

    def save(self) -> None:
        spare = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        spare.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(spare, self.path)


# -- jobs ------------------------------------------------------------------------------------------------------------


def command_of(part: str, job: str, device: str, size: str, out: Path, seconds: float) -> list[str]:
    """What runs a job; it appends its messages to <out>/messages.jsonl."""
    options = ["--device", device, "--size", size, "--out", str(out), "--seconds", f"{seconds:.0f}"]
    return [sys.executable, "-m", "bench.gpu_parts", part, job, *options]


def run_job(
    command: list[str], messages: Path, log: Path, seconds: float, take: Callable[[dict], None]
) -> tuple[str, str]:
    """Runs a command, hands on what it appends to `messages` as it comes, and ends it and all it started after
    `seconds`. Returns (done, failed or not run; why): the last line it printed, where it did not end with 0."""
    messages.unlink(missing_ok=True)
    deadline, reader = time.monotonic() + seconds, Reader(messages)
    with log.open("a") as out:
        job = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            while job.poll() is None and time.monotonic() < deadline:
                for message in reader.new():
                    take(message)
                time.sleep(0.05)
            code = job.poll()
        finally:
            end(job)
            for message in reader.new():
                take(message)
    if code is None:
        return "failed", f"out of time after {seconds:.0f} s"
    said = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = said[-1][:300] if said else f"exit code {code}"
    if code < 0:
        return "failed", f"killed by signal {-code}; {last}"
    return {0: ("done", ""), NO_GPU: ("not run", last)}.get(code, ("failed", last))


class Reader:
    """The lines that are new in a file since the last look; a line that is not finished waits."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0

    def new(self) -> list[dict]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self.at)
            whole, newline, _ = file.read().rpartition(b"\n")
        self.at += len(whole) + len(newline)
        return [json.loads(line) for line in whole.splitlines()]


def end(job: subprocess.Popen) -> None:
    """Ends a job's whole session, politely at first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(job.pid, number)
        except ProcessLookupError:
            break
        try:
            job.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue


# -- parts -----------------------------------------------------------------------------------------------------------


def run(report: Report, parts: list[str], jobs: dict[str, list[str]], minutes: float) -> bool:
    """Runs the parts in order; True when none failed. Stopped and KeyboardInterrupt pass through, noted."""
    deadline, left = time.monotonic() + 60 * minutes, list(parts)
    while left:
        part = left[0]
        seconds = max(0.0, deadline - time.monotonic()) * PARTS[part] / sum(PARTS[p] for p in left)
        try:
            _run_part(report, part, jobs[part], seconds)
        except (Stopped, KeyboardInterrupt) as stop:
            why = "Ctrl-C" if isinstance(stop, KeyboardInterrupt) else "SIGTERM"
            report.end(part, "failed", f"stopped by {why}")
            for other in left[1:]:
                report.end(other, "not run", f"stopped by {why} before")
            raise
        entry = report.data["parts"][part]
        print(f"{part}: {entry['status']} in {entry['seconds']:.0f} s {entry['reason']}".rstrip(), flush=True)
        left.pop(0)
    return all(report.data["parts"][part]["status"] != "failed" for part in parts)


def _run_part(report: Report, part: str, jobs: list[str], seconds: float) -> None:
    began, folder = time.monotonic(), report.path.parent
    spent = lambda: time.monotonic() - began
    log, messages = folder / f"{part}.log", folder / "messages.jsonl"
    log.unlink(missing_ok=True)
    report.begin(part)
    found: dict[str, tuple[str, str]] = {}
    for i, job in enumerate(jobs):
        left = seconds - spent()
        if left < 1:
            found |= dict.fromkeys(jobs[i:], ("failed", "not begun, out of time"))
            break
        mine, more = (left / (len(jobs) - i), GRACE) if part == "tune" else (left, 0.0)  # others end by themselves

        def take(message: dict, job: str = job) -> None:
            report.take(part, job, message)
            report.save()

        command = command_of(part, job, report.data["device"], report.data["size"], folder, mine)
        status, reason = found[job] = run_job(command, messages, log, mine + more, take)
        take({"facts": {"status": status, "reason": reason}})
    messages.unlink(missing_ok=True)
    status = next((s for s in ("failed", "done") if s in {status for status, _ in found.values()}), "not run")
    report.end(part, status, "; ".join(f"{job}: {why}" for job, (_, why) in found.items() if why), spent())


# -- command line ----------------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_report", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the report")
    parser.add_argument("--minutes", type=float, default=28.0, help="for everything (default %(default)g)")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help="of " + ", ".join(PARTS))
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, or cpu with --size small (default %(default)s)")
    parser.add_argument("--size", default="production", choices=("production", "small"), help="small: to try it out")
    args = parser.parse_args(argv)
    asked = args.only.split(",")
    if unknown := [part for part in asked if part not in PARTS]:
        parser.error(f"--only {args.only}: got {', '.join(map(repr, unknown))}, expected some of {', '.join(PARTS)}")
    if args.minutes <= 0:
        parser.error(f"--minutes: got {args.minutes:g}, expected more than 0")
    if not args.device.startswith("cuda") and (args.device, args.size) != ("cpu", "small"):
        parser.error(f"--device: got {args.device} with --size {args.size}, expected cuda, or cpu with --size small")
    if args.device != "cpu" and (why := _unusable()):
        print(f"bench.gpu_report: {why}; --device cpu --size small tries everything out", file=sys.stderr)
        return NO_GPU
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        report = Report(args.out, args.device, args.size)
    except ValueError as error:
        parser.error(str(error))
    return _guarded_run(report, [part for part in PARTS if part in asked], args)


def _guarded_run(report: Report, parts: list[str], args: argparse.Namespace) -> int:
    from .gpu_parts import jobs_of

    def stop(number: int, frame: Any) -> None:
        raise Stopped

    for part in PARTS:
        if part not in report.data["parts"]:
            report.end(part, "not run", "not reached" if part in parts else "not asked for")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        done = run(report, parts, {part: jobs_of(part, args.size) for part in parts}, args.minutes)
    except Stopped:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
        print(f"{report.path}: {_summary(report)}")
    return 0 if done else 1


def _summary(report: Report) -> str:
    return ", ".join(f"{part} {entry['status']}" for part, entry in report.data["parts"].items())


def _unusable() -> str:
    import torch

    return "" if torch.cuda.is_available() else "needs a GPU; torch.cuda.is_available() is False here"


if __name__ == "__main__":
    sys.exit(main())
