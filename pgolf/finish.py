"""Behind the clock: average the weights, score them, squeeze them, reload them from the bytes, score those, report."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pgolf import checkpoint, evidence, extras, limits, result, scoring
from pgolf.artifact import budget, codecs
from pgolf.artifact.bundle import bundle, made_by
from pgolf.artifact.model_io import Loaded, load, save_model
from pgolf.config import RunConfig
from pgolf.errors import BudgetError
from pgolf.eval.base import EvalResult
from pgolf.eval.neural import Neural
from pgolf.model.gpt import parameter_count
from pgolf.quant.records import Parts
from pgolf.scoring import Score, Scoring

if TYPE_CHECKING:
    from pgolf.train import Trainer

ADAPTIVE = ("ttt", "ngram")  # passes that learn from what they have scored


def check_ready(cfg: RunConfig) -> None:
    """Before the first step: what will be needed to save and to export is here. Raises SetupError when a package is
    missing and ConfigError on a level that the codec does not have."""
    codecs.choice(cfg.quant.codec, cfg.quant.level)
    if cfg.train.keep_checkpoints:
        checkpoint.library()


def finish(trainer: Trainer, run_dir: Path, began: float) -> dict:
    """Everything after the last step. Returns the result; raises BudgetError after writing it when over a limit."""
    cfg, log, ledger, dist = trainer.cfg, trainer.log, trainer.ledger, trainer.dist
    trainer.phases.undo()
    source = load_average(trainer)
    log.line(f"exported weights: {source}")
    if source == "raw" and not cfg.quant.late_qat:
        floats = trainer.last_val  # the last step's validation has scored these very weights
    else:
        with log.phase("evaluate_float", ledger):
            floats = trainer.validate(scoring.plain_windows(cfg), limit=cfg.eval.max_tokens)
    label = f"{cfg.quant.matrix}_{cfg.quant.codec}_roundtrip"
    given = trainer.calibration.run()
    more = {}
    if extras.wanted(cfg):
        with log.phase("calibrate", ledger):
            more = extras.make(trainer)
    trainer.safe_point("before packing")
    with log.phase("pack", ledger):
        artifact, code = dist.on_main(lambda: write_submission(trainer, run_dir, given, more))
    report = budget.account(artifact, code)
    log.sizes(report.artifact_bytes, report.code_bytes, f"{cfg.quant.matrix}+{cfg.quant.codec}")
    loaded = load(artifact, device=trainer.device, compute_dtype=trainer.runtime.compute_dtype)
    late = []  # what went over a time limit
    scores: list[Score] = []
    with log.phase("evaluate", ledger):
        try:
            for score in scoring_of(trainer, loaded, artifact, run_dir, label).run():
                scores.append(score)
                told(trainer, score, label)
        except limits.OutOfTime as err:
            late.append(str(err))
        trainer.note_recompiles()
    if trainer.device.type == "cuda":
        log.peak_memory(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    facts = gather(trainer, floats, scores, report, began) | evidence.gather(trainer, code, scores)
    for line in [f"code made by: {made_by()}", *evidence.lines(facts)]:
        log.line(line, console=False)
    dist.on_main(lambda: result.write_result(run_dir, facts))
    if dist.is_main:
        result.plot_curves(run_dir / "events.jsonl", run_dir / "curves.png", say=log.line)
    result.print_result(facts, log.line)
    log.line(f"run directory: {run_dir}")
    log.event("result", **facts)
    check_time(trainer, late)
    budget.check(report)
    return facts


def check_time(trainer: Trainer, late: list[str]) -> None:
    """Raises BudgetError for what went over the limits of training and evaluation. late: what is known of already."""
    cfg, dist = trainer.cfg, trainer.dist
    trained = trainer.clock.elapsed_ms / 1000 + dist.broadcast_float(trainer.ledger.seconds("calibrate"))
    scored = dist.broadcast_float(limits.spent(trainer.ledger, "evaluation"))
    # a run that was resumed behind its training made no step itself
    step = trainer.last_step_s or trainer.clock.elapsed_ms / 1000 / max(trainer.step_number, 1)
    late = [
        limits.over_training(trained, cfg.train.max_wallclock_seconds, step),
        *(late or [limits.over_evaluation(scored, cfg.eval.max_seconds)]),
    ]
    if any(late):
        raise BudgetError("\n".join(filter(None, late)) + "\nThe result is written all the same.")


def write_submission(
    trainer: Trainer, run_dir: Path, given: dict[str, Parts], more: dict[str, Any]
) -> tuple[bytes, bytes]:
    """Writes the two files that count against the limit; returns their bytes: (artifact, code). Raises SetupError.

    given: what calibration has quantised. more: what scoring needs besides the weights.
    """
    sha256, code = trainer.data.tokenizer_sha256, bundle()
    how = {"phase": trainer.ledger.phase, "code_bytes": len(code), "say": trainer.log.line}
    found = {"given": given, "diagonals": trainer.calibration.diagonals, "extras": more}
    artifact = save_model(trainer.model, trainer.infos, trainer.cfg.quant, sha256, **found, **how)
    fix = f"free some space, and go on where training ended: RESUME={run_dir}" if trainer.saver else "free some space"
    for name, data in (("model.pgolf", artifact), ("train_gpt_bundle.py", code)):
        result.write_file(run_dir / name, data, fix)
    return artifact, code


def load_average(trainer: Trainer) -> str:
    """Puts the averaged weights into the model; returns what they are."""
    source, weights = trainer.averager.averaged()
    params = dict(trainer.model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            params[name].copy_(value)
    return source


def scoring_of(trainer: Trainer, loaded: Loaded, artifact: bytes, run_dir: Path, label: str) -> Scoring:
    """The passes over the reloaded artifact, with this run's log, clock and signals."""
    log, cfg = trainer.log, trainer.cfg
    # code of its own: the reloaded model's graph is not the validation's compiled again
    own = lambda hidden: trainer.compiled(lambda batch: hidden(batch))
    neural = Neural(loaded.model, extras.temperature_of(loaded.extras), own)
    what = {"artifact": hashlib.sha256(artifact).hexdigest(), "data": trainer.data.val_sha256()}
    return Scoring(
        cfg,
        neural,
        trainer.data,
        trainer.dist,
        label=label,
        stop=trainer.stop,
        ledger=trainer.ledger,
        folder=run_dir / "evaluation" if trainer.saver else None,
        what=what,
        mixer=extras.mixer_of(loaded.extras),
        compiled=trainer.compiled,
        say=log.line,
        progress=log.progress,
    )


def told(trainer: Trainer, score: Score, label: str) -> None:
    """Logs a finished pass, and leaves its ledger in the run's folder."""
    result, name = score.result, f"{label}_{score.suffix}" if score.suffix else label
    trainer.log.final(name, result.val_loss, result.val_bpb, 1000 * result.seconds, subset=result.subset)
    if score.suffix in ADAPTIVE:
        trainer.log.line(f"ledger {name}: {len(result.ledger.events)} events, sha256 {result.ledger.digest()}")


def gather(trainer: Trainer, floats: EvalResult, scores: list[Score], report, began):
    """The facts of a run, as result.json holds them: a dict. scores: of the artifact, those that there was time for."""
    by_pass = {score.suffix: score.result for score in scores}
    packed, slid = by_pass.get(""), by_pass.get("sliding")
    cfg, ledger, found = trainer.cfg, trainer.ledger, trainer.recompiles
    train_seconds = trainer.clock.elapsed_ms / 1000
    return {
        "preset": cfg.preset,
        "seed": cfg.train.seed,
        "world_size": trainer.dist.world_size,
        "device": str(trainer.device),
        "dtype": trainer.runtime.dtype.value,
        "torch": torch.__version__,
        "data": trainer.data.name,
        "parameters": parameter_count(trainer.model),
        "steps": trainer.step_number,
        "resumes": trainer.resumes,
        "tokens": trainer.tokens,
        "train_seconds": train_seconds,
        "total_seconds": time.monotonic() - began + ledger.carried,
        "tokens_per_second": trainer.tokens / max(train_seconds, 1e-9),
        "val_loss": floats.val_loss,
        "val_bpb": floats.val_bpb,
        "val_bpb_artifact": packed.val_bpb if packed else None,
        "val_bpb_sliding": slid.val_bpb if slid else None,
        "scores": [score.facts() for score in scores],
        "subset": packed.subset if packed else None,
        "subset_sliding": slid.subset if slid else None,
        "artifact_bytes": report.artifact_bytes,
        "code_bytes": report.code_bytes,
        "total_bytes": report.total_bytes,
        "bytes_by_group": {name: size for name, size in report.items.items() if name != "code"},
        "recompiles": trainer.dist.max_int(len(found.seen)) if found else 0,
        "recompiles_by_phase": found.by_phase() if found else {},
        "calibration": trainer.calibration.facts,
        "ledger": ledger.to_dict(),
        "node": trainer.node,
        "time_limits": {"training": cfg.train.max_wallclock_seconds, "evaluation": cfg.eval.max_seconds},
    }
