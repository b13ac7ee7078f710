"""Presets against the published tables, and the published commands against the presets."""

import dataclasses
import json
import shlex

import pytest

from pgolf import config, presets, tree
from pgolf.schema import RunConfig

# Variables that each system's own command sets, from the public logs and pull requests.
BASELINE = """VOCAB_SIZE=1024 NUM_LAYERS=9 MODEL_DIM=512 NUM_HEADS=8 NUM_KV_HEADS=4 MLP_MULT=2 TIE_EMBEDDINGS=1
    TIED_EMBED_LR=0.05 MAX_WALLCLOCK_SECONDS=600 VAL_LOSS_EVERY=200 TRAIN_LOG_EVERY=50"""
H1 = """TIDAL_LR=1 LOGIT_SOFTCAP=15.0 ROPE_BASE=5000 PARALLEL_BLOCK=1 MLP_ACT=silu2 HEAD_DIVERSITY=1e-4 EMBED_LR=0.8
    MATRIX_LR=0.11 ENCODER_LAYERS=0 NUM_KV_HEADS=2 TIE_EMBEDDINGS=0"""
PR401 = """SEED=1337 NUM_LAYERS=11 MLP_MULT=3.0 XSA_LAST_N=4 ROPE_DIMS=16 LN_SCALE=1 SWA_ENABLED=1 SWA_EVERY=50
    LATE_QAT_THRESHOLD=0.15 WARMDOWN_ITERS=3500 VE_ENABLED=1 VE_DIM=128 VE_LAYERS=9,10 EMA_ENABLED=1 EMA_DECAY=0.997
    BIGRAM_VOCAB_SIZE=2048 BIGRAM_DIM=128 ADAM_WD=0.04 MUON_WD=0.04 MATRIX_LR=0.025 SCALAR_LR=0.025
    TIED_EMBED_LR=0.035"""
RAT_ROD = """SEED=1337 MAX_WALLCLOCK_SECONDS=600 XSA_LAST_N=11 BIGRAM_VOCAB_SIZE=2048 ROPE_DIMS=16 SWA_EVERY=50
    MTP_NUM_HEADS=0 COMPLEMENT_ALPHA=0 TRIGRAM=0 NGRAM_EVAL_ORDER=9 NGRAM_EVAL_ALPHA=0.30 CUBRIC_CADENCE=0"""
KITCHEN = """SEED=2 TRAIN_BATCH_TOKENS=548864 MATRIX_LR=0.036 MATRIX_LR_LATE=0.044 SCALAR_LR=0.028 SCALAR_LR_LATE=0.018
    TIED_EMBED_LR=0.022"""
COMMANDS = {"naive_baseline": BASELINE, "h1": H1, "pr401": PR401, "rat_rod_green": RAT_ROD, "kitchen_sink_v2": KITCHEN}

# Rows of the published configurations: path -> value in each of the five systems, in this order.
SYSTEMS = ("naive_baseline", "h1", "pr401", "rat_rod_green", "kitchen_sink_v2")
TABLE = {
    "train.seed": (1337, 1337, 1337, 1337, 2),
    "train.iterations": (20000, 400, 20000, 20000, 20000),
    "train.max_wallclock_seconds": (600.0,) * 5,
    "train.reserve_ms": (0, 0, 0, 0, 14000),
    "train.warmup_steps": (20,) * 5,
    "train.val_loss_every": (200, 1000, 4000, 4000, 4000),
    "train.train_log_every": (50, 200, 500, 500, 500),
    "data.batch_tokens": (524288, 524288, 786432, 786432, 548864),
    "data.seq_len": (1024, 1024, 2048, 2048, 2048),
    "data.loader": (*("sequential",) * 4, "coprime_a"),
    "eval.stride": (0, 0, 64, 64, 64),
    "eval.batch_tokens": (524288,) * 5,
    "model.embed.vocab_size": (1024,) * 5,
    "model.plan.num_layers": (9, 9, 11, 11, 11),
    "model.plan.n_encoder": (4, 0, 5, 5, 5),
    "model.dim": (512,) * 5,
    "model.attn.num_heads": (8,) * 5,
    "model.attn.num_kv_heads": (4, 2, 4, 4, 4),
    "model.mlp.mult": (2.0, 2.0, 3.0, 3.0, 3.0),
    "model.mlp.activation": ("relu2", "silu2", "relu2", "leaky_relu2", "leaky_relu2"),
    "model.embed.tied": (True, False, True, True, True),
    "model.attn.rope.base": (10000.0, 5000.0, 10000.0, 10000.0, 10000.0),
    "model.attn.rope.dims": (0, 0, 16, 16, 16),
    "model.attn.rope.ntk_reference": (0, 0, 1024, 1024, 1024),
    "model.softcap": (30.0, 15.0, 30.0, 30.0, 30.0),
    "model.attn.qk_gain_init": (1.5,) * 5,
    "model.wiring.parallel": (False, True, False, False, False),
    "model.wiring.ln_scale": (False, False, True, True, True),
    "model.attn.xsa.last_n": (None, None, 4, 11, 7),
    "model.embed.bigram.rows": (None, None, 2048, 2048, 6144),
    "model.embed.bigram.dim": (None, None, 128, 128, 128),
    "model.attn.value_embed.dim": (None, None, 128, 128, 196),
    "model.attn.value_embed.layers": (None, None, (9, 10), (9, 10), (5, 9, 10)),
    "model.wiring.backout.layer": (None, None, None, None, 7),
    "model.wiring.backout.init": (None, None, None, None, 0.1),
    "model.init.kind": ("uniform", "uniform", "orthogonal", "orthogonal", "orthogonal"),
    "loss.head_diversity.coef": (None, 1e-4, None, None, None),
    "loss.mile.gamma": (None, None, None, None, 0.75),
    "optim.muon.lr": (0.04, 0.11, 0.025, 0.025, 0.036),
    "optim.muon.lr_late": (None, None, None, None, 0.044),
    "optim.muon.momentum": (0.95, 0.95, 0.99, 0.99, 0.985),
    "optim.muon.momentum_start": (0.85, 0.85, 0.92, 0.92, 0.92),
    "optim.muon.momentum_warmup_steps": (500, 500, 1500, 1500, 1500),
    "optim.muon.weight_decay": (0.0, 0.0, 0.04, 0.04, 0.04),
    "optim.adamw.embed_lr": (0.6, 0.8, 0.6, 0.6, 0.6),
    "optim.adamw.tied_embed_lr": (0.05, 0.05, 0.035, 0.035, 0.022),
    "optim.adamw.scalar_lr": (0.04, 0.04, 0.025, 0.025, 0.028),
    "optim.adamw.scalar_lr_late": (None, None, None, None, 0.018),
    "optim.adamw.weight_decay": (0.0, 0.0, 0.04, 0.04, 0.04),
    "quant.matrix_clip": (*("auto",) * 4, "best"),
    "quant.gptq.batches": (None, None, None, None, 256),
    "quant.gptq.block": (None, None, None, None, 128),
    "quant.gptq.clip_by": (None, None, None, None, "matrix"),
    "optim.side_matrix": ("muon", "muon", "muon", "adamw", "adamw"),
    "optim.clip.norm": (None, None, 0.3, 0.3, 0.3),
    "optim.clip.scope": (None, None, "global", "rank", "rank"),
    "schedule.kind": ("linear", "tidal", "linear", "linear", "linear"),
    "schedule.warmdown_iters": (1200, 1200, 3500, 3500, 4000),
    "average.ema.decay": (None, None, 0.997, 0.997, 0.997),
    "average.swa.every": (None, None, 50, None, None),
    "quant.late_qat.threshold": (None, None, 0.15, 0.15, 0.15),
    "quant.matrix": ("int8", "int8", "int6", "int6", "int6"),
    "quant.embed": ("int8",) * 5,
    "quant.scale_floor": (1.0,) * 5,
    "quant.codec": ("zlib", "zlib", "zstd", "zstd", "lzma"),
    "quant.level": (9, 9, 22, 22, 6),
}


def environment(command: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in shlex.split(command))


@pytest.mark.parametrize("path", TABLE)
def test_published_values(path):
    assert tuple(tree.get(presets.PRESETS[name](), path) for name in SYSTEMS) == TABLE[path]


@pytest.mark.parametrize("name", presets.PRESETS)
def test_preset_is_valid_and_survives_json(name):
    run = presets.PRESETS[name]()
    assert run.preset == name and tree.problems(run) == []
    again = config.from_dict(RunConfig, json.loads(json.dumps(config.to_dict(run))))
    assert again == run and repr(again) == repr(run)  # repr also tells 3 from 3.0
    assert presets.one_liner(name)


@pytest.mark.parametrize("name", COMMANDS)
def test_published_command_is_its_preset(name):
    alone = config.load([], {"PRESET": name})
    with_command = config.load([], {"PRESET": name, **environment(COMMANDS[name])})
    assert with_command.config == alone.config == presets.PRESETS[name]()
    assert config.digest(with_command.config) == config.digest(alone.config)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("name", COMMANDS)
def test_published_command_is_understood_without_a_preset(name, gpu):
    """Every value lands in the tree, or a note says why it has no effect."""
    settings = config.load([], environment(COMMANDS[name]), has_gpu=lambda: gpu)
    assert settings.config.preset == ("rat_rod_green" if gpu else "cpu")
    taken = {s.removeprefix("environment ") for s in settings.sources.values() if s.startswith("environment ")}
    noted = " ".join(settings.notes)
    off = ("MTP_NUM_HEADS", "COMPLEMENT_ALPHA", "CUBRIC_CADENCE")  # silent at 0
    for variable in environment(COMMANDS[name]):
        assert variable in taken or variable in noted or variable in off, variable


@pytest.mark.parametrize(
    ("name", "count"),
    [("naive_baseline", 17_059_912), ("h1", 16_402_504), ("pr401", 26_993_756), ("rat_rod_green", 26_993_756),
     ("kitchen_sink_v2", 27_605_108)],
)  # fmt: skip
def test_parameter_counts_of_the_public_logs(name, count):
    from pgolf.cli import model_facts

    assert model_facts(presets.PRESETS[name]())["parameters"] == count


def test_switched_off_in_the_sources():
    """Neither baseline has what later systems added; the banks' systems leave side projections unscaled."""
    for name in ("naive_baseline", "h1"):
        run = presets.PRESETS[name]()
        assert run.optim.clip is run.average.ema is run.average.swa is run.quant.late_qat is run.model.attn.xsa is None
    assert [presets.PRESETS[n]().model.init.side_scale for n in SYSTEMS] == [False, False, True, False, False]
    assert presets.pr401().average.swa.source == "ema"
    assert presets.kitchen_sink_v2().model.wiring.resid_lambdas.init == 1.1**0.5


def test_smoke_turns_on_what_it_promises():
    run = presets.smoke()
    assert run.train.max_wallclock_seconds == 0 and run.train.iterations == 20 and run.quant.codec == "brotli"
    on = (run.model.embed.bigram, run.model.embed.smear, run.model.attn.value_embed, run.model.attn.xsa)
    assert all(dataclasses.is_dataclass(section) for section in (*on, run.average.ema, run.quant.late_qat))
    # late QAT must get its turn: the linear warmdown without a cap is (iterations - step) / warmdown_iters
    scales = [(run.train.iterations - k) / run.schedule.warmdown_iters for k in range(run.train.iterations)]
    assert 0 < sum(s < run.quant.late_qat.threshold for s in scales) < run.train.iterations


@pytest.mark.parametrize("name", ["smoke", "cpu"])
def test_small_presets_leave_something_to_quantise(name):
    run = presets.PRESETS[name]()
    assert run.quant.keep_numel < run.model.dim * run.model.dim


def test_default_preset():
    assert presets.default_preset(True) == "rat_rod_green" and presets.default_preset(False) == "cpu"
