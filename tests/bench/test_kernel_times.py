"""The kernel benchmark: its providers, what it times of them, and the command."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from toy import TOY, remembering, toy_ref, writing

from bench import bench_kernels, conftest, guards, providers, timing
from bench.cases import CASES
from bench.cases.case import PRODUCTION
from bench.timing import Timing

CPU = torch.device("cpu")


# -- providers -------------------------------------------------------------------------------------------------------


def test_who_remembers_by_version_computes_every_time():
    """`guard` cannot see a memory of (tensor, version); `touch` before every call makes it useless."""
    counted = []
    memory = remembering(lambda x: (id(x), x._version))

    def candidate(x, w):
        before = x._version
        out = memory(x, w)
        counted.append(before)
        return out

    inputs = TOY.make("small", "cpu", torch.float32)
    run = providers.Run(TOY, providers.Provider("p", candidate), inputs)
    for _ in range(4):
        run.prepare("forward")
        run.call("forward")
    assert len(set(counted)) == 4


@pytest.mark.parametrize("mode", ["forward", "backward", "both"])
def test_modes_call_what_they_say(mode):
    seen = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            seen.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            seen.append("backward")
            return dy

    inputs = TOY.make("small", "cpu", torch.float32)
    run = providers.Run(TOY, providers.Provider("p", lambda x, w: toy_ref(Watched.apply(x), w)), inputs)
    run.prepare(mode)
    run.prepare(mode)  # cotangents are there now
    seen.clear()
    run.call(mode)
    assert seen == {"both": ["forward", "backward"]}.get(mode, [mode])


def test_written_inputs_are_as_before_at_every_call():
    seen = []

    def candidate(x, w):
        seen.append(w.detach().clone())
        return writing(x, w)

    case = replace(TOY, grads=())
    run = providers.Run(case, providers.Provider("p", candidate, ("w",)), case.make("small", "cpu", torch.float32))
    for _ in range(3):
        run.prepare("forward")
        run.call("forward")
    assert all(torch.equal(w, seen[0]) for w in seen)


def test_failures_do_not_stop_the_others(monkeypatch):
    by_name = {"eager": toy_ref, "wrong": lambda x, w: (x * w, x.sum(-1)), "crash": lambda x, w: 1 / 0}
    monkeypatch.setattr(providers, "build", lambda name, case: providers.Provider(name, by_name[name]))
    found = providers.measure(TOY, list(by_name), "small", device=CPU, rounds=2, min_ms=0.0)
    assert isinstance(found["both", "eager"], Timing) and isinstance(found["backward", "eager"], Timing)
    assert "out.1: error" in found["forward", "wrong"].reason and "ZeroDivision" in found["both", "crash"].reason
    assert len(found) == 9


def test_measure_runs_a_kernel_beside_its_reference(kernels_on):
    case = next(c for c in CASES if c.id == "residual-add")
    found = providers.measure(case, ["pgolf", "eager"], "one", device=CPU, rounds=1, min_ms=0.0)
    assert set(found) == {(m, p) for m in ("forward", "backward", "both") for p in ("pgolf", "eager")}
    assert all(isinstance(t, Timing) for t in found.values()), found
    assert found["forward", "pgolf"].median > found["forward", "eager"].median  # interpreted


def test_in_place_ops_are_timed_without_copies():
    for case in (c for c in CASES if c.writes):
        size = providers.smallest(case)
        inputs, before = (case.make(size, "cpu", case.dtypes[-1]) for _ in range(2))
        providers.build("eager", case).fn(**inputs)
        assert not guards.same(inputs[case.writes[0]], before[case.writes[0]]), case.id
        providers.guarded("eager", case, size, CPU, case.dtypes[-1])


def test_available_providers(monkeypatch):
    monkeypatch.setattr(providers, "installed", lambda: {"liger_kernel": True, "quack": False, "flash_attn": False})
    by_id = {c.id: c for c in CASES}
    assert providers.available(by_id["residual-norm_only"], "cpu") == ["eager"]
    norm = providers.available(by_id["residual-norm_only"], "cuda")
    assert norm == ["pgolf", "torch.compile", "eager", "liger_kernel"]

    def explain(device, asked="auto"):
        if asked == "fa3":
            raise ValueError
        return {"auto": "cudnn"}.get(asked, asked), ""

    monkeypatch.setattr(providers, "explain", explain)
    found = providers.available(by_id["attention-xsa_bound"], "cuda")
    assert found == ["pgolf", "pgolf:triton", "torch.compile", "eager"]


def fake_library(monkeypatch, name, **members):
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**members))


def norm(x, weight, eps):
    return F.rms_norm(x, x.shape[-1:], weight.to(x.dtype), eps)


def test_peers_are_asked_the_right_question(monkeypatch):
    """With stand-ins for the libraries, of the libraries' signatures, every peer passes its case's guard."""
    op = lambda apply: SimpleNamespace(apply=apply)
    one = lambda x, w, eps, offset, casting, in_place: norm(x, w, eps)
    two = lambda x, r, w, eps, offset, casting, in_place: (norm(x + r, w, eps), x + r)
    ops = "liger_kernel.ops"
    fake_library(monkeypatch, f"{ops}.rms_norm", LigerRMSNormFunction=op(one))
    fake_library(monkeypatch, f"{ops}.fused_add_rms_norm", LigerFusedAddRMSNormFunction=op(two))
    fake_library(monkeypatch, f"{ops}.relu_squared", LigerReLUSquaredFunction=op(lambda x: F.relu(x).square()))

    def loss(x, target, weight, ignore, lse_scale, smoothing, reduction, cap):
        z = cap * torch.tanh(x.float() / cap)
        return F.cross_entropy(z, target, reduction=reduction), None, None, None

    fake_library(monkeypatch, f"{ops}.cross_entropy", LigerCrossEntropyFunction=op(loss))

    def rmsnorm(x, weight=None, residual=None, eps=1e-6, prenorm=False):
        total = x if residual is None else x + residual
        return (norm(total, weight, eps), total) if prenorm else norm(total, weight, eps)

    fake_library(monkeypatch, "quack", rmsnorm=rmsnorm)

    def flash_attn_func(q, k, v, causal=False):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    fake_library(monkeypatch, "flash_attn", flash_attn_func=flash_attn_func)
    by_id = {c.id: c for c in CASES}
    for case_id, libraries in providers.PEERS.items():
        case = by_id[case_id]
        assert PRODUCTION in case.sizes
        for library in libraries:
            providers.guarded(library, case, providers.smallest(case), CPU, case.dtypes[-1])


def test_guarded_size_fits():
    for case in (c for c in CASES if PRODUCTION in c.sizes):
        size, full = providers.guarded_size(case), case.sizes[PRODUCTION]
        assert size.keys() == full.keys() and all(0 <= size[k] <= full[k] for k in size), case.id
    by_id = {c.id: c for c in CASES}
    assert providers.guarded_size(by_id["residual-mix"])["b"] == 2
    assert providers.guarded_size(by_id["cross_entropy-v8192"])["n"] == 4096
    newton = by_id["newton_schulz-bf16"]
    assert providers.guarded_size(newton) == newton.sizes[PRODUCTION]


def test_amounts():
    case = replace(TOY, flops=lambda n: (n, 2 * n), dtypes=(torch.bfloat16,))
    assert [providers.amounts(case, "small", m) for m in ("forward", "backward", "both", "graph")] == [
        (60, 5), (120, 10), (180, 15), (60, 5)
    ]  # fmt: skip
    assert timing.rates(1.0, 2e9, 0, {"copy": 4e12, "gemm": 1e15}) == {"gb_per_s": 2000.0, "percent_of_roof": 50.0}


# -- the command -----------------------------------------------------------------------------------------------------


def pytest_bench(root, *args):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=root)


def test_without_benchmark_only_nothing_runs(root):
    done = pytest_bench(root, "bench/bench_kernels.py", "-k", "residual")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmarks run with --benchmark-only" in done.stdout and " passed" not in done.stdout


@pytest.mark.alone
def test_benchmark_only_measures_and_reports(root, tmp_path):
    file = tmp_path / "out.json"
    args = ("--benchmark-only", "--bench-size", "small", "--bench-rounds", "2", "--bench-device", "cpu")
    done = pytest_bench(root, "bench/bench_kernels.py", *args, "-k", "kept", f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        row["extra_info"]["mode"]: row for row in json.loads(file.read_text())["benchmarks"] if "-kept-" in row["name"]
    }
    assert set(rows) == {"forward", "backward", "both"} and "times on the device" in done.stdout
    info = rows["forward"]["extra_info"]
    assert info["case"] == "residual-kept" and info["provider"] == "eager" and info["card"]["device"] == "cpu"
    assert (
        info["gb_per_s"] > 0 and info["percent_of_roof"] > 0 and info["roofs"].keys() >= {"copy", "gemm", "attention"}
    )
    assert rows["forward"]["stats"]["rounds"] == 2
    data = sorted(rows["forward"]["stats"]["data"])
    assert 1e3 * sum(data) / 2 == pytest.approx(info["ms"], rel=1.0)


def test_production_sizes_need_a_gpu():
    with pytest.raises(pytest.skip.Exception, match="needs a CUDA device"):
        bench_kernels.test_kernel(None, None, CASES[0], "eager", "forward", CPU, PRODUCTION)


@pytest.mark.parametrize(
    "rounds, device, message",
    [(0, "cpu", "got 0, expected at least 1"), (1, "tpu", "'tpu', expected cpu, cuda"), (1, "meta", "expected cpu"),
     (1, "cuda", "is False here")],
)  # fmt: skip
def test_bad_options(rounds, device, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    options = {"bench_rounds": rounds, "bench_device": device}
    config = SimpleNamespace(
        stash={}, getoption=options.get, pluginmanager=SimpleNamespace(hasplugin=lambda name: True)
    )
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(config)


def test_replayed_times_are_the_measured_ones():
    replay = conftest.Replay()
    replay.load((0.5, 2.0))
    begin, end = replay(), replay()
    assert end - begin == 0.5
    begin, end = replay(), replay()
    assert end - begin == 2.0
