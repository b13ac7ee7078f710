"""Variables of the challenge's public scripts that pgolf understands and does not act on. No torch here.

`NOT_YET`: levers that pgolf lacks. At the off value they pass silently; else a lever that changes training is an error
and one that comes after training a note. `INERT`: no effect here, by design or in the scripts themselves; a note.
"""

from __future__ import annotations

from typing import NamedTuple

TRAINING, AFTER = "training", "after training"


class Missing(NamedTuple):
    """A lever of the public scripts that pgolf does not have. It is off at the values in `off`."""

    what: str
    when: str = TRAINING
    off: tuple[str, ...] = ("0",)


class Inert(NamedTuple):
    """A variable without effect here, and in which of the scripts' values nobody would expect one."""

    why: str
    default: tuple[str, ...] = ("0",)


def _missing(what: str, names: str, when: str = TRAINING, off: tuple[str, ...] = ("0",)) -> dict[str, Missing]:
    return {name: Missing(what, when, off) for name in names.split()}


NOT_YET: dict[str, Missing] = {
    **_missing("multi-token prediction", "MTP_NUM_HEADS HSMTP_NUM_HEADS SYN2_NUM_HEADS MULTI_TOKEN"),
    **_missing("an n-gram term in the training loss", "SIPHON_ENABLED COMPLEMENT_ALPHA"),
    **_missing("a gate on the attention output", "GATED_ATTENTION GATED_ATTN_ENABLED SPARSE_ATTN_GATE_ENABLED"),
    **_missing("a gate on the attention output", "GATE_ATTN_OUT ATTN_OUT_GATE_ENABLED"),
    **_missing("a dynamic token gate", "DTG_ENABLED"),
    **_missing("mixing the first block's output into attention inputs", "VRL_ENABLED"),
    **_missing("depth recurrence", "NUM_LOOPS FRACTAL_LOOPS SHARE_LOOPS", off=("0", "1")),
    **_missing("depth recurrence", "FRACTAL_LAYERS RECUR_START_STEP ENABLE_LOOPING_AT"),
    **_missing("depth recurrence", "RECUR_LAYERS", off=("", "0")),
    **_missing("two residual lanes", "PARALLEL_RESIDUAL PARALLEL_START_LAYER PARALLEL_RESIDUAL_START", off=("0", "-1")),
    **_missing("an input-dependent smear gate (SMEAR=1 has the plain one)", "SMEAR_GATE_ENABLED SMEAR_GATE_BOS_FIX"),
    **_missing("logits with two caps", "ASYM_LOGIT_RESCALE"),
    **_missing("one QK gain per layer", "QK_GAIN_INIT_SCHEDULE", off=("",)),
    **_missing("YaRN", "ROPE_YARN"),
    **_missing("sequence length that changes", "SEQ_LENS_PER_GPU TRAIN_SEQ_SCHEDULE", off=("",)),
    **_missing("sequence length that changes", "SEQ_CURRICULUM"),
    **_missing("batch size that changes", "BATCH_WARMUP"),
    **_missing("the Mousse preconditioner", "MOUSSE_ENABLED"),
    **_missing("Muon on row-normalised or Huber-decayed matrices", "MUON_ROW_NORMALIZE MUON_HUBER_WD"),
    **_missing("a weight decay of its own for tables", "EMBED_WD"),
    **_missing("weight decay that changes", "WD_SCHEDULE PREDPREY_LR"),
    **_missing("weight decay that changes", "WD_TAPER_FINAL_MULT", off=("1",)),
    **_missing("a warmdown given as a fraction", "WARMDOWN_FRAC"),
    **_missing("a floor under the warmdown", "MIN_LR"),
    **_missing("other warmdown shapes", "WARMDOWN_MODE", off=("", "linear")),
    **_missing("LAWA averaging", "LAWA_ENABLED"),
    **_missing("training after the wall-clock cap", "TTT_BURST_ENABLED DISTILL_ENABLED MUTUAL_ALPHA"),
    **_missing("a temperature or entropy term in the loss", "LOGIT_TEMP", off=("1",)),
    **_missing("a temperature or entropy term in the loss", "ENTROPY_BONUS GAMMA_ANNEAL"),
    **_missing("noise on inputs or layers", "TOKEN_DROP EMBED_MIXUP MIRROR_TRAIN LAYER_DROP"),
    **_missing("layers that grow, recycle or share", "PROGRESSIVE_GROW ATTN_RECYCLE WEIGHT_SHARE"),
    **_missing("a gradient trick", "GRAD_CENTRAL SAM_RHO CANOPY_LR MYCORRHIZAL THERMAL_VENT"),
    **_missing("a weight trick", "CONTROLLED_BURN SYNAPTIC_SCALE WEIGHT_PERTURB MUTATION_DECAY"),
    **_missing("int5 for the matrices of the smallest Hessians (quant.overrides names them)", "N_INT6_LAYERS", AFTER),
    **_missing("activation-aware repair", "AWQ_LITE AWQ_LITE_ENABLED", AFTER),
    **_missing(
        "temperature chosen on validation (eval.temperature=on: on training data)", "TEMP_SCALING", AFTER
    ),
    **_missing("multipliers that each rank adapts by itself", "CUBRIC_CADENCE", AFTER),
    **_missing("a hash embedding trained at evaluation", "HASH_EMBED_ENABLED", AFTER),
    **_missing("skipping the final evaluation", "SKIP_FINAL_EVAL", AFTER),
}
# Whole families of names; each is off at 0 and empty.
NOT_YET_FAMILIES = {
    "TTT_": Missing("this part of test-time training (ttt=on has the rest)", AFTER),
    "NGRAM_": Missing("hashed n-gram tables, whose scores are no probabilities; ngram=on has scorers that are", AFTER),
}


def _knobs(of: str, **defaults: str) -> dict[str, Inert]:
    return {name: Inert(f"a knob of {of}, which is not in pgolf", (value,)) for name, value in defaults.items()}


INERT: dict[str, Inert] = {
    "MUON_BETA2": Inert("the public scripts parse it and never use it", ("0.95",)),
    "TIDAL_WARMUP": Inert("no public script reads it; the rise takes 0.382 of the run", ("0.382",)),
    "EMBED_SCALE": Inert("an RMS norm follows, which takes every factor out", ("0", "1")),
    "CONTROL_TENSOR_NAME_PATTERNS": Inert("storage follows each parameter's role, not its name", ("",)),
    "CASEOPS_ENABLED": Inert("case operators follow from DATA_PATH and TOKENIZER_PATH", ("0",)),
    "FUSED_CE_ENABLED": Inert("KERNELS=triton|reference chooses the kernels", ("0", "1")),
    "LQER_FACTOR_BITS": Inert("LQER_ASYM_ENABLED=0 stores 4 bits; quant.low_rank.factors has the others", ("4",)),
    "COMPILE_SHAPE_WARMUP": Inert("warm-up always compiles every shape of the run", ("0", "1")),
    **_knobs("multi-token prediction", MTP_LOSS_WEIGHT="0.2", HSMTP_LOSS_WEIGHT="0.3", SYN2_LOSS_WEIGHT="0.15"),
    **_knobs("multi-token prediction", SYN2_HASH_DIM="256", SYN2_EVERY="4"),
    **_knobs("SIPHON_ENABLED", SIPHON_ALPHA="0.3", SIPHON_BUCKETS="2097152", SIPHON_MAX_P="0.8"),
    **_knobs("LAWA averaging", LAWA_K="10", LAWA_FREQ="100"),
    **_knobs("WARMDOWN_MODE", WARMDOWN_JITTER_SIGMA="0.3", WARMDOWN_SWIRL_CYCLES="4", WARMDOWN_SWIRL_AMP="0.3"),
    **_knobs("WARMDOWN_MODE", WARMDOWN_BANK_MULT="0.7", WARMDOWN_SCALAR_MULT="1.5"),
    **_knobs("SEQ_CURRICULUM", SEQ_CURRICULUM_MIN="256", SEQ_CURRICULUM_RAMP_FRAC="0.25"),
    **_knobs("BATCH_WARMUP", BATCH_WARMUP_START="262144", BATCH_WARMUP_STEPS="1000"),
    **_knobs("CONTROLLED_BURN", BURN_INTERVAL="50"),
    **_knobs("WEIGHT_PERTURB", PERTURB_INTERVAL="100"),
    **_knobs("depth recurrence", SHARE_START="4", FRACTAL_CADENCE="3", FRACTAL_OFFSET="0", FRACTAL_MLP_MULT=""),
    **_knobs("depth recurrence", LOOP_START="", LOOP_END=""),
    **_knobs("DISTILL_ENABLED", DISTILL_STEPS="50", DISTILL_LR_FACTOR="0.05", DISTILL_TEMPERATURE="2"),
    **_knobs("DISTILL_ENABLED", DISTILL_ALPHA="0.7", DISTILL_TRIGGER="0.05", MUTUAL_TEMP="2"),
    **_knobs("TTT_BURST_ENABLED", TTT_BURST_EPOCHS="2", TTT_BURST_STEPS="100", TTT_BURST_LR_FACTOR="0.1"),
    **_knobs("TTT_BURST_ENABLED", TTT_BURST_TRIGGER="0.05"),
}


def family_of(name: str) -> Missing | None:
    """The family of NOT_YET_FAMILIES that `name` belongs to, if no table lists it by itself."""
    return next((m for prefix, m in NOT_YET_FAMILIES.items() if name.startswith(prefix)), None)
