"""`python -m pgolf COMMAND`, also installed as `pgolf`: finds the command and loads nothing else."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module

import pgolf
from pgolf import cli, tree
from pgolf.errors import ConfigError

# command: (module, which has main(argv, environ) -> exit code; what it does)
COMMANDS = {
    "bundle": ("pgolf.submit.bundling", "write the code that counts as one script, with a readable twin"),
    "unbundle": ("pgolf.submit.unbundle", "show what a packed script holds, without running it"),
    "submit": ("pgolf.submit.submit", "make a records folder out of the runs of several seeds, and check it"),
    "check": ("pgolf.submit.check", "check a records folder, anybody's: --run also runs its script"),
    "data": ("pgolf.dataset.command", "check a data set as a judge would; make one with case operators"),
    "eval": ("pgolf.rescore.command", "score an artifact or a checkpoint with any evaluator, and grids of them"),
    "audit": ("pgolf.audit.command", "whether a scorer, anybody's, is a probability distribution and causal"),
    "doctor": ("pgolf.doctor.command", "check this machine; --bench measures it, --compare RUN_DIR says what differs"),
    "size": ("pgolf.size.command", "bytes before training, from settings; or of an artifact, a run, a submission"),
}


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None) -> int:
    """Runs a command and returns the process's exit code. Errors and signals as in train_gpt.py."""
    return cli.main(argv, environ, dispatch)


def dispatch(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """The command that the first argument names. ConfigError when there is none of that name."""
    name, rest = (argv[0], argv[1:]) if argv else ("", [])
    if name in ("", "-h", "--help", "help"):
        print(help_text())
        return 0 if name else ConfigError.exit_code
    if name == "--version":
        print(pgolf.__version__)
        return 0
    if name not in COMMANDS:
        close = tree.did_you_mean(name, COMMANDS)
        raise ConfigError(f"{name} is not a command{close}\nThere are: {', '.join(COMMANDS)}")
    return import_module(COMMANDS[name][0]).main(rest, environ)


def help_text() -> str:
    """What --help prints."""
    return "\n".join(
        [
            "usage: python -m pgolf COMMAND [options]",
            "",
            *(f"  {name:10}{what}" for name, (_, what) in COMMANDS.items()),
            "",
            "`python -m pgolf COMMAND --help` says more. Training is `python train_gpt.py`, see its --help.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
