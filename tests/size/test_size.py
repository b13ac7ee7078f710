"""`pgolf size`: what it estimates against what is measured, what it measures against the files, how it says to save."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from pgolf import __main__, config, tree
from pgolf.artifact.budget import LIMIT, account, account_folder
from pgolf.artifact.model_io import save_model
from pgolf.artifact.pack import measure, pack
from pgolf.errors import ArtifactError
from pgolf.model.gpt import GPT
from pgolf.model.roles import roles_of
from pgolf.presets import PRESETS
from pgolf.quant.config import CODEC_NAMES
from pgolf.quant.policy import Record
from pgolf.run import run
from pgolf.size.estimate import EXCESS, entropy, estimate
from pgolf.size.savings import cheapest, settings_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished smoke run."""
    out = tmp_path_factory.mktemp("runs")
    run(config.load([f"train.out_dir={out}", "train.run_id=r", "train.device=cpu"], {"PRESET": "smoke"}))
    return out / "r"


def size(capsys, *words, **environ):
    """(exit code, the JSON that the command prints)."""
    code = __main__.main(["size", *map(str, words), "--json"], environ)
    return code, json.loads(capsys.readouterr().out)


def inside(found, measured):
    return found["total"]["low"] <= measured <= found["total"]["high"]


# -- estimates ------------------------------------------------------------------------------------------------------


def test_a_trained_smoke_run_is_inside_its_estimate(trained, capsys):
    _, found = size(capsys, "PRESET=smoke")
    artifact = (trained / "model.pgolf").stat().st_size
    assert inside(found, artifact + found["code"])
    assert found["total"]["high"] - found["total"]["low"] < 0.15 * artifact
    assert measure((trained / "model.pgolf").read_bytes()).keys() == found["groups"].keys()


@pytest.mark.slow
def test_a_briefly_trained_cpu_run_is_inside_its_estimate(tmp_path, capsys):
    words = ["PRESET=cpu", "train.max_wallclock_seconds=0", "train.iterations=20", "schedule.by=step", "eval.stride=0"]
    words += ["quant.codec=zstd", "quant.level=9", "eval.max_tokens=2048"]
    run(config.load([f"train.out_dir={tmp_path}", "train.run_id=r", *words[1:]], {"PRESET": "cpu"}))
    capsys.readouterr()
    _, found = size(capsys, *words)
    assert inside(found, (tmp_path / "r" / "model.pgolf").stat().st_size + found["code"])


@pytest.mark.parametrize(
    ("matrix", "codec", "floor"),
    [
        ("int6", "brotli", 0.0),
        ("int6", "zlib", 1.0),
        ("int8", "lzma", 0.0),
        ("int8", "zstd", 1.0),
        ("fp16", "zstd", 0.0),
    ],
)
def test_random_weights_are_inside_their_estimate(matrix, codec, floor):
    cfg = PRESETS["smoke"]()
    model = replace(cfg.model, dim=96, embed=replace(cfg.model.embed, bigram=None))
    quant = replace(cfg.quant, codec=codec, scale_floor=floor, matrix=matrix, late_qat=None)
    cfg = replace(cfg, model=model, quant=quant)
    net, gen = GPT(model, train_length=64), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.18 * torch.randn(p.shape, generator=gen))
    artifact = save_model(net, roles_of(net), quant, "0" * 64)
    found = estimate(cfg, 1000)
    assert found.total.low <= len(artifact) + 1000 <= found.total.high
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert sum(r.high for r in found.by_role().values()) + found.code == found.total.high


def test_published_sizes_are_inside_their_estimates():
    """BASE: 15,815,847 bytes of int8 + zlib. PR #401's family: 15.5 to 15.9 MB with about 0.1 MB of code."""
    base = estimate(PRESETS["naive_baseline"](), 0).total
    assert base.low <= 15_815_847 <= base.high
    later = estimate(PRESETS["pr401"](), 0).total
    assert later.low <= 15_500_000 <= later.high and later.high - later.low < 0.4 * later.high


def test_every_codec_has_its_excess():
    assert EXCESS.keys() == set(CODEC_NAMES)


def test_entropy_is_that_of_the_planes():
    assert entropy(np.arange(256, dtype=np.uint8).view(np.int8)) == 256
    assert entropy(np.ones(1000, np.float16)) == 0
    assert entropy(np.arange(256, dtype=np.int16)) == 256  # the low byte takes all values, the high one is always 0


def test_settings_come_as_for_training(capsys):
    _, one = size(capsys, "PRESET=smoke", "NUM_LAYERS=4", "VE_LAYERS=1,2")
    _, two = size(capsys, "model.plan.num_layers=4", PRESET="smoke", VE_LAYERS="1,2")
    _, smaller = size(capsys, PRESET="smoke")
    assert one == two and one["total"]["low"] > smaller["total"]["low"]
    assert __main__.main(["size", "PRESET=smoke", "model.plan.layers=3"], {}) == 2
    assert "did you mean" in capsys.readouterr().err.lower()


def test_over_the_limit_before_training(capsys):
    assert __main__.main(["size", "PRESET=naive_baseline", "model.dim=768"], {}) == 5
    text = capsys.readouterr().out
    assert "over the limit of 16,000,000 by at least" in text and "MiB" not in text
    assert len(text.split("B must go")[1].splitlines()) == 1 + 3


# -- measurements ---------------------------------------------------------------------------------------------------


def test_every_byte_of_a_run_is_told(trained, capsys):
    code, found = size(capsys, trained)
    files = {p.name: p.stat().st_size for p in trained.iterdir() if p.is_file()}
    assert code == 0 and found["fits"] and found["savings"] == []
    assert {name: f["bytes"] for name, f in found["files"].items()} == files
    counted = {name for name, f in found["files"].items() if f["counts"]}
    assert counted == {"model.pgolf", "train_gpt_bundle.py"}
    assert found["total_bytes"] == sum(files[name] for name in counted) == sum(found["items"].values())
    assert sum(found["roles"].values()) == found["total_bytes"] and found["needs"] == ["brotli"]
    assert sum(s[3] for s in found["streams"]) + found["items"]["table"] == files["model.pgolf"]
    saved = json.loads((trained / "result.json").read_text())
    assert saved["total_bytes"] == found["total_bytes"], "the trainer and the command disagree"


def test_an_artifact_alone_and_its_text(trained, capsys):
    code, found = size(capsys, trained / "model.pgolf")
    assert code == 0 and found["artifact_bytes"] == (trained / "model.pgolf").stat().st_size and found["code_bytes"]
    assert __main__.main(["size", str(trained)], {}) == 0
    text = capsys.readouterr().out
    assert "not counted" in text and "by role" in text and "needs brotli" in text and f"{LIMIT:,}" in text


def test_what_is_no_run_is_refused(tmp_path, trained, capsys):
    (tmp_path / "model.pgolf").write_bytes(b"PGLF")
    with pytest.raises(ArtifactError, match=r"1 artifacts .* and 0 Python files"):
        account_folder(tmp_path)
    assert __main__.main(["size", str(tmp_path / "nothing")], {}) == 2
    assert __main__.main(["size", str(tmp_path / "model.pgolf")], {}) == ArtifactError.exit_code
    assert __main__.main(["size", str(trained), "model.dim=8"], {}) == 2
    assert "one file or folder" in capsys.readouterr().err


@pytest.fixture(scope="module")
def too_large(tmp_path_factory, trained):
    """A folder whose code fills all that the artifact leaves, and 1,000 bytes more."""
    folder = tmp_path_factory.mktemp("large")
    data = (trained / "model.pgolf").read_bytes()
    (folder / "model.pgolf").write_bytes(data)
    (folder / "train_gpt.py").write_bytes(b"#" * (LIMIT - len(data) + 1000))
    return folder


def test_over_the_limit_after_training(too_large, capsys):
    code, found = size(capsys, too_large)
    assert code == 5 and found["headroom"] == -1000 and len(found["savings"]) == 3
    assert all(s["saves"] >= 1000 for s in found["savings"])
    assert __main__.main(["size", str(too_large)], {}) == 5
    assert "1,000 B OVER" in capsys.readouterr().out


def test_a_submission_has_no_artifact_but_says_what_it_weighs(tmp_path, capsys):
    (tmp_path / "train_gpt.py").write_bytes(b"#" * 5000)
    (tmp_path / "train_gpt_readable.py").write_bytes(b"#" * 90_000)
    record = tmp_path / "submission.json"
    record.write_text('{"bytes_model": 15995000}')
    code, found = size(capsys, tmp_path)
    assert code == 0 and found["total_bytes"] == LIMIT and not found["files"]["train_gpt_readable.py"]["counts"]
    record.write_text('{"bytes_model": 15995001}')
    assert __main__.main(["size", str(tmp_path)], {}) == 5
    assert "model as stated" in (text := capsys.readouterr().out) and "1 B must go" in text
    for bad in ('{"bytes_model": "15995000"}', "{}", "[", '{"bytes_model": -1}'):
        record.write_text(bad)
        assert __main__.main(["size", str(tmp_path)], {}) == ArtifactError.exit_code


def test_tight_is_said(trained, tmp_path, capsys):
    data = (trained / "model.pgolf").read_bytes()
    (tmp_path / "model.pgolf").write_bytes(data)
    (tmp_path / "train_gpt.py").write_bytes(b"#" * (LIMIT - len(data) - 77))
    assert __main__.main(["size", str(tmp_path)], {}) == 0
    assert "another seed can be larger by more than 77 B" in capsys.readouterr().out


# -- savings --------------------------------------------------------------------------------------------------------


def test_the_settings_of_an_artifact_are_found_in_it(trained):
    cfg = settings_of((trained / "model.pgolf").read_bytes())
    smoke = PRESETS["smoke"]()
    assert cfg.model == smoke.model and cfg.data.seq_len == smoke.data.seq_len
    assert (cfg.quant.matrix, cfg.quant.embed, cfg.quant.codec) == ("int6", "int8", "brotli")
    assert 64 <= cfg.quant.keep_numel <= smoke.quant.keep_numel


def random_artifact(cfg):
    net, gen = GPT(cfg.model, train_length=64), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    return save_model(net, roles_of(net), cfg.quant, "")


def test_predicted_savings_are_what_the_settings_save():
    cfg = PRESETS["smoke"]()
    cfg = replace(cfg, quant=replace(cfg.quant, codec="lzma", late_qat=None))
    before = random_artifact(cfg)
    found = cheapest(cfg, 1, len(before))
    assert found[0].settings == "quant.codec=brotli"
    for way in found:
        changed = cfg
        for word in way.settings.split():
            path, _, text = word.partition("=")
            changed = tree.put(changed, path, tree.parse(text, config.NODES[path]))
        real = len(before) - len(random_artifact(changed))
        assert way.saves == pytest.approx(real, rel=0.35, abs=600), way


def test_the_cheapest_that_suffice_come_first_then_the_largest():
    cfg = PRESETS["cpu"]()
    little, much = cheapest(cfg, 1), cheapest(cfg, 10**9)
    assert [s.why for s in little] != [s.why for s in much]
    assert [s.saves for s in much] == sorted((s.saves for s in much), reverse=True)
    some = cheapest(cfg, much[0].saves - 1)
    assert some[0].saves >= much[0].saves - 1


def test_a_layer_less_takes_what_counts_layers_along():
    ways = cheapest(PRESETS["rat_rod_green"](), 10**9)
    text = next(s.settings for s in ways if "num_layers" in s.settings)
    words = dict(w.split("=") for w in text.split())
    assert words["model.plan.num_layers"] == words["model.attn.xsa.last_n"] == "10"
    assert words["model.attn.value_embed.layers"] == "8,9"
    config.load(text.split(), {"PRESET": "rat_rod_green"})  # can be run as it is written


def test_no_model_no_savings():
    cfg = PRESETS["cpu"]()
    assert cheapest(tree.put(cfg, "model.attn.num_heads", 7), 1) == []


def test_mixed_codecs_are_auto():
    cfg = PRESETS["smoke"]()
    rng = np.random.default_rng(0)
    words = rng.integers(0, 9, (64, 64), dtype=np.int8).repeat(50, 0)  # zstd or lzma, by rows that repeat
    meta = {"model": tree.to_dict(cfg.model), "train_length": 64}
    noise = rng.normal(0, 9, (400, 40)).astype(np.int8)
    some = [Record("a", "matrix", "int6", words.shape, {"q": words})]
    some += [Record("b", "embed", "int8", noise.shape, {"q": noise})]
    assert settings_of(pack(some, meta, "auto")).quant.codec == "auto"
    assert account(pack(some, meta, "zlib"), b"").by_role().keys() == {"table", "matrix", "embed", "code"}
