"""What a run says so that others can judge it later: which code, which settings, which data, what was scored.

The same facts stand in result.json and, as `name:value`, in the log: a submission holds the log alone.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pgolf import config, tree

if TYPE_CHECKING:
    from pgolf.config import Settings
    from pgolf.scoring import Score
    from pgolf.train import Trainer

BOS = 1  # the challenge's; each document begins with it


def setting_lines(settings: Settings) -> Iterator[str]:
    """Every setting with where it came from, for the log."""
    for path, value in tree.flatten(settings.config).items():
        yield f"setting {path}={config.show(value)} [{settings.sources.get(path, 'default')}]"


def gather(trainer: Trainer, code: bytes, scores: Sequence[Score]) -> dict[str, Any]:
    """For result.json. code: the script that ships. scores: those of the artifact; the last one is the run's, and
    val_bpb_final, `targets` and `target_bytes` are its."""
    by_pass = {score.suffix: score.result for score in scores}
    data, packed, slid = trainer.data, by_pass.get(""), by_pass.get("sliding")
    score = scores[-1].result if scores else None
    return {
        "settings_digest": config.digest(tree.put(trainer.cfg, "train.seed", 0)),  # seeds of one configuration share it
        "code_sha256": hashlib.sha256(code).hexdigest(),
        "tokenizer_sha256": data.tokenizer_sha256,
        "val_loss_artifact": packed.val_loss if packed else None,
        "val_loss_sliding": slid.val_loss if slid else None,
        "score_pass": (scores[-1].suffix or "plain") if scores else None,
        "val_bpb_final": score.val_bpb if score else None,
        "val_loss_final": score.val_loss if score else None,
        "order": score.order if score else None,
        "ledger_digest": score.ledger.digest() if score else None,
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
        row("score_pass", "val_bpb_final", "order", "ledger_digest"),
        row("val_tokens", "val_documents", "val_first_token", "targets", "target_bytes", "train_shards"),
        f"versions {versions} hardware:{facts['hardware']}",
    ]
