"""The frontier page of a trained model: its numbers are those of the run, and its frontier is one."""

import json

import pytest
from test_train import only_run, settings

from bench import quant_frontier
from pgolf.run import run


@pytest.fixture(scope="module")
def measured(shards, tmp_path_factory):
    """(result of the run, what the command found, folder of the page)."""
    out, page = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("page")
    # matrices of a size that rounding can hurt, trained long enough to be hurt
    result = run(settings(shards, out, "train.iterations=60", "quant.late_qat=none", "eval.stride=0"))
    argv = [str(only_run(out)), "--out", str(page), "--targets", "0", "--batches", "8", "--kinds", "int6,int4"]
    assert quant_frontier.main([*argv, "--eggroll-seconds", "0.3"]) == 0
    return result, json.loads((page / "quant_frontier.json").read_text()), page


def test_scores_are_those_of_the_run(measured):
    """Float weights, and int6 by row maximum with int8 tables: what the run itself packed and scored."""
    result, found, _ = measured
    assert found["float_bpb"] == pytest.approx(result["val_bpb"], abs=1e-6)
    same = {"matrix": "int6", "embed": "int8", "clip": "max", "method": "rounding"}
    gaps = {r["method"]: r["val_bpb"] for r in found["gaps"]}
    assert gaps["rounding, row maximum"]["int6"] == pytest.approx(result["val_bpb_artifact"], abs=1e-6)
    row = next(r for r in found["frontier"] if same.items() <= r.items())
    table = result["bytes_by_group"]["table"]
    assert row["bytes"]["brotli"] == pytest.approx(result["artifact_bytes"], abs=table)
    assert found["run"]["steps"] == 60 and found["card"]["commit"] and "bench.quant_frontier" in found["command"]


def test_every_method_and_combination_is_there(measured):
    _, found, _ = measured
    assert [r["method"] for r in found["gaps"]] == list(quant_frontier.METHODS)
    assert all(r["val_bpb"].keys() == {"int6", "int4"} for r in found["gaps"])
    keys = [(r["matrix"], r["embed"], r["clip"], r["method"]) for r in found["frontier"]]
    assert len(keys) == len(set(keys)) == 4 * 3 * 2
    assert all(r["bytes"].keys() == {"brotli", "zstd", "lzma", "zlib"} for r in found["frontier"])
    four = {r["method"]: r["val_bpb"]["int4"] for r in found["gaps"]}
    assert min(four.values()) > found["float_bpb"] and len(set(four.values())) == len(four)  # no method is another's
    assert found["eggroll"]["trials"] > 0


def test_the_frontier_is_what_nothing_beats(measured):
    _, found, _ = measured
    edge = quant_frontier.frontier(found["frontier"])
    sizes, scores = [r["size"] for r in edge], [r["val_bpb"] for r in edge]
    assert sizes == sorted(sizes) and scores == sorted(scores, reverse=True)
    for row in found["frontier"]:
        for size in row["bytes"].values():
            assert any(r["size"] <= size and r["val_bpb"] <= row["val_bpb"] for r in edge)


def test_page_and_plot(measured):
    _, found, page = measured
    text = (page / "quant_frontier.md").read_text()
    assert f"{found['float_bpb']:.4f}" in text and found["card"]["commit"] in text
    rows = [line for line in text.splitlines() if line.startswith("| GPTQ, row maximum")]
    cost = 1000 * (next(r for r in found["gaps"] if r["method"] == "GPTQ, row maximum")["val_bpb"]["int4"]
                   - found["float_bpb"])  # fmt: skip
    assert rows and f"{cost:+.2f}" in rows[0]
    assert (page / "quant_frontier.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_folder_that_is_no_run_is_said(tmp_path, capsys):
    assert quant_frontier.main([str(tmp_path), "--out", str(tmp_path)]) == 9
    assert "expected the folder of a run" in capsys.readouterr().err
