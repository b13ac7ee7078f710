"""The README of a submission: every number from the runs, and what nobody has shown yet."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from pgolf import config
from pgolf.result import LIMIT
from pgolf.submit import stats
from pgolf.submit.folder import AUDIT, MANIFEST, SCRIPT, TWIN
from pgolf.submit.runs import Run
from pgolf.submit.stats import Comparison


def text(
    found: Sequence[Run], told: dict[str, Any], compared: Comparison | None, *, with_comments: bool, audited: bool
) -> str:
    """found: the runs. told: submission.json. with_comments: whether the twin has the sources' comments."""
    score = f"**{told['val_bpb']:.5f} bits per byte** ({told['val_loss']:.5f} nats per token)"
    spread = (
        f", standard deviation {told['val_bpb_std']:.5f} over {len(found)} seeds" if len(found) > 1 else ", one seed"
    )
    sections = [
        f"# {told['name']}",
        f"{told['blurb']}",
        f"{score}{spread}; at most {told['bytes_total']:,} of {LIMIT:,} bytes; {told['hardware']}.",
        "## Results",
        "The score is that of the model that was reloaded from the artifact's bytes, over every target of the "
        "validation split, each once.",
        results(found),
        "## Bytes",
        f"Counted are the literal bytes of two files: `{SCRIPT}`, {told['bytes_code']:,} bytes, and the artifact.",
        sizes(found),
        "## Time",
        "Seconds. Compilation, packing and validation during training count for neither budget.",
        times(found),
        "## Against the baseline",
        versus(compared),
        "## Reproduce",
        reproduce(found, told),
        "## What is here",
        contents(with_comments),
        "## What was shown, and what was not",
        shown(found, told, audited),
    ]
    return "\n\n".join(sections) + "\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, the first column left and the others right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def results(found: Sequence[Run]) -> str:
    """A row a seed, then mean and standard deviation."""
    values = lambda run: (run.facts["val_bpb"], run.facts["val_bpb_artifact"], run.score, run.loss)
    rows = [[run.seed, f"{run.facts['steps']:,}", *(f"{v:.5f}" for v in values(run))] for run in found]
    columns = list(zip(*map(values, found), strict=True))
    rows.append(["mean", "", *(f"{fmean(c):.5f}" for c in columns)])
    if len(found) > 1:
        rows.append(["std", "", *(f"{stdev(c):.5f}" for c in columns)])
    return table(["seed", "steps", "float BPB", "artifact, plain", "score (BPB)", "score (nats per token)"], rows)


def sizes(found: Sequence[Run]) -> str:
    """Bytes of each seed, and what is left."""
    rows = [
        [run.seed, *(f"{run.facts[k]:,}" for k in ("artifact_bytes", "code_bytes", "total_bytes")),
         f"{LIMIT - run.facts['total_bytes']:,}"] for run in found
    ]  # fmt: skip
    return table(["seed", "artifact", "code", "total", "left"], rows)


def times(found: Sequence[Run]) -> str:
    """The ledgers side by side: every phase, then the two budgets."""
    phases = list(dict.fromkeys(name for run in found for name in run.facts["ledger"]))
    rows = []
    for name in phases:
        entries = [run.facts["ledger"].get(name, {"seconds": 0.0, "counted": None}) for run in found]
        rows.append([name, *(f"{e['seconds']:.2f}" for e in entries), entries[0]["counted"] or "-"])
    for budget in ("training", "evaluation"):
        limit = found[0].facts.get("time_limits", {}).get(budget)
        limit_text = f"limit {limit:g}" if limit else "no limit set"
        rows.append([f"**{budget}**", *(f"{run.seconds(budget):.2f}" for run in found), limit_text])
    return table(["phase", *(f"seed {run.seed}" for run in found), "counts for"], rows)


def versus(compared: Comparison | None) -> str:
    """The test in both units, or that there is none."""
    if compared is None:
        return "No baseline was named (`--baseline`), so there is no test of significance."
    c = compared
    spread = "" if c.baseline_std is None else f", standard deviation {c.baseline_std:.5f}"
    number = lambda x: f"{x:.2f}" if math.isfinite(x) else "infinite"
    rows = [[t.of, f"{t.margin_bpb:.5f}", number(t.t), f"{t.df:.2f}", f"{t.p:.2g}"] for t in c.tests]
    verdict = "is" if c.significant else "is **not**"
    return (
        f"{c.baseline}: {c.baseline_bpb:.5f} bits per byte, {c.baseline_n} seed{'s' * (c.baseline_n > 1)}{spread}. "
        f"Better by {c.gain_bpb:+.5f} bits per byte, {c.gain_nats_per_token:+.5f} nats per token, "
        f"{c.gain_nats_per_byte:+.5f} nats per byte.\n\n"
        "Welch's test, one-sided, of a mean that is lower by more than a margin:\n\n"
        + table(["margin", "in bits per byte", "t", "degrees of freedom", "p"], rows)
        + f"\n\nThe bar of {stats.NATS:g} nats per token with p < {stats.P:g} {verdict} passed."
    )


def reproduce(found: Sequence[Run], told: dict[str, Any]) -> str:
    """A command a seed. The settings stand in each log."""
    ranks = found[0].facts["world_size"]
    launch = "python" if ranks == 1 else f"torchrun --standalone --nproc_per_node={ranks}"
    data = "" if found[0].facts["data"] == "embedded" else "DATA_PATH=... TOKENIZER_PATH=... "
    changed = " ".join(_changed(found[0]))
    lines = [
        f"PRESET={told['pgolf']['preset']} {data}SEED={run.seed} {launch} {SCRIPT} {changed}".rstrip() for run in found
    ]
    return "From inside this folder:\n\n```sh\n" + "\n".join(lines) + "\n```\n\nEach log begins with all settings."


def _changed(run: Run) -> list[str]:
    """What was set besides the preset, as overrides; names and places apart."""
    try:
        told = json.loads((run.path / "config.json").read_text(encoding="utf-8"))
        items = [(path, values[1]) for path, values in told["changed_from_preset"].items()]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []
    own = (
        "train.seed",
        "train.run_id",
        "train.out_dir",
        "data.path",
        "data.tokenizer_path",
        "data.cache_dir",
        "preset",
    )
    return [f"{path}={_shown(value)}" for path, value in items if path not in own]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "on"
    return config.show(tuple(value) if isinstance(value, list) else value)


def contents(with_comments: bool) -> str:
    """The files, and how to look into the script."""
    comments = "with all comments" if with_comments else "as the script unpacks it, without comments"
    return (
        f"- `{SCRIPT}`: the code that counts; it unpacks to a temporary folder and runs from there\n"
        f"- `{TWIN}`: the same code {comments}, for people\n"
        f"- `{MANIFEST}`: SHA-256 of the script, of every file in it and of its source\n"
        "- `train_seed*.log`: the whole output of each run\n"
        "- `submission.json`: the numbers of this page\n\n"
        "`pgolf unbundle .` lists and verifies the script without running it, `pgolf check .` checks the folder."
    )


def shown(found: Sequence[Run], told: dict[str, Any], audited: bool) -> str:
    """What stands behind the score, and what does not."""
    audit = (
        f"An audit of the scorer is in `{AUDIT}`."
        if audited
        else "**There is no audit report**: that the scorer is causal and its probabilities sum to 1 is not shown here."
    )
    facts = found[0].facts
    return "\n".join(
        [
            f"- {audit}",
            f"- Code `{facts['code_sha256'][:16]}`, settings `{facts['settings_digest'][:16]}`, tokenizer "
            f"`{facts['tokenizer_sha256'][:16]}`: the same in all {len(found)} logs.",
            f"- {facts['targets']:,} targets, {facts['target_bytes']:,} bytes; before its start each run counted the "
            "bytes of all val tokens on two paths, and they agreed.",
            f"- Hyper-parameters were tuned on: {told['hyperparameters_tuned_on']}. "
            f"Calibration read: {told['calibration']}.",
        ]
    )
