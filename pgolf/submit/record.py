"""submission.json: its fields, the names that others use for them, and a reader that says where something is wrong."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from pgolf.errors import ArtifactError

NAME = "submission.json"
MAX_BYTES = 1 << 20
MAX_SEED = 2**63

# our name: what else it is called in public submissions
ALIASES = {
    "bytes_total": ("artifact_bytes", "total_bytes", "artifact_bytes_max", "bytes", "total_submission_size"),
    "bytes_code": ("code_bytes", "code_size"),
    "bytes_model": ("model_bytes", "bytes_model_compressed", "compressed_model_bytes"),
    "github_id": ("github", "github_user", "github_username"),
    "val_bpb_std": ("std_bpb", "bpb_std"),
    "val_loss_std": ("std_loss",),
    "seed_results": ("results", "per_seed", "runs"),
}
SEED_ALIASES = {
    "train_wallclock_ms": ("train_time_ms", "train_ms", "wallclock_ms"),
    "eval_time_s": ("eval_time_seconds", "eval_seconds", "eval_s"),
    "steps": ("step_stop", "train_steps"),
    "artifact_bytes": ("bytes_total", "total_bytes"),
}
SUMMARIES = ("mean", "std", "avg", "average")  # beside the seeds, in some
REQUIRED = ("author", "github_id", "name", "date", "val_bpb")


@dataclass(frozen=True)
class SeedScore:
    """One seed's entry; None where it has no such number."""

    val_bpb: float | None = None
    val_loss: float | None = None
    artifact_bytes: int | None = None  # code and model together
    train_wallclock_ms: float | None = None
    eval_time_s: float | None = None
    steps: int | None = None


@dataclass
class Record:
    """A submission.json. raw: as it stands. problems: (path, what is wrong there), for all fields that we know."""

    raw: dict[str, Any]
    author: str | None = None
    github_id: str | None = None
    name: str | None = None
    date: str | None = None
    track: str | None = None
    val_bpb: float | None = None
    val_loss: float | None = None
    val_bpb_std: float | None = None
    val_loss_std: float | None = None
    bytes_total: int | None = None
    bytes_code: int | None = None
    bytes_model: int | None = None
    seeds: list[int] = field(default_factory=list)
    seed_results: dict[int, SeedScore] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


def load(data: bytes) -> Record:
    """The record in a file's bytes. Raises ArtifactError when it is no JSON object, or with all that is wrong in it."""
    record = parse(data)
    if record.problems:
        told = "".join(f"\n  {path}: {what}" for path, what in record.problems)
        raise ArtifactError(f"{NAME}: {len(record.problems)} problems:{told}")
    return record


def parse(data: bytes) -> Record:
    """The same, with the problems of fields in the record. Raises ArtifactError only when there is no JSON object."""
    if len(data) > MAX_BYTES:
        raise ArtifactError(f"{NAME}: {len(data):,} bytes, expected a page of JSON, at most {MAX_BYTES:,}")
    try:
        raw = json.loads(
            data.decode("utf-8-sig"), parse_constant=_no_constant, parse_int=_integer, object_pairs_hook=_object
        )
    except (ValueError, RecursionError) as err:
        raise ArtifactError(f"{NAME}: no JSON: {err}") from err
    if not isinstance(raw, dict):
        raise ArtifactError(f"{NAME}: $: expected an object, got {_kind(raw)}")
    record = Record(raw)
    _Reader(record).fill()
    return record


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def _integer(text: str) -> int:
    if (
        len(text) > 30
    ):  # Python takes quadratic time for long ones, and refuses those of 4,300 digits with its own words
        raise ValueError(f"an integer of {len(text):,} digits")
    return int(text)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) < len(pairs):
        raise ValueError("a name stands twice in one object; which one counts?")
    return out


class _Reader:
    """Fills a record from its raw values and notes what is wrong with them."""

    def __init__(self, record: Record):
        self.record = record

    def fill(self) -> None:
        record, raw = self.record, self.record.raw
        for name in REQUIRED:
            if find(raw, name, ALIASES) is None:
                self.complain(f"$.{name}", "missing")
        for name in ("author", "github_id", "name", "date", "track"):
            setattr(record, name, self.value(raw, "$", name, ALIASES, text))
        for name in ("val_bpb", "val_loss"):
            setattr(record, name, self.value(raw, "$", name, ALIASES, positive))
        for name in ("val_bpb_std", "val_loss_std"):
            setattr(record, name, self.value(raw, "$", name, ALIASES, spread))
        for name in ("bytes_total", "bytes_code", "bytes_model"):
            setattr(record, name, self.value(raw, "$", name, ALIASES, count))
        if record.date is not None and not is_date(record.date):
            self.complain("$.date", f"expected YYYY-MM-DD, got {record.date!r}")
        self.seeds()

    def complain(self, path: str, what: str) -> None:
        self.record.problems.append((path, what))

    def value(
        self, box: Mapping[str, Any], at: str, name: str, aliases: Mapping[str, tuple[str, ...]], kind: Callable
    ) -> Any:
        """The field under its own or another's name, as `kind` takes it; None and a complaint when it cannot."""
        found = find(box, name, aliases)
        if found is None:
            return None
        try:
            return kind(box[found])
        except ValueError as err:
            self.complain(f"{at}.{found}", str(err))
            return None

    def seeds(self) -> None:
        """`seeds` as a list or a map, `seed_results` as a map from seed to an object, or a list of objects."""
        record, raw = self.record, self.record.raw
        listed = raw.get("seeds")
        results_name = find(raw, "seed_results", ALIASES)
        results = raw[results_name] if results_name else None
        if isinstance(listed, dict) or (isinstance(listed, list) and any(isinstance(x, dict) for x in listed)):
            results, results_name = (results, results_name) if results is not None else (listed, "seeds")
            listed = None
        if isinstance(listed, list):
            for i, item in enumerate(listed):
                self.seed(f"$.seeds[{i}]", item, record.seeds)
        elif listed is not None and not isinstance(listed, int):
            self.complain("$.seeds", f"expected a list or an object, got {_kind(listed)}")
        if isinstance(results, dict):
            named = {key: row for key, row in results.items() if key not in SUMMARIES}
            rows = [(f"$.{results_name}.{key}", key, row) for key, row in named.items()]
        elif isinstance(results, list):
            rows = [
                (f"$.{results_name}[{i}]", row.get("seed") if isinstance(row, dict) else None, row)
                for i, row in enumerate(results)
            ]
        else:
            rows = []
            if results is not None:
                self.complain(f"$.{results_name}", f"expected an object or a list, got {_kind(results)}")
        self.results(rows)
        if not record.seeds:
            record.seeds = list(record.seed_results)

    def seed(self, at: str, value: Any, into: list[int]) -> None:
        number = re.fullmatch(r"(?:seed[ _-]?)?(\d{1,19})", value) if isinstance(value, str) else None
        if number:
            value = int(number[1])
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < MAX_SEED:
            self.complain(at, f"expected a seed, got {_kind(value)}")
        elif value in into:
            self.complain(at, f"seed {value} stands there twice")
        else:
            into.append(value)

    def results(self, rows: list[tuple[str, Any, Any]]) -> None:
        for at, key, row in rows:
            seen = list(self.record.seed_results)
            before = len(seen)
            self.seed(at, key, seen)
            if len(seen) == before:
                continue
            if isinstance(row, (int, float)) and not isinstance(row, bool):
                row = {"val_bpb": row}
            if not isinstance(row, dict):
                self.complain(at, f"expected an object, got {_kind(row)}")
                continue
            kinds = {"val_bpb": positive, "val_loss": positive, "artifact_bytes": count, "train_wallclock_ms": positive,
                     "eval_time_s": positive, "steps": count}  # fmt: skip
            values = {name: self.value(row, at, name, SEED_ALIASES, kind) for name, kind in kinds.items()}
            self.record.seed_results[seen[-1]] = SeedScore(**values)


def find(box: Mapping[str, Any], name: str, aliases: Mapping[str, tuple[str, ...]]) -> str | None:
    """The name under which `box` has the field; None without it. null counts as absent."""
    return next((n for n in (name, *aliases.get(name, ())) if box.get(n) is not None), None)


def text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"expected a text, got {_kind(value)}")
    return value


def positive(value: Any) -> float:
    """A finite number above zero. Raises ValueError."""
    number = spread(value)
    if number == 0:
        raise ValueError("expected a number above zero, got 0")
    return number


def spread(value: Any) -> float:
    """A finite number, zero or more. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {_kind(value)}")
    number = float(value) if abs(value) < 1e300 else math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"expected a finite number, zero or more, got {_kind(value)}")
    return number


def count(value: Any) -> int:
    """A whole number above zero. Raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**53:
        raise ValueError(f"expected a whole number above zero, got {_kind(value)}")
    return value


def is_date(value: str) -> bool:
    """Whether it begins with a date that exists, as YYYY-MM-DD; a time may follow."""
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}(?:[T ][\d:.]+(?:Z|[+-]\d{2}:?\d{2})?)?", value, re.ASCII):
        return False
    try:
        date.fromisoformat(value[:10])
    except ValueError:
        return False
    return True


def _kind(value: Any) -> str:
    """A value for a message: short, and told by its type where it is large."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    shown = json.dumps(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
