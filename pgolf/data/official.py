"""The published val split in numbers, and what a wrong number has meant before.

The challenge's split is the first 50,000 documents of its FineWeb sample. Whatever tokenizes it, the bytes are the
same: of the text as the organisers' normaliser leaves it or, with a byte sidecar, of the text itself. Source of the
numbers: logs of the challenge's public records, and audits of their byte counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pgolf.errors import DataError

DOCUMENTS = 50_000
SEQ_LEN = 2048  # the records drop the targets behind the last whole sequence of this length
NORMALISED_BYTES, ORIGINAL_BYTES = 151_080_891, 151_080_645  # of all targets, none dropped
NEAR = 1e-4  # by which the bytes of another tokenization of the split may differ: truncation alone makes 5e-5
BOS = 1


class Export(NamedTuple):
    """A published tokenization. targets, bytes: of the stream truncated to whole sequences of SEQ_LEN."""

    name: str
    vocab_size: int
    targets: int
    bytes: int
    case_operators: bool = False
    exact: bool = True  # whether logs print the bytes; else they are computed from printed scores

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.targets


OFFICIAL = (
    Export("sp1024", 1024, 62_021_632, 151_080_363),
    Export("sp4096", 4096, 45_508_608, 151_074_053, exact=False),
    Export("sp4096, second export", 4096, 45_514_752, 151_074_924, exact=False),
    Export("sp8192", 8192, 40_540_160, 151_078_222),
    Export("case-operator sp8192", 8192, 47_851_520, 151_074_499, case_operators=True),
)
# truncated targets of val splits that were wrong: what had happened
WRONG_TARGETS = {
    9_662_464: "a truncated val file (19 MB instead of 95.7 MB), as in the first version of PR #1923",
    36_562_944: "a val split made by parallel workers that each took their own first documents, as in PR #2109",
}
LEAKY_SHARDS = 1000  # train shards above which an export has 10 M tokens a shard, as the leaking one had (1499)
# (lowest and highest ratio of counted to true bytes, what had happened)
WRONG_RATIOS = (
    (1.0085, 1.0115, "the over-count of 1.0 % of PR #1795"),
    (1.0400, 1.0430, "undecodable tokens counted as the three bytes of U+FFFD: +4.13 %, as in PR #1143"),
    (1.1550, 1.1800, "the leading space counted twice: +17 %, as in PR #1545"),
    (1.2000, 1.3000, "no lone space piece, so a space costs three byte pieces: bits per byte 20 % too low, PR #897"),
)


@dataclass(frozen=True)
class Split:
    """What is known of a val split. named: its shards are called fineweb_val_*, as the challenge's are.

    bytes: of all targets. bytes_of(t): of the first t targets.
    """

    vocab_size: int
    tokens: int
    documents: int
    first_token: int
    bytes: int
    bytes_of: Callable[[int], int]
    case_operators: bool = False
    sidecar: bool = False  # bytes are of the text itself, not of the normalised text
    named: bool = True

    @property
    def truncated(self) -> int:
        """Targets in whole sequences."""
        return max(self.tokens - 1, 0) // SEQ_LEN * SEQ_LEN


def leak_mark(path: str, train_shards: int) -> str:
    """The mark of the export whose training data held val documents 10,000 to 49,999 (PR #2127); "" without one.

    A mark is no proof: the documents themselves decide (`pgolf.data.overlap`).
    """
    if "datasets/datasets" in path.replace("\\", "/"):
        return "a data path with datasets/datasets: the export whose training shards hold validation documents"
    if train_shards > LEAKY_SHARDS:
        what = f"{train_shards:,} training shards: an export of 10 M tokens a shard"
        return f"{what}, whose training data held validation documents"
    return ""


def export_of(split: Split) -> Export | None:
    """The published export with this vocabulary and number of targets."""
    known = ((e.vocab_size, e.targets, e.case_operators) for e in OFFICIAL)
    return dict(zip(known, OFFICIAL, strict=True)).get((split.vocab_size, split.truncated, split.case_operators))


def is_candidate(split: Split) -> bool:
    """Whether a split claims to be the challenge's.

    It has an export's numbers; or its name, and 50,000 documents of about the right size or the number of targets of a
    split that is known to be wrong. A part of the split, cut for a quick run, claims nothing.
    """
    alike = split.documents == DOCUMENTS and 0.5 < split.bytes / NORMALISED_BYTES < 2
    return export_of(split) is not None or (split.named and (alike or split.truncated in WRONG_TARGETS))


def verify(split: Split) -> str:
    """One line on what the split is. Raises DataError when it claims to be the challenge's and is not to the byte."""
    if not is_candidate(split):
        return "official: not the challenge's val split; scores do not compare with its records"
    export = export_of(split)
    problem = _problem(split, export)
    if problem:
        raise DataError(
            f"this is not the challenge's val split, though it looks like it: {problem}\n"
            "fix: fetch the export and its tokenizer again (python -m pgolf.data.download); a data set of your own "
            "should not name its shards fineweb_val_*"
        )
    name = f"the {export.name} export" if export else "another tokenization"
    return f"official: {name} of the challenge's val split, {split.documents:,} documents, {split.bytes:,} bytes"


def _problem(split: Split, export: Export | None) -> str:
    if split.truncated in WRONG_TARGETS and export is None:
        return f"{split.truncated:,} targets is the mark of {WRONG_TARGETS[split.truncated]}"
    if split.documents != DOCUMENTS:
        none = "; BOS was left out, as in a preparation script of PR #1736" if not split.documents else ""
        return f"{split.documents:,} documents (BOS tokens), expected {DOCUMENTS:,}{none}"
    if split.first_token != BOS:
        return f"it begins with token {split.first_token}, expected BOS ({BOS})"
    if export:
        counted = split.bytes_of(export.targets)
        to_the_byte = export.exact and split.sidecar == export.case_operators
        if abs(counted - export.bytes) > (0 if to_the_byte else NEAR * export.bytes):
            what = f"{counted:,} bytes in the first {export.targets:,} targets, {export.name} has {export.bytes:,}"
            return f"{what} ({_percent(counted, export.bytes)}){_known_ratio(counted / export.bytes)}"
    whole = ORIGINAL_BYTES if split.sidecar else NORMALISED_BYTES
    if abs(split.bytes - whole) > NEAR * whole:
        what = f"{split.bytes:,} bytes, expected {whole:,} within {100 * NEAR:g} %"
        return f"{what} ({_percent(split.bytes, whole)}){_known_ratio(split.bytes / whole)}"
    return ""


def _percent(counted: int, true: int) -> str:
    return f"{counted - true:+,} bytes, {100 * (counted / true - 1):+.2f} %"


def _known_ratio(ratio: float) -> str:
    """What this ratio of counted to true bytes has meant before; "" when it is new."""
    return next((f": the mark of {what}" for low, high, what in WRONG_RATIOS if low <= ratio <= high), "")
