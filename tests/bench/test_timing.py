"""The timer and the guards. Every guard has a control: what it must catch, and is caught."""

import json
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toy import TOY, remembering, toy_ref, writing

from bench import guards, timing
from bench.cases import CASES
from bench.timing import HostClock, Timing, time_interleaved

# -- a device that works behind the host's back ----------------------------------------------------------------------


class FakeGpu(HostClock):
    """Host and device have a time each, seconds; a launch costs the host 10 us and returns at once."""

    def __init__(self):
        self.host = self.device = 0.0
        self.log, self.seen = [], 0.0  # what happened; up to when the host has waited

    def launch(self, ms: float, what: str = "work") -> None:
        self.host += 1e-5
        self.device = max(self.device, self.host) + ms / 1e3
        self.log.append(what)

    def drain(self) -> None:
        self.host = self.seen = max(self.host, self.device)

    def flush(self) -> None:
        self.launch(0.3, "flush")

    def mark(self) -> float:
        return max(self.device, self.host)

    def wait(self) -> None:
        self.drain()

    def ms(self, begin: float, end: float) -> float:
        if end > self.seen:
            raise RuntimeError("read before the device was done")
        return 1e3 * (end - begin)

    def now(self) -> float:
        return self.host


class Careless(FakeGpu):
    """What an unsynchronised timer does: it reads the host's clock, and waits for nothing."""

    def mark(self) -> float:
        return self.host

    def wait(self) -> None:
        self.seen = self.host


def test_time_is_the_devices_not_the_hosts():
    gpu = FakeGpu()
    got = time_interleaved({"work": lambda: gpu.launch(5.0)}, rounds=4, min_ms=19.0, clock=gpu)["work"]
    assert got.median == pytest.approx(5.0) and got.p20 == pytest.approx(5.0) and got.p80 == pytest.approx(5.0)
    assert got.host == pytest.approx(0.01) and got.rounds == 4 and got.repeats == 4 and len(got.samples) == 4


def test_unsynchronised_timer_is_caught():
    good, bad = FakeGpu(), Careless()
    guards.guard_timer(good, lambda: good.launch(5.0), good.drain, now=good.now)
    assert time_interleaved({"work": lambda: bad.launch(5.0)}, clock=bad)["work"].median < 0.1  # not the 5 it takes
    with pytest.raises(AssertionError, match="does it wait"):
        guards.guard_timer(bad, lambda: bad.launch(5.0), bad.drain, now=bad.now)


def test_timer_that_does_not_wait_before_reading_fails():
    gpu = FakeGpu()
    gpu.wait = lambda: None
    with pytest.raises(RuntimeError, match="before the device was done"):
        time_interleaved({"work": lambda: gpu.launch(5.0)}, clock=gpu)


def test_each_call_is_prepared_then_flushed_and_neither_is_timed():
    gpu = FakeGpu()
    prepare = lambda name: gpu.launch(7.0, f"prepare {name}")
    got = time_interleaved({"a": lambda: gpu.launch(1.0, "a")}, rounds=2, min_ms=0.0, prepare=prepare, clock=gpu)
    assert got["a"].median == pytest.approx(1.0)
    assert gpu.log == ["prepare a", "flush", "a"] * (len(gpu.log) // 3)


def test_candidates_take_turns():
    gpu, order = FakeGpu(), []
    calls = {name: lambda name=name: (order.append(name), gpu.launch(1.0)) for name in "abc"}
    time_interleaved(calls, rounds=6, min_ms=0.0, clock=gpu)
    rounds = ["".join(order[i : i + 3]) for i in range(len(order) - 18, len(order), 3)]
    assert rounds == ["abc", "cba", "bca", "acb", "cab", "bac"]


@pytest.mark.alone
def test_times_of_a_cpu():
    times = time_interleaved({"two": lambda: time.sleep(0.002), "six": lambda: time.sleep(0.006)}, rounds=5, min_ms=6.0)
    assert times["two"].median >= 2.0 and times["six"].median >= 6.0
    assert times["two"].p20 <= times["two"].median <= times["two"].p80
    assert times["two"].median < times["six"].median and times["two"].repeats > times["six"].repeats


def test_quantiles():
    got = Timing.of([[1.0, 2.0, 3.0], [4.0, 5.0, 60.0]], [0.5])
    assert (got.median, got.p20, got.p80, got.samples, got.rounds, got.repeats) == (3.5, 2.0, 5.0, (2.0, 5.0), 2, 3)


@pytest.mark.parametrize("call", [lambda: time_interleaved({}, rounds=0), lambda: timing.clock_of("meta")])
def test_bad_arguments_of_the_timer(call):
    with pytest.raises(ValueError, match=r"got .* expected"):
        call()


# -- guards ----------------------------------------------------------------------------------------------------------


def try_guard(candidate, **options):
    guards.guard(TOY, candidate, "small", device="cpu", dtype=torch.float32, **options)


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy * 1.01


class HalfWritten(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        out = torch.empty_like(x)
        out[:3] = x[:3]
        return out

    @staticmethod
    def backward(ctx, dy):
        return dy


def handing_out_again(x, w, known={}):  # noqa: B006  one result for all calls is the point
    if not known:
        known["out"] = toy_ref(x, w)
    return known["out"]


def test_right_candidate_passes():
    try_guard(toy_ref)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    "candidate, message",
    [
        (lambda x, w: (x * w * 1.001, (x * x).sum(-1)), "out.0: error"),
        (lambda x, w: toy_ref(WrongBackward.apply(x), w), "d x: error"),
        (lambda x, w: (x * w, (x * x).sum(-1)[:4]), "out.1: shape"),
        (lambda x, w: (x * w,), "expected"),
        (lambda x, w: toy_ref(HalfWritten.apply(x), w), "not finite"),
        (lambda x, w: (x.detach() * w + 0 * x, (x * x).sum(-1)), "d x: error"),
        (remembering(id), "result of an earlier call"),
        (remembering(lambda x: x.data_ptr()), "result of an earlier call"),
        (handing_out_again, "result of an earlier call"),
        (writing, "changed its input w"),
    ],
    ids=["value", "gradient", "shape", "missing", "half written", "skipped backward", "cached by identity",
         "cached by address", "one result", "mutated input"],
)  # fmt: skip
def test_bad_candidate_is_caught(candidate, message):
    with pytest.raises(AssertionError, match=message):
        try_guard(candidate)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("key", [id, lambda x: x.data_ptr()])
def test_cached_values_are_caught_without_gradients_too(key):
    case = replace(TOY, grads=())
    with pytest.raises(AssertionError, match=r"earlier call\? toy-toy out.0: error"):
        guards.guard(case, remembering(key), "small", device="cpu", dtype=torch.float32)


def test_result_that_is_handed_out_again_is_caught_when_inputs_cannot_be_renewed():
    """Another seed gives another shape here, so that the second call sees the values of the first."""
    by_chance = lambda make, n: {"x": make.randn(n + make.seed, 6), "w": make.randn(6)}
    case, known = replace(TOY, grads=(), inputs=by_chance), []

    def candidate(x, w):
        known.append(known[0] if known else toy_ref(x, w))
        return known[0]

    with pytest.raises(AssertionError, match="earlier call"):
        guards.guard(case, candidate, "small", device="cpu", dtype=torch.float32)


def test_unwritten_memory_is_seen_only_when_poisoned(monkeypatch):
    """The control of the control: without poison, memory that happens to hold the right numbers passes."""
    lucky = lambda x, w: (x * w, 0 * x.sum(-1) + torch.empty(x.shape[0]))
    with pytest.raises(AssertionError, match="not finite"):
        try_guard(lucky)
    zero = replace(TOY, ref=lambda x, w: (x * w, 0 * x.sum(-1)))
    monkeypatch.setattr(torch, "empty", torch.zeros)
    guards.guard(zero, lucky, "small", device="cpu", dtype=torch.float32, poison=False)


def test_declared_writes_pass():
    try_guard(writing, writes=("w",))


def test_tables_inside_inputs_are_compared_and_refilled():
    case = next(c for c in CASES if c.id == "ngram_hash-lookup")
    a, b = (case.make("odd", "cpu", torch.float32, seed) for seed in (0, 0))
    assert guards.alike(a, b) and guards.same(a["table"], b["table"])
    a["table"].lines[0, 0] += 1
    assert not guards.same(a["table"], b["table"])
    guards.refill(a, b)
    assert guards.same(a["table"], b["table"])
    sizes_differ = [not guards.alike(a, case.make("odd", "cpu", torch.float32, seed)) for seed in range(1, 9)]
    assert any(sizes_differ)  # by chance; then `guard` fills in the same values again


def test_time_below_the_roof_is_caught():
    roof = timing.roof_ms(8e9, 1e12, {"copy": 2e12, "gemm": 5e14})
    assert roof == pytest.approx(4.0)
    guards.guard_speed("k", 2.1, roof)
    with pytest.raises(AssertionError, match="work is skipped"):
        guards.guard_speed("k", 1.9, roof)


# -- card ------------------------------------------------------------------------------------------------------------


def test_card_of_a_cpu():
    card = timing.device_card("cpu")
    assert {"device", "name", "cores", "threads", "memory_bytes", "torch", "python", "date"} <= card.keys()
    assert card["device"] == "cpu" and None not in card.values() and card["memory_bytes"] > 1 << 28
    json.dumps(card)


def test_card_of_a_gpu(monkeypatch):
    asked = []
    properties = SimpleNamespace(
        name="NVIDIA X", major=9, minor=0, multi_processor_count=132, total_memory=80, L2_cache_size=50, uuid="ab-cd"
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    answer = lambda *command: asked.append(command) or "570.1, 1980, 1980, 2619, [N/A]"
    monkeypatch.setattr(timing, "_output", answer)
    card = timing.device_card("cuda")
    assert (card["arch"], card["sms"], card["driver"], card["clock_mhz"]) == (90, 132, "570.1", 1980.0)
    assert "power_limit_w" not in card and "--id=GPU-ab-cd" in asked[0]
    monkeypatch.setattr(timing, "_output", lambda *command: None)  # no nvidia-smi, no git
    assert not {"driver", "clock_mhz", "commit"} & timing.device_card("cuda").keys()
