"""The byte budget: artifact and code together, counted from the literal bytes. The trainer, the packer and the `size`
command all use `account`, so that a log cannot disagree with a file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pgolf.artifact.pack import measure
from pgolf.errors import ArtifactError, BudgetError

LIMIT = 16_000_000  # decimal bytes; the challenge counts no MiB


@dataclass(frozen=True)
class SizeReport:
    """Sizes in bytes. `items` {what: bytes} adds up to `total_bytes`; `headroom` is negative when over the limit."""

    artifact_bytes: int
    code_bytes: int
    total_bytes: int
    headroom: int
    items: dict[str, int]

    def lines(self) -> list[str]:
        """For the console: every item, largest first, then the total."""
        rows = [*_largest(self.items), ("total", self.total_bytes)]
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


def check(report: SizeReport) -> None:
    """Raises BudgetError when the report is over the limit, with what would have to shrink."""
    if report.headroom >= 0:
        return
    largest = ", ".join(f"{name} {size:,} B" for name, size in _largest(report.items)[:3])
    raise BudgetError(
        f"{report.total_bytes:,} bytes of artifact and code, the limit is {LIMIT:,}: {-report.headroom:,} must go.\n"
        f"Largest: {largest}.\n"
        "Use a smaller model (model.plan.num_layers, model.mlp.mult), fewer bits (quant.embed=int6) or another codec."
    )


def _largest(items: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(items.items(), key=lambda item: (-item[1], item[0]))
