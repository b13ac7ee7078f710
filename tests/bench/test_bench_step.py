"""The step benchmark: what it runs, what it refuses, and the budget that it holds."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'pgolf[bench]'")

from bench import bench_step, budget, conftest, step, variants
from bench.gpus import GPUS, key_of
from bench.providers import Failure
from bench.timing import Timing
from pgolf import runtime
from pgolf.presets import PRESETS

CPU = torch.device("cpu")
# What ceilings were when the file was made, in ms. A ceiling may only fall; a row may not go
PUBLIC = {"rat_rod_green": 87.0, "pr401": 87.0, "kitchen_sink_v2": 63.2}  # ms of a step in public logs
STARTED = {(preset, gpu): ms for preset, ms in PUBLIC.items() for gpu in ("h100", "h200")}


@pytest.fixture(scope="module")
def smoke():
    """The smoke preset's eager step, two rows of 64 tokens, warm."""
    return step.Bench(PRESETS["smoke"](), ["eager"], CPU, world_size=4)


@pytest.fixture
def stepper(smoke):
    assert not smoke.failures
    return smoke.steppers["eager"]


# -- what runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, tokens",
    [("rat_rod_green", 98_304), ("pr401", 98_304), ("kitchen_sink_v2", 67_584), ("naive_baseline", 65_536),
     ("h1", 65_536)],
)  # fmt: skip
def test_tokens_of_one_gpus_share(preset, tokens):
    data = step.share(PRESETS[preset](), "compile+kernels").data
    assert data.batch_tokens == tokens and data.batch_tokens % data.seq_len == 0 and data.micro_batches == 1


def test_every_timed_preset_exists():
    assert set(variants.TIMED) | set(variants.SMALL) <= set(PRESETS)
    assert set(variants.DEFAULT.values()) | set(variants.ON_CPU) <= set(variants.VARIANTS)


def test_default_variant_is_what_a_run_does(monkeypatch):
    """On each kind of device the settings of the default variant are what "auto" resolves to."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(runtime.attention, "explain", lambda *_, **__: ("cudnn", "stand-in"))
    for kind, name in variants.DEFAULT.items():
        for preset in variants.TIMED:
            own, forced = (runtime_of(cfg, kind) for cfg in (PRESETS[preset](), step.share(PRESETS[preset](), name)))
            assert own == forced, (kind, preset)
            assert step.share(PRESETS[preset](), name).kernels.fold_scales == PRESETS[preset]().kernels.fold_scales


def runtime_of(cfg, kind):
    k = cfg.kernels
    chosen = runtime.choose(
        torch.device(kind), dtype=cfg.train.dtype, compile=cfg.train.compile, default_path=k.default, ops=k.ops(),
        weight_cast=k.weight_cast,
    )  # fmt: skip
    return chosen.paths, chosen.dtype.value, chosen.compile.value, chosen.weight_cast.value


def test_random_batches_are_as_the_loaders():
    batches = step.RandomBatches(step.share(PRESETS["rat_rod_green"](), "eager"), CPU)
    first, second = batches.next_batch(), batches.next_batch()
    assert first.ids.shape == first.targets.shape == (48, 2048) and first.ids.dtype == torch.int64
    assert torch.equal(first.ids[:, 1:], first.targets[:, :-1]) and not torch.equal(first.ids, second.ids)
    assert batches.tokens_per_step == 98_304
    counts = first.ids.flatten().bincount(minlength=1024)
    assert counts[0] > 50 * counts[500:].float().mean() and (counts > 0).sum() > 1000


def test_steps_leave_weights_and_count_updates(stepper):
    before = {name: p.clone() for name, p in stepper.trainer.model.named_parameters()}
    count = stepper.count
    for optimizer in (True, False):
        assert stepper.call(optimizer).item() == pytest.approx(stepper.truth.batches[0].loss, rel=0.1)
    assert stepper.count == count + 1 and stepper.trainer.optim is stepper.updating
    for name, p in stepper.trainer.model.named_parameters():
        assert torch.equal(p, before[name]) and p.grad is None


def test_run_measures_both_ways(smoke):
    found = smoke.run(rounds=2, min_ms=0.0)
    assert set(found) == {("eager", True), ("eager", False)}
    whole = found["eager", True]
    assert whole.timing.median > 0 and whole.peak_bytes is None and whole.choices["compile"] == "off"
    facts = replace(whole, peak_bytes=2_500_000_000, timing=Timing.of([[50.0]], [1.0])).facts(23.55e12, 989.4e12)
    assert facts["tokens"] == 128 and facts["tokens_per_s"] == 2560 and facts["recompiles"] == 0
    assert facts["mfu"] == pytest.approx(0.476, abs=1e-3) and json.loads(json.dumps(facts)) == facts
    assert step.in_words(facts).startswith("2,560 tokens/s, MFU 47.6 %, peak 2.5 GB, compiled in ")


def test_a_variant_that_fails_does_not_stop_the_others(smoke, monkeypatch):
    broken = step.Stepper(step.share(PRESETS["smoke"](), "eager", 4), CPU)
    calls = []

    def call(optimizer=True, lr_scale=0.0):
        calls.append(optimizer)
        raise ZeroDivisionError("no such step")

    broken.check, broken.call = lambda: None, call
    monkeypatch.setitem(smoke.steppers, "broken", broken)
    found = smoke.run(rounds=1, min_ms=0.0)
    assert found["broken", True].reason == found["broken", False].reason == "ZeroDivisionError: no such step"
    assert isinstance(found["eager", True], step.Measured) and len(calls) == 1
    smoke.failures.clear()


def test_what_fails_for_all_is_a_failure_of_each(monkeypatch):
    monkeypatch.setattr(step, "weights_of", lambda *_: 1 / 0)
    found = step.measure(PRESETS["smoke"](), ["eager", "compile"], CPU)
    assert len(found) == 4 and all("ZeroDivision" in failure.reason for failure in found.values())


# -- what is refused -------------------------------------------------------------------------------------------------


def test_right_step_passes(stepper):
    stepper.check()
    stepper.end_of_run()
    stepper.check()


def test_optimizer_that_is_skipped_is_refused(stepper, monkeypatch):
    monkeypatch.setattr(stepper.trainer.optim.adamw, "step", lambda: None)
    with pytest.raises(AssertionError, match="its step has 0 of the right length"):
        stepper.check()


def test_scaled_gradients_are_refused(stepper, monkeypatch):
    whole = stepper.trainer.compute_loss
    monkeypatch.setattr(stepper.trainer, "compute_loss", lambda batch: [whole(batch)[0] * 0.99, whole(batch)[1]])
    with pytest.raises(AssertionError, match=r"gradient off by 0\.01"):
        stepper.check()


def test_skipped_rows_are_refused(stepper, monkeypatch):
    whole = stepper.trainer.compute_loss
    half = lambda batch: whole(type(batch)(batch.ids[:1], batch.targets[:1]))
    monkeypatch.setattr(stepper.trainer, "compute_loss", half)
    with pytest.raises(AssertionError, match=r"loss|gradient off"):
        stepper.check()


def test_result_that_is_kept_is_refused(stepper, monkeypatch):
    first = stepper.trainer.loader.batches[0]
    monkeypatch.setattr(stepper.trainer.loader, "next_batch", lambda: first)
    with pytest.raises(AssertionError, match=r"loss|gradient off"):
        stepper.check()


def test_stale_casts_are_refused(stepper, monkeypatch):
    """Weights that are cast outside the graph, and not anew in each step."""
    cfg = step.share(PRESETS["smoke"](), "eager", 4)
    cfg = replace(cfg, kernels=replace(cfg.kernels, weight_cast="on"))
    other = step.Stepper(cfg, CPU, stepper.trainer.model.state_dict(), stepper.truth)
    other.check()
    for p in other.trainer.model.parameters():
        p.data.mul_(1.5)
    other.trainer.cast.refresh_()
    other.trainer.model.load_state_dict(stepper.trainer.model.state_dict())
    monkeypatch.setattr(other.trainer.cast, "refresh_", lambda: None)
    with pytest.raises(AssertionError, match=r"loss|gradient off"):
        other.check()


def test_recompilation_names_its_guard(smoke):
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    double(torch.ones(3))
    try:
        with step.Compilations() as smoke.compiled:
            assert smoke._try("right", lambda: double(torch.ones(3))) is not None and not smoke.failures
            smoke._try("other size", lambda: double(torch.ones(4)))
            smoke._try("new function", lambda: torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3)))
        assert "size mismatch at index 0. expected 3, actual 4" in smoke.failures["other size"].reason
        assert "compiled after warm-up" in smoke.failures["new function"].reason
    finally:
        smoke.compiled = None
        smoke.failures.clear()


def test_compiled_kernels_are_counted(smoke):
    with step.Compilations() as compiled:
        assert compiled.total == 0
        compiled._saw(repr="_residual_fwd_kernel[num_warps=4]", key=None)
        assert compiled.total == 1
    triton = pytest.importorskip("triton")
    assert triton.knobs.runtime.jit_post_compile_hook is None


# -- budget ----------------------------------------------------------------------------------------------------------


def test_committed_ceilings_only_went_down():
    held = budget.read(devices=GPUS)
    for (preset, gpu), started in STARTED.items():
        assert held[preset].ceiling[gpu] <= started, f"{preset} on {gpu}: a ceiling is never loosened"
    for preset, one in held.items():
        steps = [ms for ms in (one.goal, one.plan, min(one.ceiling.values())) if ms is not None]
        assert preset in variants.TIMED and steps == sorted(steps)
    assert held["rat_rod_green"].goal == 50.0 and held["rat_rod_green"].plan == 60.0


@pytest.mark.parametrize(
    "text, message",
    [
        ("[rat_rod_green", "expected a step budget"),
        ("[rat_rod_red]\nceiling = { h100 = 1.0 }", "preset: got 'rat_rod_red', expected one of naive_baseline"),
        ("[pr401]\nceiling = { h300 = 1.0 }", "GPU of pr401: got 'h300', expected one of h100"),
        ("[pr401]\nceilings = { h100 = 1.0 }", "key of pr401: got 'ceilings'"),
        ("[pr401]\nceiling = { h100 = -1 }", "got -1, expected milliseconds above 0"),
        ("[pr401]\ngoal = 'soon'", "got 'soon', expected milliseconds"),
        ("pr401 = 87.0", "expected a table"),
    ],
)
def test_bad_budgets(text, message, tmp_path):
    path = tmp_path / "b.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        budget.read(path)


def test_verdicts():
    one = budget.Budget({"h100": 87.0}, plan=60.0, goal=50.0)
    assert budget.verdict(one, "h100", 90.0) == (
        False, "over budget: 90 ms, ceiling 87 ms on h100 (plan 60, goal 50)",
    )  # fmt: skip
    kept, said = budget.verdict(one, "h100", 70.0)
    assert kept and said.endswith("; tighten the ceiling to 72.1")
    assert budget.verdict(one, "h100", 86.9) == (True, "86.9 ms, ceiling 87 ms on h100 (plan 60, goal 50)")
    assert budget.verdict(one, None, 900.0) == (True, "no ceiling for this device, only for h100")
    assert budget.verdict(budget.Budget(), "h100", 900.0)[0]


def test_device_names():
    assert key_of("NVIDIA H100 80GB HBM3") == "h100" and key_of("NVIDIA H200") == "h200"
    for other in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD EPYC"):
        assert key_of(other) is None


# -- bench_step ------------------------------------------------------------------------------------------------------


def ids(size, device):
    seen = []
    options = {"bench_size": size, "bench_device": device}
    metafunc = SimpleNamespace(
        config=SimpleNamespace(getoption=options.get), parametrize=lambda names, rows: seen.extend(r.id for r in rows)
    )
    bench_step.pytest_generate_tests(metafunc)
    return seen


def test_rows():
    whole = ids("production", "cuda")
    assert len(whole) == len(set(whole)) == 5 * 5 * 2
    assert {"rat_rod_green-compile+kernels-step", "h1-eager-gradients"} <= set(whole) and ids(
        "production", "cpu"
    ) == whole
    assert ids("small", "cpu") == [f"smoke-{v}-{w}" for v in ("eager", "compile") for w in ("step", "gradients")]


class Request:
    """Stands in for pytest's: an H100 whose steps take what the test says."""

    def __init__(self, found, name="NVIDIA H100 80GB HBM3"):
        self.reported, notes = [], []
        self.config = SimpleNamespace(stash={conftest.NOTES: notes})
        self.notes = notes
        self.fixtures = {
            "steps": lambda preset: found,
            "card": {"name": name},
            "bench_size": "production",
            "roofs": {"gemm": 600e12, "gemm_large": 700e12, "copy": 3e12},
            "report": lambda timing, flops, **info: self.reported.append((timing, flops, info)),
        }
        self.getfixturevalue = self.fixtures.__getitem__


def of(ms):
    return step.Measured(Timing.of([[ms]], [1.0]), 98_304, 1 << 34, 40.0, {"attention": "cudnn"})


def run_row(found, variant="compile+kernels", optimizer=True, **kwargs):
    request = Request({(variant, optimizer): found}, **kwargs)
    benchmark = SimpleNamespace(disabled=False, name="row")
    bench_step.test_step(
        request, benchmark, "rat_rod_green", variant, optimizer, torch.device("cuda"), "production", budget.read()
    )
    return request


def test_a_step_over_its_ceiling_fails_and_is_reported():
    with pytest.raises(AssertionError, match="over budget: 1000 ms, ceiling"):
        run_row(of(1000.0))
    request = run_row(of(49.0))
    (_, flops, info), notes = request.reported[0], " ".join(request.notes)
    assert flops == pytest.approx(23.55e12, rel=1e-3) and info["mfu"] == pytest.approx(0.4858, abs=1e-3)
    assert info["tokens_per_s"] == round(98_304 / 0.049) and "MFU 48.6 %" in notes and "tighten the ceiling" in notes


def test_only_the_default_step_has_a_ceiling():
    for variant, optimizer in (("eager", True), ("compile+kernels", False), ("compile+kernels+fold", True)):
        assert run_row(of(1000.0), variant, optimizer).reported
    assert "no ceiling for this device" in run_row(of(1000.0), name="NVIDIA H100 PCIe").notes[-1]


def test_a_time_that_no_work_can_take_is_refused():
    with pytest.raises(AssertionError, match="work is skipped"):
        run_row(of(10.0))


def test_failures_fail_and_memory_skips_where_no_ceiling_waits():
    full, wrong = Failure("OutOfMemoryError: 90 GB", "trace"), Failure("AssertionError: gradient off", "the trace")
    with pytest.raises(pytest.skip.Exception, match="eager: OutOfMemory"):
        run_row(full, "eager")
    with pytest.raises(pytest.fail.Exception, match="trace"):
        run_row(full)
    with pytest.raises(pytest.fail.Exception, match="the trace"):
        run_row(wrong, "eager")


def test_production_steps_need_a_gpu():
    with pytest.raises(pytest.skip.Exception, match="needs a CUDA device"):
        bench_step.test_step(None, None, "pr401", "eager", True, CPU, "production", {})


def command(root, *args):
    line = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench/bench_step.py", "-k", "eager-step"]
    small = ("--bench-size", "small", "--bench-rounds", "1", "--bench-device", "cpu")
    return subprocess.run([*line, *small, *args], capture_output=True, text=True, cwd=root)


def test_command_fails_over_budget_and_keeps_the_figures(root, tmp_path):
    path, figures = tmp_path / "b.toml", tmp_path / "f.json"
    path.write_text("[smoke]\nceiling = { cpu = 0.001 }\n")
    done = command(root, "--benchmark-only", f"--bench-budget={path}", f"--benchmark-json={figures}")
    assert done.returncode == 1 and "ceiling 0.001 ms on cpu" in done.stdout, done.stdout + done.stderr
    assert "smoke, eager: over budget" in done.stdout and "tokens/s" in done.stdout
    (row,) = json.loads(figures.read_text())["benchmarks"]
    info = row["extra_info"]
    assert info["preset"] == "smoke" and info["tokens"] == 512 and info["ms"] > 0 and info["recompiles"] == 0


@pytest.mark.slow
def test_compiled_step_on_a_cpu():
    """torch.compile's graphs are those of the warm-up, to the end of a run; gradients are right."""
    cfg = PRESETS["smoke"]()
    attn = replace(cfg.model.attn, value_embed=replace(cfg.model.attn.value_embed, layers=(0,)), xsa=None)
    plan = replace(cfg.model.plan, num_layers=1)
    cfg = replace(cfg, model=replace(cfg.model, plan=plan, attn=attn))
    for found in step.measure(cfg, ["compile"], CPU, rounds=1, min_ms=0.0).values():
        assert isinstance(found, step.Measured), found.trace
        assert found.choices["compile"] == "on" and found.compile_s > 1
