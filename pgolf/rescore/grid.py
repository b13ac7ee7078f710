"""A grid of evaluations: which rows there are, and which of them share a neural pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from pgolf import tree
from pgolf.config import NODES, show
from pgolf.errors import ConfigError
from pgolf.ngram.config import NgramConfig
from pgolf.schema import RunConfig
from pgolf.scoring import pass_names

NONE = "none"
SECTIONS = ("eval.", "ttt.", "ngram.")


@dataclass(frozen=True)
class Row:
    """One line of the table: a neural pass, and n-grams on top of it or none. at: the grid's values of this row."""

    suffix: str
    cfg: RunConfig
    at: dict[str, str] = field(default_factory=dict)

    @property
    def ngram(self) -> NgramConfig | None:
        return self.cfg.ngram


@dataclass(frozen=True)
class Group:
    """Rows with one and the same neural pass. cfg: its settings, without n-grams."""

    suffix: str
    cfg: RunConfig
    rows: tuple[Row, ...]


def parse_axes(asked: Sequence[Sequence[str]]) -> dict[str, list[str]]:
    """[["ngram.power=0.1", "0.3"]] -> {"ngram.power": ["0.1", "0.3"]}. Raises ConfigError."""
    axes: dict[str, list[str]] = {}
    for words in asked:
        path, equals, first = words[0].partition("=")
        if not equals or path not in NODES or not path.startswith(SECTIONS) or NODES[path].is_section:
            close = "" if path in NODES else tree.did_you_mean(path, [n for n in NODES if n.startswith(SECTIONS)])
            raise ConfigError(
                f"--grid {words[0]}: expected path=value value ..., with a setting of eval, ttt or ngram{close}"
            )
        axes[path] = [*axes.get(path, []), first, *words[1:]]
    return axes


def rows_of(
    cfg: RunConfig, suffixes: Sequence[str], scorers: Sequence[str], axes: Mapping[str, list[str]]
) -> list[Row]:
    """Every combination. suffixes: passes, [] = the last of the settings. scorers: n-gram scorers or "none", [] = what
    the settings have. An axis of the n-grams makes no second row of a pass without them. Raises ConfigError."""
    names = pass_names(cfg)
    wanted = ["" if name == "plain" else name for name in suffixes] or names[-1:]
    if unknown := [name for name in wanted if name not in names]:
        told = ", ".join(name or "plain" for name in names)
        raise ConfigError(
            f"--passes {unknown[0]}: these settings have {told}{tree.did_you_mean(unknown[0], names)}\n"
            "fix: eval.documents=on, eval.stride=64 or ttt=on adds a pass"
        )
    out: list[Row] = []
    for suffix, scorer, values in product(wanted, scorers or [""], product(*axes.values())):
        row = _row(cfg, suffix, scorer, dict(zip(axes, values, strict=True)))
        if row not in out:
            out.append(row)
    return out


def _row(cfg: RunConfig, suffix: str, scorer: str, at: dict[str, str]) -> Row:
    if scorer == NONE:
        cfg = tree.put(cfg, "ngram", None)
    elif scorer:
        cfg = tree.put(tree.put(cfg, "ngram", cfg.ngram or NgramConfig()), "ngram.scorer", scorer)
    shown: dict[str, str] = {}
    for path, text in at.items():
        if path.startswith("ngram.") and cfg.ngram is None:
            continue
        if NODES[path].switch and tree.get(cfg, NODES[path].switch) is None:
            raise ConfigError(f"--grid {path}: {NODES[path].switch} is off; add {NODES[path].switch}=on")
        try:
            value = tree.parse(text, NODES[path])
        except ValueError as err:
            raise ConfigError(f"--grid {path}={text} {err}") from err
        cfg = tree.put(cfg, path, value)
        shown[path] = show(value)
    if problems := tree.problems(cfg):
        raise ConfigError("\n".join(problems))
    return Row(suffix, cfg, shown)


def groups_of(rows: Sequence[Row]) -> list[Group]:
    """Rows by neural pass, in order."""
    found: dict[Any, list[Row]] = {}
    for row in rows:
        found.setdefault((row.suffix, tree.put(row.cfg, "ngram", None)), []).append(row)
    return [Group(suffix, cfg, tuple(own)) for (suffix, cfg), own in found.items()]
