"""The byte budget: artifact and code together, counted from the literal bytes. The trainer, the packer and the `size`
command all use `account`, so that a log cannot disagree with a file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from pgolf.artifact.pack import measure
from pgolf.errors import ArtifactError, BudgetError

LIMIT = 16_000_000  # decimal bytes; the challenge counts no MiB


@dataclass(frozen=True)
class SizeReport:
    """Sizes in bytes. `items` {what: bytes} adds up to `total_bytes`; `headroom` is negative when over the limit.

    An item is "table", "code", or a group of stored parts, `role.kind.part`.
    """

    artifact_bytes: int
    code_bytes: int
    total_bytes: int
    headroom: int
    items: dict[str, int]

    def by_role(self) -> dict[str, int]:
        """The items of each role together, with "table" and "code"; adds up to `total_bytes` too."""
        out: dict[str, int] = {}
        for name, size in self.items.items():
            out[role_of(name)] = out.get(role_of(name), 0) + size
        return out

    def lines(self) -> list[str]:
        """For the console: every item, largest first, then the total."""
        rows = [*largest(self.items), ("total", self.total_bytes)]
        width = max(len(name) for name, _ in rows)
        out = [f"  {name:<{width}} {size:>12,} B {size / LIMIT:>7.2%}" for name, size in rows]
        state = f"{self.headroom:,} B left" if self.headroom >= 0 else f"{-self.headroom:,} B OVER"
        return [*out, f"  {'limit':<{width}} {LIMIT:>12,} B, {state}"]

    def to_dict(self) -> dict:
        """JSON values."""
        return asdict(self)


def account(artifact: bytes | str | Path, code: bytes) -> SizeReport:
    """Sizes of an artifact (its bytes or its path) and the code that ships with it.

    Raises ArtifactError when the artifact cannot be read or trusted.
    """
    if not isinstance(artifact, bytes):
        try:
            artifact = Path(artifact).read_bytes()
        except OSError as e:
            raise ArtifactError(f"cannot read the artifact {artifact}: {e.strerror}") from e
    total = len(artifact) + len(code)
    return SizeReport(len(artifact), len(code), total, LIMIT - total, {**measure(artifact), "code": len(code)})


def account_folder(folder: str | Path) -> tuple[SizeReport, dict[str, tuple[int, bool]]]:
    """Sizes of a run's or a submission's folder, and {file: (bytes, does it count)} of all that lies in it.

    What counts is the one artifact, *.pgolf, and every Python file beside it but the readable twin that nothing
    imports. A submission's folder has no artifact: then `bytes_model` of its submission.json counts, as stated. Raises
    ArtifactError when it is neither.
    """
    files = sorted(p for p in Path(folder).iterdir() if p.is_file())
    artifacts = [p for p in files if p.suffix == ".pgolf"]
    code = [p for p in files if p.suffix == ".py" and not p.stem.endswith("_readable")]
    told = _stated(Path(folder) / "submission.json")
    if not code or (len(artifacts) != 1 and (artifacts or told is None)):
        raise ArtifactError(
            f"{folder}: {len(artifacts)} artifacts (*.pgolf) and {len(code)} Python files, expected one artifact and "
            "the code that runs it, or a submission with bytes_model in its submission.json"
        )
    script = b"".join(p.read_bytes() for p in code)
    if artifacts:
        report = account(artifacts[0], script)
    else:
        total = told + len(script)
        report = SizeReport(told, len(script), total, LIMIT - total, {"model as stated": told, "code": len(script)})
    counted = {*artifacts, *code}
    return report, {p.name: (p.stat().st_size, p in counted) for p in files}


def _stated(path: Path) -> int | None:
    """The model's bytes according to a submission.json; None if it does not say."""
    try:
        told = json.loads(path.read_bytes())["bytes_model"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return told if type(told) is int and told > 0 else None


def check(report: SizeReport) -> None:
    """Raises BudgetError when the report is over the limit, with what would have to shrink."""
    if report.headroom >= 0:
        return
    most = ", ".join(f"{name} {size:,} B" for name, size in largest(report.items)[:3])
    raise BudgetError(
        f"{report.total_bytes:,} bytes of artifact and code, the limit is {LIMIT:,}: {-report.headroom:,} must go.\n"
        f"Largest: {most}.\n"
        "`python -m pgolf size RUN_DIR` names the three cheapest ways to save them."
    )


def role_of(item: str) -> str:
    """The role in the name of an item."""
    return item.partition(".")[0]


def largest(items: dict[str, int]) -> list[tuple[str, int]]:
    """(name, bytes), the largest first."""
    return sorted(items.items(), key=lambda item: (-item[1], item[0]))
