"""The launch search: what it tries, what it refuses, and that the table's file is edited and nothing more."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from toy import TOY, toy_ref

pytest.importorskip("triton", reason="triton is not installed: nothing to launch")

from bench import launch_table, search, tune
from bench.cases import CASES
from bench.cases.case import PRODUCTION
from bench.timing import HostClock, Timing
from pgolf.kernels._op import tuned
from pgolf.kernels._tuned import TABLE, Launch

BY_ID = {case.id: case for case in CASES}
TEXT = launch_table.PATH.read_text()

# -- the table -------------------------------------------------------------------------------------------------------


def test_the_real_file_survives_being_read_and_written():
    assert launch_table.parse(TEXT) == TABLE
    text = TEXT
    for kernel, rows in TABLE.items():
        text = launch_table.rewritten(text, kernel, rows)
    assert text == TEXT


SAMPLE = """# head
TABLE: dict[str, dict[tuple[int, str], Launch]] = {
    # one: a comment, kept
    "one": {
        (0, "*"): Launch(1, 1, {"BLOCK_T": 4}),
        (80, "*"): Launch(8, 1, {"BLOCK_T": 8}),
        (90, "D64"): Launch(8, 2, {"BLOCK_T": 8}),  # why
        (100, "*"): Launch(8, 1, {"BLOCK_T": 4}),
    },
    "two": {
        (80, "*"): Launch(4, 1, {"BLOCK_T": 2}),
    },
}
"""


def test_changing_one_row_changes_its_line_only():
    text = launch_table.rewritten(SAMPLE, "one", {(80, "*"): Launch(4, 2, {"BLOCK_T": 16})})
    changed = [(a, b) for a, b in zip(SAMPLE.splitlines(), text.splitlines(), strict=True) if a != b]
    assert changed == [
        ('        (80, "*"): Launch(8, 1, {"BLOCK_T": 8}),', '        (80, "*"): Launch(4, 2, {"BLOCK_T": 16}),')
    ]


def test_a_comment_behind_a_row_stays():
    new = Launch(4, 2, {"BLOCK_T": 16})
    text = launch_table.rewritten(SAMPLE, "one", {(90, "D64"): new})
    assert launch_table.parse(text)["one"][90, "D64"] == new
    assert text == SAMPLE.replace('(8, 2, {"BLOCK_T": 8}),  # why', '(4, 2, {"BLOCK_T": 16}),  # why')


@pytest.mark.parametrize("note", ["static", "H100 80GB HBM3, 1234567, 0.4123 -> 0.3917 ms", "a long name " * 6 + "9"])
def test_a_new_row_goes_to_its_place_in_ruffs_format(note, tmp_path):
    new = Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, note)
    file = tmp_path / "_tuned.py"
    launch_table.save({"one": {(90, "*"): new}, "two": {(90, "D64"): new}}, file, SAMPLE)
    text = file.read_text()
    found = launch_table.parse(text)
    assert list(found["one"]) == [(0, "*"), (80, "*"), (90, "*"), (90, "D64"), (100, "*")]
    assert found["one"].pop((90, "*")) == new == found["two"].pop((90, "D64"))
    assert found == launch_table.parse(SAMPLE)
    assert set(SAMPLE.splitlines()) <= set(text.splitlines())
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "--line-length", "120", str(file)]
    done = subprocess.run(ruff, capture_output=True, text=True)
    if "No module named ruff" not in done.stderr:
        assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_written_when_the_edit_went_wrong(monkeypatch, tmp_path):
    monkeypatch.setattr(launch_table, "rewritten", lambda text, kernel, rows: text.replace("BLOCK_T", "BLOCK_X"))
    with pytest.raises(AssertionError, match="not the intended"):
        launch_table.save({"residual_fwd": {(90, "D512"): Launch(4, 1, {"BLOCK_T": 4})}}, tmp_path / "x.py")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="without TABLE"):
        launch_table.parse("X = 1\n")


@pytest.mark.parametrize("key", [(90, "*"), (90, "few"), (80, "*")])
def test_a_row_changes_no_other_launch(key):
    """A row for sm_90 holds for sm_100 too, and hides the classes of sm_80: all that is as before."""
    kernel, new = "newton_schulz", Launch(4, 3, {"BLOCK": 64, "BLOCK_K": 32})
    asked = [(arch, c) for arch in (80, 89, 90, 100, 120) for c in ("*", "few", "fp32")]
    before = {one: launch_table.resolve(kernel, *one) for one in asked}
    with launch_table.forced(kernel, launch_table.rows_with(kernel, key, new)):
        after = {one: launch_table.resolve(kernel, *one) for one in asked}
    assert after == before | {key: new}
    assert {one: launch_table.resolve(kernel, *one) for one in asked} == before


# -- candidates ------------------------------------------------------------------------------------------------------


def test_neighbours_are_single_steps_within_limits():
    how = Launch(8, 3, {"BLOCK_M": 128, "BLOCK_N": 64})
    found = {search.brief(n) for n in search.neighbours("attention_fwd", how)}
    single = {"w16 s3 BLOCK_M=128 BLOCK_N=64", "w4 s3 BLOCK_M=128 BLOCK_N=64", "w8 s4 BLOCK_M=128 BLOCK_N=64",
              "w8 s2 BLOCK_M=128 BLOCK_N=64", "w8 s3 BLOCK_M=256 BLOCK_N=64", "w8 s3 BLOCK_M=64 BLOCK_N=64",
              "w8 s3 BLOCK_M=128 BLOCK_N=128", "w8 s3 BLOCK_M=128 BLOCK_N=32"}  # fmt: skip
    assert single < found and "w16 s3 BLOCK_M=256 BLOCK_N=64" in found and "w8 s3 BLOCK_M=64 BLOCK_N=128" in found
    assert search.brief(how) not in found and len(found) == 8 + 4 + 2
    edge = search.neighbours("residual_fwd", Launch(16, 1, {"BLOCK_T": 1}))
    assert {search.brief(n) for n in edge} == {"w8 s1 BLOCK_T=1", "w16 s1 BLOCK_T=2"}
    assert all(n.blocks["BLOCK_N"] >= 128 for n in search.neighbours("mlp_up", Launch(8, 2, {"BLOCK_N": 128})))


def test_targets_of_real_cases():
    cases = [BY_ID[name] for name in ("residual-add", "residual-kept", "newton_schulz-up", "mlp-relu2")]
    found = {t.name: t for t in search.targets([*cases, BY_ID["residual-shared"]], 90)}
    add = found["residual_bwd sm_90 D512"]
    assert [(case.id, mode) for case, mode in add.of] == [("residual-add", "backward"), ("residual-kept", "backward")]
    assert add.launch == launch_table.resolve("residual_bwd", 90, "D512")
    assert found["newton_schulz sm_90 few"].of[0][1] == "graph" and found["mlp_up sm_90 nothing"].of[0][1] == "forward"
    assert found["mlp_du sm_90 nothing"].of[0][1] == "backward"


def test_every_kernel_of_the_table_is_reached():
    """By a production case; but for mlp's fp32 rows and the like, a row that no case launches is never tuned."""
    reached = {kernel for case in CASES if PRODUCTION in case.sizes
               for kernel, _ in search.asked(case, case.sizes[PRODUCTION], 90)}  # fmt: skip
    assert reached == set(TABLE)


def test_static_filter_refuses_spills_and_shared_memory():
    with search.Compiler(workers=1) as fits:
        target = next(t for t in search.targets([BY_ID["residual-add"]], 90) if t.kernel == "residual_fwd")
        same, good, bad, broken = fits(
            target, [target.launch, *(Launch(w, 1, {"BLOCK_T": b}) for w, b in ((4, 4), (1, 32), (8, 3)))]
        )
    assert "as the committed row" in same[0]
    assert good[0] == "" and "registers" in good[1]
    assert "spill" in bad[0] and "does not compile" in broken[0]


# -- the search, on a toy that is launched by a row ------------------------------------------------------------------

MS = {16: 9.0, 8: 6.0, 4: 3.0, 2: 1.0, 1: 2.0, 32: 12.0}


class FakeClock(HostClock):
    """Time passes where the toy says so."""

    def __init__(self):
        self.at = 0.0

    def flush(self):
        pass

    def mark(self):
        return self.at

    now = mark


CLOCK = FakeClock()


def make_toy(wrong=(), ms=MS, name="toy"):
    """Right unless its block is in `wrong`, and as slow as `ms` says of it. The best right one is at block 2."""

    def fn(x, w):
        block = tuned("toy", x).blocks["BLOCK"]
        if not x.is_meta:
            CLOCK.at += ms[block] / 1e3
        out, other = toy_ref(x, w)
        return (out * 1.25 if block in wrong else out), other

    return replace(TOY, fn=fn, grads=(), name=name)


@pytest.fixture
def toy_row(monkeypatch):
    monkeypatch.setitem(TABLE, "toy", {(0, "*"): Launch(4, 1, {"BLOCK": 8})})


def all_fit(target, launches):
    return [("" if how.num_warps == 4 else "other warps", "") for how in launches]


def tune_toy(*cases, fits=all_fit, **options):
    (target,) = search.targets(cases, 0, "cpu", "small")
    return search.Tuner("cpu", fits, size="small", rounds=3, min_ms=0.0, clock=CLOCK, **options).tune(target)


def test_the_search_climbs_to_the_fastest(toy_row):
    out = tune_toy(make_toy(ms=MS | {16: 5.9}))
    assert out.won and out.best.blocks == {"BLOCK": 2}
    assert out.ms == pytest.approx((6.0, 1.0))
    assert out.tried["w4 s1 BLOCK=16"].startswith("slower") and out.tried["w4 s1 BLOCK=1"].startswith("slower")
    assert out.tried["w8 s1 BLOCK=8"] == "other warps" and "faster" in out.tried["w4 s1 BLOCK=4"]
    assert TABLE["toy"] == {(0, "*"): Launch(4, 1, {"BLOCK": 8})}
    assert out.to_dict()["best"] == "w4 s1 BLOCK=2"


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is no interpreter; bench.tune itself does this")
def test_the_check_runs_the_kernel_by_the_candidate(kernels_on):
    """A real kernel, in the interpreter: another block is right too, and one that Triton does not take is seen."""
    case = BY_ID["residual-add"]
    target = search.Target("residual_fwd", (0, "*"), TABLE["residual_fwd"][0, "*"], ((case, "forward"),))
    tuner = search.Tuner("cpu", all_fit, size="odd")
    assert tuner.fault(target, Launch(1, 1, {"BLOCK_T": 8}), case) == ""
    assert "power of" in tuner.fault(target, Launch(1, 1, {"BLOCK_T": 3}), case)


def test_a_wrong_candidate_is_refused_however_fast(toy_row):
    out = tune_toy(make_toy(wrong=(4,)))
    assert not out.won and "wrong: AssertionError: toy-toy out.0" in out.tried["w4 s1 BLOCK=4"]
    assert TABLE["toy"] == {(0, "*"): Launch(4, 1, {"BLOCK": 8})}


def test_a_candidate_must_be_right_in_every_case_of_the_row(toy_row):
    first, second = make_toy(), replace(make_toy(wrong=(4,), name="second"), traffic=lambda n, item: (1, 1))
    out = tune_toy(second, first)
    assert [case.id for case, _ in out.target.of] == ["toy-toy", "toy-second"]  # the larger first
    assert not out.won and out.tried["w4 s1 BLOCK=4"] == "wrong in another case"


def test_a_slower_candidate_is_refused(toy_row):
    out = tune_toy(make_toy(ms=MS | {4: 6.5}))
    assert not out.won and out.ms is None and out.tried["w4 s1 BLOCK=4"].startswith("slower")


def test_what_does_not_win_again_is_not_kept(toy_row, monkeypatch):
    """The fastest of many is lucky at times."""
    lucky = iter([1.0, 6.0])
    monkeypatch.setattr(search.Tuner, "times", lambda self, target, case, mode, launches: {
        name: spread(6.0 if how.blocks["BLOCK"] == 8 else next(lucky)) for name, how in launches.items()
        if how.blocks["BLOCK"] != 16})  # fmt: skip
    out = tune_toy(make_toy())
    assert not out.won and out.tried["w4 s1 BLOCK=4"].startswith("not confirmed")


def test_time_limit(toy_row):
    ticks = iter(range(1000))
    out = tune_toy(make_toy(), now=lambda: next(ticks), deadline=0.0)
    assert not out.won and list(out.tried) == ["w4 s1 BLOCK=8"] and next(ticks) == 1
    out = tune_toy(make_toy(), now=lambda: next(ticks), deadline=3.0)  # in the middle of the first neighbours
    assert not out.won and out.ms is None and next(ticks) < 10


def spread(ms, width=0.0):
    return Timing(ms, ms - width, ms + width, 3, 1, 0.0, (ms,) * 3)


def test_what_wins():
    assert search.wins([spread(0.97)], [spread(1.0)])
    assert not search.wins([spread(0.99)], [spread(1.0)])  # within the margin
    assert not search.wins([spread(0.9, 0.1)], [spread(1.0, 0.1)])  # within the spread
    assert search.wins([spread(0.5), spread(1.01)], [spread(1.0), spread(1.0)])
    assert not search.wins([spread(0.5), spread(1.1)], [spread(1.0), spread(1.0)])  # one case pays


# -- the command -----------------------------------------------------------------------------------------------------


BASE = Launch(8, 1, {"BLOCK": 64})
FROZEN = {(80, "*"): BASE, (80, "few"): replace(BASE, num_warps=4), (80, "fp32"): replace(BASE, num_warps=2)}


@pytest.fixture
def frozen(monkeypatch):
    """A kernel with these rows, whatever has been tuned since."""
    monkeypatch.setitem(TABLE, "newton_schulz", dict(FROZEN))


def won(shape_class, how):
    target = search.Target("newton_schulz", (90, shape_class), FROZEN[80, shape_class], ())
    return search.Outcome(target, how, (0.25, 0.125), {"w1 s1": "faster"})


def test_rows_that_won_are_written_with_what_they_rest_on(tmp_path, monkeypatch, frozen):
    monkeypatch.setattr("bench.timing.device_card", lambda device: {"name": "NVIDIA H100 80GB HBM3", "commit": "abc"})
    few, fp32 = Launch(4, 2, {"BLOCK": 32}), Launch(1, 1, {"BLOCK": 32})
    file = tmp_path / "_tuned.py"
    tune.write([won("few", few), won("fp32", fp32)], "cuda", file)
    found = launch_table.parse(file.read_text())["newton_schulz"]
    note = "H100 80GB HBM3, abc, 0.25 -> 0.125 ms"
    assert found[90, "few"] == replace(few, note=note) and found[90, "fp32"] == replace(fp32, note=note)
    assert found[100, "few"] == FROZEN[80, "few"] and found[100, "fp32"] == FROZEN[80, "fp32"]
    assert dict(FROZEN) == TABLE["newton_schulz"]  # this process launches as before


def test_a_row_that_won_survives_a_later_one_of_its_kernel(frozen):
    """(90, "*") hides the classes of sm_80, but not the class that was found for sm_90 before it."""
    few, everything = Launch(4, 3, {"BLOCK": 32}), Launch(8, 3, {"BLOCK": 128})
    rows = tune.changed_rows([won("few", few), won("*", everything)], {"name": "G"})["newton_schulz"]
    note = "G, no commit, 0.25 -> 0.125 ms"
    assert rows.pop((90, "few")) == replace(few, note=note) and rows.pop((90, "*")) == replace(everything, note=note)
    assert rows == {(90, "fp32"): FROZEN[80, "fp32"], **{(100, c): FROZEN[80, c] for c in ("*", "few", "fp32")}}


def test_what_was_found_before_the_device_was_lost_counts(tmp_path, monkeypatch, capsys, frozen):
    def run(cases, device, minutes):
        yield won("few", Launch(4, 2, {"BLOCK": 32}))
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "unusable", lambda device: "")
    monkeypatch.setattr(tune, "run", run)
    monkeypatch.setattr("bench.timing.device_card", lambda device: {"name": "G"})
    file, rows = tmp_path / "_tuned.py", tmp_path / "rows.json"
    assert tune.main(["--op", "newton", "--write", str(file), "--json", str(rows)]) == 1
    assert launch_table.parse(file.read_text())["newton_schulz"][90, "few"].num_stages == 2
    assert json.loads(rows.read_text())[0]["won"] and "illegal memory access" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--op", "residual-add"]) == 3 == tune.main(["--op", "residual-add", "--device", "cpu"])
    assert "needs a GPU; torch.cuda.is_available() is False here" in capsys.readouterr().err


def test_dry_run_is_bounded(monkeypatch, capsys):
    class Stub:
        asked = 0

        def __init__(self, workers):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def __call__(self, target, launches):
            Stub.asked += len(launches)
            return [("3 spill instructions, expected 0", "")] * len(launches)

    monkeypatch.setattr(search, "Compiler", Stub)
    assert tune.main(["--dry-run", "--arch", "100", "--op", "residual-add", "--compiles", "4"]) == 0
    said = capsys.readouterr().out
    assert Stub.asked == 4 and "residual_bwd sm_100 D512" in said and said.count("out: 3 spill") == 4


@pytest.mark.parametrize(
    "args, message",
    [(["--minutes", "0"], "must be positive"), (["--op", "nonsense"], "no case of that name"),
     (["--dry-run", "--arch", "70"], "--arch 70: known are 80"), (["--arch", "90"], "only with --dry-run")],
)  # fmt: skip
def test_bad_arguments(args, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        tune.main(args)
    assert stopped.value.code == 2 and message in capsys.readouterr().err
