"""Shared by the tests of checkpoints in a run."""

from pathlib import Path

import torch
from test_train import make_trainer

from pgolf import checkpoint, snapshot

FACTS = (
    "step", "tokens", "elapsed_ms", "reserve_ms", "skipped", "phases", "loader", "rng", "optimizer_steps", "swa_count",
    "last_losses", "ledger", "resumes", "world_size", "data", "machine", "config", "digest", "pgolf",
)  # fmt: skip
# 8 steps with checkpoints at 3, 6 and 8, all kept; late QAT from step 3 on
SHORT = (
    "train.iterations=8", "train.warmup_steps=0", "train.checkpoint_every=3", "schedule.warmdown_iters=6",
    "quant.late_qat.threshold=0.9", "train.keep_checkpoints=9", "eval.stride=0", "train.val_loss_every=0",
)  # fmt: skip


def last(run_dir):
    """(tensors, facts) of the newest checkpoint."""
    return checkpoint.read(checkpoint.newest(run_dir / snapshot.FOLDER))


def assert_same_state(a, b, but=()):
    """Bit for bit, but for times, names and what `but` lists."""
    assert a[0].keys() == b[0].keys()
    for name, t in a[0].items():
        assert t.dtype == b[0][name].dtype and torch.equal(t, b[0][name]), name
    for facts in (a[1], b[1]):
        assert facts.keys() == set(FACTS)
    for name in set(FACTS) - {"elapsed_ms", "skipped", "ledger", "resumes", "config", *but}:
        assert a[1][name] == b[1][name], name


def text(run_dir):
    return (run_dir / "train.log").read_text()


def saving(shards, out, *overrides):
    trainer = make_trainer(shards, out, *overrides)
    trainer.saver = snapshot.Saver(trainer, Path(out) / snapshot.FOLDER)
    return trainer
