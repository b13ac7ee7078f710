"""Ranks whose clocks disagree take the same decisions: learning rate, phases, the end of training, a stop."""

import os
import socket
import time
import traceback

import pytest
import torch.multiprocessing as mp

RANKS = 3


def _body(rank, port, out, queue):
    try:
        queue.put((rank, _run(rank, port, out)))
        queue.close()
        queue.join_thread()
    except Exception:
        queue.put((rank, traceback.format_exc()))


def _run(rank, port, out):
    """A run of 1.2 s with a skewed clock; {what: the decisions of this rank}."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch

    torch.set_num_threads(1)
    from pgolf import clock, config, limits, train
    from pgolf.run import run

    def skewed() -> float:
        return 1e5 * rank + (1 + rank) * time.monotonic()  # rank 1's is twice as fast, rank 2's three times

    def skewed_clock(*args, **kwargs):
        return clock.Clock(*args, **(kwargs | {"now": skewed}))

    train.Clock = limits.Clock = skewed_clock
    seen = {"scales": [], "progress": [], "own": [], "phases": []}
    take_step, apply = train.Trainer.step, train.Phases.apply
    began = []

    def step(self, scale, n):
        if self.ledger.current == "train":
            began[:] = began or [skewed()]
            seen["scales"].append(scale)
            seen["progress"].append(self.clock.elapsed_ms)
            seen["own"].append(1000 * (skewed() - began[0]))  # what this rank would have gone by
        return take_step(self, scale, n)

    def phases(self, scale):
        happened = apply(self, scale)
        seen["phases"] += [(len(seen["scales"]), name) for name, _ in happened]
        return happened

    train.Trainer.step, train.Phases.apply = step, phases
    overrides = [f"train.out_dir={out}", "train.run_id=r", "train.device=cpu", "train.iterations=100000"]
    overrides += ["train.max_wallclock_seconds=1.2", "train.val_loss_every=5", "eval.max_tokens=256", "eval.stride=0"]
    overrides += ["schedule.warmdown_iters=20", "train.train_log_every=0", "data.micro_batches=1"]
    result = run(config.load(overrides, {"PRESET": "smoke"}))
    return seen | {"steps": result["steps"], "ms": result["train_seconds"], "bpb": result["val_bpb_artifact"]}


@pytest.mark.alone
@pytest.mark.dist
@pytest.mark.slow
def test_ranks_with_skewed_clocks_decide_alike(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_body, args=(r, port, str(tmp_path), queue)) for r in range(RANKS)]
    [p.start() for p in processes]
    try:
        found = dict(queue.get(timeout=100) for _ in range(RANKS))
    finally:
        [p.join(10) for p in processes]
        [p.kill() for p in processes if p.is_alive()]
    assert all(isinstance(f, dict) for f in found.values()), found
    first = found[0]
    assert first["steps"] >= 5 and len({*first["scales"]}) >= 3 and len(first["phases"]) == 1
    for other in (found[1], found[2]):
        for what in ("scales", "progress", "phases", "steps", "ms", "bpb"):
            assert other[what] == first[what], what
    # by its own clock each would have decided otherwise
    assert found[1]["own"][-1] > 1.5 * first["own"][-1] and found[2]["own"][-1] > 2 * first["own"][-1]
