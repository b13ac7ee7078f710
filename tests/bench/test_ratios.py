"""The gate of the CPU benchmarks catches what is slow, wrong, skipped or destroyed; and their command works."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install 'pgolf[bench]'")

from bench import bench_artifact, bench_cpu_step, bench_data, bench_eval, bench_optim
from bench.ratios import ROUNDS, gate, measure, rates


class Clock:
    """Time that passes only when told."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def __call__(self) -> float:
        return self.now

    def takes(self, name: str, *seconds: float):
        """(name, a function whose calls take these seconds in turn, the last one from then on)."""
        left = list(seconds)

        def fn():
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return len(self.order)

        return name, fn


@pytest.fixture
def clock():
    return Clock()


def test_ratio_of_medians(clock):
    """One slow call in seven moves neither median."""
    a, b = clock.takes("new", *[0.2] * 4, 9.0, 0.2), clock.takes("old", *[0.1] * 3, 7.0, 0.1)
    ratio = measure("x", a, b, at_most=2.1, seconds=2, clock=clock)
    assert ratio.candidate_s == pytest.approx(0.2) and ratio.baseline_s == pytest.approx(0.1)
    assert ratio.value == pytest.approx(2) and "ratio 2, at most 2.1" in str(ratio)


def test_slow_candidate_fails_after_a_second_try(clock):
    with pytest.raises(AssertionError) as failure:
        measure("x", clock.takes("new", 0.3), clock.takes("old", 0.2), at_most=1.4, clock=clock)
    assert str(failure.value).count("new 300 ms, old 200 ms, ratio 1.5, at most 1.4") == 2
    assert "the first try" in str(failure.value)
    rounds = clock.order.count("old") - 2  # less the two that sized the samples
    assert rounds == ROUNDS[0] + 4  # 1 s holds fewer than 3 of 0.5 s, the 2 s of the second try 4


def test_one_bad_try_is_forgiven(clock):
    """Slow while the first try lasts, as when the machine does something else."""
    ratio = measure("x", clock.takes("new", *[0.5] * 5, 0.1), clock.takes("old", 0.2), at_most=1.0, clock=clock)
    assert ratio.value == pytest.approx(0.5)


@pytest.mark.alone
def test_slow_candidate_fails_in_real_time():
    work = lambda n: lambda: sum(range(n))
    with pytest.raises(AssertionError, match="at most 1"):
        measure("x", ("double", work(40_000)), ("single", work(20_000)), at_most=1.0, seconds=0.2)
    assert measure("x", ("single", work(20_000)), ("double", work(40_000)), at_most=1.0, seconds=0.2).holds


def test_sides_take_turns(clock):
    measure("x", clock.takes("a", 0.1), clock.takes("b", 0.1), at_most=2, seconds=0.81, clock=clock)
    assert "".join(clock.order) == "aab" + "abbaabba"  # the result to check, the samples' sizes, four rounds


def test_calls_longer_than_the_gate_s_time_are_one_round(clock):
    measure("x", clock.takes("a", 1.0), clock.takes("b", 0.1), at_most=99, seconds=1.0, clock=clock)
    assert "".join(clock.order) == "aab" + "ab"


def test_short_calls_share_a_sample(clock):
    measure("x", clock.takes("a", 1e-5), clock.takes("b", 1e-4), at_most=1, clock=clock)
    last = "".join(clock.order)[-2 * 110 :]
    assert last.count("a") == 2 * 100 and last.count("b") == 2 * 10  # each sample 1 ms


def check_is_seven(got):
    assert got == 7


@pytest.mark.parametrize("results", [[6], [7, 7, 6]], ids=["wrong", "wrong_later"])
def test_wrong_results_fail(results):
    left = list(results)
    candidate = lambda: left.pop(0) if len(left) > 1 else left[0]
    with pytest.raises(AssertionError, match="7"):
        measure(
            "x", ("fast", candidate), ("slow", lambda: time.sleep(1e-3)), at_most=9, check=check_is_seven, seconds=0.1
        )


def test_destroyed_inputs_fail():
    x = torch.ones(4)
    check = lambda got: torch.testing.assert_close(got, torch.full((4,), 2.0))
    with pytest.raises(AssertionError):
        measure("x", ("in place", lambda: x.mul_(2)), ("copy", lambda: x * 2), at_most=99, check=check, seconds=0.1)


# -- each benchmark refuses a wrong candidate before it times anything ------------------------------------------------


class Untimed:
    """Stands in for pytest-benchmark's fixture."""

    name, disabled = "test_x", False

    def __init__(self):
        self.extra_info, self.stats = {}, None

    def __call__(self, fn, *args):
        raise AssertionError("timed a wrong candidate")

    pedantic = __call__


def refuses(run, *args) -> None:
    with pytest.raises(AssertionError) as failure:
        run(Untimed(), *args)
    assert "ratio" not in str(failure.value) and "timed" not in str(failure.value)


@pytest.mark.parametrize("name", bench_data.LOADERS)
def test_loader_that_repeats_a_window_is_refused(monkeypatch, name):
    class Repeats(bench_data.LOADERS[name]):
        def _windows(self):
            windows = super()._windows()
            return windows[[0, *range(len(windows) - 1)]]

    monkeypatch.setitem(bench_data.LOADERS, name, Repeats)
    refuses(bench_data.test_loader, name)


def test_newton_schulz_that_skips_a_step_is_refused(monkeypatch):
    whole = bench_optim.newton_schulz
    monkeypatch.setattr(bench_optim, "newton_schulz", lambda g: whole(g, steps=4))
    refuses(bench_optim.test_newton_schulz, "key_value")


def test_optimizer_that_forgets_decay_is_refused(monkeypatch):
    whole = bench_optim.Optimizers.step

    def step(self):
        for decay in self.muon.decays.values():
            decay.zero_()
        whole(self)

    monkeypatch.setattr(bench_optim.Optimizers, "step", step)
    refuses(bench_optim.test_optimizer_step, "rat_rod_green_reduced")


def test_reload_that_rounds_is_refused(monkeypatch):
    load = bench_artifact.load_model
    monkeypatch.setattr(bench_artifact, "load_model", lambda data: load(data).bfloat16().float())
    refuses(bench_artifact.test_reload, "zlib")


def test_ngram_counts_of_another_text_are_refused(monkeypatch):
    count = bench_eval.count_before
    monkeypatch.setattr(bench_eval, "count_before", lambda keys, tokens: count(keys.flip(0), tokens))
    refuses(bench_eval.test_ngram_counts, 2)


def test_windows_with_less_context_are_refused(monkeypatch):
    monkeypatch.setitem(bench_eval.WINDOWS, "sliding", lambda length, tokens: bench_eval.PlainWindows(length, tokens))
    refuses(bench_eval.test_windows, "sliding")


def test_step_that_skips_an_optimizer_is_refused(monkeypatch):
    with bench_cpu_step.running() as trainer:
        monkeypatch.setattr(trainer.optim.adamw, "step", lambda: None)
        refuses(bench_cpu_step.test_whole_step, trainer)


def test_every_benchmark_has_a_group_and_a_plain_name():
    """Names must not change from machine to machine, or saved times could not be compared."""
    modules = (bench_artifact, bench_cpu_step, bench_data, bench_eval, bench_optim)
    found = [fn for m in modules for name, fn in vars(m).items() if name.startswith("test_")]
    assert len(found) >= 16
    for fn in found:
        marks = {m.name: m for m in fn.pytestmark}
        assert marks["benchmark"].kwargs["group"].isalpha() or "_" in marks["benchmark"].kwargs["group"]
        if "parametrize" in marks:
            assert all(isinstance(value, str | int) for value in marks["parametrize"].args[1])


# -- pytest-benchmark ------------------------------------------------------------------------------------------------


def test_gate_and_rates_fill_extra_info():
    benchmark = Untimed()
    gate(
        benchmark, ("fast", lambda: 7), ("slow", lambda: time.sleep(2e-3)), at_most=1, check=check_is_seven, seconds=0.1
    )
    benchmark.stats = SimpleNamespace(stats=SimpleNamespace(median=0.5))
    rates(benchmark, tokens=100)
    kept = json.loads(json.dumps(benchmark.extra_info))
    assert kept["tokens_per_s"] == 200 and kept["ratio"]["value"] < 1 and kept["ratio"]["candidate"] == "fast"


def test_disabled_checks_and_does_not_time():
    benchmark, calls = Untimed(), []
    benchmark.disabled = True
    gate(
        benchmark,
        ("a", lambda: calls.append("a") or 7),
        ("b", lambda: calls.append("b")),
        at_most=0,
        check=check_is_seven,
    )
    assert calls == ["a", "b"] and not benchmark.extra_info
    with pytest.raises(AssertionError):
        gate(benchmark, ("a", lambda: 6), ("b", lambda: None), at_most=0, check=check_is_seven)


@pytest.mark.alone
@pytest.mark.slow
def test_benchmark_command(root, tmp_path):
    """Saves, and compares with what it saved."""

    def run(*args):
        what = ("--benchmark-only", "bench/bench_data.py", "bench/bench_optim.py", "-k", "shard_opening or ema_update")
        args = ("-m", "pytest", "-p", "no:cacheprovider", "-q", *what, f"--benchmark-storage={tmp_path}", *args)
        return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=root)

    first = run("--benchmark-save=first")
    assert first.returncode == 0, first.stdout + first.stderr
    (file,) = tmp_path.rglob("*_first.json")
    saved = {b["fullname"]: b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]}
    assert saved.keys() == {"bench/bench_data.py::test_shard_opening", "bench/bench_optim.py::test_ema_update"}
    assert all(info["ratio"]["value"] <= info["ratio"]["at_most"] for info in saved.values())
    second = run("--benchmark-compare=0001")
    assert second.returncode == 0 and "test_ema_update (0001_first)" in second.stdout, second.stdout
