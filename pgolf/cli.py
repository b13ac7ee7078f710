"""The command line of `train_gpt.py`: help, description, errors as messages with exit codes."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pgolf
from pgolf import aliases, config, errors, node, tree
from pgolf.config import NODES, RunConfig
from pgolf.errors import ConfigError, PgolfError, Stopped
from pgolf.presets import PRESETS, one_liner
from pgolf.signals import CODES

FLAGS = {
    "--help": "this text",
    "--describe": "print the configuration, the layer plan and the parameter count as one JSON object; train nothing",
    "--dry-run": "print parameters, memory and what a step sends between 1, 8, 64 and 1,024 ranks; train nothing",
    "--no-compile": "run without torch.compile, as train.compile=off does",
    "--debug": "show tracebacks",
    "--allow-change": "KEY: resume although this setting or section was another when the run was saved; repeatable",
    "--version": "print the version",
}
INTERRUPTED = 130
CUT_OFF = 141  # as a shell calls it
# Shown by --help, in this order; docs/levers.md has all of them.
MOST_USED = (
    "SEED", "ITERATIONS", "MAX_WALLCLOCK_SECONDS", "DATA_PATH", "TOKENIZER_PATH", "TRAIN_BATCH_TOKENS", "TRAIN_SEQ_LEN",
    "LOADER_MODE", "VOCAB_SIZE", "NUM_LAYERS", "MODEL_DIM", "NUM_HEADS", "NUM_KV_HEADS", "MLP_MULT", "ACT",
    "TIE_EMBEDDINGS", "ROPE_DIMS", "LN_SCALE", "XSA_LAST_N", "BIGRAM_VOCAB_SIZE", "BIGRAM_DIM", "SMEAR", "VE_ENABLED",
    "VE_LAYERS", "MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR", "MUON_WD", "ADAM_WD", "GRAD_CLIP_NORM", "WARMDOWN_ITERS",
    "EMA_ENABLED", "EMA_DECAY", "SWA_ENABLED", "LATE_QAT_THRESHOLD", "COMPRESSOR", "EVAL_STRIDE", "KERNELS", "DEVICE",
    "COMPILE_ENABLED", "OUT_DIR", "RUN_ID", "RESUME", "CHECKPOINT_SECONDS",
)  # fmt: skip


Command = Callable[[Sequence[str], Mapping[str, str]], int]


def main(
    argv: Sequence[str] | None = None, environ: Mapping[str, str] | None = None, command: Command | None = None
) -> int:
    """Runs the command line and returns the process's exit code. Defaults: this process's arguments and environment.

    command: what is run with them instead of training, under the same handling of errors.
    """
    # How long a waiting OpenMP thread spins before it sleeps; libgomp reads this when torch is imported. Its default is
    # milliseconds, and beside another busy process a step of the cpu preset can then take seconds. LOG.md has numbers.
    if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        os.environ["GOMP_SPINCOUNT"] = "3000"
    argv = sys.argv[1:] if argv is None else argv
    environ = config.process_environment() if environ is None else environ
    try:
        code = (command or _main)([a for a in argv if a != "--debug"], environ)
        sys.stdout.flush()
        return code
    except PgolfError as err:
        if "--debug" in argv:
            traceback.print_exc()
        # what all ranks find, a fault in the settings or a signal, one of them says
        if not err.on_all_ranks or environ.get("RANK", "0") in ("", "0"):
            print(f"{'stopped' if isinstance(err, Stopped) else 'error'}: {err}", file=sys.stderr)
        elif isinstance(err, ConfigError):
            # torchrun ends the others when the first ends, which should not be before rank 0 has spoken
            time.sleep(1.5)
        return err.exit_code
    except BrokenPipeError:  # `--help | head`: the reader has what it wanted; what is still buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CUT_OFF
    except KeyboardInterrupt:
        if "--debug" in argv:
            traceback.print_exc()
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    argv, allow_change = take_values(argv, "--allow-change")
    flags = [a for a in argv if a.startswith("-") and a != "-h"]
    if "-h" in argv or "--help" in flags:
        print(help_text())
        return 0
    if "--version" in flags:
        print(pgolf.__version__)
        return 0
    for flag in flags:
        if flag not in FLAGS:
            raise ConfigError(_unknown_flag(flag))
    overrides = [a for a in argv if a not in flags] + ["train.compile=off"] * ("--no-compile" in flags)
    settings = config.load(overrides, environ)
    settings = replace(settings, allow_change=known_settings(allow_change))
    node.check_torch()
    if "--describe" in flags:
        print(json.dumps(config.describe(settings, model_facts), indent=2))
        return 0
    if "--dry-run" in flags:
        from pgolf import dry_run

        print("\n".join(dry_run.lines(settings.config)))
        return 0
    from pgolf.run import run  # imports torch

    run(settings)
    return 0


def take_values(argv: Sequence[str], flag: str) -> tuple[list[str], list[str]]:
    """(the other arguments, the values of `--flag VALUE` and `--flag=VALUE`)."""
    rest, values, words = [], [], iter(argv)
    for word in words:
        if word == flag:
            values.append(next(words, ""))
        elif word.startswith(f"{flag}="):
            values.append(word.partition("=")[2])
        else:
            rest.append(word)
    return rest, values


def known_settings(keys: Sequence[str]) -> tuple[str, ...]:
    """`keys`, all of which are settings or sections. Raises ConfigError on one that is not."""
    for key in keys:
        if key not in NODES:
            meant = tree.did_you_mean(key, NODES)
            raise ConfigError(f"--allow-change {key or '(nothing)'}: expected a setting or a section{meant}")
    return tuple(keys)


def _unknown_flag(flag: str) -> str:
    name = flag.lstrip("-").partition("=")[0]
    if flag.partition("=")[0] not in FLAGS and (name in NODES or tree.nearest(name, NODES)):
        like = name if name in NODES else tree.nearest(name, NODES)[0]
        if not tree.nearest(flag, FLAGS):
            return f"{flag} is not an option; settings are written without dashes, path=value: {like}=..."
    return f"{flag} is not an option{tree.did_you_mean(flag, FLAGS)}\nThere are: {', '.join(FLAGS)}"


def model_facts(run: RunConfig) -> dict[str, Any]:
    """{"plan": one row a layer visit, "parameters": exact count}, from a model without storage."""
    import torch

    from pgolf.model.gpt import GPT

    with torch.device("meta"):
        model = GPT(run.model, train_length=run.data.seq_len)
    return {"plan": [asdict(step) for step in model.plan], "parameters": sum(p.numel() for p in model.parameters())}


def help_text() -> str:
    """What --help prints; generated from the settings tree, so it cannot be out of date."""
    lines = [
        "Trains a tiny language model, packs it, and scores what it unpacks.",
        "",
        "usage: [NAME=value ...] python train_gpt.py [path=value ...] [options]",
        "       [NAME=value ...] torchrun --standalone --nproc_per_node=8 train_gpt.py [path=value ...]",
        "",
        "options:",
        *(f"  {flag:16}{text}" for flag, text in FLAGS.items()),
        "",
        "presets (PRESET=name; without it rat_rod_green on a GPU, else cpu):",
        *(f"  {name:17}{one_liner(name)}" for name in PRESETS),
        "",
        "the most used variables (0 switches an optional part off; presets have other defaults):",
        *(_variable_line(name) for name in MOST_USED),
        "  every other lever of the public training scripts works too: docs/levers.md",
        "",
        "overrides: the same settings by path, after the command; they win over variables and preset:",
        "  python train_gpt.py optim.muon.lr=0.03 model.embed.smear=none model.attn.value_embed=on",
        "",
        "exit codes:",
        *(f"  {code:<5}{text}" for code, text in exit_codes().items()),
    ]
    return "\n".join(lines)


def _variable_line(name: str) -> str:
    alias = aliases.alias(name)
    node = NODES[alias.paths[1 if alias.switch and len(alias.paths) > 1 else 0]]
    kind = "1 or 0" if node.is_switch else tree.type_name(node).partition(",")[0]
    default = "off" if alias.switch else config.show(node.default) or "-"
    doc = config.doc(node.path).partition(";")[0]
    return f"  {name:22}{kind:8}{default:12}{node.path}{': ' if doc else ''}{doc}"


def exit_codes() -> dict[int, str]:
    """Every exit code and what it means."""
    classes = [c for c in (PgolfError, *PgolfError.__subclasses__()) if c.__module__.startswith("pgolf.")]
    known = {c.exit_code: f"{c.__name__}: {(c.__doc__ or '').splitlines()[0]}" for c in classes if c is not PgolfError}
    ended = {code: f"{name} (see docs/errors.md)" for name, code in CODES.items() if code != Stopped.exit_code}
    ended |= {INTERRUPTED: "interrupted (Ctrl-C)", CUT_OFF: "what read the output stopped reading, as head does"}
    return {0: "success", errors.PgolfError.exit_code: "any other error", **known, **ended}
