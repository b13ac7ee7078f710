"""What a run must remember to go on as if nothing had happened: what it is, and when it is written.

A save pauses the training clock and is a phase of its own in the time ledger, "checkpoint", counted for no budget, as
validation is: it changes no weight, and so the checkpoint settings change neither the schedule nor the number of steps.
Whoever counts every second between the first step and the last adds that line of the ledger.
"""

from __future__ import annotations

import base64
import hashlib
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

import pgolf
from pgolf import checkpoint, config

if TYPE_CHECKING:
    from pgolf.train import Trainer

FOLDER = "checkpoints"


class Saver:
    """Writes `trainer`'s checkpoints into `folder`, when they are due. Same decisions on every rank."""

    def __init__(self, trainer: Trainer, folder: Path):
        self.trainer, self.folder = trainer, folder
        self.saved_step = trainer.step_number or -1  # a resumed run has its own step on the disk
        self.saved_ms = trainer.clock.elapsed_ms

    @property
    def due(self) -> bool:
        """After the last step always; by steps and by rank 0's training time where the settings say so."""
        trainer, t = self.trainer, self.trainer.cfg.train
        by_time = t.checkpoint_seconds and trainer.clock.elapsed_ms - self.saved_ms >= 1000 * t.checkpoint_seconds
        by_step = t.checkpoint_every and trainer.step_number % t.checkpoint_every == 0
        return bool(trainer.is_last or by_step or by_time)

    def save(self) -> None:
        """Writes the state after the last finished step, unless it is there. A collective; training time stands still.

        Raises NumericalError on a non-finite state and SetupError when the disk fails, on every rank.
        """
        trainer, began = self.trainer, time.monotonic()
        if trainer.step_number == self.saved_step:
            return
        with trainer.dist.patient(), trainer.clock.paused(), trainer.ledger.phase("checkpoint"):
            trainer.check_finite()
            tensors, facts = snapshot(trainer)
            keep = trainer.cfg.train.keep_checkpoints
            written = trainer.dist.on_main(lambda: checkpoint.write(self.folder, tensors, facts, keep))
        self.saved_step, self.saved_ms = trainer.step_number, trainer.clock.elapsed_ms
        seconds, path = time.monotonic() - began, str(written.path)
        trainer.log.event("checkpoint", step=self.saved_step, bytes=written.nbytes, seconds=seconds, path=path)
        size = f"{written.nbytes / 1e6:.1f} MB in {seconds:.2f} s"
        trainer.log.line(f"checkpoint: step {self.saved_step}, {size}, {path}")


def snapshot(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors on the CPU, facts as JSON values) after the last finished step. A collective; tensors on rank 0 only."""
    found = {f"model.{info.name}": info.param for info in trainer.infos}
    found |= {f"optim.{name}": t for name, t in trainer.optim.tensors().items()}
    averages = trainer.averager.state_dict()
    for kind in ("ema", "swa_sum"):
        found |= {f"average.{kind}.{name}": t for name, t in (averages[kind] or {}).items()}
    ranks = trainer.dist.gather_objects((trainer.loader.state_dict(), rng_state(trainer.device)))
    loader = {"states": [loader for loader, _ in ranks], "micro_steps": trainer.loader.micro_steps}
    facts = {
        "step": trainer.step_number,
        "tokens": trainer.tokens,
        "elapsed_ms": trainer.clock.elapsed_ms,
        "reserve_ms": trainer.reserve_ms,
        "skipped": list(trainer.skipped),
        "phases": [phase.name for phase in trainer.phases.phases if phase.started],
        "loader": loader,
        "rng": [rng for _, rng in ranks],
        "optimizer_steps": dict(trainer.optim.counts),
        "swa_count": averages["swa_count"],
        "last_losses": [list(pair) for pair in trainer.losses],
        "ledger": trainer.ledger.to_dict(),
        "resumes": trainer.resumes,
        "world_size": trainer.dist.world_size,
        "data": data_facts(trainer),
        "machine": machine(trainer),
        "config": config.to_dict(trainer.cfg),
        "digest": config.digest(trainer.cfg),
        "pgolf": pgolf.__version__,
    }
    return {name: _on_cpu(t) for name, t in found.items()} if trainer.dist.is_main else {}, facts


def _on_cpu(tensor: Tensor) -> Tensor:
    """A copy: weights may be views into one bank, and what is written must not share memory."""
    return torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())


def rng_state(device: torch.device) -> dict[str, Any]:
    """The process's generators as JSON values: Python's, NumPy's, torch's, and the GPU's if `device` is one."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": [kind, _text(keys), *rest],
        "torch": _text(torch.get_rng_state().numpy()),
    }
    if device.type == "cuda":
        state["cuda"] = _text(torch.cuda.get_rng_state(device).numpy())
    return state


def set_rng_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Inverse of `rng_state`; a GPU's generator stays as it is when the state is of a run without one."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, _array(keys, np.uint32), *rest))
    torch.set_rng_state(torch.from_numpy(_array(state["torch"], np.uint8)))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(torch.from_numpy(_array(state["cuda"], np.uint8)), device)


def _text(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _array(text: str, dtype: type) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()


def data_facts(trainer: Trainer) -> dict[str, Any]:
    """Which data: names and sizes of the train shards, in order, and the tokenizer. Not where they lie."""
    shards = trainer.loader.loader.shards
    names = [f"{path.name} {len(shard)}" for path, shard in zip(trainer.data.train_files, shards, strict=True)]
    return {
        "shards": len(names),
        "tokens": sum(map(len, shards)),
        "sha256": hashlib.sha256("\n".join(names).encode()).hexdigest(),
        "tokenizer_sha256": trainer.data.tokenizer_sha256,
    }


def machine(trainer: Trainer) -> dict[str, str]:
    """What the machine decided and the settings do not show; a difference is told, not refused."""
    chosen = trainer.runtime
    return {
        "device": chosen.device.type,
        "dtype": chosen.dtype.value,
        "compile": chosen.compile.value,
        "weight cast": chosen.weight_cast.value,
        "torch": torch.__version__.partition("+")[0],
        "ranks": str(trainer.dist.world_size),
    }
