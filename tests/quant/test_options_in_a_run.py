"""Every storage option at once, from training to the score of the reloaded bytes."""

import json

from test_train import only_run, run, settings

from pgolf.artifact.pack import unpack

OPTIONS = (
    "train.iterations=6", "quant.late_qat=none", "average.ema=none", "eval.stride=0",
    "quant.matrix=int5", "quant.embed=int7", "quant.matrix_clip=best-row", "quant.embed_clip=14sd", "quant.optrot=true",
    "quant.overrides=*.mlp.down.*=int4:0.999,blocks.0.attn.out.*=ternary", "quant.low_rank=on",
    "quant.low_rank.top_k=2", "quant.low_rank.scope=blocks.*", "quant.prune=on",
)  # fmt: skip


def total_and_records(shards, out, target):
    result = run(settings(shards, out, *OPTIONS, f"quant.prune.target_mb={target}"))
    path = only_run(out)
    assert json.loads((path / "result.json").read_text())["val_bpb_artifact"] == result["val_bpb_artifact"]
    return result, unpack((path / "model.pgolf").read_bytes())[0], (path / "train.log").read_text()


def test_all_of_them_are_in_the_artifact_and_the_size_is_met(shards, tmp_path):
    whole, records, log = total_and_records(shards, tmp_path / "whole", 16)
    kinds = {r.name: r.kind for r in records}
    assert kinds["embed.weight"] == "int7" and kinds["blocks.0.attn.out.weight"].startswith("ternary+optrot")
    assert sum(kind.endswith("+lowrank") for kind in kinds.values()) == 2
    assert {kind.split("+")[0] for name, kind in kinds.items() if ".mlp.down." in name} == {"int4"}
    assert "pruning to 16.0 MB: 0 integers" in log
    assert abs(whole["val_bpb_artifact"] - whole["val_bpb"]) < 0.5
    target = (whole["total_bytes"] - 150) / 1e6
    less, pruned, log = total_and_records(shards, tmp_path / "less", target)
    assert less["total_bytes"] <= round(1e6 * target) < whole["total_bytes"]
    assert f"pruning to {target} MB: " in log and "MB: 0 integers" not in log
    assert {r.name: r.kind for r in pruned} == kinds and pruned != records
