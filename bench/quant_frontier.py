"""Size against quality of one trained model: every bit width, clip rule, rounding method and codec.

    python -m bench.quant_frontier RUN_DIR [--out docs/measured] [--targets 65536] [--batches 256]

Reads the last checkpoint of a run, quantises its averaged weights in many ways, scores each on the first targets of the
val split with the run's own evaluator, and packs it with every codec. Writes quant_frontier.json (numbers, machine,
commit, command), quant_frontier.md (tables) and, with matplotlib, quant_frontier.png.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pgolf import checkpoint, config, finish, resume, scoring, tree
from pgolf.artifact.codecs import CODECS
from pgolf.artifact.pack import pack
from pgolf.calibrate import Calibration
from pgolf.clock import TimeLedger
from pgolf.dist import Dist
from pgolf.errors import ArtifactError, PgolfError
from pgolf.eval.base import evaluate
from pgolf.eval.neural import Neural
from pgolf.log import RunLog
from pgolf.quant import eggroll
from pgolf.quant.config import EggrollConfig, GeneratedConfig, GptqConfig, QuantConfig
from pgolf.quant.policy import quantize_state
from pgolf.quant.records import Parts, Record
from pgolf.snapshot import FOLDER
from pgolf.train import Trainer

from .report import table
from .timing import device_card

KINDS = ("int8", "int7", "int6", "int5", "int4")
CLIPS = ("max", "0.999", "best-row")
GAPS = ("int6", "int5", "int4")  # columns of the table of methods
FULL = GptqConfig()
# Rows of the table of methods: the clip rule, and GPTQ or None for plain rounding.
METHODS: dict[str, tuple[str, GptqConfig | None]] = {
    "rounding, row maximum": ("max", None),
    "rounding, best of 5 clips by row": ("best-row", None),
    "GPTQ, row maximum": ("max", FULL),
    "GPTQ, best of 5 by e^T H e": ("best-row", FULL),
    "GPTQ, best of 5 by squares": ("best-row", replace(FULL, clip_by="rows")),
    "GPTQ, best of 5 by squares of the matrix": ("best-row", replace(FULL, clip_by="matrix")),
    "GPTQ, damping 0.002": ("max", replace(FULL, damp=0.002)),
    "GPTQ, damping 0.1": ("max", replace(FULL, damp=0.1)),
    "GPTQ, MLP rounded": ("max", replace(FULL, skip_mlp=True)),
    "GPTQ v7, damping 0.01, best of 5 by squares": (
        "best-row",
        replace(FULL, variant="v7", damp=0.01, clip_by="rows"),
    ),
    "GPTQ on 4 batches, row maximum": ("max", replace(FULL, batches=4)),
    "GPTQ on generated text, row maximum": ("max", replace(FULL, generated=GeneratedConfig(sequences=16))),
}
EGGROLL_SECONDS = 30.0
NUMBERS = "quant_frontier.json"


@dataclass
class Bench:
    """A trained model with its averaged weights, and the Hessians that were collected so far, by what they are of."""

    trainer: Trainer
    targets: int

    def __post_init__(self):
        self.hessians: dict[tuple, Mapping[str, Tensor]] = {}

    def calibration(self, quant: QuantConfig) -> Calibration:
        self.trainer.cfg = replace(self.trainer.cfg, quant=quant)
        return Calibration(self.trainer)

    def parts(self, quant: QuantConfig) -> dict[str, Parts]:
        """What GPTQ makes of the matrices; Hessians are those of the float model and do not depend on the grid."""
        calibration = self.calibration(quant)
        key = quant.gptq.batches, quant.gptq.generated
        if key not in self.hessians:
            everything = self.calibration(replace(quant, gptq=replace(quant.gptq, skip_mlp=False)))
            found, _, _ = everything.collect()
            self.hessians[key] = {name: found.of(name) for name in everything.names}
        return {name: calibration.solve(name, self.hessians[key][name]) for name in calibration.names}

    def records(self, quant: QuantConfig, given: Mapping[str, Parts] | None = None) -> list[Record]:
        state = {info.name: info.param.detach().float().cpu() for info in self.trainer.infos}
        return quantize_state(state, self.trainer.infos, quant, given)

    def score(self, records: list[Record] | None) -> float:
        """BPB of the model that `records` hold, of the float model without."""
        trainer = self.trainer
        model = trainer.model if records is None else eggroll.exported(trainer.model, records)
        model.eval()
        windows, data = scoring.plain_windows(trainer.cfg), trainer.data
        return evaluate(
            windows, Neural(model), data.val, data.byte_counts, trainer.dist, val_bytes=data.val_bytes,
            limit_tokens=self.targets,
        ).val_bpb  # fmt: skip

    def quantised(self, quant: QuantConfig) -> list[Record]:
        return self.records(quant, self.parts(quant) if quant.gptq else None)


def load(run_dir: Path, out: Path, targets: int) -> Bench:
    """The run's last checkpoint in a trainer, as it is before packing."""
    path = checkpoint.newest(run_dir / FOLDER)
    if path is None:
        raise ArtifactError(f"{run_dir} has no {FOLDER}/ with a checkpoint: expected the folder of a run")
    tensors, facts = checkpoint.read(path)
    saved = tree.from_dict(config.RunConfig, facts["config"])
    # no time limit, and nothing compiled: this is no run
    cfg = replace(saved, train=replace(saved.train, max_wallclock_seconds=0.0, compile="off", device="cpu", resume=""))
    log = RunLog(out, console=False)
    trainer = Trainer(cfg, Dist(), log, TimeLedger())
    resume.restore(trainer, resume.Saved(path, facts, {}, tensors))
    trainer.phases.undo()
    finish.load_average(trainer)
    if trainer.cast:
        trainer.cast.refresh_()
    return Bench(trainer, targets)


# -- measuring ---------------------------------------------------------------------------------------------------------


def gap_rows(bench: Bench, base: QuantConfig, kinds: tuple[str, ...], batches: int) -> Iterator[dict]:
    """A row a method: BPB by the kind of the matrices, tables staying as they are."""
    for name, (clip, gptq) in METHODS.items():
        if gptq:
            gptq = replace(gptq, batches=min(batches, gptq.batches))
        quants = {k: replace(base, matrix=k, matrix_clip=clip, gptq=gptq) for k in kinds}
        yield {"method": name, "val_bpb": {k: bench.score(bench.quantised(q)) for k, q in quants.items()}}


def eggroll_row(bench: Bench, base: QuantConfig, kind: str, seconds: float) -> dict:
    """What the search gains on plain rounding, on its own sequences, on others and on the val split."""
    quant = replace(base, matrix=kind, matrix_clip="max", eggroll=EggrollConfig(seconds=seconds))
    calibration = bench.calibration(quant)
    before = bench.score(bench.records(quant))
    after = bench.score(bench.records(quant, calibration.run()))
    return {"kind": kind, "seconds": seconds, "val_bpb": [before, after], **calibration.facts["eggroll"]}


def frontier_rows(bench: Bench, base: QuantConfig, kinds: tuple[str, ...], batches: int) -> Iterator[dict]:
    """A row a kind, kind of tables, clip and method: BPB, and bytes by codec."""
    for kind in kinds:
        for embed in dict.fromkeys(("int8", kind)):
            for clip in CLIPS:
                for gptq in (None, replace(FULL, batches=batches)):
                    quant = replace(base, matrix=kind, embed=embed, matrix_clip=clip, embed_clip=clip, gptq=gptq)
                    records = bench.quantised(quant)
                    sizes = {codec: len(pack(records, {}, codec)) for codec in CODECS}
                    what = {"matrix": kind, "embed": embed, "clip": clip, "method": "GPTQ" if gptq else "rounding"}
                    yield {**what, "val_bpb": bench.score(records), "bytes": sizes}


def told(what: str, rows: Iterator[dict]) -> Iterator[dict]:
    """`rows`, with a line on the console for each: all of it takes minutes."""
    for i, row in enumerate(rows, 1):
        print(f"{what} {i}: {row}", file=sys.stderr, flush=True)
        yield row


def measure(bench: Bench, kinds: tuple[str, ...], batches: int, seconds: float) -> dict[str, Any]:
    """All of it, with the provenance."""
    trainer, began = bench.trainer, time.monotonic()
    base = replace(trainer.cfg.quant, gptq=None, eggroll=None, late_qat=None, low_rank=None, prune=None, overrides="")
    gaps = tuple(k for k in GAPS if k in kinds)
    return {
        "schema": 1,
        "command": "python -m bench.quant_frontier " + " ".join(sys.argv[1:]),
        "card": device_card("cpu"),
        "run": {
            "preset": trainer.cfg.preset, "seed": trainer.cfg.train.seed, "steps": trainer.step_number,
            "train_seconds": trainer.clock.elapsed_ms / 1000, "digest": config.digest(trainer.cfg),
            "data": trainer.data.name,
        },
        "targets": min(bench.targets, len(trainer.data.val) - 1), "val_targets": len(trainer.data.val) - 1,
        "batches": batches,
        "float_bpb": bench.score(None),
        "gaps": list(told("methods", gap_rows(bench, base, gaps, batches))),
        "eggroll": eggroll_row(bench, base, gaps[-1], seconds),
        "frontier": list(told("frontier", frontier_rows(bench, base, kinds, batches))),
        "seconds": time.monotonic() - began,
    }  # fmt: skip


# -- telling -----------------------------------------------------------------------------------------------------------


def page(found: dict) -> str:
    """The Markdown page."""
    card, run, floats = found["card"], found["run"], found["float_bpb"]
    gaps = found["gaps"]
    kinds = list(gaps[0]["val_bpb"])
    rows = [[r["method"], *(f"{1000 * (r['val_bpb'][k] - floats):+.2f}" for k in kinds)] for r in gaps]
    e = found["eggroll"]
    head = [
        "# Quantisation: size and quality", "",
        "Written by `python -m bench.quant_frontier`; numbers and provenance in quant_frontier.json.", "",
        f"Model: preset `{run['preset']}`, seed {run['seed']}, {run['steps']} steps in {run['train_seconds']:.0f} s of"
        f" training, data {run['data']}. Float: {floats:.4f} BPB on {found['targets']:,} of {found['val_targets']:,}"
        f" val targets, plain windows. Machine: {card.get('name')}, {card.get('cores')} cores, torch"
        f" {card.get('torch')}, commit {card.get('commit')}, {card.get('date')}.", "",
        f"Hessians of {found['batches']} training micro-batches. A small model that is short of training: differences"
        " between methods are what carries over, and less than their size.", "",
        "## What rounding the matrices costs", "",
        "Thousandths of a BPB over float, the rounding of the tables, as the preset stores them, included.", "",
    ]  # fmt: skip
    tail = [
        "", f"EGGROLL for {e['seconds']:g} s on rounded {e['kind']}: {e['kept']} of {e['trials']} trials kept; loss"
        f" on its own sequences {e['loss'][0]:.4f} -> {e['loss'][1]:.4f}, on others of the training stream"
        f" {e['control'][0]:.4f} -> {e['control'][1]:.4f}, val {e['val_bpb'][0]:.4f} -> {e['val_bpb'][1]:.4f} BPB.", "",
        "## The frontier", "", "Artifacts that no other beats in both bytes and BPB, all codecs taken together.", "",
    ]  # fmt: skip
    best = [
        [f"{r['matrix']} / {r['embed']}", r["clip"], r["method"], r["codec"], f"{r['size']:,}", f"{r['val_bpb']:.4f}"]
        for r in frontier(found["frontier"])
    ]
    kind = ["", "## Codecs", "", "Bytes over brotli's, mean of all rows.", ""]
    extra = [[codec, f"{100 * overhead(found['frontier'], codec):+.2f} %"] for codec in CODECS]
    return "\n".join([
        *head, table(["method", *kinds], rows), *tail,
        table(["matrices / tables", "clip", "method", "codec", "bytes", "BPB"], best),
        "![every artifact, bytes against BPB](quant_frontier.png)", *kind, table(["codec", "bytes"], extra),
    ])  # fmt: skip


def frontier(rows: list[dict]) -> list[dict]:
    """Rows by size, one a codec, that no smaller one reaches in BPB."""
    flat = sorted(({**r, "codec": c, "size": n} for r in rows for c, n in r["bytes"].items()),
                  key=lambda r: (r["size"], r["val_bpb"]))  # fmt: skip
    out: list[dict] = []
    for row in flat:
        if not out or row["val_bpb"] < out[-1]["val_bpb"]:
            out.append(row)
    return out


def overhead(rows: list[dict], codec: str) -> float:
    """Mean of bytes / brotli's bytes, less 1."""
    return sum(r["bytes"][codec] / r["bytes"]["brotli"] for r in rows) / len(rows) - 1


def draw(found: dict, path: Path) -> None:
    """Bytes against BPB: colour is the matrices' kind, marker the clip, filled is GPTQ; one panel a codec."""
    from matplotlib.figure import Figure

    figure, floats = Figure(figsize=(12, 9), layout="constrained"), found["float_bpb"]
    kinds = list(dict.fromkeys(r["matrix"] for r in found["frontier"]))
    axes = figure.subplots(2, 2, sharey=True).flat
    for panel, codec in zip(axes, CODECS, strict=True):
        for r in found["frontier"]:
            color = f"C{kinds.index(r['matrix'])}"
            style = {"marker": "os^"[CLIPS.index(r["clip"])], "edgecolors": color, "s": 28}
            panel.scatter(
                r["bytes"][codec] / 1e6, r["val_bpb"] - floats, c=color if r["method"] == "GPTQ" else "none", **style
            )
        edge = frontier([{**r, "bytes": {codec: r["bytes"][codec]}} for r in found["frontier"]])
        panel.plot([r["size"] / 1e6 for r in edge], [r["val_bpb"] - floats for r in edge], "k-", linewidth=0.7)
        panel.set(title=codec, xlabel="MB of weights", ylabel="BPB over float", yscale="log")
    names = [*kinds, *(f"clip {c}" for c in CLIPS), "rounding", "GPTQ", "frontier"]
    panel = figure.axes[0]
    marks = [
        *(panel.scatter([], [], c=f"C{i}") for i in range(len(kinds))),
        *(panel.scatter([], [], c="none", edgecolors="k", marker=m) for m in "os^"),
        panel.scatter([], [], c="none", edgecolors="k"), panel.scatter([], [], c="k"), *panel.plot([], [], "k-"),
    ]  # fmt: skip
    figure.legend(marks, names, loc="outside lower center", ncol=len(names), fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


def found_in(args: argparse.Namespace) -> dict[str, Any]:
    """Everything measured on the run that `args` names."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = load(args.run_dir, Path(scratch), args.targets)
        try:
            return measure(bench, tuple(args.kinds.split(",")), args.batches, args.eggroll_seconds)
        finally:
            bench.trainer.loader.close()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.quant_frontier", description=__doc__.partition("\n")[0])
    parser.add_argument("run_dir", type=Path, help="folder of a finished run")
    parser.add_argument("--out", type=Path, default=Path("docs/measured"), help="where the page goes")
    parser.add_argument("--targets", type=int, default=65536, help="val targets to score; 0 = all")
    parser.add_argument("--batches", type=int, default=FULL.batches, help="micro-batches for the Hessians")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of integers, comma-separated")
    parser.add_argument("--redraw", action="store_true", help="only page and plot, of the numbers in --out")
    parser.add_argument("--eggroll-seconds", type=float, default=EGGROLL_SECONDS)
    args = parser.parse_args(argv)
    try:
        found = json.loads((args.out / NUMBERS).read_text()) if args.redraw else found_in(args)
    except PgolfError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / NUMBERS).write_text(json.dumps(found, indent=1) + "\n")
    (args.out / "quant_frontier.md").write_text(page(found))
    try:
        draw(found, args.out / "quant_frontier.png")
    except ImportError:
        print("matplotlib is not installed: tables only")
    return 0


if __name__ == "__main__":
    sys.exit(main())
