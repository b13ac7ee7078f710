"""Errors that a user can act on. Each class fixes the process's exit code; `docs/errors.md` lists them.

A message says what is wrong, what was got, what was expected and what mends it. `train_gpt.py` prints it without a
traceback unless `--debug` is given.
"""


class PgolfError(Exception):
    """Base of all errors meant for users. `exit_code` is the process's exit status."""

    exit_code = 1


class ConfigError(PgolfError, ValueError):
    """A setting that does not exist, has the wrong type or cannot work with the others."""

    exit_code = 2


class SetupError(PgolfError):
    """The environment lacks something: a package, a device, a writable folder."""

    exit_code = 3


class DataError(PgolfError):
    """Shards, tokenizer or corpus are missing, damaged or do not fit together."""

    exit_code = 4


class BudgetError(PgolfError):
    """Over the byte or the time budget."""

    exit_code = 5


class NumericalError(PgolfError):
    """A non-finite loss or gradient, or a switch that had no effect."""

    exit_code = 6


class OutOfMemoryError(PgolfError):
    """The device ran out of memory."""

    exit_code = 7


class DistributedError(PgolfError):
    """A rank failed, hung or disagreed with the others."""

    exit_code = 8


class ArtifactError(PgolfError):
    """An artifact or bundle that cannot be trusted: truncated, altered or foreign."""

    exit_code = 9


class Stopped(PgolfError):
    """A signal asked the run to stop, and it did so at a safe point."""

    exit_code = 143  # SIGTERM's; an instance has that of its signal

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code
