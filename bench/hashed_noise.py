"""What n-gram scorers claim on uniform random tokens, which nothing compresses: 10 bits a token for 1,024 ids.

    python -m bench.hashed_noise [--out docs/measured] [--scale 256]

The unsafe hashed scorers run at the load of a whole evaluation (60 chunks of 1,048,576 targets in 8,388,608 buckets:
7.5 insertions a bucket at the end), everything divided by `scale`. Z is the sum over all 1,024 tokens of what the
scorer credits them with after one context, n = 9, at the end; a distribution has 1. Writes hashed_noise.json and .md.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from pgolf.eval.stats import TokenStats
from pgolf.kernels._ngram_legacy import legacy_lookup, legacy_tables, legacy_update
from pgolf.ngram.config import NgramConfig
from pgolf.ngram.legacy import LegacyHashed, LegacySettings
from pgolf.ngram.scorer import Scorer
from pgolf.ngram.scorers import SCORERS

from .report import table
from .timing import device_card

VOCAB, CHUNKS, CHUNK, BUCKETS = 1024, 60, 2**20, 2**23
EXACT = ("dirichlet", "pitman_yor", "kneser_ney", "witten_bell", "hashed_rows", "entropy_gate", "tilt",
         "calibrated_tilt", "hedge")  # fmt: skip


class HashedDirichlet(LegacyHashed):
    """UNSAFE: q_n = (min(F, C) + 5 q_(n-1)) / (C + 5) on the hashed tables, the model at the bottom."""

    def chunk_nats(self, contexts: Tensor, pairs: Tensor, nats: Tensor, entropy: Tensor) -> Tensor:
        p = (-nats).exp()
        for c, f in zip(contexts.double(), pairs.double(), strict=True):
            p = torch.where(c > 0, (torch.minimum(f, c) + 5 * p) / (c + 5), p)
        return -p.clamp(min=self.settings.floor).log()


def unsafe(scale: int) -> dict[str, LegacyHashed]:
    """The scorers of earlier submissions, and the first with more and fewer buckets."""
    record = LegacySettings(buckets=BUCKETS // scale, chunk=CHUNK // scale)
    make = lambda **change: LegacyHashed(NgramConfig(), VOCAB, replace(record, **change))
    dirichlet = HashedDirichlet(NgramConfig(), VOCAB, replace(record, chunk=65536 // scale))
    return {
        "hashed, n = 2 to 9, 8,388,608 buckets": make(),
        "hashed Dirichlet, 5, 8,388,608 buckets": dirichlet,
        "hashed, n = 2 to 7, 1,048,576 buckets": make(buckets=2**20 // scale, longest=7),
        **{f"hashed, n = 2 to 9, {2**k:,} buckets": make(buckets=2**k // scale) for k in (29, 26, 20, 17)},
    }


def exact() -> dict[str, Scorer]:
    flat = NgramConfig(orders=tuple(range(1, 9)), concentration=(5.0,))
    found = {"exact Dirichlet, 5, orders 1 to 8": SCORERS["dirichlet"](flat, VOCAB)}
    return found | {f"{name}, defaults": SCORERS[name](NgramConfig(), VOCAB) for name in EXACT}


def noise(n: int) -> Tensor:
    """(n,) int64 without BOS: ids 2 to 1,025, so that documents end nowhere."""
    return torch.randint(2, VOCAB + 2, (n,), generator=torch.Generator().manual_seed(0))


def statistics(tokens: Tensor, hints: Tensor | None) -> TokenStats:
    """Of the best model there is: uniform."""
    flat = torch.full((tokens.numel() - 1,), math.log(VOCAB))
    hint_nats = None if hints is None else math.log(VOCAB) * (hints >= 0)
    return TokenStats(flat, flat.clone(), hints, hint_nats)


def hashed_mass(scorer: LegacyHashed, tokens: Tensor, samples: int = 16) -> float:
    """Mean over contexts of the sum over all tokens of min(F, C) / C, for n = 9, with the tables of the end."""
    s = scorer.settings
    tables = legacy_tables(s.buckets)
    for start in range(0, tokens.numel() - 1, s.chunk):
        legacy_update(tables, tokens, start, min(start + s.chunk + 1, tokens.numel()))
    total = 0.0
    for i in range(samples):
        at = (i + 1) * tokens.numel() // (samples + 1)
        rows = torch.cat([tokens[at - 8 : at].expand(VOCAB, 8), torch.arange(2, VOCAB + 2)[:, None]], 1).flatten()
        c, f = (x[7, 8::9].double() for x in legacy_lookup(tables, rows, 0, rows.numel()))
        total += (torch.minimum(f, c) / c.clamp(min=1)).sum().item()
    return total / samples


def row(name: str, scorer: Scorer, tokens: Tensor, last: int) -> dict:
    """Claimed bits a token: all, and the last chunk's."""
    began = time.monotonic()
    prepared = scorer.prepare(tokens)
    bits = scorer.nats(prepared, statistics(tokens, prepared.hints)) / math.log(2)
    z = hashed_mass(scorer, tokens) if isinstance(scorer, LegacyHashed) else None
    out = {"scorer": name, "valid": scorer.valid, "bits": bits.mean().item(), "last_chunk": bits[-last:].mean().item()}
    print(f"{name}: {out['bits']:.3f} bits", file=sys.stderr, flush=True)
    return out | {"z": z, "seconds": time.monotonic() - began}


def measure(scale: int) -> dict:
    tokens = noise(CHUNKS * CHUNK // scale + 1)
    scorers = unsafe(scale) | exact()
    return {
        "schema": 1,
        "command": "python -m bench.hashed_noise " + " ".join(sys.argv[1:]),
        "card": device_card("cpu"), "targets": tokens.numel() - 1, "vocab": VOCAB, "scale": scale,
        "rows": [row(name, scorer, tokens, CHUNK // scale) for name, scorer in scorers.items()],
    }  # fmt: skip


def page(found: dict) -> str:
    """The Markdown page."""
    card = found["card"]
    rows = [
        [r["scorer"], "yes" if r["valid"] else "**no**", f"{r['bits']:.3f}", f"{r['last_chunk']:.3f}",
         "1 by construction" if r["z"] is None else f"{r['z']:,.0f}"]
        for r in found["rows"]
    ]  # fmt: skip
    bits, machine = math.log2(found["vocab"]), f"{card.get('name')}, torch {card.get('torch')}"
    text = f"""# n-gram scorers on noise

Written by `python -m bench.hashed_noise`; numbers in hashed_noise.json.

{found["targets"]:,} uniform random tokens of {found["vocab"]:,} ids; the model is uniform too. No code needs fewer
than {bits:.0f} bits a token, but for luck: k bits in all with chance 2^-k. Hashed scorers claim far less, the
less the fewer buckets they have: what they report is the length of no code. Exact ones pay for what they believe.

Buckets are those of the whole evaluation. Stream, chunks and buckets are divided by {found["scale"]}, loads are not. Z:
what all tokens together are credited with after one context of eight tokens, at the end.

Command `{found["command"].strip()}`. Machine: {machine}, commit {card.get("commit")}, {card.get("date")}.
"""
    return text + "\n" + table(["scorer", "valid", "bits a token", "last chunk", "Z"], rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.hashed_noise", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/measured"), help="where the page goes")
    parser.add_argument("--scale", type=int, default=256, help="power of two that divides stream, chunks and buckets")
    args = parser.parse_args(argv)
    found = measure(args.scale)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "hashed_noise.json").write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "hashed_noise.md").write_text(page(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
