"""Ranks, collectives over two gloo processes, the clock and the time ledger."""

import socket
import traceback
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from pgolf.clock import Clock, TimeLedger, ledger_lines
from pgolf.dist import Dist, Rank, start
from pgolf.errors import DistributedError, SetupError


class Hand:
    """A clock moved by hand; `rate` makes it run fast or slow."""

    def __init__(self, at=0.0, rate=1.0):
        self.at, self.rate = at, rate

    def __call__(self):
        return self.at

    def sleep(self, seconds):
        self.at += seconds * self.rate


def test_one_rank_needs_no_process_group():
    dist = Dist()
    x = torch.arange(3.0)
    dist.mean_grads_([x])
    dist.broadcast_params_([x])
    dist.barrier()
    assert torch.equal(dist.all_reduce_sum_(x), torch.arange(3.0))
    assert dist.max_int(7) == 7 and dist.broadcast_object("a") == "a" and dist.broadcast_float(0.1) == 0.1
    assert dist.is_main and not torch.distributed.is_initialized()
    dist.close()
    dist.close()


def test_rank_reads_torchruns_variables(monkeypatch):
    env = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Rank.from_environ("cpu", env) == Rank(5, 8, 1, torch.device("cpu"))
    assert Rank.from_environ("cpu", {}) == Rank(0, 1, 0, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Rank.from_environ("auto", env).device == torch.device("cuda", 1)
    assert Rank.from_environ("cpu", env).device == torch.device("cpu")
    with pytest.raises(DistributedError, match=r"LOCAL_RANK=3 needs GPU 3, but only 2 (.|\n)*nproc_per_node=2"):
        Rank.from_environ("auto", {**env, "LOCAL_RANK": "3"})


@pytest.mark.parametrize("env", [{"RANK": "x"}, {"RANK": "1"}, {"WORLD_SIZE": "0"}, {"RANK": "-1", "WORLD_SIZE": "2"}])
def test_contradicting_variables_are_explained(env):
    with pytest.raises(DistributedError) as caught:
        Rank.from_environ("cpu", env)
    assert caught.value.exit_code == 8 and next(iter(env.values())) in str(caught.value)


def test_cuda_asked_for_without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SetupError, match="device=cuda") as caught:
        Rank.from_environ("cuda", {})
    assert caught.value.exit_code == 3
    assert Rank.from_environ("auto", {}).device.type == "cpu"
    with pytest.raises(SetupError, match="must be auto, cpu or cuda"):
        Rank.from_environ("gpu", {})


def test_missing_rendezvous_is_explained(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(DistributedError, match="torchrun"):
        start("cpu")


def test_clock_leaves_out_pauses():
    hand = Hand(at=1000.0)
    clock = Clock(Dist(), cap_ms=5000, now=hand)
    clock.start()
    hand.sleep(2)
    assert clock.tick() == 2000
    with clock.paused():
        hand.sleep(100)
        assert clock.tick() == 2000
        with clock.paused():
            hand.sleep(1)
        hand.sleep(1)
    hand.sleep(2.5)
    assert clock.tick() == 4500 and not clock.expired and clock.left_ms == 500
    hand.sleep(0.5)
    assert not clock.expired  # decided by ticks only
    assert clock.tick() == 5000 and clock.expired and clock.left_ms == 0


def test_clock_without_cap_and_resumed():
    hand = Hand()
    clock = Clock(Dist(), now=hand)
    clock.start(at_ms=1500)
    hand.sleep(1)
    assert clock.tick() == 2500 and not clock.expired and clock.left_ms is None


def test_clock_goes_on_after_an_error_in_a_pause():
    hand = Hand()
    clock = Clock(Dist(), now=hand)
    clock.start()
    with pytest.raises(KeyError), clock.paused():
        hand.sleep(5)
        raise KeyError
    hand.sleep(1)
    assert clock.tick() == 1000


def test_ledger_books_no_second_twice():
    hand = Hand()
    ledger = TimeLedger(now=hand)
    hand.sleep(50)  # belongs to nobody
    with ledger.phase("compile"):
        hand.sleep(3)
    with ledger.phase("train"):
        hand.sleep(1)
        for _ in range(2):
            with ledger.phase("validate"):
                hand.sleep(10)
            hand.sleep(1)
        assert ledger.seconds("train") == 3
    with pytest.raises(KeyError), ledger.phase("calibrate"):
        hand.sleep(2)
        raise KeyError
    with ledger.phase("evaluate"):
        hand.sleep(7)
    expected = {"compile": (3, None), "train": (3, "training"), "validate": (20, None), "calibrate": (2, "training"),
                "evaluate": (7, "evaluation")}  # fmt: skip
    assert {k: (v["seconds"], v["counted"]) for k, v in ledger.to_dict().items()} == expected
    sums = {line.split("  ")[0]: float(line.split()[-2]) for line in ledger.lines() if line.startswith("=")}
    assert sums == {"= training": 5, "= evaluation": 7, "= all": 35}
    assert ledger_lines(ledger.to_dict()) == ledger.lines()


SHAPES = [
    ((3, 4), torch.float32),
    ((5,), torch.bfloat16),
    ((), torch.float32),
    ((2, 2), torch.bfloat16),
    ((4, 6), torch.float32),
]


def _two_ranks(rank, port, queue):
    """Body of a process; reports {name: value} or the traceback."""
    try:
        queue.put((rank, _collectives(rank, port)))
        queue.close()
        queue.join_thread()  # the parent reads before this process ends
    except Exception:
        queue.put((rank, traceback.format_exc()))


def _collectives(rank, port):
    import os

    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    dist = start("cpu")
    out = {"rank": (dist.rank, dist.world_size, str(dist.device))}
    gen = torch.Generator().manual_seed(rank)
    grads = [torch.randn(s, generator=gen).to(d) for s, d in SHAPES]
    grads[-1] = grads[-1].t().contiguous().t()  # another memory layout
    dist.mean_grads_(grads)
    out["grads"] = [g.float().tolist() for g in grads]
    params = [torch.full((3,), float(rank)), torch.nn.Parameter(torch.full((2, 2), 7.0 + rank))]
    dist.broadcast_params_(params)
    out["params"] = [p.tolist() for p in params]
    out["object"] = dist.broadcast_object({"from": rank})
    out["max"] = dist.max_int(10 - rank)
    out["sum"] = dist.all_reduce_sum_(torch.tensor([200, 3], dtype=torch.uint8)).tolist()
    hand = Hand(at=1e6 * rank, rate=1.0 + 0.07 * rank)  # rank 1's clock is elsewhere and 7 % fast
    clock = Clock(dist, cap_ms=1010, now=hand)
    clock.start()
    ticks = []
    while not clock.expired:
        hand.sleep(0.1)
        ticks.append(clock.tick())
        with clock.paused():
            hand.sleep(0.5 + rank)
    out["ticks"] = ticks
    from torch import _dynamo  # noqa: F401  as a run does; what it imports must not keep the process group alive

    dist.barrier()
    if rank == 1:
        dist.close()  # gone, as a rank that died
        out["threads"] = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    else:
        try:
            for _ in range(3):
                dist.max_int(1)
        except DistributedError as err:
            out["alone"] = str(err)
        dist.close()
    return out


@pytest.mark.alone
@pytest.mark.dist
def test_two_processes():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=_two_ranks, args=(r, port, queue)) for r in range(2)]
    [p.start() for p in processes]
    try:
        got = dict(queue.get(timeout=60) for _ in range(2))
    finally:
        [p.join(10) for p in processes]
        [p.kill() for p in processes if p.is_alive()]
    a, b = got[0], got[1]
    assert isinstance(a, dict) and isinstance(b, dict), (a, b)
    assert (a["rank"], b["rank"]) == ((0, 2, "cpu"), (1, 2, "cpu"))
    assert a["grads"] == b["grads"]
    gens = [torch.Generator().manual_seed(r) for r in range(2)]
    for i, (shape, dtype) in enumerate(SHAPES):
        mine = [torch.randn(shape, generator=g).to(dtype).double() for g in gens]
        tolerance = 2**-7 if dtype == torch.bfloat16 else 1e-6
        averaged = torch.tensor(a["grads"][i], dtype=torch.float64)
        torch.testing.assert_close(averaged, (mine[0] + mine[1]) / 2, rtol=tolerance, atol=tolerance)
    assert a["params"] == b["params"] == [[0.0] * 3, [[7.0, 7.0], [7.0, 7.0]]]
    assert a["object"] == b["object"] == {"from": 0}
    assert a["max"] == b["max"] == 10
    assert a["sum"] == b["sum"] == [400 % 256, 6]
    assert not [name for name in b["threads"] if "gloo" in name], "they may outlive the interpreter"
    # rank 0's clock to the bit on both, and so both stop at the same step
    assert a["ticks"] == b["ticks"] and len(a["ticks"]) == 11
    assert a["ticks"] == pytest.approx([100.0 * (i + 1) for i in range(11)])
    assert "rank 0 of 2: maximum over ranks failed" in a["alone"]
    assert "rank 1 gives no sign of life" in a["alone"]
