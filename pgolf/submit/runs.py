"""Run folders as a submission needs them, and what makes them unfit for one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgolf.errors import ArtifactError, BudgetError, ConfigError
from pgolf.result import LIMIT

FILES = {"result": "result.json", "log": "train.log", "artifact": "model.pgolf", "script": "train_gpt_bundle.py"}
# Facts that all runs share, and what it means when they do not
SHARED = {
    "settings_digest": "other settings",
    "code_sha256": "other code",
    "tokenizer_sha256": "another tokenizer",
    "val_tokens": "another validation split",
    "target_bytes": "other byte counts",
    "data": "other data",
    "score_pass": "another evaluation",
    "order": "another order of documents",
}
NUMBERS = (
    "seed",
    "steps",
    "train_seconds",
    "val_bpb",
    "val_loss",
    "val_bpb_final",
    "val_loss_final",
    "artifact_bytes",
    "code_bytes",
    "total_bytes",
    "targets",
)
SECONDS = 600.0


@dataclass(frozen=True)
class Run:
    """One finished run. facts: its result.json; score and loss: of the last evaluation, in bits per byte and nats."""

    path: Path
    facts: dict[str, Any]
    log: bytes
    script: bytes
    score: float
    loss: float

    @property
    def seed(self) -> int:
        return self.facts["seed"]

    def seconds(self, budget: str) -> float:
        """Seconds that count for "training" or "evaluation"."""
        return sum(row["seconds"] for row in self.facts["ledger"].values() if row["counted"] == budget)

    @property
    def bytes_per_token(self) -> float:
        return self.facts["target_bytes"] / self.facts["targets"]


def load(path: Path) -> Run:
    """The run in a folder. Raises ConfigError when it is none, ArtifactError when it is not finished or was changed."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; expected a run's, as train_gpt.py leaves it")
    missing = [name for name in FILES.values() if not (path / name).is_file()]
    if missing:
        raise ArtifactError(f"{path}: not a finished run, {', '.join(missing)} missing (RESUME={path} goes on with it)")
    try:
        facts = json.loads((path / FILES["result"]).read_text(encoding="utf-8"))
        log, script, artifact = ((path / FILES[name]).read_bytes() for name in ("log", "script", "artifact"))
    except (OSError, ValueError, RecursionError) as err:
        raise ArtifactError(f"{path}: cannot be read: {err}") from err
    needed = (*SHARED, *NUMBERS, "ledger", "scores", "ledger_digest")
    if not isinstance(facts, dict) or (gaps := [k for k in needed if facts.get(k) is None]):
        gaps = gaps if isinstance(facts, dict) else list(NUMBERS)
        raise ArtifactError(
            f"{path}: result.json lacks {', '.join(gaps)}: an older version's run, or one without a score"
        )
    if bad := [k for k in NUMBERS if isinstance(facts[k], bool) or not isinstance(facts[k], (int, float))]:
        raise ArtifactError(f"{path}: result.json: {', '.join(bad)} is no number")
    if len(artifact) != facts["artifact_bytes"] or len(script) != facts["code_bytes"]:
        raise ArtifactError(
            f"{path}: artifact or script is not of the size that result.json has; was it written again?"
        )
    if hashlib.sha256(script).hexdigest() != facts["code_sha256"]:
        raise ArtifactError(f"{path}: {FILES['script']} is not the script that ran: its hash is not result.json's")
    return Run(path, facts, log, script, facts["val_bpb_final"], facts["val_loss_final"])


def unfit(runs: Sequence[Run], seeds: int, is_record: bool) -> tuple[list[str], list[str]]:
    """(faults, budgets that were exceeded): why these runs cannot be submitted together; both empty if they can.

    seeds: how many there must be at least.
    """
    faults, over = [], []
    first = runs[0]
    if len(runs) < seeds:
        faults.append(f"{len(runs)} run{'s' * (len(runs) > 1)}, {seeds} seeds are needed")
    for run in runs:
        if twins := [r.path.name for r in runs if r is not run and r.seed == run.seed]:
            faults.append(f"{run.path}: seed {run.seed} is also {', '.join(twins)}'s")
        for key, means in SHARED.items():
            if run.facts[key] != first.facts[key]:
                hint = _changed(first, run) if key == "settings_digest" else ""
                faults.append(f"{run.path}: {means} than {first.path.name} ({key}){hint}")
        if run.facts["targets"] != run.facts["val_tokens"] - 1:
            faults.append(
                f"{run.path}: {run.facts['targets']:,} of {run.facts['val_tokens'] - 1:,} targets were scored"
                " (eval.max_tokens=0 and eval.sliding_max_tokens=0 score all)"
            )
        if run.facts["total_bytes"] > LIMIT:
            over.append(
                f"{run.path}: {run.facts['total_bytes']:,} bytes, {run.facts['total_bytes'] - LIMIT:,} too many"
            )
        for budget in ("training", "evaluation") if is_record else ():
            if run.seconds(budget) > SECONDS + (budget == "training"):  # the step under way at the cap is finished
                over.append(f"{run.path}: {run.seconds(budget):.1f} s of {budget}, the limit is {SECONDS:g}")
    return faults, over


def _changed(a: Run, b: Run) -> str:
    """The settings in which two runs differ, as far as their config.json tell."""
    try:
        one, two = (_flat(json.loads((r.path / "config.json").read_text())["config"]) for r in (a, b))
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    own = ("train.seed", "train.run_id", "train.out_dir")
    names = [k for k in {**one, **two} if one.get(k) != two.get(k) and k not in own]
    return "".join(f"; {k} is {one.get(k)} and {two.get(k)}" for k in names[:4])


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {path: value}
    items = ((f"{path}.{k}" if path else k, v) for k, v in value.items())
    return {k: v for name, inner in items for k, v in _flat(inner, name).items()}


def refuse(faults: list[str], over: list[str]) -> None:
    """Raises ArtifactError for faults (budgets are told with them), BudgetError when only budgets were exceeded."""
    told = "".join(f"\n  - {text}" for text in [*faults, *over])
    if faults:
        raise ArtifactError(f"these runs cannot be submitted:{told}")
    if over:
        raise BudgetError(f"over the budget:{told}")
