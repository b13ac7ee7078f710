"""The corpus that needs no network: Python's own standard library, tokenised into shards on first use.

A document is one source file (about 730 files, 12 MB with Python 3.11). Which split it belongs to is decided by a hash
of its path, so a new Python version moves no document from val to train. A build takes a few seconds, is verified by
SHA-256 whenever it is used again, and is published by renaming a whole folder, so it is either complete or absent.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pgolf.data.shards import sha256, write_shard, write_synced
from pgolf.data.tokenizer import SPACE_MARK, sentencepiece
from pgolf.errors import DataError, SetupError

FORMAT_VERSION = 2  # of the corpus: raise it when documents, split or tokenizer settings change
VAL_PARTS = 16  # one document in 16 is val: 5.4 % of the bytes with Python 3.11 (one in 20 would be 2.2 %)
CHUNK_BYTES = 4000  # of tokenizer training text; SentencePiece drops sentences above 4192 bytes
STALE_SECONDS = 86400  # age from which an abandoned build folder is removed
SHARDS = {"train": "fineweb_train_000000.bin", "val": "fineweb_val_000000.bin"}
TOKENIZER, MANIFEST = "tokenizer.model", "manifest.json"
# Tests repeat the code they test, the rest is other people's: neither is the language of the library
SKIPPED_FOLDERS = {
    "test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "_bundled", "_vendor",
}  # fmt: skip


class Document(NamedTuple):
    """One source file: its path below the root, with slashes, and its text, which encodes to the file's bytes."""

    name: str
    text: str


@dataclass(frozen=True)
class CorpusPaths:
    """Where a corpus lies. manifest: the content of manifest.json (hashes and counts per split, versions)."""

    data_dir: Path
    tokenizer_path: Path
    manifest: dict


def build_or_load(
    cache_dir: str | Path = "",
    vocab_size: int = 1024,
    progress: Callable[[str], None] = lambda line: None,
    *,
    root: str | Path | None = None,
) -> CorpusPaths:
    """The corpus in the cache, built when it is missing or damaged. `progress` is called with one line per stage.

    cache_dir: empty = ~/.cache/pgolf. root: folder of Python sources; None = the standard library. Safe to call from
    several processes at once: each builds, the first one's folder stays. Raises SetupError when the cache cannot be
    written or sentencepiece is missing, DataError when there are no sources or the vocabulary does not fit them.
    """
    root = Path(root if root is not None else sysconfig.get_path("stdlib"))
    cache = Path(cache_dir).expanduser() if cache_dir else Path.home() / ".cache" / "pgolf"
    files = source_files(root)
    target = cache / f"corpus-{_key(root, files, vocab_size)}"
    found = _load(target)
    if found is None:
        if target.exists():
            progress(f"the corpus in {target} is damaged: building it again")
        else:
            progress(f"building the embedded corpus (once) in {target}")
        found = _build(root, files, target, vocab_size, progress)
    return found


def source_files(root: Path) -> list[Path]:
    """The library's own .py files below `root`, sorted by relative path: no tests, no vendored or generated code."""
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [n for n in subfolders if n not in SKIPPED_FOLDERS]
        # _sysconfigdata_*.py holds the build machine's paths: it alone would make the corpus differ between machines
        files += [Path(folder, n) for n in names if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    return sorted(files, key=lambda p: p.relative_to(root).as_posix())


def read_documents(root: Path, files: list[Path]) -> list[Document]:
    """The files as documents, byte for byte. Left out: empty ones, and those whose bytes tokens could not give back.

    These are files that are not UTF-8, that hold U+2581 (it would come back as a space) or NUL, or that begin with a
    space (which BPB counting takes to be the tokenizer's).
    """
    documents = []
    for path in files:
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text and not text.startswith(" ") and SPACE_MARK not in text and "\0" not in text:
            documents.append(Document(path.relative_to(root).as_posix(), text))
    return documents


def split_of(name: str) -> str:
    """ "val" for about one path in 16, "train" for the others."""
    return "train" if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % VAL_PARTS else "val"


def train_tokenizer(documents: list[Document], vocab_size: int, symbols: Sequence[str] = ()) -> bytes:
    """A SentencePiece BPE model of exactly `vocab_size` pieces, serialised; the same text gives the same bytes.

    The challenge's settings but for three, because source code is no web text. Its normaliser (nmt_nfkc) turns newlines
    and tabs into spaces and folds runs of spaces, which would leave no Python at all; with "identity" and no folding,
    tokens stand for the file's very bytes, so the BPB denominator is the file size. And pieces of several spaces are
    allowed: else every space of an indentation is a token, 35 % of all (1.77 bytes a token instead of 2.50). `symbols`
    are pieces of their own right behind the specials, never split nor merged.
    """
    model = io.BytesIO()
    try:
        sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=_chunks(documents), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            character_coverage=0.999, byte_fallback=True, split_digits=True, add_dummy_prefix=False,
            normalization_rule_name="identity", remove_extra_whitespaces=False, allow_whitespace_only_pieces=True,
            pad_id=0, bos_id=1, eos_id=2, unk_id=3, hard_vocab_limit=False, minloglevel=2, num_threads=1,
            user_defined_symbols=list(symbols),
        )  # fmt: skip
        pieces = sentencepiece().SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    except RuntimeError as err:  # too few for the bytes and the characters
        raise DataError(_no_vocabulary(vocab_size, str(err).splitlines()[-1])) from err
    if pieces != vocab_size:  # the soft limit of the challenge's settings: the text has no more pieces to merge
        raise DataError(_no_vocabulary(vocab_size, f"the text yields {pieces}"))
    return model.getvalue()


def _no_vocabulary(vocab_size: int, reason: str) -> str:
    return (
        f"the embedded corpus cannot have a vocabulary of {vocab_size} pieces: {reason}\n"
        "fix: set model.embed.vocab_size between 512 and 8192 (1024 is the challenge's)"
    )


def _chunks(documents: list[Document]) -> Iterator[str]:
    """Whole lines, up to CHUNK_BYTES together, so that newlines and indentation can become part of pieces."""
    for _, text in documents:
        lines, size = [], 0
        for line in text.splitlines(keepends=True):
            length = len(line.encode())
            if lines and size + length > CHUNK_BYTES:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(line)
            size += length
        yield "".join(lines)


def _key(root: Path, files: list[Path], vocab_size: int) -> str:
    """Names a corpus by what goes into it: Python version, files and their sizes, vocabulary, format."""
    listing = [(p.relative_to(root).as_posix(), p.stat().st_size) for p in files]
    text = json.dumps([platform.python_version(), FORMAT_VERSION, vocab_size, listing])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _load(target: Path) -> CorpusPaths | None:
    """The corpus at `target` if every file of it has its SHA-256, the manifest too (about 15 ms); None otherwise."""
    try:
        manifest = json.loads((target / MANIFEST).read_bytes())
        intact = manifest["self"] == _digest(manifest) and manifest["sha256"] == _hashes(target)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        return None
    return CorpusPaths(target, target / TOKENIZER, manifest) if intact else None


def _hashes(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the files of a corpus. These names and no others: a damaged manifest could name any file."""
    return {name: sha256(folder / name) for name in (*SHARDS.values(), TOKENIZER)}


def _digest(manifest: dict) -> str:
    """SHA-256 of what the manifest says, which it keeps under "self"."""
    facts = {key: value for key, value in manifest.items() if key != "self"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _build(root: Path, files: list[Path], target: Path, vocab_size: int, progress: Callable) -> CorpusPaths:
    """Builds beside `target`, then renames. A killed build leaves a hidden folder that is swept after a day."""
    began = time.monotonic()
    temp = _temp_folder(target)
    try:
        manifest = _write_corpus(temp, root, files, vocab_size, progress)
        _publish(temp, target)
    except OSError as err:
        raise SetupError(
            f"the corpus cannot be written to {target.parent}: {err.strerror or err}\n"
            "fix: free about 20 MB there, or set data.cache_dir to another folder"
        ) from err
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    found = _load(target)
    if found is None:
        raise SetupError(f"the corpus in {target} changed just after it was written\nfix: set data.cache_dir elsewhere")
    counts = ", ".join(f"{manifest['splits'][s]['tokens']:,} {s}" for s in SHARDS)
    progress(f"corpus ready: {counts} tokens ({time.monotonic() - began:.1f} s)")
    return found


def _temp_folder(target: Path) -> Path:
    """A fresh hidden folder beside `target`; sweeps those that killed builds left more than a day ago."""
    cache = target.parent
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(".building-*"):
            if time.time() - old.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        return Path(tempfile.mkdtemp(prefix=".building-", dir=cache))
    except OSError as err:
        raise SetupError(
            f"the corpus cache {cache} is not writable: {err.strerror or err}\n"
            "fix: set data.cache_dir to a folder that you can write to"
        ) from err


def _write_corpus(folder: Path, root: Path, files: list[Path], vocab_size: int, progress: Callable) -> dict:
    """Writes shards, tokenizer and, last, the manifest into `folder`; returns the manifest."""
    progress(f"reading {len(files)} source files in {root}")
    documents = read_documents(root, files)
    splits = {split: [d for d in documents if split_of(d.name) == split] for split in SHARDS}
    if not all(splits.values()):
        raise DataError(
            f"no embedded corpus: {len(documents)} usable Python sources in {root}, expected some hundred\n"
            "fix: install Python with its sources, or set data.path to a folder of shards"
        )
    progress(f"training a tokenizer of {vocab_size} pieces")
    model = train_tokenizer(splits["train"], vocab_size)
    sp = sentencepiece().SentencePieceProcessor(model_proto=model)
    write_synced(folder / TOKENIZER, model)
    counts = {}
    for split, name in SHARDS.items():
        size = sum(len(d.text.encode()) for d in splits[split])
        progress(f"tokenising {split}: {len(splits[split])} documents, {size / 1e6:.1f} MB")
        tokens = _tokenise(sp, splits[split])
        write_shard(folder / name, tokens)
        counts[split] = {"documents": len(splits[split]), "bytes": size, "tokens": len(tokens)}
    manifest = {
        "format": FORMAT_VERSION,
        "python": platform.python_version(),
        "sentencepiece": sentencepiece().__version__,
        "vocab_size": vocab_size,
        "splits": counts,
        "sha256": _hashes(folder),
    }
    manifest["self"] = _digest(manifest)
    write_synced(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _tokenise(sp, documents: list[Document]) -> np.ndarray:
    """BOS and the tokens of each document, no EOS: (n,) uint16."""
    encoded = sp.encode([d.text for d in documents], add_bos=True, num_threads=2)
    return np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])


def _publish(temp: Path, target: Path) -> None:
    """Renames `temp` to `target`. Another process's finished folder stays; a damaged one is moved out of the way."""
    os.chmod(temp, 0o755)  # mkdtemp makes it private, but a cache may be shared
    for _ in range(3):
        try:
            os.rename(temp, target)
            return
        except OSError:
            if not target.exists():
                raise
            if _load(target) is not None:
                return
        aside = Path(tempfile.mkdtemp(prefix=".building-", dir=target.parent))
        os.rename(target, aside / "damaged")
        shutil.rmtree(aside, ignore_errors=True)
    raise FileExistsError(f"{target} is in the way")
