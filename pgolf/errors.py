"""Errors that a user can act on. Each class fixes the process's exit code; `docs/errors.md` lists them.

A message says what is wrong, what was got, what was expected and what mends it. `train_gpt.py` prints it without a
traceback unless `--debug` is given.
"""

LINE, LINES = 500, 40  # the longest line and the most lines of a message


def readable(text: str) -> str:
    """`text` fit for a terminal: a message quotes names and values, and a damaged file may hold anything.

    Long lines lose their middle, long lists their end; what is no printable character is written as its escape.
    """
    lines = text.split("\n")
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} lines more"]
    return "\n".join(_one_line(line) for line in lines)


def _one_line(line: str) -> str:
    if not line.isprintable():
        line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[: 20 * LINE])
    if len(line) > LINE:
        end = (LINE - 40) // 2
        line = f"{line[:end]} [{len(line) - 2 * end:,} characters] {line[-end:]}"
    return line


class PgolfError(Exception):
    """Base of all errors meant for users. `exit_code` is the process's exit status."""

    def __init__(self, message: str = ""):
        super().__init__(readable(message))

    exit_code = 1
    on_all_ranks = False  # whether every rank raises it, so that rank 0 alone should tell it


class ConfigError(PgolfError, ValueError):
    """A setting that does not exist, has the wrong type or cannot work with the others."""

    exit_code = 2
    on_all_ranks = True


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


class AuditError(PgolfError):
    """A scorer failed its audit, or an audit its negative controls."""

    exit_code = 10


class Stopped(PgolfError):
    """A signal asked the run to stop, and it did so at a safe point."""

    exit_code = 143  # SIGTERM's; an instance has that of its signal
    on_all_ranks = True

    def __init__(self, message: str, code: int):
        super().__init__(message)
        self.exit_code = code
