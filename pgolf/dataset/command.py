"""`pgolf data check` and `pgolf data case-ops`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from pgolf.data import export, source
from pgolf.data.config import DataConfig
from pgolf.data.official import DOCUMENTS
from pgolf.dataset import checks
from pgolf.doctor.rows import FAIL, Row, summary, table
from pgolf.errors import ConfigError, DataError

PAD = 12  # width of the longest name
EMBEDDED_VOCAB = 1024


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Exit code: 0, or DataError's when a check fails."""
    args = _parser().parse_args(argv)
    return args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pgolf data", description="Checks and makes data sets.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check",
        help="all that a judge asks of a data set",
        description="Shards, tokenizer, bytes on two paths, the official split's numbers, train against val.",
        epilog="Exit code 0 when nothing fails, 4 otherwise.",
    )
    check.set_defaults(run=run_check)
    check.add_argument("path", nargs="?", metavar="DATA_PATH", help="folder of the shards; none: the embedded corpus")
    check.add_argument("--tokenizer", metavar="FILE", help="the SentencePiece model that made the shards")
    check.add_argument("--vocab-size", type=int, metavar="V", help="the model's vocabulary (default: the tokenizer's)")
    check.add_argument("--all", action="store_true", help="every train shard and document, however long it takes")
    check.add_argument(
        "--seconds", type=float, default=checks.SECONDS, help="for looking through train shards (default %(default)g)"
    )
    check.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    make = commands.add_parser(
        "case-ops",
        help="tokenise documents with case operators, with the byte sidecar",
        description="Documents to shards with lossless case operators: capitals become operators before small letters.",
    )
    make.set_defaults(run=run_case_ops)
    make.add_argument("source", metavar="IN", type=Path, help='documents: a JSON object with "text" a line')
    make.add_argument("out", metavar="OUT", type=Path, help="folder for the shards")
    which = make.add_mutually_exclusive_group(required=True)
    which.add_argument("--tokenizer", type=Path, metavar="FILE", help="a SentencePiece model with the operators")
    which.add_argument("--vocab-size", type=int, metavar="V", help="train one of V pieces on the training documents")
    make.add_argument(
        "--val-docs", type=int, default=DOCUMENTS, metavar="N", help="first N documents are val (default %(default)s)"
    )
    make.add_argument("--shard-tokens", type=int, default=export.SHARD_TOKENS, metavar="N", help="default %(default)s")
    return parser


def run_check(args: argparse.Namespace) -> int:
    """Prints the rows as they come; the last line counts them."""
    subject = _subject(args)
    found: list[Row] = []
    for row in checks.run(subject):
        found.append(row)
        if not args.json:
            print(*table([row], pad=PAD), sep="\n", flush=True)
    failed = any(row.status == FAIL for row in found)
    if args.json:
        facts = {"data": str(subject.folder), "tokenizer": str(subject.tokenizer_path), "all": subject.thorough}
        print(json.dumps({"ok": not failed, **facts, "checks": [row._asdict() for row in found]}, indent=2))
    else:
        print(f"{summary(found)}; {subject.folder}")
    return DataError.exit_code if failed else 0


def _subject(args: argparse.Namespace) -> checks.Subject:
    if args.path and not args.tokenizer:
        raise ConfigError("data check DATA_PATH needs --tokenizer FILE, the SentencePiece model that made the shards")
    if not args.path:
        if args.tokenizer:
            raise ConfigError("--tokenizer without DATA_PATH: the embedded corpus has its own tokenizer; give both")
        place = source.locate(DataConfig(), args.vocab_size or EMBEDDED_VOCAB, print if not args.json else _silent)
        return checks.Subject(place.folder, place.tokenizer_path, args.vocab_size, args.all, args.seconds)
    return checks.Subject(Path(args.path), Path(args.tokenizer), args.vocab_size, args.all, args.seconds)


def _silent(line: str) -> None:
    pass


def run_case_ops(args: argparse.Namespace) -> int:
    """Makes the data set and says how to train on it."""
    if args.val_docs < 1 or args.shard_tokens < 1:
        raise ConfigError(f"--val-docs={args.val_docs}, --shard-tokens={args.shard_tokens}: both must be at least 1")
    made = export.make(
        lambda: export.read_jsonl(args.source),
        args.out,
        args.val_docs,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size or 0,
        shard_tokens=args.shard_tokens,
        progress=print,
    )
    for split, counts in made.counts.items():
        print(f"{split}: " + ", ".join(f"{n:,} {what}" for what, n in counts.items()))
    print(f"Check: python -m pgolf data check {made.folder} --tokenizer {made.tokenizer_path}")
    print(f"Train with:\n  DATA_PATH={made.folder} TOKENIZER_PATH={made.tokenizer_path} ...")
    return 0
