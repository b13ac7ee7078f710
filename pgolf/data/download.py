"""Fetches the challenge's FineWeb shards and tokenizer from the Hugging Face hub.

    python -m pgolf.data.download sp1024 --train-shards 10

Says what it will fetch before it does, fetches nothing else, and checks what arrives: size, SHA-256 where the hub knows
it, shard header. Whole files that are there already are kept, so an interrupted download is continued by repeating the
command. Needs huggingface_hub.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from pgolf.data.shards import check_shard, foreign_kind, sha256
from pgolf.errors import DataError, PgolfError, SetupError

REPO_ID, PREFIX = "willdepueoai/parameter-golf", "datasets"
MAX_SHARDS = 10_000  # of a split that a manifest may name: 2 TB


def main(argv: list[str] | None = None, hub=None) -> int:
    """Command line; returns the exit code. `hub` stands in for the huggingface_hub module in tests."""
    args = _parser().parse_args(argv)
    try:
        fetch(args, hub or _hub(), print)
    except PgolfError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pgolf.data.download", description=__doc__.split("\n\n")[0])
    parser.add_argument("variant", help="tokenizer variant: sp1024, sp4096, ... (a wrong one lists what exists)")
    parser.add_argument("--train-shards", type=int, default=1, metavar="N", help="first N shards of 0.2 GB (default 1)")
    parser.add_argument("--out", type=Path, default=Path("data"), help="target folder (default ./data)")
    parser.add_argument("--repo-id", default=REPO_ID, help=f"dataset repository (default {REPO_ID})")
    parser.add_argument("--prefix", default=PREFIX, help=f"folder of manifest.json in it (default {PREFIX})")
    parser.add_argument("--revision", default="main", help="branch, tag or commit (default main)")
    parser.add_argument("--offline", action="store_true", help="no network: only check what is in --out")
    return parser


def _hub():
    try:
        import huggingface_hub
    except ImportError as err:
        raise SetupError("downloads need huggingface_hub, not installed\nfix: pip install huggingface_hub") from err
    return huggingface_hub


def fetch(args: argparse.Namespace, hub, say: Callable[[str], None]) -> tuple[Path, Path]:
    """Downloads and checks; returns (folder of the shards, tokenizer file). Raises DataError or SetupError."""
    source = {"repo_id": args.repo_id, "repo_type": "dataset", "revision": args.revision}
    listing = f"{args.prefix}/manifest.json"
    if not args.offline:
        _get(hub, listing, args.out, source)
    elif not (args.out / listing).is_file():
        raise DataError(f"--offline, but {args.out / listing} is not there\nfix: run once without --offline")
    paths = wanted(read_listing(args.out / listing), args.variant, args.train_shards, args.prefix)
    known = {} if args.offline else _infos(hub, paths, source)
    missing = [p for p in paths if not _is_whole(args.out / p, known.get(p))]
    if missing and args.offline:
        raise DataError(
            f"--offline, but {len(missing)} of {len(paths)} files are missing, first {args.out / missing[0]}"
        )
    size = sum(known[p].size for p in missing)
    say(f"{args.repo_id}: {len(missing)} of {len(paths)} files to fetch, {size / 1e9:.2f} GB, into {args.out}")
    _reserve(args.out, size)
    for path in missing:
        say(f"  {path} ({known[path].size / 1e6:.0f} MB)")
        (args.out / path).unlink(missing_ok=True)  # the hub would keep a cut file that it has a record of
        _get(hub, path, args.out, source)
    for path in paths:
        _verify(args.out / path, known.get(path))
    shards, tokenizer = (args.out / paths[0]).parent, args.out / paths[-1]
    say(f"checked. Train with:\n  DATA_PATH={shards} TOKENIZER_PATH={tokenizer} ...")
    return shards, tokenizer


def read_listing(path: Path) -> dict:
    """The repository's manifest.json. Raises DataError when it cannot be read or is no JSON object."""
    try:
        raw = path.read_bytes()
        listing = json.loads(raw)
    except OSError as err:
        raise DataError(f"{path} cannot be read: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        kind = foreign_kind(raw[:64]) or "something else (cut off?)"
        raise DataError(f"{path} is no JSON: it looks like {kind}\nfix: delete it and repeat the command") from err
    if not isinstance(listing, dict):
        raise DataError(f"{path} holds no JSON object\nfix: delete it and repeat the command")
    return listing


def wanted(manifest: dict, variant: str, train_shards: int, prefix: str) -> list[str]:
    """Paths in the repository: all val shards, the first train shards, and last the tokenizer. Raises DataError."""
    try:
        return _wanted(manifest, variant, train_shards, prefix)
    except (KeyError, TypeError, AttributeError, ValueError) as err:
        raise DataError(
            f"the repository's manifest.json is not of the form that pgolf knows ({type(err).__name__}: {err})\n"
            "fix: --revision of a version that is, or another --repo-id"
        ) from err


def _wanted(manifest: dict, variant: str, train_shards: int, prefix: str) -> list[str]:
    name, datasets = f"fineweb10B_{variant}", {d["name"]: d for d in manifest.get("datasets", [])}
    if name not in datasets:
        have = ", ".join(sorted(n.removeprefix("fineweb10B_") for n in datasets)) or "none"
        raise DataError(
            f"variant {variant} is not hosted; expected one of: {have}\nfix: choose one, or tokenise your own"
        )
    n_train, n_val = (_count(datasets[name]["stats"], key) for key in ("files_train", "files_val"))
    if not 0 <= train_shards <= n_train:
        raise DataError(f"--train-shards {train_shards}: {variant} has 0..{n_train} train shards")
    tokenizers = {t["name"]: t for t in manifest.get("tokenizers", [])}
    model = tokenizers.get(datasets[name]["tokenizer_name"], {}).get("model_path")
    if not model:
        raise DataError(f"variant {variant} has no SentencePiece model in the manifest; pgolf needs one to count bytes")
    parts = PurePosixPath(model).parts
    if str(PurePosixPath(model)) != model or parts[0] == "/" or ".." in parts or not model.isprintable():
        raise ValueError(f"model_path {model!r} is no path inside the repository")
    counts = (("val", n_val), ("train", train_shards))
    files = [f"datasets/{name}/fineweb_{split}_{i:06d}.bin" for split, n in counts for i in range(n)]
    return [f"{prefix}/{p}" for p in (*files, model)]


def _count(stats: dict, key: str) -> int:
    if type(stats[key]) is not int or not 0 <= stats[key] <= MAX_SHARDS:
        raise ValueError(f"{key} is {stats[key]!r}, expected a count up to {MAX_SHARDS:,}")
    return stats[key]


def _get(hub, path: str, out: Path, source: dict) -> None:
    try:
        hub.hf_hub_download(filename=path, local_dir=out, **source)
    except Exception as err:  # the hub's own classes differ by version; its first line names status and address
        raise _unreachable(path, source, err) from err


def _infos(hub, paths: list[str], source: dict) -> dict:
    """Size and, for large files, SHA-256 of each path, from the hub."""
    try:
        infos = {i.path: i for i in hub.HfApi().get_paths_info(paths=paths, **source)}
    except Exception as err:
        raise _unreachable(paths[0], source, err) from err
    absent = [p for p in paths if p not in infos]
    if absent:
        raise DataError(
            f"{source['repo_id']} lists but does not host {absent[0]} ({len(absent)} files)\nfix: --revision"
        )
    return infos


def _unreachable(path: str, source: dict, err: Exception) -> DataError:
    reason = (str(err).strip().splitlines() or [""])[0]
    return DataError(
        f"{path} cannot be fetched from {source['repo_id']}: {type(err).__name__}: {reason}\n"
        "fix: check network, --repo-id and (401, 403, 429) `hf auth login`; repeat the command to continue"
    )


def _is_whole(path: Path, info) -> bool:
    return path.is_file() and (info is None or path.stat().st_size == info.size)


def _reserve(out: Path, size: int) -> None:
    """Makes sure that `size` bytes fit, by allocating them: a quota does not show in free space (PR #1740)."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out) as file:
            if size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            elif shutil.disk_usage(out).free < size:
                raise OSError("too little free space")
    except OSError as err:
        free = f"{shutil.disk_usage(out).free / 1e9:.2f} GB free" if out.is_dir() else "no such folder"
        raise SetupError(
            f"{size / 1e9:.2f} GB cannot be written to {out}: {err.strerror or err} ({free})\n"
            "fix: free space, fewer --train-shards, or another --out"
        ) from err


def _verify(path: Path, info) -> None:
    """Header of a shard, SHA-256 where the hub gave one. A file that fails is named and should be deleted."""
    if path.suffix == ".bin":
        check_shard(path)
    expected = info.lfs.sha256 if info is not None and info.lfs else None
    if expected and sha256(path) != expected:
        raise DataError(f"{path} is damaged: SHA-256 is not {expected}\nfix: delete it and repeat the command")


if __name__ == "__main__":
    raise SystemExit(main())
