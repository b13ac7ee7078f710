"""The plots of `bench/report.py`. matplotlib is imported when one is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .report import Result

WIDE = ("attention", "mlp", "residual", "qk_prep")  # ops with a bar of their own
LEFT_OUT = ("data", "communication")  # phases of the ledger that are not in a measured step


def draw(result: Result, folder: Path) -> list[str]:
    """Draws what a result has numbers for; returns the names of the files. Without matplotlib none."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: tables only")
        return []
    matplotlib.use("Agg")
    makers = {"roofline": roofline, "step": waterfall, "changes": changes}
    names = []
    for what, make in makers.items():
        figure = make(result)
        if figure is not None:
            names.append(f"{result.path.stem}-{what}.png")
            figure.savefig(folder / names[-1], dpi=110, bbox_inches="tight")
    return names


def _figure(result: Result, title: str, width: float = 9, height: float = 5.5) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    axes = figure.subplots()
    axes.set_title(f"{title}\n{result.title}", fontsize=9)
    return figure, axes


def _timed(result: Result) -> list[dict]:
    return [r for r in result.data.get("attention", []) + result.data.get("kernels", []) if "ms" in r]


def roofline(result: Result) -> Any:
    """Every case and mode: measured time over the time that the measured roofs allow. On the diagonal is the roof."""
    rows = [r for r in _timed(result) if "percent_of_roof" in r]
    if not rows:
        return None
    figure, axes = _figure(result, "Kernels against the roof")
    for name in dict.fromkeys(r["provider"] for r in rows):
        of = [r for r in rows if r["provider"] == name]
        axes.scatter([r["ms"] * r["percent_of_roof"] / 100 for r in of], [r["ms"] for r in of], s=16, label=name)
    ends = [min(r["ms"] * r["percent_of_roof"] / 100 for r in rows) / 1.5, max(r["ms"] for r in rows) * 1.5]
    for share, style in ((1.0, "-"), (0.5, "--"), (0.25, ":")):
        axes.plot(ends, [e / share for e in ends], f"k{style}", linewidth=0.7, label=f"{100 * share:.0f} % of the roof")
    axes.set(xscale="log", yscale="log", xlabel="ms that the measured roofs allow", ylabel="ms measured")
    axes.legend(fontsize=7)
    return figure


def waterfall(result: Result) -> Any:
    """The ledger's roofline time of a step, part by part at the measured roofs, and the measured variants beside it."""
    steps = [r for r in result.data.get("steps", []) if "ms" in r and r["optimizer"]]
    if not steps:
        return None
    preset = next((r["preset"] for r in steps if r["preset"] == "rat_rod_green"), steps[0]["preset"])
    parts = planned(result, preset)
    figure, axes = _figure(result, f"One step of {preset}: roofline by part, then measured", width=11)
    names, below = [], 0.0
    for name, ms in parts.items():
        axes.bar(len(names), ms, bottom=below, color="tab:blue")
        axes.annotate(f"{ms:.1f}", (len(names), below + ms), ha="center", va="bottom", fontsize=7)
        names.append(name)
        below += ms
    bars = ([("all parts", below, "tab:gray")] if parts else []) + [
        (r["variant"], r["ms"], "tab:orange") for r in steps if r["preset"] == preset
    ]
    for name, ms, color in bars:
        axes.bar(len(names), ms, color=color)
        axes.annotate(f"{ms:.1f}", (len(names), ms), ha="center", va="bottom", fontsize=7)
        names.append(name)
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=7)
    axes.set_ylabel("ms")
    return figure


def planned(result: Result, preset: str) -> dict[str, float]:
    """Part -> roofline ms by the ledger, rates from the result's roofs; empty for a GPU that bench/gpus.py lacks."""
    from pgolf.presets import PRESETS

    from .gpus import GPUS, key_of, with_roofs
    from .ledger import ledger

    key = key_of(result.card.get("name", ""))
    if key is None or preset not in PRESETS:
        return {}
    gpu = with_roofs(GPUS[key], result.path) if result.data.get("roofs") else GPUS[key]
    parts = dict.fromkeys([*WIDE, "other kernels", "torch", "optimizer"], 0.0)
    for row in ledger(PRESETS[preset](), gpu).rows:
        if row.phase in LEFT_OUT:
            continue
        op = row.op.removesuffix("_bwd")
        name = "optimizer" if row.phase == "optimizer" else op if op in (*WIDE, "torch") else "other kernels"
        parts[name] += row.ms
    return parts


def changes(result: Result) -> Any:
    """torch.compile of the reference before, pgolf after: a pair of bars a case, forward and backward together."""
    rows = {(r["case"], r["mode"], r["provider"]): r["ms"] for r in _timed(result)}
    pairs = {}
    for case, mode, provider in rows:
        best = (
            "both" if (case, "both", provider) in rows else "graph" if (case, "graph", provider) in rows else "forward"
        )
        if provider == "pgolf" and mode == best and (case, mode, "torch.compile") in rows:
            pairs[f"{case} {mode}"] = rows[case, mode, "torch.compile"], rows[case, mode, provider]
    if not pairs:
        return None
    order = sorted(pairs, key=lambda name: pairs[name][1] / pairs[name][0], reverse=True)
    figure, axes = _figure(result, "torch.compile and pgolf", height=1.5 + 0.3 * len(pairs))
    for offset, which, name in ((0.2, 0, "torch.compile of the reference"), (-0.2, 1, "pgolf")):
        at = [i + offset for i in range(len(order))]
        bars = axes.barh(at, [pairs[case][which] / pairs[case][0] for case in order], height=0.4, label=name)
        axes.bar_label(bars, [f"{pairs[case][which]:.3g} ms" for case in order], fontsize=6, padding=2)
    axes.set_yticks(range(len(order)), order, fontsize=7)
    axes.set(xlabel="time, as a share of torch.compile's")
    axes.margins(x=0.12)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
