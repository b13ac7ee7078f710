"""What `pgolf data check` looks at: each check gives rows, and none of them hides what another has to say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from pgolf.data import case_ops, official, overlap, shards, sidecar, source
from pgolf.data.tokenizer import document_starts, document_texts, load_tokenizer, piece_bytes
from pgolf.doctor.rows import FAIL, NONE, OK, WARN, Row
from pgolf.errors import DataError

SECONDS = 20.0  # that the default check spends on training shards
SAMPLE = 1000  # val documents whose transform the default check turns back
FOLDED_SHARE = 0.01  # of documents that a folding normaliser may keep from coming back
LETTERS, CAPITALS = 10_000, 1e-4  # ASCII letters that make a verdict, and the least share of capitals in real text


@dataclass
class Subject:
    """The data set under check. vocab_size: the model's, None = as many as the tokenizer has pieces."""

    folder: Path
    tokenizer_path: Path
    vocab: int | None = None
    thorough: bool = False
    seconds: float = SECONDS

    @cached_property
    def sp(self):
        return load_tokenizer(self.tokenizer_path, self.vocab)

    @property
    def vocab_size(self) -> int:
        return self.vocab or self.sp.vocab_size()

    @cached_property
    def train_files(self) -> list[Path]:
        return shards.find_shards(self.folder, "train")

    @cached_property
    def val_files(self) -> list[Path]:
        return shards.find_shards(self.folder, "val")

    @cached_property
    def val(self) -> np.ndarray:
        """(n,) uint16 tokens of the val split, at least two."""
        for path in self.val_files:
            shards.scan_ids(path, self.vocab_size)
        tokens = np.concatenate([shards.read_shard(f) for f in self.val_files])
        if len(tokens) < 2:
            raise DataError(f"the val split in {self.folder} has {len(tokens)} tokens, expected at least 2")
        return tokens

    @cached_property
    def counted(self) -> source.Counted:
        return source.count_bytes(self.sp, self.vocab_size, self.val, self.val_files)

    @cached_property
    def documents(self) -> int:
        return int((self.val == self.sp.bos_id()).sum())


def run(subject: Subject) -> Iterator[Row]:
    """The rows of all checks, in order. A fault that several of them meet is told once."""
    told: set[str] = set()
    for name, check in CHECKS.items():
        try:
            yield from check(subject)
        except DataError as err:
            what, _, fix = str(err).partition("\nfix: ")
            if what in told:
                yield Row(name, NONE, "cannot be checked: see above")
            else:
                told.add(what)
                yield Row(name, FAIL, what.replace("\n", "; "), fix)


def tokenizer(s: Subject) -> Iterable[Row]:
    folds = "keeps the text as it is" if sidecar.keeps_text(s.sp) else "folds the text: bytes are of the folded one"
    operators = ", ".join(f"{case_ops.NAMES[c]} {i}" for c, i in case_ops.operator_pieces(s.sp).items())
    what = f"{s.sp.vocab_size():,} pieces, BOS {s.sp.bos_id()}, SHA-256 {shards.sha256(s.tokenizer_path)[:16]}; its "
    yield Row("tokenizer", OK, f"{what}normaliser {folds}" + (f"; case operators {operators}" if operators else ""))


def train_shards(s: Subject) -> Iterable[Row]:
    total = sum(shards.check_shard(path, s.vocab_size) for path in s.train_files)
    for path in s.train_files if s.thorough else {s.train_files[0], s.train_files[-1]}:
        shards.scan_ids(path, s.vocab_size)
    part = "all ids" if s.thorough else "all ids of the first and the last, 65,536 of the others"
    yield Row("train shards", OK, f"{len(s.train_files):,} shard(s), {total:,} tokens; headers and {part}")


def val_shards(s: Subject) -> Iterable[Row]:
    if same := set(s.train_files) & set(s.val_files):
        raise DataError(f"{min(same).name} serves as train and val\nfix: rename it")
    yield Row("val shards", OK, f"{len(s.val_files):,} shard(s), {len(s.val):,} tokens; headers and all ids")


def provenance(s: Subject) -> Iterable[Row]:
    """Marks of the export whose training data held val documents, and what a manifest says."""
    if mark := official.leak_mark(str(s.folder.absolute()), len(s.train_files)):
        yield Row("provenance", WARN, mark, "the row `overlap` decides; run it with --all")
        return
    for path in (s.folder / "manifest.json", s.folder.parent / "manifest.json"):
        found = _docs_val(path)
        if found is not None and found != s.documents:
            what = f"{path} says {found:,} val documents, the split has {s.documents:,}"
            yield Row("provenance", FAIL, what, "fetch manifest and shards of one export")
            return
        if found is not None:
            yield Row("provenance", OK, f"{path.name} has the split's {found:,} val documents")
            return
    yield Row("provenance", OK, f"{len(s.train_files):,} train shard(s), no mark of a known faulty export")


def _docs_val(path: Path) -> int | None:
    try:
        found = json.loads(path.read_bytes())
        value = found.get("docs_val") if isinstance(found, dict) else None
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, int) else None


def documents(s: Subject) -> Iterable[Row]:
    if s.val[0] != s.sp.bos_id():
        what = f"the val split begins with token {s.val[0]}, not with BOS ({s.sp.bos_id()}): the rest of a document"
        yield Row("documents", WARN, f"{what}; {s.documents:,} more follow", "begin the split with a document")
        return
    lengths = np.diff(np.append(document_starts(s.sp, s.val), len(s.val))) - 1
    empty = f"; {(lengths == 0).sum():,} are empty" if (lengths == 0).any() else ""
    middle = f"{np.median(lengths):,.0f} tokens in the middle, {lengths.max():,} at most"
    yield Row("documents", OK, f"{s.documents:,} val documents, BOS first; {middle}{empty}")


def byte_paths(s: Subject) -> Iterable[Row]:
    total = int(s.counted.per_token[1:].sum(dtype=np.int64))
    ratio = f"{total / (len(s.val) - 1):.6f} bytes per token"
    if s.counted.proof is None:
        what = f"{total:,} bytes, {ratio}; table and pieces agree in each of {s.documents:,} documents"
        yield Row("bytes", OK, what)
        yield Row("sidecar", NONE, "none: bytes come from the tokenizer's pieces")
        return
    what = f"{total:,} bytes, {ratio}; from the byte sidecar"
    yield Row("bytes", OK, what)
    yield Row("sidecar", OK, str(s.counted.proof))


def official_split(s: Subject) -> Iterable[Row]:
    split = source.split_facts(s.sp, s.vocab_size, s.val, s.val_files, s.counted)
    told = official.verify(split).removeprefix("official: ")
    yield Row("official", OK if official.is_candidate(split) else NONE, told)


def overlaps(s: Subject) -> Iterable[Row]:
    found = overlap.check(s.val, s.train_files, s.sp.bos_id(), None if s.thorough else s.seconds)
    what = f"{found}; longest run of neighbours {found.longest_run} ({found.seconds:.1f} s)"
    if not found.documents:
        yield Row("overlap", WARN, "no val documents to look up: the split has no BOS", "make the data with BOS")
    elif found.leaks:
        fix = "train on an export whose training data hold no val documents; scores of this one are void"
        yield Row("overlap", FAIL, what, fix)
    elif found.noted:
        yield Row("overlap", WARN, what, "more than repetition in crawled text explains well: look at some of them")
    else:
        yield Row("overlap", OK, what)


def transform(s: Subject) -> Iterable[Row]:
    """Case operators must come back from their decoder; text without them must not have lost its capitals."""
    if case_ops.operator_pieces(s.sp):
        yield _round_trip(s)
        return
    text = piece_bytes(s.sp)
    count = np.bincount(s.val, minlength=len(text))[: len(text)]
    letters, capitals = (
        int(sum(n * sum(test(c) for c in chr_of(piece)) for n, piece in zip(count.tolist(), text, strict=True) if n))
        for test in (str.isalpha, str.isupper)
    )
    if letters >= LETTERS and capitals < CAPITALS * letters:
        what = f"{capitals:,} of {letters:,} ASCII letters are capitals: the text was case-folded, which loses bytes"
        yield Row("transform", FAIL, what, "use a lossless transform: python -m pgolf data case-ops")
        return
    yield Row("transform", OK, f"none; {capitals:,} of {letters:,} ASCII letters are capitals")


def chr_of(piece: bytes) -> str:
    """The ASCII characters of a piece."""
    return piece.decode("ascii", "ignore")


def _round_trip(s: Subject) -> Row:
    n = len(document_starts(s.sp, s.val))
    step = 1 if s.thorough else max(n // SAMPLE, 1)
    strict, tried, failed, first = sidecar.keeps_text(s.sp), 0, 0, ""
    for i, text in enumerate(document_texts(s.sp, s.val)):
        if i % step:
            continue
        tried += 1
        if why := _not_kept(text):
            failed += 1
            first = first or f"document {i:,}: {why}"
    what = f"{tried - failed:,} of {tried:,} val documents come back from the case operators (of {n:,})"
    if not failed:
        return Row("transform", OK, what)
    what = f"{what}; first {first}"
    if strict or failed > FOLDED_SHARE * tried:
        return Row("transform", FAIL, what, "make the data again; a transform that is not lossless is not accepted")
    return Row("transform", OK, f"{what}, as the tokenizer's normaliser folds text")


def _not_kept(text: bytes) -> str:
    try:
        encoded = text.decode()
        return "" if case_ops.encode(case_ops.decode(encoded)) == encoded else "another text"
    except UnicodeDecodeError as err:
        return f"no UTF-8 at byte {err.start:,}"
    except DataError as err:
        return str(err).splitlines()[0]


CHECKS: dict[str, Callable[[Subject], Iterable[Row]]] = {
    "tokenizer": tokenizer,
    "train shards": train_shards,
    "val shards": val_shards,
    "provenance": provenance,
    "documents": documents,
    "bytes": byte_paths,
    "official": official_split,
    "overlap": overlaps,
    "transform": transform,
}
