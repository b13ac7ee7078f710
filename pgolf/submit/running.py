"""`pgolf check --run`: the script in a folder of its own, without the repository, without network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from pgolf.submit.folder import SCRIPT, Folder
from pgolf.submit.rules import Finding, Rule, fail, ok, skip, warn

SECONDS = 300
# In every Python process of the run: sockets to other machines fail, and say so where they are swallowed too
GUARD = """\
import socket, sys
def refuse(*a, **k):
    sys.stderr.write("NETWORK WAS ASKED FOR\\n")
    raise OSError("pgolf check --run: no network")
for name in ("connect", "connect_ex", "sendto"):
    original = getattr(socket.socket, name)
    def guarded(self, *a, _original=original, **k):
        return _original(self, *a, **k) if self.family == getattr(socket, "AF_UNIX", None) else refuse()
    setattr(socket.socket, name, guarded)
socket.getaddrinfo = refuse
"""
# A few steps on the corpus that pgolf makes of Python's own library
SMOKE = {"PRESET": "smoke", "ITERATIONS": "2", "WARMUP_STEPS": "0", "DEVICE": "cpu", "VOCAB_SIZE": "512"}
IMPORT = "import runpy; runpy.run_path('train_gpt.py', run_name='imported')"


def alone(f: Folder) -> Finding:
    """Runs a bundle of pgolf for two steps and its export; of another script its imports and definitions only."""
    if f.script is None:
        return skip(f.script_error)
    ours = "pgolf/cli.py" in f.script.files
    with TemporaryDirectory(prefix="pgolf-check-") as name:
        place = Path(name)
        (place / "guard").mkdir()
        (place / "guard" / "sitecustomize.py").write_text(GUARD)
        for helper in (SCRIPT, *f.helpers):
            (place / "work" / helper).parent.mkdir(parents=True, exist_ok=True)
            (place / "work" / helper).write_bytes(f.read(helper))
        command = [sys.executable, SCRIPT, "train.out_dir=runs"] if ours else [sys.executable, "-c", IMPORT]
        environ = {"PATH": "/usr/bin:/bin", "HOME": name, "TMPDIR": name, "PYTHONPATH": str(place / "guard"),
                   "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **(SMOKE if ours else {})}  # fmt: skip
        try:
            done = subprocess.run(command, cwd=place / "work", env=environ, stdin=subprocess.DEVNULL,
                                  capture_output=True, text=True, errors="replace", timeout=SECONDS)  # fmt: skip
        except subprocess.TimeoutExpired:
            return fail(f"{SCRIPT} did not end within {SECONDS} s")
        result = list((place / "work").glob("runs/*/result.json"))
    last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "")[:200]
    if "NETWORK WAS ASKED FOR" in done.stderr:
        return fail(f"{SCRIPT} asks for the network: {last}")
    if done.returncode:
        missing = "ModuleNotFoundError" in last or "CUDA" in last
        return (warn if missing and not ours else fail)(f"{SCRIPT} ends with code {done.returncode}: {last}")
    if not ours:
        return ok(f"{SCRIPT} imports without fault; its training was not run")
    return ok("it trains, packs and scores alone, without network") if result else fail("it ends without a result")


RULES = {"PG022": Rule("the script runs alone, without network", alone)}
