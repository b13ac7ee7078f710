"""From environment and command line to one checked `RunConfig`. The door for settings; no torch at import.

    defaults -> PRESET -> environment variables -> dotted overrides (`optim.muon.lr=0.03 model.embed.smear=none`)

`python -m pgolf.config --levers` prints docs/levers.md.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from pgolf import aliases, tree
from pgolf.errors import ConfigError
from pgolf.not_yet import INERT, NOT_YET, TRAINING, family_of
from pgolf.presets import PRESETS, default_preset, one_liner
from pgolf.result import write_file
from pgolf.schema import RunConfig, TrainConfig
from pgolf.tree import diff, from_dict, to_dict

__all__ = [
    "RunConfig", "Settings", "TrainConfig", "describe", "diff", "digest", "from_dict", "levers", "load", "to_dict",
    "write",
]  # fmt: skip

NODES = tree.nodes(RunConfig)
# Where a run reads and writes, and what it is called, does not change what it is.
NOT_IN_DIGEST = (
    "preset", "train.run_id", "train.out_dir", "data.path", "data.tokenizer_path", "data.cache_dir",
    # a save stands outside the clock and changes no weight
    "train.checkpoint_every", "train.checkpoint_seconds", "train.keep_checkpoints", "train.resume",
)  # fmt: skip

# path: (whether it matters, why not). Asked only about settings that somebody set.
NO_EFFECT: dict[str, tuple[Callable[[RunConfig], bool], str]] = {
    "optim.adamw.embed_lr": (lambda c: not c.model.embed.tied, "embeddings are tied (TIED_EMBED_LR is the one)"),
    "optim.adamw.head_lr": (lambda c: not c.model.embed.tied, "embeddings are tied: there is no head of its own"),
    "optim.adamw.tied_embed_lr": (lambda c: c.model.embed.tied, "embeddings are not tied (EMBED_LR is the one)"),
    "model.embed.tied_init_std": (
        lambda c: c.model.embed.tied,
        "embeddings are not tied: their table starts at N(0, 1)",
    ),
    "model.mlp.leaky_slope": (lambda c: c.model.mlp.activation == "leaky_relu2", "the activation is not leaky_relu2"),
    "model.mlp.mult": (lambda c: not c.model.mlp.hidden, "model.mlp.hidden (MLP_HIDDEN) gives the width"),
    "schedule.warmdown_iters": (lambda c: c.schedule.kind == "linear", "the schedule is not linear"),
    "schedule.cosine_cycles": (lambda c: c.schedule.kind == "cosine", "the schedule is not cosine"),
    "schedule.d2z_warmup_steps": (lambda c: c.schedule.kind == "d2z", "the schedule is not d2z"),
    "quant.gptq.batches": (lambda c: not c.quant.gptq.generated, "GPTQ calibrates on generated text"),
    "quant.low_rank.group": (lambda c: c.quant.low_rank.factors == "asym", "quant.low_rank.factors is not asym"),
    "data.shards_per_batch": (lambda c: c.data.loader == "coprime_b", "the loader is not coprime_b"),
    "data.shard_hold_steps": (lambda c: c.data.loader == "coprime_b", "the loader is not coprime_b"),
    "data.max_loaded_shards": (lambda c: c.data.loader == "coprime_b", "the loader is not coprime_b"),
}


@dataclass(frozen=True)
class Settings:
    """A checked configuration, where each value came from, and what its author should know.

    allow_change: settings or sections that a resumed run may have changed (--allow-change).
    """

    config: RunConfig
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    allow_change: tuple[str, ...] = ()


def gpu_present() -> bool:
    """Whether torch sees a CUDA device; without torch there is none to use."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def process_environment() -> Mapping[str, str]:
    """The environment of this process."""
    return os.environ


def load(
    argv: Iterable[str] = (),
    environ: Mapping[str, str] | None = None,
    has_gpu: Callable[[], bool] = gpu_present,
    base: RunConfig | None = None,
) -> Settings:
    """Settings from `path=value` arguments and environment variables (default: this process's).

    `has_gpu` is asked only when nobody names a preset. base: settings of an earlier run to start from instead of a
    preset. Raises ConfigError with every problem found, not just the first.
    """
    overrides = [_split(arg) for arg in argv]
    variables, complaints = aliases.recognise(process_environment() if environ is None else environ)
    if base is None:
        name, source, notes = _choose_preset(dict(overrides), variables, has_gpu)
        work = _Load(PRESETS[name](), source, notes, complaints)
    else:
        work = _Load(base, "the run", [], complaints)
    work.errors += [_unknown(path) for path, _ in overrides if path not in NODES]
    arguments = [Row(p, text, "override", f"{p}={text}") for p, text in overrides if p in NODES and p != "preset"]
    work.take_schedule(variables)
    work.apply([*work.rows_of(variables), *arguments])
    work.take_foreign(variables)
    work.fit_depth()
    return work.finish()


def _split(arg: str) -> tuple[str, str]:
    path, equals, text = arg.partition("=")
    if not equals:
        raise ConfigError(f"{arg!r} is not understood: a setting is written path=value, e.g. optim.muon.lr=0.03")
    return path.strip(), text.strip()


def _choose_preset(
    overrides: Mapping[str, str], variables: Mapping[str, str], has_gpu: Callable[[], bool]
) -> tuple[str, str, list[str]]:
    """(name, source, notes)."""
    if "preset" in overrides:
        name, source, notes = overrides["preset"], "override", []
    elif "PRESET" in variables:
        name, source, notes = variables["PRESET"], "environment PRESET", []
    else:
        forced = "cpu" in (overrides.get("train.device"), variables.get("DEVICE"))
        gpu = not forced and has_gpu()
        found = "a GPU was found" if gpu else "the device is set to cpu" if forced else "no GPU was found"
        name, source = default_preset(gpu), "default"
        notes = [f"preset {name}, because {found}; PRESET=name chooses: {', '.join(PRESETS)}"]
    if name not in PRESETS:
        close = tree.did_you_mean(name, PRESETS)
        raise ConfigError(f"PRESET={name} is not a preset{close}\nThere are: {', '.join(PRESETS)}")
    return name, source, notes


class Row(NamedTuple):
    """One value to set: where, its text, "environment VAR" or "override", and what the user typed."""

    path: str
    text: str
    source: str
    typed: str


class _Load:
    """The configuration while it is being put together."""

    def __init__(self, start: RunConfig, source: str, notes: list[str], complaints: list[str]):
        self.start = self.config = start
        self.notes, self.errors = notes, complaints
        self.chosen: dict[str, tuple[str, str]] = {
            "preset": (source, f"PRESET={start.preset}")
        }  # path: (source, as typed)

    def is_off(self, path: str) -> str:
        """The switched-off section around `path`, or ""."""
        switch = NODES[path].switch
        return switch if switch and tree.get(self.config, switch) is None else ""

    def assign(self, path: str, text: str, source: str, typed: str) -> None:
        node = NODES[path]
        before, _ = self.chosen.get(path, ("", ""))
        if path in aliases.ADD_UP and source.startswith("environment") and before.startswith("environment"):
            text = f"{tree.get(self.config, path)},{text}"
        try:
            value = tree.parse(text, node)
        except ValueError as err:
            self.errors.append(f"{typed}{'' if typed.startswith(path) else f' ({path})'} {err}")
            return
        if node.is_switch:  # turning on what is on keeps its settings
            value = (tree.get(self.config, path) or node.kind()) if value else None
        self.config = tree.put(self.config, path, value)
        self.chosen[path] = (source, typed)

    def rows_of(self, variables: Mapping[str, str]) -> Iterator[Row]:
        """What the environment sets, in the table's order."""
        for name in [n for n in aliases.ALIASES if n in variables]:
            typed = f"{name}={variables[name]}"
            try:
                pairs = aliases.alias(name).expand(variables[name], self.start)
            except ValueError as err:
                self.errors.append(f"{typed} {err}")
                continue
            yield from (Row(path, text, f"environment {name}", typed) for path, text in pairs)

    def apply(self, rows: list[Row]) -> None:
        """Later rows win; switches come first, so that a section may be turned on anywhere."""
        for path, text, source, typed in sorted(rows, key=lambda row: not NODES[row.path].is_switch):
            off = self.is_off(path)
            if not off:
                self.assign(path, text, source, typed)
            elif source == "override":
                self.errors.append(f"{typed}: {off} is off; add {off}=on first")
            else:
                self.notes.append(f"{typed} has no effect: {off} is off ({how_to_turn_on(off)})")

    def take_schedule(self, variables: Mapping[str, str]) -> None:
        try:
            decided = aliases.schedule_kind(variables, self.start.schedule.kind)
        except ValueError as err:
            self.errors.append(f"{', '.join(n for n in aliases.SCHEDULE_FLAGS if n in variables)}: each {err}")
            return
        if decided:
            flag, kind = decided
            self.assign("schedule.kind", kind, f"environment {flag}", f"{flag}={variables[flag]}")
            for other in aliases.SCHEDULE_FLAGS:
                if other != flag and other in variables and tree.parse_bool(variables[other]):
                    self.notes.append(f"{other}={variables[other]} has no effect: {flag} comes first")

    def take_foreign(self, variables: Mapping[str, str]) -> None:
        """Levers that pgolf does not have: an error if they change training, else one note a lever."""
        ignored: dict[str, list[str]] = {}
        for name, text in variables.items():
            typed = f"{name}={text}"
            if name in aliases.ALIASES:  # of a family that pgolf has in part
                continue
            if inert := INERT.get(name):
                if not tree.is_off(text, inert.default):
                    self.notes.append(f"{typed} has no effect: {inert.why}")
            elif (lever := NOT_YET.get(name) or family_of(name)) and not tree.is_off(text, lever.off):
                if lever.when == TRAINING:
                    off = lever.off[0] or "nothing"
                    self.errors.append(f"{typed}: pgolf does not have {lever.what}; unset {name} or set it to {off}")
                else:
                    ignored.setdefault(lever.what, []).append(typed)
        self.notes += [f"ignored: {', '.join(typed)} (pgolf does not have {what})" for what, typed in ignored.items()]

    def fit_depth(self) -> None:
        """Layer numbers that nobody asked for follow a shallower model, counted from its end; asked for, they fail."""
        last = self.config.model.plan.num_layers - 1
        xsa = "model.attn.xsa.last_n"
        fits: dict[str, Callable[[Any], Any]] = {
            xsa: lambda n: min(n, last + 1),
            "model.attn.value_embed.layers": lambda ls: tuple(sorted({max(i - max(*ls, last) + last, 0) for i in ls})),
            "model.wiring.backout.layer": lambda i: min(i, last),
        }
        for path, fit in fits.items():
            source = self.chosen.get(path, ("",))[0]
            # the public scripts take XSA_LAST_N=11 on 9 layers as "all of them"
            if last < 0 or self.is_off(path) or (source and not (path == xsa and source.startswith("environment"))):
                continue
            old = tree.get(self.config, path)
            if (new := fit(old)) != old:
                self.config = tree.put(self.config, path, new)
                self.notes.append(f"{path}: {show(old)} became {show(new)}, for a model of {last + 1} layers")

    def finish(self) -> Settings:
        for path, (matters, why) in NO_EFFECT.items():
            source, typed = self.chosen.get(path, ("", ""))
            if source and not self.is_off(path) and not matters(self.config):
                self.notes.append(f"{typed} has no effect: {why}")
        errors = self.errors + [self._with_source(p) for p in tree.problems(self.config)]
        if len(errors) == 1:
            raise ConfigError(errors[0])
        if errors:
            raise ConfigError("\n  - ".join([f"{len(errors)} problems with the settings:", *errors]))
        return Settings(self.config, self.sources(), self.notes)

    def _with_source(self, problem: str) -> str:
        source = self.chosen.get(problem.partition("=")[0], ("",))[0]
        return f"{problem} [{source}]" if source else problem

    def sources(self) -> dict[str, str]:
        """path: "default" | "preset NAME" | "environment VAR" | "override"."""
        out = {}
        for path, value in tree.flatten(self.config).items():
            node = NODES[path]
            default = ("none" if node.default is None else "on") if node.is_switch else node.default
            untouched = "default" if value == default else f"preset {self.config.preset}"
            out[path] = self.chosen.get(path, (untouched,))[0]
        return out


def show(value: Any) -> str:
    """A value as users write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "true", False: "false"}[value]
    return str(value)


def _unknown(path: str) -> str:
    if path in aliases.KNOWN:
        return f"{path} is an environment variable: write it before the command, as in {path}=... python train_gpt.py"
    return f"{path} is not a setting{tree.did_you_mean(path, NODES)}"


def how_to_turn_on(section: str) -> str:
    """ "set VE_ENABLED=1" or, without a variable for it, "add model.x=on"."""
    for name in aliases.ALIASES:
        alias = aliases.alias(name)
        if alias.switch == section:
            return f"set {name}{alias.hint}"
    return f"add {section}=on"


def digest(config: RunConfig) -> str:
    """sha256 of what the run is: canonical JSON without names and places (`NOT_IN_DIGEST`)."""
    flat = {path: value for path, value in tree.flatten(config).items() if path not in NOT_IN_DIGEST}
    return hashlib.sha256(json.dumps(flat, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def describe(settings: Settings, facts: Callable[[RunConfig], dict[str, Any]] = lambda _: {}) -> dict[str, Any]:
    """Everything about a run as JSON-ready values; `facts` adds what needs torch, such as the parameter count."""
    config = settings.config
    changed = diff(PRESETS[config.preset](), config) if config.preset in PRESETS else {}
    return {
        "preset": config.preset,
        "digest": digest(config),
        "config": to_dict(config),
        "sources": settings.sources,
        "changed_from_preset": {path: list(values) for path, values in changed.items()},
        "notes": settings.notes,
        **facts(config),
    }


def write(settings: Settings, path: Path) -> None:
    """`describe` as a JSON file. Raises SetupError when it cannot be written."""
    write_file(Path(path), (json.dumps(describe(settings), indent=2) + "\n").encode())


def variables_of() -> dict[str, list[str]]:
    """path: the environment names that set it as their main meaning."""
    out: dict[str, list[str]] = {}
    for name in aliases.ALIASES:
        alias = aliases.alias(name)
        for path in alias.paths[:2] if alias.switch else alias.paths[:1]:
            out.setdefault(path, []).append(name)
    out["schedule.kind"] = list(aliases.SCHEDULE_FLAGS)
    out["preset"] = ["PRESET"]
    return out


def doc(path: str) -> str:
    """One line about the setting; a comment that only repeats its variable says nothing."""
    text = tree.doc_of(NODES[path])
    return "" if text in aliases.KNOWN else text


def levers() -> str:
    """docs/levers.md."""
    names = variables_of()
    rows = ["| setting | type | default | environment | what it is |", "|---|---|---|---|---|"]
    for path, node in NODES.items():
        if node.is_section and not node.optional:
            continue
        default = ("none" if node.default is None else "on") if node.is_switch else show(node.default)
        cells = [f"`{path}`", tree.type_name(node), default, ", ".join(names.get(path, [])), doc(path)]
        rows.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
    presets = [f"- `{name}`: {one_liner(name)}" for name in PRESETS]
    head = ["# Levers", "", "Generated by `python -m pgolf.config --levers`.", "", "Presets (`PRESET=name`):", ""]
    return "\n".join([*head, *presets, "", *rows, ""])


if __name__ == "__main__":
    print(levers(), end="")
