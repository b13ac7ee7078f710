"""Going on where a checkpoint was taken: finding it, checking it against the settings, putting it back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pgolf import checkpoint, config, tree
from pgolf.config import RunConfig, Settings
from pgolf.dist import Dist
from pgolf.errors import ArtifactError, ConfigError, PgolfError, SetupError
from pgolf.log import RunLog
from pgolf.snapshot import FOLDER, data_facts, machine, set_rng_state

if TYPE_CHECKING:
    from pgolf.train import Trainer

# What may differ in a resumed run without a word: none of it reaches a weight.
FREE = (
    *config.NOT_IN_DIGEST, "train.val_loss_every", "train.train_log_every", "train.warmup_steps",
    "data.max_loaded_shards",
)  # fmt: skip


@dataclass
class Saved:
    """A checkpoint that was read. tensors: on rank 0 only. changes: the settings that the user allowed to differ."""

    path: Path
    facts: dict[str, Any]
    changes: dict[str, tuple[Any, Any]]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def run_folder(settings: Settings) -> Path:
    """The existing run directory that `train.resume` names; for "auto" `out_dir/run_id`, existing or not.

    Raises ConfigError when there is none, or when going on there would write over something else.
    """
    train = settings.config.train
    own = Path(train.out_dir) / train.run_id
    if train.resume == "auto":
        if own.exists() and any(own.iterdir()) and not (own / "events.jsonl").is_file():
            raise ConfigError(
                f"{own} is no run's folder (no events.jsonl), and is left untouched: choose another RUN_ID"
            )
        if (own / "result.json").exists() and not (own / FOLDER).is_dir():
            raise ConfigError(
                f"{own} holds a finished run without checkpoints, which is left untouched: choose another RUN_ID"
            )
        return own
    named = Path(train.resume)
    if not named.is_dir():
        raise ConfigError(
            f"train.resume={named} is no folder; expected a run directory, one of its checkpoints, or auto"
        )
    if checkpoint.NAME.fullmatch(named.resolve().name):
        named = named.resolve().parent
    run_dir = named.resolve().parent if named.resolve().name == FOLDER else named
    if not (run_dir / FOLDER).is_dir():
        raise ConfigError(
            f"train.resume={train.resume} has no {FOLDER}/: expected a run directory or a checkpoint of one"
        )
    if train.run_id and own.resolve() != run_dir.resolve():
        raise ConfigError(
            f"train.resume={train.resume} goes on in {run_dir}, but train.run_id={train.run_id}: leave it out"
        )
    return run_dir


@contextmanager
def claimed(run_dir: Path, dist: Dist) -> Iterator[None]:
    """Holds a run's folder against a second process, as when a job is started again while the first still lives.

    Released when this process ends, however it ends. Raises SetupError when another one holds it.
    """
    handle = dist.on_main(lambda: _lock(run_dir))
    try:
        yield
    finally:
        if dist.is_main and handle is not None:
            os.close(handle)


def _lock(folder: Path) -> int | None:
    """An open handle of the locked folder; None where the system or the file system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(handle)
        if isinstance(err, BlockingIOError):
            raise SetupError(
                f"{folder}: another process is at work on this run; wait until it has ended, or choose another RUN_ID"
            ) from err
        return None
    return handle


def load(settings: Settings, run_dir: Path, dist: Dist, log: RunLog) -> Saved | None:
    """Reads the checkpoint that this run is to go on from; None when it is to start afresh. A collective.

    Rank 0 reads, so the file must be on its machine only. Raises ArtifactError on a damaged or foreign checkpoint and
    ConfigError when it was saved with settings that matter and are others now, unless `settings.allow_change` names
    them.
    """
    resume = settings.config.train.resume
    if not resume:
        return None
    tensors: dict[str, Tensor] = {}

    def read() -> Saved | None:
        named = Path(resume)
        single = resume != "auto" and checkpoint.NAME.fullmatch(named.resolve().name)
        path = named if single else checkpoint.newest(run_dir / FOLDER, log.line)
        if path is None:
            return None
        found, facts = checkpoint.read(path)
        tensors.update(found)
        return Saved(path, facts, check_settings(path, facts, settings))

    saved = dist.on_main(read)
    if saved is None:
        if resume != "auto":
            raise ConfigError(f"train.resume={resume}: there is no checkpoint in {run_dir / FOLDER}")
        log.line(f"resume=auto: no checkpoint in {run_dir / FOLDER}, the run starts from step 0")
        return None
    saved.tensors = tensors
    return saved


def check_settings(path: Path, facts: Mapping[str, Any], settings: Settings) -> dict[str, tuple[Any, Any]]:
    """The allowed differences {setting: (saved, now)}. Raises ConfigError that lists those that are not allowed."""
    try:
        saved = tree.from_dict(RunConfig, facts["config"])
    except (ConfigError, KeyError) as err:
        raise ArtifactError(f"{path}: its settings are not of this version of pgolf: {err}") from err
    changes = {p: pair for p, pair in tree.diff(saved, settings.config).items() if p not in FREE}
    refuse(path, {p: pair for p, pair in changes.items() if not allowed(p, settings)})
    return changes


def allowed(path: str, settings: Settings) -> bool:
    """Whether --allow-change names the setting or a section around it."""
    return any(path == key or path.startswith(f"{key}.") for key in settings.allow_change)


def refuse(path: Path, changes: Mapping[str, tuple[Any, Any]]) -> None:
    """Raises ConfigError with a line for each of `changes`, if there are any."""
    if not changes:
        return
    width = max(map(len, changes))
    rows = [f"  {p:<{width}}  saved {config.show(a)}  now {config.show(b)}" for p, (a, b) in changes.items()]
    inner = {p for p in changes if any(p.startswith(f"{q}.") for q in changes)}  # of a section that was switched
    flags = " ".join(f"--allow-change {p}" for p in changes if p not in inner)
    raise ConfigError(
        "\n".join([f"{path} was saved with other settings:", *rows])
        + f"\nGive the saved values again, or go on with the new ones: {flags}"
    )


# -- putting back ------------------------------------------------------------------------------------------------


def check_data(trainer: Trainer, saved: Saved, settings: Settings) -> None:
    """Before the warm-up: refuses other data unless data.path may change, and tells what the machine does otherwise."""
    then, now = saved.facts.get("data"), data_facts(trainer)
    if then != now:
        saved.changes["data.path"] = tuple(_data_words(d) for d in (then, now))
        if not allowed("data.path", settings):
            refuse(saved.path, {"data.path": saved.changes["data.path"]})
    here = machine(trainer)
    for what, value in (saved.facts.get("machine") or {}).items():
        if value != here.get(what):
            trainer.log.line(f"note: {what} was {value} when the checkpoint was saved, and is {here.get(what)} now")


def _data_words(facts: Any) -> str:
    try:
        names = f"{facts['sha256'][:8]}, tokenizer {facts['tokenizer_sha256'][:8]}"
        return f"{facts['shards']} shards of {facts['tokens']:,} tokens ({names})"
    except (TypeError, KeyError, ValueError):
        return "unknown"


def restore(trainer: Trainer, saved: Saved) -> None:
    """Puts `trainer` where the checkpoint was taken. A collective. After the warm-up, which resets what it touches.

    Raises ConfigError when tensors do not fit this run's model and ArtifactError when facts are not of this version.
    """
    facts = saved.facts
    try:
        _restore_tensors(trainer, _from_main(saved.tensors, trainer.dist), facts)
        _restore_loader(trainer, saved)
        rngs = facts["rng"]
        set_rng_state(rngs[trainer.dist.rank % len(rngs)], trainer.device)
        for phase in trainer.phases.phases:
            if phase.name in facts["phases"]:
                trainer.phases.start(phase)
        trainer.step_number, trainer.tokens = facts["step"], facts["tokens"]
        trainer.skipped = tuple(facts["skipped"])
        trainer.clock.elapsed_ms = float(facts["elapsed_ms"])
        if "train.reserve_ms" not in saved.changes:  # a shorter one than that which ended training would begin it again
            trainer.keep_reserve(max(trainer.reserve_ms, float(facts["reserve_ms"])))
        for step, loss in facts["last_losses"]:
            trainer.losses.append((step, loss))
            trainer.divergence.note(loss)
        trainer.ledger.carry(facts["ledger"])
        trainer.resumes = facts["resumes"] + 1
    except PgolfError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as err:
        raise ArtifactError(f"{saved.path}: its facts are not of this version of pgolf ({err!r})") from err
    saved.tensors.clear()
    _tell(trainer, saved)


def _tell(trainer: Trainer, saved: Saved) -> None:
    step, spent = trainer.step_number, trainer.clock.elapsed_ms / 1000
    changes = {path: list(pair) for path, pair in saved.changes.items()}
    trainer.log.event("resume", step=step, path=str(saved.path), elapsed_ms=1000 * spent, changes=changes)
    trainer.log.line(f"resumed: {saved.path}, step {step}, {spent:.1f} s of training spent")
    for path, (then, now) in saved.changes.items():
        trainer.log.line(f"note: {path} was {config.show(then)} and is {config.show(now)} from here on")


def _from_main(tensors: dict[str, Tensor], dist: Dist) -> dict[str, Tensor]:
    """Rank 0's tensors on every rank, over the CPU: no other machine needs the file."""
    shapes = dist.broadcast_object({name: (t.shape, t.dtype) for name, t in tensors.items()})
    if not dist.is_main:
        tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
    # as bytes: gloo does not know every dtype
    dist.broadcast_params_([t.reshape(-1).view(torch.uint8) for t in tensors.values() if t.numel()])
    return tensors


def _restore_tensors(trainer: Trainer, tensors: dict[str, Tensor], facts: Mapping[str, Any]) -> None:
    params = {info.name: info.param for info in trainer.infos}
    weights = tensors_below(tensors, "model.", params)
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(weights[name])
    trainer.optim.load_tensors_(_below(tensors, "optim."))
    trainer.optim.counts = {kind: facts["optimizer_steps"].get(kind, 0) for kind in trainer.optim.counts}
    averages = trainer.averager.state_dict()
    count = facts["swa_count"]
    # an average that an allowed change turned on begins here, one that it turned off is dropped
    for kind, fresh in (("ema", weights), ("swa_sum", {n: torch.zeros_like(w) for n, w in weights.items()})):
        if averages[kind] is None:
            continue
        found = _below(tensors, f"average.{kind}.")
        count = 0 if kind == "swa_sum" and not found else count
        averages[kind] = _fitting(found or fresh, params, f"average.{kind}")
    trainer.averager.load_state_dict({**averages, "swa_count": count})


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def tensors_below(tensors: Mapping[str, Tensor], prefix: str, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors named `prefix` + parameter, in the order of `params`. Raises ConfigError where they do
    not fit."""
    return _fitting(_below(tensors, prefix), params, prefix.rstrip("."))


def _fitting(got: Mapping[str, Tensor], params: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """`got` in the order of `params`. Raises ConfigError unless names and shapes are the same."""
    odd = [f"{n} missing" for n in params if n not in got] + [f"{n} unexpected" for n in got if n not in params]
    odd += [
        f"{n} saved {tuple(got[n].shape)}, here {tuple(p.shape)}"
        for n, p in params.items()
        if n in got and got[n].shape != p.shape
    ]
    if odd:
        more = f"; and {len(odd) - 4} more" if len(odd) > 4 else ""
        raise ConfigError(f"the checkpoint does not fit: {what}: {'; '.join(odd[:4])}{more}\n"
                          "Resume with the model settings of the saved run.")  # fmt: skip
    return {name: got[name] for name in params}


def _restore_loader(trainer: Trainer, saved: Saved) -> None:
    """The coprime loaders count in blocks of this data and this length: with others their order starts anew."""
    loader = saved.facts["loader"]
    if trainer.cfg.data.loader != "sequential" and {"data.path", "data.seq_len"} & saved.changes.keys():
        trainer.log.line("note: the order of the data starts anew")
        return
    trainer.loader.resume(loader["states"], loader["micro_steps"])
