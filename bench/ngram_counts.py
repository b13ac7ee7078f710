"""How fast exact counts and scorers are on this machine.

    python -m bench.ngram_counts [--out docs/measured] [--tokens 10000000] [--scored 1048576] [--device cpu]

Counts of orders 2 to 9 on streams that sort differently, each order counted and dropped; then each scorer on a stream
with the frequencies of text, without the model. Writes ngram_counts.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pgolf.eval.stats import TokenStats
from pgolf.ngram.config import SCORER_NAMES, NgramConfig
from pgolf.ngram.counts import StreamCounts
from pgolf.ngram.scorers import build_scorer

from .report import table
from .timing import device_card

ORDERS = range(2, 10)
VOCAB, VECTORS = 1024, 2**11


def draw(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def zipf(n: int) -> Tensor:
    """Frequencies like those of text: the k-th token has 1 / k of the first one's."""
    weights = 1 / torch.arange(1, VOCAB + 1, dtype=torch.float64)
    at = torch.rand(n, generator=draw(1), dtype=torch.float64) * weights.sum()
    return torch.searchsorted(weights.cumsum(0), at).clamp(max=VOCAB - 1)


def repeated(n: int) -> Tensor:
    """A page of 100,000 tokens over and over: every context is known and has few followers."""
    return zipf(100_000).repeat(-(-n // 100_000))[:n]


STREAMS: dict[str, Callable[[int], Tensor]] = {
    "uniform": lambda n: torch.randint(0, VOCAB, (n,), generator=draw(0)),
    "Zipf": zipf,
    "one page again and again": repeated,
    "one token": lambda n: torch.full((n,), 7),
}


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """(of the clock, of this process's threads)."""
    synchronise(device)
    began, cpu = time.monotonic(), time.process_time()
    work()
    synchronise(device)
    return time.monotonic() - began, time.process_time() - cpu


def counts_of(tokens: Tensor) -> None:
    counts = StreamCounts(tokens, keep=False)
    for n in ORDERS:
        counts.of(n)


def scorer_row(name: str, n: int, device: torch.device) -> dict:
    """Seconds of `prepare` and of the nats of n targets; vector scorers score the last 2,048 of them."""
    scorer = build_scorer(NgramConfig(scorer=name), VOCAB)
    tokens = zipf(n + 1).to(device)
    kept: dict = {}
    first = seconds(lambda: kept.update(prepared=scorer.prepare(tokens)), device)
    prepared = kept["prepared"]
    row = {"scorer": name, "prepare_s": first, "targets": n}
    if "vector" in scorer.needs:
        log_probs = torch.randn(min(VECTORS, n), VOCAB, generator=draw(2)).log_softmax(1).to(device)
        index = torch.arange(n, device=device)[-VECTORS:]
        work = lambda: [scorer.vector_nats(prepared, i, p) for i, p in zip(index.split(1024), log_probs.split(1024))]  # noqa: B905
        return row | {"scored": len(index), "nats_s": seconds(work, device)}
    nats = -torch.rand(n, generator=draw(3)).log()
    hint_nats = None if prepared.hints is None else -torch.rand(prepared.hints.shape, generator=draw(4)).log()
    hints = None if prepared.hints is None else prepared.hints.cpu()
    stats = TokenStats(nats, 4 * torch.rand(n, generator=draw(5)), hints, hint_nats)
    return row | {"scored": n, "nats_s": seconds(lambda: scorer.nats(prepared, stats), device)}


def measure(n: int, scored: int, device: torch.device) -> dict:
    card = device_card(device)  # with the commit as it is now
    counts_of(STREAMS["uniform"](1000).to(device))  # kernels compile, pages come
    rows = []
    for name, make in STREAMS.items():
        tokens = make(n).to(device)
        wall, cpu = seconds(lambda t=tokens: counts_of(t), device)
        rows.append({"stream": name, "seconds": wall, "cpu_seconds": cpu})
        print(f"{name}: {wall:.2f} s, {cpu:.2f} of the CPU", file=sys.stderr, flush=True)
    scorers = [scorer_row(name, scored, device) for name in SCORER_NAMES]
    command = "python -m bench.ngram_counts " + " ".join(sys.argv[1:])
    what = {"schema": 1, "command": command, "card": card, "threads": torch.get_num_threads()}
    return what | {"tokens": n, "orders": list(ORDERS), "counts": rows, "scorers": scorers}


def page(found: dict) -> str:
    """The Markdown page."""
    card = found["card"]
    counts = [
        [
            r["stream"],
            f"{r['seconds']:.1f}",
            f"{r['cpu_seconds']:.1f}",
            f"{found['tokens'] * len(found['orders']) / r['seconds'] / 1e6:.1f}",
        ]
        for r in found["counts"]
    ]
    scorers = [
        [r["scorer"], *(f"{r[part][k]:.2f}" for part in ("prepare_s", "nats_s") for k in (0, 1)), f"{r['scored']:,}",
         f"{r['scored'] / (r['nats_s'][1] + r['prepare_s'][1] * r['scored'] / r['targets']) / 1e3:,.1f}"]
        for r in found["scorers"]
    ]  # fmt: skip
    machine = f"{card.get('name')}, torch {card.get('torch')}, commit {card.get('commit')}, {card.get('date')}"
    text = f"""# n-gram counts and scorers: speed

Written by `python -m bench.ngram_counts`; numbers in ngram_counts.json.

Command `{found["command"].strip()}`, {found["threads"]} threads. Machine: {machine}. One run each. CPU seconds are
those of the process, all threads together: on a machine with other work they are the number to compare.

## Counts

{found["tokens"]:,} tokens, orders {found["orders"][0]} to {found["orders"][-1]}.

{table(["stream", "seconds", "CPU seconds", "million tokens x orders a second"], counts)}
## Scorers

{found["scorers"][0]["targets"]:,} targets of a Zipf stream with {VOCAB:,} ids, default settings, without the model's
own time. Counts are made when they are first asked for, in `prepare` or in `nats`. Vector scorers pay a row of
{VOCAB:,} for each order and target.

"""
    heads = ["scorer", "prepare, s", "CPU s", "nats, s", "CPU s", "targets", "thousand targets a CPU second"]
    return text + table(heads, scorers)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ngram_counts", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/measured"), help="where the page goes")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--scored", type=int, default=2**20, help="targets that each scorer scores")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    found = measure(args.tokens, args.scored, torch.device(args.device))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "ngram_counts.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "ngram_counts.md").write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
