"""Token shards in the challenge's format: read, check and write.

A shard is 256 little-endian int32 (magic 20240520, version 1, token count n, zeros) and n little-endian uint16 token
ids, 1024 + 2n bytes in all. Shards of a split are consumed in the order of their names; a document may straddle two.
The format is the one of the challenge and of modded-nanogpt.
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import stat
from pathlib import Path

import numpy as np

from pgolf.errors import DataError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 1024
SPLITS = ("train", "val")
QUICK_IDS = 65536  # ids that a cheap check looks at: 128 KB, enough to notice a shard of another vocabulary
SCAN_IDS = 1 << 24  # ids per piece of a full scan: 32 MB

# First bytes of files that turn up under a shard's name, and what to call them
_FOREIGN = (
    (b"version https://git-lfs", "a Git-LFS pointer, not the file it points to"),
    (b"PAR1", "a parquet table"),
    (b"\x93NUMPY", "a NumPy .npy array"),
    (b"PK\x03\x04", "a zip archive (or .npz)"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"\x28\xb5\x2f\xfd", "a zstandard archive"),
    (b"<", "an HTML or XML page, probably a server's error message"),
    (b"{", "a JSON text, probably a server's error message"),
    (np.int32(20240801).astype("<i4").tobytes(), "an llm.c shard of 32-bit ids (magic 20240801)"),
)


def foreign_kind(head: bytes) -> str:
    """Names what a file that starts with `head` looks like, or returns "" when nothing is recognised."""
    if not head:
        return "an empty file"
    return next((kind for start, kind in _FOREIGN if head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(start)), "")


def near_names(path: Path) -> str:
    """What lies beside a path that is missing: a hint for messages, in one line."""
    parent = path.absolute().parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = sorted(p.name for p in parent.iterdir())
    close = difflib.get_close_matches(path.name, names, n=4, cutoff=0.5)
    shown = ", ".join(close or names[:8]) or "nothing"
    return f"{'did you mean' if close else 'there is'}, in {parent}: {shown}"


def find_shards(folder: str | Path, split: str) -> list[Path]:
    """The shards `*_{split}_*.bin` of `folder` ("train" or "val"), sorted by name; byte sidecars are left out.

    Raises DataError when the folder or the shards are missing.
    """
    if split not in SPLITS:
        raise ValueError(f"split={split!r} must be one of {', '.join(SPLITS)}")
    folder, pattern = Path(folder), f"*_{split}_*.bin"
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise DataError(
            f"data.path={folder} {what}; expected a folder with shards {pattern} (cwd {Path.cwd()})\n"
            f"fix: {near_names(folder)}; or leave data.path empty for the embedded corpus"
        )
    # fineweb_val_bytes_*.bin hold byte counts (PR #1729), and a plain glob for the val split would take them for tokens
    files = sorted(p for p in folder.glob(pattern) if "_bytes_" not in p.name)
    if not files:
        names = sorted(p.name for p in folder.iterdir())
        there = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"
        raise DataError(
            f"no {split} shards: {pattern} matches nothing in {folder} (cwd {Path.cwd()}); there is: {there}\n"
            "fix: point data.path at the folder of the .bin files, or fetch them: python -m pgolf.data.download sp1024"
        )
    return files


def check_shard(path: str | Path, vocab_size: int | None = None) -> int:
    """Checks size, magic and version, and with `vocab_size` the first 65,536 ids. Returns the number of tokens.

    Raises DataError, which names the format of a foreign file.
    """
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for a writer
            raise OSError(errno.EINVAL, "it is no regular file")
        size = status.st_size
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
    except OSError as err:
        raise DataError(f"shard {path} cannot be read: {err.strerror}\nfix: {near_names(path)}") from err
    header = np.frombuffer(raw[: len(raw) // 4 * 4], dtype="<i4")
    if len(header) < 3 or header[0] != MAGIC or header[1] != VERSION:
        got = foreign_kind(raw) or f"words {header[:2].tolist()}"
        raise DataError(
            f"{path} is no token shard: it starts with {got}; expected magic {MAGIC}, version {VERSION}\n"
            "fix: fetch or tokenise it again (python -m pgolf.data.download), and remove files of other kinds"
        )
    count = int(header[2])
    expected = HEADER_BYTES + 2 * count
    if count < 0 or size != expected:
        state = "truncated" if size < expected else "longer than its header says"
        raise DataError(
            f"shard {path} is {state}: {size:,} bytes; its header says {count:,} tokens, which is {expected:,} bytes\n"
            "fix: delete the file and fetch it again"
        )
    if vocab_size is not None:
        _check_ids(path, np.fromfile(path, "<u2", QUICK_IDS, offset=HEADER_BYTES), vocab_size, 0)
    return count


class Shard:
    """An opened shard of `len(shard)` ids; `shard[a:b]` reads a part of them, (b - a,) uint16. For one thread.

    Read and not mapped: when a file is cut, or its disk goes away, a map kills the process with SIGBUS and without a
    word, while a read says what is wrong. It costs no more (5 us against 9 for a window of 1025 ids in the page cache).
    The file stays open: where the system allows to remove it, the run reads on.
    """

    def __init__(self, path: str | Path):
        self.path, self._count = Path(path), check_shard(path)
        try:
            self._file = open(path, "rb")  # noqa: SIM115  as long as the shard lives
        except OSError as err:  # gone since it was checked, or more shards than files may be open (ulimit -n)
            raise DataError(f"shard {path} cannot be opened: {err.strerror}") from err

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(self._count)
        assert step == 1
        need = 2 * max(stop - start, 0)
        try:
            self._file.seek(HEADER_BYTES + 2 * start)
            raw, why = self._file.read(need), "the file has become shorter"
        except OSError as err:
            raw, why = b"", err.strerror or str(err)
        if len(raw) != need:
            raise DataError(
                f"shard {self.path}, tokens {start:,} to {stop:,} cannot be read: {why}; it was whole at the start\n"
                "fix: put the file back as it was, and go on from the last checkpoint (RESUME)"
            )
        return np.frombuffer(raw, "<u2")

    def __del__(self):
        if hasattr(self, "_file"):
            self._file.close()


def read_shard(path: str | Path) -> np.ndarray:
    """The shard's ids, (n,) uint16, header left out. Raises DataError like `check_shard`."""
    return Shard(path)[:]


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int, first: int) -> None:
    if len(ids) and int(ids.max()) >= vocab_size:
        at = int(np.argmax(ids >= vocab_size))
        raise DataError(
            f"shard {path}, position {first + at:,}: token id {int(ids[at])} but the vocabulary has {vocab_size} ids"
            f" (0..{vocab_size - 1})\nfix: set model.embed.vocab_size to that of the tokenizer which made the shards"
        )


def scan_ids(path: str | Path, vocab_size: int) -> None:
    """Looks at every id of a shard. Raises DataError with shard, position and id of the first one >= vocab_size."""
    ids = Shard(path)
    for first in range(0, len(ids), SCAN_IDS):
        _check_ids(Path(path), ids[first : first + SCAN_IDS], vocab_size, first)


def check_split(folder: str | Path, split: str, vocab_size: int) -> list[Path]:
    """Checks every shard's header and all ids of the first and the last shard, before a run starts and not hours in.

    Returns the shards. Raises DataError. A full scan of 10^8 ids takes about 0.02 s once the file is cached.
    """
    files = find_shards(folder, split)
    total = sum(check_shard(path, vocab_size) for path in files)
    if total < 2:
        raise DataError(
            f"the {split} split in {folder} has {total} tokens in {len(files)} shard(s), expected at least 2\n"
            "fix: fetch or tokenise it again"
        )
    for path in {files[0], files[-1]}:
        scan_ids(path, vocab_size)
    return files


def sha256(path: str | Path) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_synced(path: Path, *parts: bytes) -> None:
    """Writes a file that is either whole or absent: temporary name, fsync, rename."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temp.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def write_shard(path: str | Path, tokens) -> None:
    """Writes ids (n,), integers in 0..65535, as one shard; an interrupted write leaves no file behind.

    Raises ValueError on ids that do not fit uint16, or on 2**31 tokens and more.
    """
    ids = np.asarray(tokens)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"tokens must be a vector of integers, got {ids.dtype} of shape {ids.shape}")
    if len(ids) >= 2**31:
        raise ValueError(f"{len(ids):,} tokens do not fit one shard: the header counts to 2**31 - 1")
    if len(ids) and not 0 <= ids.min() <= ids.max() < 65536:
        raise ValueError(f"token ids {ids.min()}..{ids.max()} must lie in 0..65535 (uint16)")
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, len(ids)
    write_synced(Path(path), header.tobytes(), ids.astype("<u2").tobytes())
