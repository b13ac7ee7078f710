"""What a run says so that others can judge it later: which code, which settings, which data, what was scored.

The same facts stand in result.json and, as `name:value`, in the log: a submission holds the log alone.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from pgolf import config, tree
from pgolf.eval.base import EvalResult

if TYPE_CHECKING:
    from pgolf.config import Settings
    from pgolf.train import Trainer

BOS = 1  # the challenge's; each document begins with it


def setting_lines(settings: Settings) -> Iterator[str]:
    """Every setting with where it came from, for the log."""
    for path, value in tree.flatten(settings.config).items():
        yield f"setting {path}={config.show(value)} [{settings.sources.get(path, 'default')}]"


def gather(trainer: Trainer, code: bytes, packed: EvalResult | None, slid: EvalResult | None) -> dict[str, Any]:
    """For result.json. code: the script that ships. packed, slid: the plain and the sliding score, None where there is
    none; the last one is the run's score, and `targets` and `target_bytes` are its."""
    data, score = trainer.data, slid or packed
    return {
        "settings_digest": config.digest(tree.put(trainer.cfg, "train.seed", 0)),  # seeds of one configuration share it
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "tokenizer_sha256": data.tokenizer_sha256,
        "val_loss_artifact": packed.val_loss if packed else None,
        "val_loss_sliding": slid.val_loss if slid else None,
        "targets": score.targets if score else None,
        "target_bytes": score.bytes if score else None,
        "val_tokens": len(data.val),
        "val_documents": int((data.val == BOS).sum()),
        "val_first_token": int(data.val[0]),
        "train_shards": len(data.train_files),
        "hardware": hardware(trainer.device, trainer.dist.world_size),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }


def hardware(device: torch.device, ranks: int) -> str:
    """As in "8x NVIDIA H100 80GB HBM3"; a CPU by its architecture."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU {platform.machine()}"
    return f"{ranks}x {name}"


def lines(facts: dict[str, Any]) -> list[str]:
    """The same facts for the log."""
    row = lambda *names: "evidence " + " ".join(f"{name}:{facts[name]}" for name in names)
    versions = " ".join(f"{name}:{version}" for name, version in facts["versions"].items())
    return [
        row("settings_digest"),
        row("code_sha256"),
        row("tokenizer_sha256"),
        row("val_tokens", "val_documents", "val_first_token", "targets", "target_bytes", "train_shards"),
        f"versions {versions} hardware:{facts['hardware']}",
    ]
