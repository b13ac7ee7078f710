"""The door for settings: sources, switches, notes, errors; and the command line in front of it."""

import dataclasses
import json
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgolf
from pgolf import aliases, cli, config, not_yet, presets, tree
from pgolf.errors import ConfigError
from pgolf.schema import RunConfig, TrainConfig


def load(*argv, preset="pr401", **environ):
    return config.load(argv, ({"PRESET": preset} if preset else {}) | environ, has_gpu=lambda: False)


def error(*argv, preset="pr401", **environ) -> str:
    with pytest.raises(ConfigError) as caught:
        load(*argv, preset=preset, **environ)
    assert caught.value.exit_code == 2
    return str(caught.value)


# ---- sources and precedence


def test_order_default_preset_environment_override():
    plain = load()
    assert plain.config == presets.pr401() and plain.notes == []
    assert plain.sources["optim.muon.lr"] == "preset pr401" and plain.sources["optim.adamw.beta1"] == "default"
    env = load(MATRIX_LR="0.03")
    assert env.config.optim.muon.lr == 0.03 and env.sources["optim.muon.lr"] == "environment MATRIX_LR"
    both = load("optim.muon.lr=0.01", MATRIX_LR="0.03")
    assert both.config.optim.muon.lr == 0.01 and both.sources["optim.muon.lr"] == "override"


def test_every_setting_has_a_source():
    got = load("model.embed.smear=none", preset="kitchen_sink_v2", VE_ENABLED="0", Z_LOSS="1e-4")
    assert got.sources.keys() == tree.flatten(got.config).keys()
    assert got.sources["model.embed.smear"] == "override" and "model.embed.smear.init" not in got.sources
    assert got.sources["model.attn.value_embed"] == "environment VE_ENABLED"
    assert got.sources["loss.z_loss"] == got.sources["loss.z_loss.coef"] == "environment Z_LOSS"
    assert got.sources["loss.mile.gamma"] == "default"  # the section's own default, though a preset turned it on
    assert got.sources["loss.mile"] == "preset kitchen_sink_v2" and got.sources["preset"] == "environment PRESET"


def test_preset_by_machine_is_a_note():
    for gpu, name in ((True, "rat_rod_green"), (False, "cpu")):
        got = config.load([], {}, has_gpu=lambda gpu=gpu: gpu)
        assert got.config == presets.PRESETS[name]() and name in got.notes[0] and got.sources["preset"] == "default"
    on_cpu = config.load([], {"DEVICE": "cpu"}, has_gpu=lambda: pytest.fail("asked for a GPU that nobody wants"))
    assert on_cpu.config.preset == "cpu" and on_cpu.config.train.device == "cpu"


def test_preset_as_override_wins():
    assert load("preset=h1", preset="pr401").config == presets.h1()
    assert "did you mean pr401" in error(preset="pr402")


def test_presets_are_asked_without_a_gpu_probe():
    config.load([], {"PRESET": "smoke"}, has_gpu=lambda: pytest.fail("a named preset needs no probe"))


def test_empty_variable_is_not_set():
    assert load(SEED="", NUM_LAYERS=" ").config == presets.pr401()


def test_prefixed_spelling_wins():
    got = load(SEED="1", PGOLF_SEED="2", PGOLF_MAX_WALLCLOCK_SECONDS="60")
    assert got.config.train.seed == 2 and got.config.train.max_wallclock_seconds == 60.0


# ---- switches


@pytest.mark.parametrize(
    ("environ", "path", "value"),
    [
        ({"BIGRAM_VOCAB_SIZE": "0"}, "model.embed.bigram", None),
        ({"BIGRAM_VOCAB_SIZE": "4096"}, "model.embed.bigram.rows", 4096),
        ({"BIGRAM_BUCKETS": "8192"}, "model.embed.bigram.hash", "mul1009"),
        ({"TRIGRAM": "1"}, "model.embed.bigram.trigram", True),
        ({"TRIGRAM_VOCAB_SIZE": "2048"}, "model.embed.trigram.dim", 48),
        ({"XSA_LAST_N": "0"}, "model.attn.xsa", None),
        ({"XSA_LAYERS": "3"}, "model.attn.xsa.last_n", 3),
        ({"VE_ENABLED": "0"}, "model.attn.value_embed", None),
        ({"VE_LAYERS": "5,9,10"}, "model.attn.value_embed.layers", (5, 9, 10)),
        ({"VALUE_RESIDUAL": "1"}, "model.attn.value_residual.mode", "add"),
        ({"VALUE_RESIDUAL": "mix"}, "model.attn.value_residual.mode", "mix"),
        ({"CACHE_LAYER": "7", "BACKOUT_INIT": "0.2"}, "model.wiring.backout.init", 0.2),
        ({"RESID_LAMBDAS": "frozen"}, "model.wiring.resid_lambdas.frozen", True),
        ({"RESID_LAMBDAS": "learned"}, "model.wiring.resid_lambdas.frozen", False),
        ({"RESID_LAMBDAS": "0"}, "model.wiring.resid_lambdas", None),
        ({"SMEAR": "0"}, "model.embed.smear", None),
        ({"SKIP_GATED": "1"}, "model.plan.skips.gated", True),
        ({"HEAD_DIVERSITY": "1e-3"}, "loss.head_diversity.coef", 1e-3),
        ({"MILE_GAMMA": "0.75"}, "loss.mile.peak_frac", 0.4),
        ({"GRAD_CLIP_NORM": "0"}, "optim.clip", None),
        ({"GRAD_CLIP_NORM": "0.0"}, "optim.clip", None),
        ({"SWA_ENABLED": "0"}, "average.swa", None),
        ({"EMA_ENABLED": "0", "SWA_ENABLED": "false"}, "average.ema", None),
        ({"LATE_QAT_THRESHOLD": "0"}, "quant.late_qat", None),
        ({"QAT_ENABLED": "1"}, "quant.late_qat.threshold", 2.0),
        ({"QAT_ENABLED": "0"}, "quant.late_qat.threshold", 0.15),
        ({"MATRIX_BITS": "5"}, "quant.matrix", "int5"),
        ({"EMBED_BITS": "7", "EMBED_CLIP_SIGMAS": "15"}, "quant.embed_clip", "15sd"),
        ({"MATRIX_CLIP_SIGMAS": "12.85", "LATE_QAT_THRESHOLD": "0"}, "quant.matrix_clip", "12.85sd"),
        ({"MATRIX_CLIP_SIGMAS": "0"}, "quant.matrix_clip", "auto"),
        ({"MLP_CLIP_SIGMAS": "11.5", "ATTN_CLIP_SIGMAS": "13"}, "quant.overrides", "*.attn.*=:13sd,*.mlp.*=:11.5sd"),
        ({"INT5_LAYERS": "3, 4"}, "quant.overrides", "blocks.3.*=int5,blocks.4.*=int5"),
        ({"INT8_SENSITIVE": "attn.proj"}, "quant.overrides", "*attn.out*=int8"),
        ({"INT5_LAYERS": "0", "INT8_SENSITIVE": "mlp.fc"}, "quant.overrides", "blocks.0.*=int5,*mlp.up*=int8"),
        ({"USE_OPTROT": "1", "LATE_QAT_THRESHOLD": "0"}, "quant.optrot", True),
        ({"LQER_ENABLED": "1", "LQER_RANK": "2"}, "quant.low_rank.rank", 2),
        ({"LQER_ENABLED": "1", "LQER_ASYM_ENABLED": "0"}, "quant.low_rank.factors", "int4"),
        ({"LQER_ENABLED": "1", "LQER_SCOPE": "mlp"}, "quant.low_rank.scope", "*.mlp.*"),
        ({"LQER_ENABLED": "1", "LQER_GAIN_SELECT": "1"}, "quant.low_rank.select", "gain"),
        ({"LQER_ENABLED": "0"}, "quant.low_rank", None),
        ({"TARGET_MB": "15.5"}, "quant.prune.target_mb", 15.5),
        ({"CROWN_Q_LAMBDA": "0.5"}, "quant.crown_q.coef", 0.5),
        ({"CROWN_Q_LAMBDA": "0"}, "quant.crown_q", None),
        ({"GPTQ_RESERVE_MS": "14000"}, "train.reserve_ms", 14000),
        ({"GPTQ_RESERVE_SECONDS": "12.5"}, "train.reserve_ms", 12500),
        ({"GPTQ_CALIB_BATCHES": "64"}, "quant.gptq.batches", 64),
        ({"GPTQ_CALIBRATION_BATCHES": "0"}, "quant.gptq", None),
        ({"GPTQ_CALIB_BATCHES": "64", "GPTQ_BLOCK_SIZE": "32"}, "quant.gptq.block", 32),
        ({"GPTQ_CALIB_BATCHES": "64", "GPTQ_PERCDAMP": "0.002"}, "quant.gptq.damp", 0.002),
        ({"GPTQ_CALIB_BATCHES": "64", "GPTQ_SKIP_MLP": "1"}, "quant.gptq.skip_mlp", True),
        ({"GPTQ_AR_CALIB": "1"}, "quant.gptq.generated.sequences", 64),
        ({"GPTQ_AR_CALIB": "0"}, "quant.gptq", None),
        ({"GPTQ_CALIBRATION_MODE": "generated"}, "quant.gptq.generated.temperature", 0.8),
        ({"GPTQ_CALIB_BATCHES": "64", "GPTQ_CALIBRATION_MODE": "train"}, "quant.gptq.generated", None),
        ({"LOADER_MODE": "coprime"}, "data.loader", "coprime_b"),
        ({"COMPILE_ENABLED": "0"}, "train.compile", "off"),
        ({"MATRIX_LR_LATE": "none"}, "optim.muon.lr_late", None),
        ({"MLP_ACT": "leaky_relu2"}, "model.mlp.leaky_slope", 0.01),
        ({"MLP_ACT": "leaky_relu2", "LEAKY_SLOPE": "0.3"}, "model.mlp.leaky_slope", 0.3),
        ({"ACT": "leaky_relu2"}, "model.mlp.leaky_slope", 0.5),
    ],
)
def test_variables_mean_what_they_mean_upstream(environ, path, value):
    assert tree.get(load(**environ).config, path) == value


def test_turning_on_what_is_on_keeps_its_settings():
    got = load(BIGRAM_VOCAB_SIZE="4096", GRAD_CLIP_NORM="0.5", preset="kitchen_sink_v2").config
    assert got.optim.clip.scope == "rank" and got.optim.clip.norm == 0.5
    assert load("average.ema=on", preset="smoke").config.average.ema.decay == 0.8


def test_late_rates_follow_the_early_ones():
    got = load(MATRIX_LR="0.03", preset="kitchen_sink_v2").config
    assert (got.optim.muon.lr, got.optim.muon.lr_late) == (0.03, None)
    got = load(MATRIX_LR_LATE="0.05", MATRIX_LR="0.03", preset="kitchen_sink_v2").config
    assert (got.optim.muon.lr, got.optim.muon.lr_late) == (0.03, 0.05)


def test_knob_of_a_section_that_is_off_is_a_note():
    got = load(VE_DIM="128", SWA_EVERY="25", BACKOUT_INIT="0.2", preset="naive_baseline")
    assert got.config == presets.naive_baseline()
    assert "VE_DIM=128 has no effect: model.attn.value_embed is off (set VE_ENABLED=1)" in got.notes
    assert "SWA_EVERY=25 has no effect: average.swa is off (set SWA_ENABLED=1)" in got.notes
    assert "BACKOUT_INIT=0.2 has no effect: model.wiring.backout is off (set CACHE_LAYER=7)" in got.notes


def test_knob_of_a_section_that_is_off_as_override_is_an_error():
    text = error("model.embed.smear.init=1", preset="h1")
    assert text == "model.embed.smear.init=1: model.embed.smear is off; add model.embed.smear=on first"
    got = load("model.embed.smear.init=1", "model.embed.smear=on", preset="h1")  # in any order
    assert got.config.model.embed.smear.init == 1.0


def test_override_switches_before_a_variable_sets():
    got = load("model.attn.value_embed=on", preset="naive_baseline", VE_DIM="64")
    assert got.config.model.attn.value_embed.dim == 64 and not any("VE_DIM" in n for n in got.notes)
    off = load("model.attn.value_embed=none", VE_DIM="64")
    assert off.config.model.attn.value_embed is None and "VE_DIM=64 has no effect" in off.notes[0]


def test_off_leaves_no_orphans():
    got = load("model.embed.bigram=none", "model.attn.xsa=off")
    assert got.config.model.embed.bigram is None and not any("bigram." in p or "xsa." in p for p in got.sources)


def test_shallower_model_takes_the_presets_layer_numbers_with_it():
    got = load(NUM_LAYERS="9", preset="kitchen_sink_v2")
    assert got.config.model.attn.value_embed.layers == (3, 7, 8) and len(got.notes) == 1
    assert "5,9,10 became 3,7,8" in got.notes[0]
    assert load(NUM_LAYERS="9", XSA_LAST_N="11").config.model.attn.xsa.last_n == 9  # all of them, as upstream
    assert "model.attn.value_embed.layers=(9, 10) must be below" in error(NUM_LAYERS="9", VE_LAYERS="9,10")
    assert "model.attn.xsa.last_n=11" in error("model.attn.xsa.last_n=11", NUM_LAYERS="9")
    assert load(NUM_LAYERS="12").config.model.attn.value_embed.layers == (9, 10)


# ---- schedules


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        ({"TIDAL_LR": "1"}, "tidal"),
        ({"COSINE_LR": "1", "BREATHING_LR": "1", "TIDAL_LR": "0"}, "breathing"),
        ({"WHALE_LR": "1", "TIDAL_LR": "1"}, "tidal"),
        ({"ROOT_FIRST": "1", "COSMO_LR": "1"}, "cosine"),
        ({"COSMO_LR": "1", "CORAL_LR": "1"}, "cosmo"),
        ({"CIRCADIAN_LR": "1", "ROOT_FIRST": "1"}, "circadian"),
        ({"GOLDEN_LR": "1", "COSINE_LR": "1"}, "golden"),
        ({"D2Z_ENABLED": "1"}, "d2z"),
        ({"COSINE_LR": "0"}, "linear"),
    ],
)
def test_schedule_flags_by_priority(flags, kind):
    assert load(**flags).config.schedule.kind == kind


def test_schedule_flag_off_falls_back_and_losers_are_noted():
    assert load(TIDAL_LR="0", preset="h1").config.schedule.kind == "linear"
    assert load(COSINE_LR="0", preset="h1").config.schedule.kind == "tidal"
    assert "WHALE_LR=1 has no effect: TIDAL_LR comes first" in load(WHALE_LR="1", TIDAL_LR="1").notes


# ---- notes


@pytest.mark.parametrize(
    ("environ", "preset", "note"),
    [
        ({"EMBED_LR": "0.8"}, "pr401", "EMBED_LR=0.8 has no effect: embeddings are tied (TIED_EMBED_LR is the one)"),
        ({"TIED_EMBED_LR": "0.1"}, "h1", "(EMBED_LR is the one)"),
        ({"WARMDOWN_ITERS": "9"}, "h1", "the schedule is not linear"),
        ({"LEAKY_SLOPE": "0.1"}, "pr401", "the activation is not leaky_relu2"),
        ({"COPRIME_SHARD_HOLD_STEPS": "8"}, "pr401", "the loader is not coprime_b"),
        ({"MUON_BETA2": "0.9"}, "pr401", "the public scripts parse it and never use it"),
        ({"GPTQ_BLOCK_SIZE": "64"}, "pr401", "quant.gptq is off (set GPTQ_CALIB_BATCHES)"),
        ({"TTT_LR": "0.002"}, "pr401", "TTT_LR=0.002 has no effect: ttt is off (set TTT_ENABLED=1)"),
        ({"TTT_MLP_ONLY": "1", "TTT_TAU": "2"}, "pr401", "ignored: TTT_MLP_ONLY=1, TTT_TAU=2"),
        ({"NGRAM_EVAL_ORDER": "9"}, "pr401", "hashed n-gram tables, whose scores are no probabilities; ngram=on"),
        ({"TEMP_SCALING": "1"}, "pr401", "does not have temperature chosen on validation"),
    ],
)
def test_what_has_no_effect_is_said(environ, preset, note):
    got = load(preset=preset, **environ)
    assert len(got.notes) == 1 and note in got.notes[0]
    without = presets.PRESETS[preset]()
    changed = tree.diff(without, got.config)
    assert len(changed) <= 1  # the value itself, where the tree has a place for it


def test_test_time_training_by_the_variables_of_pr_1156():
    got = load(TTT_ENABLED="1", TTT_LR="0.001", TTT_EPOCHS="2", TTT_CHUNK_TOKENS="65536", TTT_FREEZE_BLOCKS="2",
               TTT_MOMENTUM="0.8", TTT_BATCH_SEQS="32", TTT_GRAD_CLIP="0.5", TTT_SAM="1")  # fmt: skip
    sgd = got.config.ttt.sgd
    assert (sgd.lr, sgd.epochs, sgd.chunk, sgd.freeze_blocks) == (0.001, 2, 65536, 2)
    assert (sgd.momentum, sgd.step_rows, sgd.clip, sgd.sam) == (0.8, 32, 0.5, 0.05) and got.notes == []


def test_silent_at_the_off_value():
    quiet = {name: lever.off[0] for name, lever in not_yet.NOT_YET.items()}
    quiet |= {name: inert.default[0] for name, inert in not_yet.INERT.items()}
    got = load(**quiet | {"TTT_ENABLED": "0", "NGRAM_EVAL_ORDER": "0", "MTP_NUM_HEADS": "false", "LOGIT_TEMP": "1.0"})
    assert got.notes == [] and got.config == presets.pr401()


@pytest.mark.parametrize(
    "name", [n for n, lever in not_yet.NOT_YET.items() if lever.when == not_yet.TRAINING and lever.off != ("1",)]
)
def test_missing_lever_that_changes_training_stops_the_run(name):
    text = error(**{name: "3"})
    assert text.startswith(f"{name}=3: pgolf does not have ") and f"unset {name}" in text


# ---- errors


def test_all_problems_at_once_with_full_paths():
    text = error(
        "optim.muon.momentm=0.9", "data.seq_len=abc", NUM_HEADS="7", MLP_ACT="relu3", ITERATIONS="0", EMA_DECAY="nan",
        MTP_NUM_HEADS="2", VE_ENABLED="maybe",
    )  # fmt: skip
    lines = text.splitlines()
    assert lines[0].startswith("8 problems") or lines[0].startswith("9 problems")
    for part in (
        "optim.muon.momentm is not a setting; did you mean optim.muon.momentum",
        "data.seq_len=abc must be a whole number",
        "model.attn.num_heads=7 must be a positive multiple of num_kv_heads=4 [environment NUM_HEADS]",
        "model.mlp.activation='relu3' must be one of relu2,",
        "train.iterations=0 must be at least 1 [environment ITERATIONS]",
        "EMA_DECAY=nan (average.ema.decay) must be a finite number",
        "MTP_NUM_HEADS=2: pgolf does not have multi-token prediction",
        "VE_ENABLED=maybe must be 1 or 0",
    ):
        assert any(part in line for line in lines), part


def test_zero_heads_is_a_message_not_a_crash():
    assert "model.attn.num_heads=0" in error(NUM_HEADS="0")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ("muon.lr=1", "did you mean optim.muon.lr"),
        ("model.embed.smeer=on", "did you mean model.embed.smear"),
        ("SEED=3", "SEED is an environment variable"),
        ("seed", "a setting is written path=value"),
        ("model.embed=on", "is a section: name one of its settings, e.g. model.embed.vocab_size"),
        ("model.embed.smear=maybe", "must be on or none"),
        ("train.fullgraph=2", "must be 1 or 0"),
        ("model.attn.value_embed.layers=a", "whole numbers such as 9,10"),
        ("optim.muon.lr_late=x", "a finite number or none"),
        ("optim.muon.lr=inf", "a finite number"),
        ("train.max_wallclock_seconds=10 ", None),
        ("train.reserve_ms=600000", "must be below the cap"),
        ("train.run_id=../x", "plain folder name"),
        ("eval.stride=4096", "gaps otherwise"),
        ("quant.matrix=fp16", "quant.late_qat rounds to a grid"),
    ],
)
def test_bad_overrides(argv, part):
    if part is None:
        assert load(argv).config.train.max_wallclock_seconds == 10.0
    else:
        assert part in error(argv)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NUM_LAYER", "NUM_LAYERS"), ("NUM_LAYRES", "NUM_LAYERS"), ("num_layers", "NUM_LAYERS"),
        ("XSA_LASTN", "XSA_LAST_N"), ("MATRIXLR", "MATRIX_LR"), ("WARMDOWN_ITER", "WARMDOWN_ITERS"),
        ("BIGRAM_VOCABSIZE", "BIGRAM_VOCAB_SIZE"), ("EMA_ENABLE", "EMA_ENABLED"), ("PRESETS", "PRESET"),
        ("PGOLF_SEEED", "SEED"), ("MAX_WALLCLOCK_SECOND", "MAX_WALLCLOCK_SECONDS"),
        ("TRAIN_SEQ_LENGTH", "TRAIN_SEQ_LEN"), ("TTT_BURST_ENABLE", "TTT_BURST_ENABLED"),
    ],
)  # fmt: skip
def test_misspelt_variable_never_starts_a_run(name, meant):
    text = error(**{name: "11"})
    assert f"did you mean {meant}" in text and "11" not in text  # a foreign variable's value is nobody's business


def test_unknown_prefixed_variable():
    assert "PGOLF_FOO is not a variable of pgolf" in error(PGOLF_FOO="1")


FOREIGN = """
    PATH HOME USER SHELL LANG LC_ALL TERM PWD OLDPWD SHLVL EDITOR PAGER MAIL TMPDIR TEMP TMP HOSTNAME LOGNAME DISPLAY
    DATA_DIR LOG_LEVEL MODEL_NAME MODEL_PATH BATCH_SIZE SPEED KERNEL DEVICES CUDA_HOME CUDA_DEVICE NUM_WORKERS NUM_GPUS
    CUDA_VISIBLE_DEVICES CUDA_VERSION CUDA_DEVICE_ORDER NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES NCCL_DEBUG
    RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_RUN_ID
    TORCHELASTIC_MAX_RESTARTS TORCHELASTIC_RESTART_COUNT TORCH_HOME TORCHINDUCTOR_CACHE_DIR TRITON_CACHE_DIR
    TRITON_INTERPRET TORCHDYNAMO_SUPPRESS_ERRORS OMP_NUM_THREADS MKL_NUM_THREADS PYTHONPATH PYTHONUNBUFFERED VIRTUAL_ENV
    CONDA_PREFIX CONDA_DEFAULT_ENV LD_LIBRARY_PATH XDG_CACHE_HOME XDG_RUNTIME_DIR SSH_AUTH_SOCK SSH_CONNECTION SSH_TTY
    GITHUB_RUN_ID GITHUB_ACTIONS GITHUB_TOKEN CI RUNNER_OS RUNNER_TEMP SLURM_JOB_ID SLURM_NTASKS SLURM_PROCID
    RUNPOD_POD_ID RUNPOD_GPU_COUNT RUNPOD_API_KEY PUBLIC_KEY HF_HOME HF_TOKEN HF_HUB_OFFLINE WANDB_API_KEY WANDB_RUN_ID
    WANDB_MODE JUPYTER_PORT COLAB_GPU KUBERNETES_SERVICE_HOST KUBERNETES_PORT DEBIAN_FRONTEND GPG_KEY PYTHON_VERSION
    NV_CUDA_LIB_VERSION NV_LIBNCCL_PACKAGE LIBRARY_PATH MANPATH INFOPATH LESSOPEN LS_COLORS COLORTERM COLUMNS LINES
    HISTSIZE HISTFILE INVOCATION_ID JOURNAL_STREAM SYSTEMROOT COMSPEC PROCESSOR_ARCHITECTURE NUMBER_OF_PROCESSORS
    PROGRAMFILES APPDATA LOCALAPPDATA OUTPUT_DIR OUTPUT CACHE_DIR CACHE_PATH TOKENIZERS_PARALLELISM TARGET TARGET_DIR
    RUN_NAME RUN_DIR JOB_ID SEQ_LEN MAX_TOKENS MAX_LENGTH EPOCHS LEARNING_RATE NUM_EPOCHS NO_COLOR COMPILER VERBOSE
    EVAL_DATA TEST_PATH GIT_COMMIT BUILD_ID DOCKER_HOST HTTP_PROXY no_proxy ACTIVE ACTIONS_RUNTIME_URL _"""


@pytest.mark.parametrize("name", FOREIGN.split())
def test_foreign_variables_are_left_alone(name):
    assert load(**{name: "anything"}).config == presets.pr401()


# ---- the tables


def test_every_alias_hits_the_tree():
    for name in aliases.ALIASES:
        for path in aliases.alias(name).paths:
            assert path in config.NODES, (name, path)
        switch = aliases.alias(name).switch
        assert not switch or config.NODES[switch].is_switch, name
    assert set(aliases.SCHEDULE_FLAGS.values()) <= set(pgolf.optim.config.SCHEDULE_NAMES)
    assert all(path in config.NODES for path in (*config.NO_EFFECT, *config.NOT_IN_DIGEST))


def test_no_variable_has_two_meanings():
    tables = (aliases.ALIASES, aliases.SCHEDULE_FLAGS, not_yet.NOT_YET, not_yet.INERT)
    names = [n for table in tables for n in table]
    assert len(names) == len(set(names))


def test_every_setting_can_be_overridden_with_its_own_value():
    """Printing a value and giving it back as an override changes nothing."""
    start = presets.kitchen_sink_v2()
    pairs = [f"{path}={config.show(value)}" for path, value in tree.flatten(start).items()]
    assert load(*pairs, preset="kitchen_sink_v2").config == start


# ---- digest, diff, JSON, description


def test_digest_ignores_names_and_places_only():
    base = config.digest(presets.pr401())
    assert len(base) == 64 and base == config.digest(load(RUN_ID="x", OUT_DIR="/y", DATA_PATH="/z").config)
    digests = {config.digest(make()) for make in presets.PRESETS.values()}
    assert len(digests) == len(presets.PRESETS) and config.digest(load(SEED="1").config) != base
    assert config.digest(load("model.embed.smear=none").config) != base


def test_diff():
    other = load("model.embed.smear=none", "optim.muon.lr=0.03").config
    assert config.diff(presets.pr401(), other) == {
        "model.embed.smear": ("on", "none"),
        "model.embed.smear.init": (0.0, None),
        "optim.muon.lr": (0.025, 0.03),
    }
    assert config.diff(other, other) == {}


def test_from_dict_refuses_what_it_does_not_know():
    data = config.to_dict(presets.smoke())
    with pytest.raises(ConfigError, match=r"model\.embed\.smeer is not a setting; did you mean smear"):
        config.from_dict(RunConfig, data | {"model": {"embed": {"smeer": None}}})
    with pytest.raises(ConfigError, match=r"train\.seed='1' must be of type int"):
        config.from_dict(RunConfig, data | {"train": {"seed": "1"}})
    with pytest.raises(ConfigError, match=r"train: got 3"):
        config.from_dict(RunConfig, data | {"train": 3})
    assert config.from_dict(RunConfig, {}) == RunConfig()


def test_describe_and_write(tmp_path):
    got = load("optim.muon.lr=0.03", preset="smoke", EMBED_LR="1")
    told = config.describe(got, lambda run: {"parameters": 7})
    assert told == json.loads(json.dumps(told)) and told["parameters"] == 7
    assert config.from_dict(RunConfig, told["config"]) == got.config
    assert told["changed_from_preset"] == {"optim.adamw.embed_lr": [0.6, 1.0], "optim.muon.lr": [0.04, 0.03]}
    config.write(got, tmp_path / "c.json")
    assert json.loads((tmp_path / "c.json").read_text())["digest"] == config.digest(got.config)


def test_levers_lists_every_setting_and_variable():
    text = config.levers()
    for path, node in config.NODES.items():
        assert (f"`{path}`" in text) == (not node.is_section or node.optional)
    for name in (*aliases.ALIASES, *aliases.SCHEDULE_FLAGS):
        alias = aliases.ALIASES.get(name, "")
        main = alias if isinstance(alias, str) else alias.paths[0]
        row = next(line for line in text.splitlines() if line.startswith(f"| `{main or 'schedule.kind'}`"))
        assert name in row
    assert "| no cap" not in text and "0 = no cap" in text


def test_run_without_problems_of_its_own_sections():
    bad = dataclasses.replace(RunConfig(), train=TrainConfig(iterations=0, compile="yes", device="tpu", run_id="a/b"))
    assert len(tree.problems(bad)) == 4 and all(p.startswith("train.") for p in tree.problems(bad))


# ---- the generic tree, on a tree of its own


@dataclass(frozen=True)
class Leaf:
    """A leaf."""

    # above
    size: int = 1
    rate: float | None = None  # behind


@dataclass(frozen=True)
class Root:
    name: str = "x"
    flag: bool = True
    many: tuple[int, ...] = (1, 2)
    leaf: Leaf | None = None
    fixed: Leaf = field(default_factory=Leaf)


def test_nodes_and_docs():
    found = tree.nodes(Root)
    assert list(found) == [
        "name",
        "flag",
        "many",
        "leaf",
        "leaf.size",
        "leaf.rate",
        "fixed",
        "fixed.size",
        "fixed.rate",
    ]
    assert found["leaf"].is_switch and not found["fixed"].is_switch and found["leaf.size"].switch == "leaf"
    assert tree.doc_of(found["leaf.size"]) == "above" and tree.doc_of(found["leaf.rate"]) == "behind"
    assert tree.doc_of(found["leaf"]) == "A leaf."


LEAVES = st.builds(Leaf, st.integers(), st.none() | st.floats(allow_nan=False, allow_infinity=False))


@given(st.builds(Root, st.text(), st.booleans(), st.lists(st.integers()).map(tuple), st.none() | LEAVES, LEAVES))
@settings(max_examples=60, deadline=None)
def test_round_trip_through_json(root):
    assert tree.from_dict(Root, json.loads(json.dumps(tree.to_dict(root)))) == root


@given(st.floats(allow_nan=False, allow_infinity=False))
@settings(max_examples=60, deadline=None)
def test_a_float_survives_its_text(value):
    assert tree.parse(config.show(value), tree.nodes(Leaf)["rate"]) == value


# ---- the command line


def run_main(capsys, *argv, **environ):
    code = cli.main(argv, environ)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.alone
def test_help_answers_within_a_second_and_without_torch(root):
    script = "import sys, train_gpt; from pgolf.cli import main; main(['--help']); assert 'torch' not in sys.modules"
    times = []
    for _ in range(3):  # the machine may be busy: the best of three
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
        times.append(time.perf_counter() - began)
    assert min(times) < 1.0
    for part in ("usage:", "PRESET=", *presets.PRESETS, *cli.MOST_USED, "exit codes:", "130"):
        assert part in done.stdout


def test_describe_prints_one_json_object(capsys):
    code, out, err = run_main(capsys, "--describe", "data.seq_len=128", PRESET="smoke")
    told = json.loads(out)
    assert code == 0 and err == "" and told["config"]["data"]["seq_len"] == 128
    assert [row["block"] for row in told["plan"]] == [0, 1, 2] and told["parameters"] > 60_000


def test_errors_are_messages_with_exit_codes(capsys):
    code, out, err = run_main(capsys, "optim.muon.rl=1", PRESET="smoke")
    assert (
        code == 2 and out == "" and err.startswith("error: optim.muon.rl is not a setting; did you mean optim.muon.lr")
    )
    assert err.count("\n") == 1
    code, _, err = run_main(capsys, "--debug", "optim.muon.rl=1", PRESET="smoke")
    assert code == 2 and "Traceback" in err
    code, _, err = run_main(capsys, "optim.muon.rl=1", PRESET="smoke", RANK="3")
    assert code == 2 and err == ""  # rank 0 says it for all


@pytest.mark.parametrize(
    ("flag", "part"),
    [("--descrbe", "did you mean --describe"), ("--optim.muon.lr=3", "without dashes, path=value: optim.muon.lr="),
     ("--seed", "without dashes, path=value: train.seed=")],
)  # fmt: skip
def test_unknown_flag(capsys, flag, part):
    code, _, err = run_main(capsys, flag, PRESET="smoke")
    assert code == 2 and part in err


def test_version(capsys):
    assert run_main(capsys, "--version")[:2] == (0, pgolf.__version__ + "\n")


def test_interrupt_is_130(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_main", interrupted)
    assert run_main(capsys)[0] == 130


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), -float("inf")])
def test_saved_settings_hold_finite_numbers_only(value):
    data = config.to_dict(presets.smoke())
    data["optim"]["muon"]["lr"] = value
    with pytest.raises(ConfigError, match=r"optim\.muon\.lr=.* must be a finite number"):
        config.from_dict(config.RunConfig, data)


@pytest.mark.parametrize(
    "override",
    ["model.plan.num_layers=1001", "model.dim=0", "model.dim=-512", "model.dim=1099511627776", "model.mlp.mult=1e308",
     "model.mlp.hidden=99999999999", "model.embed.bigram.rows=99999999999", "model.attn.value_embed.dim=9999999"],
)  # fmt: skip
def test_a_model_that_nobody_can_mean_is_refused(override):
    with pytest.raises(ConfigError, match=override.split("=")[0].rsplit(".", 1)[0]):
        config.load([override], {"PRESET": "rat_rod_green"}, has_gpu=lambda: False)


def test_messages_stay_readable_whatever_was_typed():
    text = error(f"train.seed={'9' * 5000}x\x1b[2J\udcff", preset="smoke")
    assert len(text) <= 500 and text.isprintable() and "must be a whole number" in text
    assert r"\x1b[2J\udcff" in text and " characters] " in text and str(ConfigError(text)) == text
    lines = error(*(f"nothing{i}=1" for i in range(90)), preset="smoke").split("\n")
    assert lines[0].startswith("90 problems") and len(lines) == 40 and lines[-1] == "... and 52 lines more"
