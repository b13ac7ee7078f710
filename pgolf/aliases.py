"""Environment names of the challenge's public scripts -> places in the settings tree. No torch here.

A plain string is a path, one to one. An `Alias` is for names that also switch a section, or whose meaning differs.
Rows further down are applied later. `pgolf.not_yet` names what the scripts know and pgolf does not do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher

from pgolf import tree
from pgolf.not_yet import INERT, NOT_YET, family_of
from pgolf.schema import RunConfig

Assign = tuple[str, str]  # path, text to parse there


@dataclass(frozen=True)
class Alias:
    """`expand(text, config of the preset)` gives what to set; `paths` is all that it may set, the main one first.

    switch is the section that the name can turn on, hint how to write that.
    """

    paths: tuple[str, ...]
    expand: Callable[[str, RunConfig], list[Assign]]
    switch: str = ""
    hint: str = ""


def to(path: str) -> Alias:
    return Alias((path,), lambda text, _: [(path, text)])


def gate(section: str) -> Alias:
    """1 turns the section on, 0 off."""
    return Alias((section,), lambda text, _: [(section, "on" if tree.parse_bool(text) else "none")], section, "=1")


def sized(section: str, setting: str, *also: Assign) -> Alias:
    """0 turns the section off; anything else turns it on and is the value of `setting`."""
    path = f"{section}.{setting}"

    def expand(text: str, _: RunConfig) -> list[Assign]:
        if tree.is_off(text):
            return [(section, "none")]
        return [(section, "on"), (path, text), *also]

    return Alias((section, path, *(p for p, _ in also)), expand, section)


def _chosen(path: str, off: str, on: str) -> Alias:
    """0 sets one value, 1 the other."""
    return Alias((path,), lambda text, _: [(path, on if tree.parse_bool(text) else off)])


def _early_and_late(path: str) -> Alias:
    """PR #1130: the late half follows the early one unless its own variable is set (which comes further down)."""
    late = f"{path}_late"

    def expand(text: str, config: RunConfig) -> list[Assign]:
        return [(path, text)] if tree.get(config, late) is None else [(path, text), (late, "none")]

    return Alias((path, late), expand)


def _mlp_act(text: str, config: RunConfig) -> list[Assign]:
    # PR #1380's leaky_relu2 has slope 0.01; a preset that has the activation already keeps its own slope
    slope = text == "leaky_relu2" and config.model.mlp.activation != text
    return [("model.mlp.activation", text), *([("model.mlp.leaky_slope", "0.01")] if slope else [])]


def _modes(section: str, setting: str, modes: dict[str, str]) -> Alias:
    """0 is off; each key of `modes` turns the section on with that value of `setting`."""

    def expand(text: str, _: RunConfig) -> list[Assign]:
        if tree.is_off(text):
            return [(section, "none")]
        if text not in modes:
            raise ValueError(f"must be 0 or one of {', '.join(modes)}")
        return [(section, "on"), (f"{section}.{setting}", modes[text])]

    return Alias((section, f"{section}.{setting}"), expand, section, f"={next(iter(modes))}")


def _cache_layer(text: str, _: RunConfig) -> list[Assign]:
    section = "model.wiring.backout"
    return [(section, "none")] if text.startswith("-") else [(section, "on"), (f"{section}.layer", text)]


def _on_off_auto(text: str) -> str:
    return text if text == "auto" else "on" if tree.parse_bool(text) else "off"


def _qat_from_start(text: str, _: RunConfig) -> list[Assign]:
    # a learning-rate scale never exceeds 1, so a threshold of 2 means the first step; 0 leaves late QAT as it is
    return [("quant.late_qat", "on"), ("quant.late_qat.threshold", "2")] if tree.parse_bool(text) else []


def _calibration(modes: dict[str, bool]) -> Callable[[str, RunConfig], list[Assign]]:
    """Each key of `modes` calibrates GPTQ, which is turned on, on text of the model's own, or not on that."""

    def expand(text: str, config: RunConfig) -> list[Assign]:
        if text not in modes:
            raise ValueError(f"must be one of {', '.join(modes)}")
        if modes[text]:
            return [("quant.gptq", "on"), ("quant.gptq.generated", "on")]
        return [("quant.gptq.generated", "none")] if config.quant.gptq else []

    return expand


def _bits(path: str) -> Alias:
    def expand(text: str, _: RunConfig) -> list[Assign]:
        if text not in ("4", "5", "6", "7", "8"):
            raise ValueError("must be 4, 5, 6, 7 or 8")
        return [(path, f"int{text}")]

    return Alias((path,), expand)


def _sigmas(path: str, pattern: str = "") -> Alias:
    """A row's clip in standard deviations; with a `pattern` of the parameters that fit it. 0 leaves it as it is."""

    def expand(text: str, _: RunConfig) -> list[Assign]:
        return [] if tree.is_off(text) else [(path, f"{pattern}=:{text}sd" if pattern else f"{text}sd")]

    return Alias((path,), expand)


# The names that the public scripts give to layers, and ours.
LAYER_NAMES = {"attn.c_q": "attn.q", "attn.c_k": "attn.k", "attn.c_v": "attn.v", "attn.proj": "attn.out",
               "mlp.fc": "mlp.up", "mlp.proj": "mlp.down"}  # fmt: skip


def _layers_as(kind: str) -> Alias:
    """Comma-separated layer numbers or parts of names, as the scripts or we name them: these are stored as `kind`."""

    def expand(text: str, _: RunConfig) -> list[Assign]:
        patterns = []
        for part in filter(None, (p.strip() for p in text.split(","))):
            for theirs, ours in LAYER_NAMES.items():
                part = part.replace(theirs, ours)
            patterns.append(f"blocks.{part}.*" if part.isdigit() else f"*{part}*")
        return [("quant.overrides", ",".join(f"{pattern}={kind}" for pattern in patterns))]

    return Alias(("quant.overrides",), expand)


def _lqer_scope(text: str, _: RunConfig) -> list[Assign]:
    scopes = {"all": "*", "mlp": "*.mlp.*", "attn": "*.attn.*", "embed": "*embed*"}
    if text not in scopes:
        raise ValueError(f"must be one of {', '.join(scopes)}")
    return [("quant.low_rank.scope", scopes[text])]


def _reserve_seconds(text: str, _: RunConfig) -> list[Assign]:
    try:
        return [("train.reserve_ms", str(round(1000 * float(text))))]
    except (ValueError, OverflowError):
        raise ValueError("must be a number of seconds") from None


BIGRAM, TRIGRAM = "model.embed.bigram", "model.embed.trigram"

ALIASES: dict[str, str | Alias] = {
    # run and data
    "SEED": "train.seed",
    "RUN_ID": "train.run_id",
    "ITERATIONS": "train.iterations",
    "MAX_WALLCLOCK_SECONDS": "train.max_wallclock_seconds",
    "GPTQ_RESERVE_MS": "train.reserve_ms",
    "GPTQ_RESERVE_SECONDS": Alias(("train.reserve_ms",), _reserve_seconds),
    "WARMUP_STEPS": "train.warmup_steps",
    "VAL_LOSS_EVERY": "train.val_loss_every",
    "TRAIN_LOG_EVERY": "train.train_log_every",
    "COMPILE_ENABLED": Alias(("train.compile",), lambda text, _: [("train.compile", _on_off_auto(text))]),
    "COMPILE_FULLGRAPH": "train.fullgraph",
    "DATA_PATH": "data.path",
    "TOKENIZER_PATH": "data.tokenizer_path",
    "TRAIN_BATCH_TOKENS": "data.batch_tokens",
    "TRAIN_SEQ_LEN": "data.seq_len",
    # PR #1120's "coprime" is variant B
    "LOADER_MODE": Alias(("data.loader",), lambda text, _: [("data.loader", {"coprime": "coprime_b"}.get(text, text))]),
    "COPRIME_SHARDS_PER_BATCH": "data.shards_per_batch",
    "COPRIME_SHARD_HOLD_STEPS": "data.shard_hold_steps",
    "COPRIME_MAX_LOADED_SHARDS": "data.max_loaded_shards",
    "EVAL_SEQ_LEN": "eval.seq_len",
    "EVAL_STRIDE": "eval.stride",
    "VAL_BATCH_SIZE": "eval.batch_tokens",
    "VAL_BATCH_TOKENS": "eval.batch_tokens",
    # model
    "VOCAB_SIZE": "model.embed.vocab_size",
    "MODEL_DIM": "model.dim",
    "NUM_LAYERS": "model.plan.num_layers",
    "ENCODER_LAYERS": "model.plan.encoder_layers",
    "NUM_HEADS": "model.attn.num_heads",
    "NUM_KV_HEADS": "model.attn.num_kv_heads",
    "QK_GAIN_INIT": "model.attn.qk_gain_init",
    "ROPE_BASE": "model.attn.rope.base",
    "ROPE_DIMS": "model.attn.rope.dims",
    "LOGIT_SOFTCAP": "model.softcap",
    "TIE_EMBEDDINGS": "model.embed.tied",
    "TIED_EMBED_INIT_STD": "model.embed.tied_init_std",
    "MLP_MULT": "model.mlp.mult",
    "MLP_HIDDEN": "model.mlp.hidden",
    "MLP_ACT": Alias(("model.mlp.activation", "model.mlp.leaky_slope"), _mlp_act),
    "LEAKY_SLOPE": "model.mlp.leaky_slope",
    "PARALLEL_BLOCK": "model.wiring.parallel",
    "SANDWICH_NORM": "model.wiring.sandwich_norm",
    "LN_SCALE": "model.wiring.ln_scale",
    "CACHE_LAYER": Alias(
        ("model.wiring.backout", "model.wiring.backout.layer"), _cache_layer, "model.wiring.backout", "=7"
    ),
    "BACKOUT_INIT": "model.wiring.backout.init",
    "XSA_LAST_N": sized("model.attn.xsa", "last_n"),
    "XSA_LAYERS": sized("model.attn.xsa", "last_n"),
    "BIGRAM_VOCAB_SIZE": sized(BIGRAM, "rows"),
    "BIGRAM_DIM": f"{BIGRAM}.dim",
    "BIGRAM_BUCKETS": sized(BIGRAM, "rows", (f"{BIGRAM}.hash", "mul1009")),  # the scripts of this name hash so
    "BIGRAM_EMBED_DIM": f"{BIGRAM}.dim",
    "TRIGRAM": f"{BIGRAM}.trigram",
    "TRIGRAM_VOCAB_SIZE": sized(TRIGRAM, "rows"),
    "TRIGRAM_DIM": f"{TRIGRAM}.dim",
    "VE_ENABLED": gate("model.attn.value_embed"),
    "VE_DIM": "model.attn.value_embed.dim",
    "VE_LAYERS": "model.attn.value_embed.layers",
    # PR #609 adds (1), PR #549 mixes
    "VALUE_RESIDUAL": _modes("model.attn.value_residual", "mode", {"1": "add", "add": "add", "mix": "mix"}),
    # loss
    "MILE_GAMMA": sized("loss.mile", "gamma"),
    "MILE_CLAMP_MIN": "loss.mile.clamp_min",
    "MILE_PEAK_FRAC": "loss.mile.peak_frac",
    "HEAD_DIVERSITY": sized("loss.head_diversity", "coef"),
    "Z_LOSS": sized("loss.z_loss", "coef"),
    "LOGIT_PENALTY": sized("loss.logit_penalty", "coef"),
    "LABEL_SMOOTH": "loss.label_smooth",
    "FOCAL_GAMMA": "loss.focal_gamma",
    # optimisers, schedule, averaging
    "MATRIX_LR": _early_and_late("optim.muon.lr"),
    "MATRIX_LR_LATE": "optim.muon.lr_late",
    "MUON_MOMENTUM": "optim.muon.momentum",
    "MUON_MOMENTUM_WARMUP_START": "optim.muon.momentum_start",
    "MUON_MOMENTUM_WARMUP_STEPS": "optim.muon.momentum_warmup_steps",
    "MUON_BACKEND_STEPS": "optim.muon.ns_steps",
    "MUON_WD": "optim.muon.weight_decay",
    "EMBED_LR": "optim.adamw.embed_lr",
    "TIED_EMBED_LR": "optim.adamw.tied_embed_lr",
    "HEAD_LR": "optim.adamw.head_lr",
    "SCALAR_LR": _early_and_late("optim.adamw.scalar_lr"),
    "SCALAR_LR_LATE": "optim.adamw.scalar_lr_late",
    "BETA1": "optim.adamw.beta1",
    "BETA2": "optim.adamw.beta2",
    "ADAM_EPS": "optim.adamw.eps",
    "ADAM_WD": "optim.adamw.weight_decay",
    "DECODER_LR_MULT": "optim.decoder_lr_mult",
    "GRAD_CLIP_NORM": sized("optim.clip", "norm"),
    "WARMDOWN_ITERS": "schedule.warmdown_iters",
    "COSINE_CYCLES": "schedule.cosine_cycles",
    "D2Z_WARMUP_STEPS": "schedule.d2z_warmup_steps",
    "EMA_ENABLED": gate("average.ema"),
    "EMA_DECAY": "average.ema.decay",
    "SWA_ENABLED": gate("average.swa"),
    "SWA_EVERY": "average.swa.every",
    "SWA_START_FRAC": "average.swa.threshold",
    # quantisation and packing
    "LATE_QAT_THRESHOLD": sized("quant.late_qat", "threshold"),
    "LATE_QAT": gate("quant.late_qat"),
    "QAT_THRESHOLD": "quant.late_qat.threshold",
    "QAT_ENABLED": Alias(("quant.late_qat", "quant.late_qat.threshold"), _qat_from_start),
    "GPTQ_CALIB_BATCHES": sized("quant.gptq", "batches"),
    "GPTQ_CALIBRATION_BATCHES": sized("quant.gptq", "batches"),
    "GPTQ_BLOCK_SIZE": "quant.gptq.block",
    "GPTQ_PERCDAMP": "quant.gptq.damp",
    "GPTQ_SKIP_MLP": "quant.gptq.skip_mlp",
    "GPTQ_AR_CALIB": Alias(("quant.gptq.generated", "quant.gptq"), _calibration({"0": False, "1": True})),
    "GPTQ_CALIBRATION_MODE": Alias(
        ("quant.gptq.generated", "quant.gptq"), _calibration({"train": False, "generated": True})
    ),
    "CROWN_Q_LAMBDA": sized("quant.crown_q", "coef"),
    "MATRIX_BITS": _bits("quant.matrix"),
    "EMBED_BITS": _bits("quant.embed"),
    "MATRIX_CLIP_SIGMAS": _sigmas("quant.matrix_clip"),
    "EMBED_CLIP_SIGMAS": _sigmas("quant.embed_clip"),
    "ATTN_CLIP_SIGMAS": _sigmas("quant.overrides", "*.attn.*"),
    "MLP_CLIP_SIGMAS": _sigmas("quant.overrides", "*.mlp.*"),
    "INT5_LAYERS": _layers_as("int5"),
    "INT8_SENSITIVE": _layers_as("int8"),
    "USE_OPTROT": "quant.optrot",
    "LQER_ENABLED": gate("quant.low_rank"),
    "LQER_RANK": "quant.low_rank.rank",
    "LQER_ASYM_ENABLED": _chosen("quant.low_rank.factors", off="int4", on="asym"),
    "LQER_TOP_K": "quant.low_rank.top_k",
    "LQER_ASYM_GROUP": "quant.low_rank.group",
    "LQER_SCOPE": Alias(("quant.low_rank.scope",), _lqer_scope),
    "LQER_GAIN_SELECT": _chosen("quant.low_rank.select", off="error", on="gain"),
    "TARGET_MB": sized("quant.prune", "target_mb"),
    "COMPRESSOR": "quant.codec",
    # names of our own, for what the scripts hard-code
    "KERNELS": "kernels.default",
    "DEVICE": "train.device",
    "OUT_DIR": "train.out_dir",
    "CHECKPOINT_EVERY": "train.checkpoint_every",
    "CHECKPOINT_SECONDS": "train.checkpoint_seconds",
    "KEEP_CHECKPOINTS": "train.keep_checkpoints",
    "RESUME": "train.resume",
    "MICRO_BATCHES": "data.micro_batches",
    "ACT": "model.mlp.activation",
    "SMEAR": gate("model.embed.smear"),
    "NTK_REFERENCE": "model.attn.rope.ntk_reference",
    "SKIP_GATED": "model.plan.skips.gated",
    "SKIP_GATES_ENABLED": "model.plan.skips.gated",  # PR #1218's name for the same formula
    "RESID_LAMBDAS": _modes("model.wiring.resid_lambdas", "frozen", {"learned": "false", "frozen": "true"}),
    # test-time training (PR #401, #1130, #1156 and the document adapters of PR #1530 onwards)
    "TTT_ENABLED": gate("ttt"),
    "TTT_LR": "ttt.sgd.lr",
    "TTT_EPOCHS": "ttt.sgd.epochs",
    "TTT_CHUNK_TOKENS": "ttt.sgd.chunk",
    "TTT_FREEZE_BLOCKS": "ttt.sgd.freeze_blocks",
    "TTT_MOMENTUM": "ttt.sgd.momentum",
    "TTT_BATCH_SEQS": "ttt.sgd.step_rows",
    "TTT_GRAD_CLIP": "ttt.sgd.clip",
    "TTT_OPTIMIZER": "ttt.sgd.optimizer",
    "TTT_WD": "ttt.sgd.weight_decay",
    "TTT_SAM": _chosen("ttt.sgd.sam", off="0", on="0.05"),
    "TTT_EMA_DECAY": "ttt.sgd.shadow",
    "TTT_WARMUP_CHUNKS": "ttt.sgd.warmup_chunks",
    "TTT_MAX_TRAIN_CHUNKS": "ttt.sgd.max_chunks",
    "TTT_FREEZE_EMBED": "ttt.sgd.freeze_tables",
    "TTT_DISCRIMINATIVE_LR": "ttt.sgd.block_rates",
    "TTT_LORA_RANK": "ttt.lora.rank",
    "TTT_LORA_ALPHA": "ttt.lora.alpha",
    "TTT_LORA_LR": "ttt.lora.lr",
    "TTT_BETA1": "ttt.lora.beta1",
    "TTT_BETA2": "ttt.lora.beta2",
    "TTT_WARM_START_A": "ttt.lora.keep_a",
    "GLOBAL_TTT_LR": "ttt.phases.lr",
}

# First one that is set wins, as in PR #1380 (D2Z, of another script, comes behind; golden is cosine with a high floor).
SCHEDULE_FLAGS = {
    "TIDAL_LR": "tidal", "BREATHING_LR": "breathing", "WHALE_LR": "whale", "CIRCADIAN_LR": "circadian",
    "ROOT_FIRST": "cosine", "COSMO_LR": "cosmo", "CORAL_LR": "cosine", "D2Z_ENABLED": "d2z", "GOLDEN_LR": "golden",
    "COSINE_LR": "cosine",
}  # fmt: skip


def alias(name: str) -> Alias:
    """The row of ALIASES as an Alias."""
    row = ALIASES[name]
    return to(row) if isinstance(row, str) else row


def schedule_kind(flags: Mapping[str, str], current: str) -> tuple[str, str] | None:
    """(flag that decides, schedule kind) from the schedule flags in an environment; None: they change nothing.

    Turning the current schedule's flag off falls back to "linear". ValueError on a flag that is neither 0 nor 1.
    """
    given = {name: tree.parse_bool(flags[name]) for name in SCHEDULE_FLAGS if name in flags}
    for name, on in given.items():
        if on:
            return name, SCHEDULE_FLAGS[name]
    return next(((name, "linear") for name in given if SCHEDULE_FLAGS[name] == current), None)


# Settings that are lists of rules: what several variables say adds up.
ADD_UP = {"quant.overrides"}
KNOWN = ("PRESET", *ALIASES, *SCHEDULE_FLAGS, *NOT_YET, *INERT)
# Foreign names that look like ours: a build image's KERNEL is no typo of KERNELS.
FOREIGN = {"KERNEL", "DEVICES"}


def recognise(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Our variables among `environ` (empty ones do not count), and complaints about names that must be misspelt.

    `PGOLF_X` is another spelling of X, for machines where X is taken; it wins. An unknown PGOLF_ name is an error. So
    is a foreign name that is nearly one of ours: a typo must not start a paid run.
    """
    found, complaints = {}, []
    for name, text in sorted(environ.items(), key=lambda item: item[0].startswith("PGOLF_")):
        bare = name.removeprefix("PGOLF_")
        if bare in KNOWN or (family_of(bare) and not misspelt(bare)):
            if text.strip():
                found[bare] = text.strip()
        elif bare != name:
            complaints.append(f"{name} is not a variable of pgolf{tree.did_you_mean(bare, KNOWN)}")
        elif meant := misspelt(name):
            complaints.append(f"{name} is no variable of pgolf; did you mean {meant}? If it is foreign, unset it")
    return found, complaints


def misspelt(name: str) -> str:
    """The variable that `name` is nearly (similarity at least 0.87, in capitals), or ""."""
    if name in FOREIGN:
        return ""
    upper, matcher = name.upper(), SequenceMatcher(autojunk=False)
    matcher.set_seq2(upper)
    best, best_ratio = "", 0.87
    for known in KNOWN:
        # five letters at least: SPEED is 0.89 of SEED
        if len(known) < 5 or abs(len(known) - len(upper)) > 3:
            continue
        matcher.set_seq1(known)
        if matcher.quick_ratio() >= best_ratio and (ratio := matcher.ratio()) >= best_ratio:
            best, best_ratio = known, ratio
    return best
