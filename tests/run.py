"""All tests in about half the time of one `pytest`: most of them side by side, then those that need the machine alone.

    python tests/run.py [pytest's options]        e.g. --durations=15, -k loader, -n 8

Two calls of pytest, because a test that is marked `alone` must not have another one beside it. That mark belongs on a
test that holds a wall-clock time from above (an answer within 1 s, a ratio of two times, a measured rate), whose
outcome depends on how far something gets in a given time, or whose processes must meet within seconds. Limits that
only end a hang (20 s and more for a second of work) and CPU times need no mark. A test's name must be the same in
every process: no addresses, and no sets in the order of their hashes.

Exit code: pytest's of the first call that failed, 0 if both passed.
"""

import subprocess
import sys
from pathlib import Path

# What stands before and behind the options; of two values pytest takes the last one. A file's tests stay together, so
# that what they share is made once
CALLS = ((("-n", "2", "--dist", "loadfile"), ("-m", "not alone")), ((), ("-m", "alone", "-n", "0")))
NOTHING = 5  # pytest's exit code where no test was selected, as -k may have it in one of the calls


def main(options: list[str]) -> int:
    root = Path(__file__).resolve().parent.parent
    codes = []
    for before, behind in CALLS:
        command = [sys.executable, "-m", "pytest", *before, *options, *behind]
        print("$", *command, flush=True)
        codes.append(subprocess.run(command, cwd=root).returncode)
    failed = [code for code in codes if code not in (0, NOTHING)]
    return failed[0] if failed else min(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
