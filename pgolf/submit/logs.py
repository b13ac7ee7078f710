"""What a training log says, ours or anybody's: the challenge's lines, read forgivingly.

A number that a log does not have is None. Lines that are torn or foreign are passed over; nothing here raises.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

MAX_LINE = 4000  # characters of a line that are looked at: some logs hold their script in one

NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
PATTERNS = {
    "final": re.compile(rf"(?:final_?)?(\S*?)\s+val_loss:\s*{NUMBER}\s+val_bpb:\s*{NUMBER}"),
    "eval_ms": re.compile(rf"eval_time:\s*{NUMBER}\s*ms"),
    "step": re.compile(rf"^step:(\d+)/(\d+) .*train_time:{NUMBER}ms"),
    "early": re.compile(rf"stopping_early: \S+ train_time:{NUMBER}ms step:(\d+)"),
    "model": re.compile(r"Serialized model (\S+): (\d+) bytes"),
    "code": re.compile(r"Code size(?: \S+)?: (\d+) bytes"),
    "total": re.compile(r"Total submission size(?: \S+)?: (\d+) bytes"),
    "eval": re.compile(rf"total_eval_time[:=]\s*{NUMBER}\s*(ms|s)?"),
    "budget": re.compile(rf"^\s*= (training|evaluation)\s+{NUMBER} s"),
    "seed": re.compile(r"(?:^|[\s,{\"'])seed[\"']?\s*[:=]\s*(\d{1,19})\b", re.I),
    "calibrated": re.compile(r"calibrat\w*[^\n]*?(?:source|from)[:= ]+(\w+)", re.I),
}
FACT = re.compile(r"(\w+):(\S+)")


@dataclass
class Log:
    """One run's log. Times in seconds, sizes in bytes. score: the last final one; facts: our `evidence` lines."""

    name: str
    text: str = field(repr=False)
    seed: int | None = None
    val_loss: float | None = None
    val_bpb: float | None = None
    score: str | None = None  # the name of the final line
    steps: int | None = None
    train_seconds: float | None = None
    eval_seconds: float | None = None
    model_bytes: int | None = None
    code_bytes: int | None = None
    total_bytes: int | None = None
    val_tokens: int | None = None
    train_shards: int | None = None
    calibrated_on: str | None = None
    facts: dict[str, str] = field(default_factory=dict)
    non_finite: bool = False

    @property
    def bytes_per_token(self) -> float | None:
        """As the two scores imply it: val_loss = val_bpb x ln 2 x bytes per token."""
        if not self.val_loss or not self.val_bpb:
            return None
        return self.val_loss / (self.val_bpb * 0.6931471805599453)

    def number(self, fact: str) -> int | None:
        """A whole number among the facts."""
        value = self.facts.get(fact, "")
        return int(value) if value.isascii() and value.isdigit() and len(value) < 19 else None


def is_log(text: str) -> bool:
    """Whether a text looks like a training log."""
    return bool(re.search(r"^step:\d+/\d+ ", text, re.M)) or "val_bpb:" in text


def read(name: str, text: str) -> Log:
    """The facts of a log; of facts that it repeats, the last one."""
    log = Log(name, text)
    finals: dict[str, float] = {}
    trained = early = total_eval = None
    budgets: dict[str, float] = {}
    for line in text.splitlines():
        line = line[:MAX_LINE]
        if line.startswith("evidence "):
            log.facts |= dict(FACT.findall(line))
        elif found := PATTERNS["early"].search(line):
            early, log.steps = float(found[1]) / 1000, int(found[2])
        elif found := PATTERNS["step"].match(line):
            trained, log.steps = float(found[3]) / 1000, int(found[1])
        elif found := PATTERNS["budget"].match(line):
            budgets[found[1]] = float(found[2])
        elif found := PATTERNS["eval"].search(line):
            total_eval = float(found[1]) / (1000 if found[2] == "ms" else 1)
        elif "val_bpb:" in line and "step:" not in line:
            _final(log, line, finals)
        else:
            _rest(log, line)
    log.train_seconds = budgets.get("training") or early or trained
    log.eval_seconds = budgets.get("evaluation") or total_eval or sum(finals.values()) or None
    if log.seed is None and (found := re.search(r"seed[_-]?(\d{1,19})", name, re.I)):
        log.seed = int(found[1])
    return log


def _final(log: Log, line: str, finals: dict[str, float]) -> None:
    log.non_finite |= bool(re.search(r"val_(?:loss|bpb):\s*-?(?:nan|inf)", line, re.I))
    found = PATTERNS["final"].search(line)
    if not found:
        return
    label, loss, bpb = found[1].removesuffix("_exact"), float(found[2]), float(found[3])
    exact = "_exact" in line
    if exact or label != log.score:  # the exact line follows the rounded one of its name
        log.score, log.val_loss, log.val_bpb = label, loss, bpb
    if ms := PATTERNS["eval_ms"].search(line):
        finals[label] = float(ms[1]) / 1000


def _rest(log: Log, line: str) -> None:
    if found := PATTERNS["model"].search(line):
        log.model_bytes = int(found[2])
    elif found := PATTERNS["code"].search(line):
        log.code_bytes = int(found[1])
    elif found := PATTERNS["total"].search(line):
        log.total_bytes = int(found[1])
    if log.seed is None and (found := PATTERNS["seed"].search(line)):
        log.seed = int(found[1])
    if found := re.search(r"\bval_tokens:\s*([\d,]{1,20})", line):
        log.val_tokens = int(found[1].replace(",", "") or 0)
    if found := re.search(r"\btrain_shards:\s*(\d{1,9})", line):
        log.train_shards = int(found[1])
    if found := PATTERNS["calibrated"].search(line):
        log.calibrated_on = found[1].lower()
