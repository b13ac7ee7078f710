"""The lines of a grid as a table, as JSON values, and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgolf.rescore.run import Line

HEAD = ("pass", "n-grams", "settings", "BPB", "nats/token", "gain mBPB", "neural s", "n-gram s")


def cells(line: Line) -> tuple[str, ...]:
    """A line of the table. Seconds of a neural pass that was not run are "kept"."""
    r = line.result
    return (
        line.row.suffix or "plain",
        line.scorer,
        " ".join(f"{path}={text}" for path, text in line.row.at.items()),
        f"{r.val_bpb:.5f}",
        f"{r.val_loss:.5f}",
        f"{1000 * line.gain:+.2f}" if line.scorer != "none" else "",
        f"{line.neural_seconds:.1f}" if line.neural_seconds else "kept",
        f"{line.ngram_seconds:.1f}" if line.scorer != "none" else "",
    )


def table(lines: Sequence[Line]) -> str:
    """Aligned text; every table is valid Markdown too."""
    rows = [HEAD, *map(cells, lines)]
    width = [max(len(row[i]) for row in rows) for i in range(len(HEAD))]
    left = (0, 1, 2)
    text = ["| " + " | ".join(_pad(c, w, i in left) for i, (c, w) in enumerate(zip(row, width, strict=True))) + " |"
            for row in rows]  # fmt: skip
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in left else ":") for i, w in enumerate(width)) + "|"
    return "\n".join([text[0], rule, *text[1:]])


def _pad(cell: str, width: int, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)


def facts(lines: Sequence[Line], head: dict[str, Any]) -> dict[str, Any]:
    """JSON values. head: what was evaluated."""
    best = min(lines, key=lambda line: line.result.val_bpb)
    return {**head, "rows": [line.facts() for line in lines], "best": lines.index(best)}


def plot(lines: Sequence[Line], png: Path, title: str) -> bool:
    """A curve for each scorer and pass where one setting varies over numbers, else a point a line. False without
    matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, max(3.0, 1.2 + 0.28 * len(lines))), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    path = _numeric_axis(lines)
    if path:
        _curves(axes, lines, path)
    else:
        _points(axes, lines)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    figure.savefig(png, dpi=120)
    return True


def _numeric_axis(lines: Sequence[Line]) -> str:
    """The one setting that varies, if its values are numbers; "" if there is none, or several vary."""
    paths = {path for line in lines for path in line.row.at}
    varied = [p for p in paths if len({line.row.at.get(p) for line in lines if p in line.row.at}) > 1]
    if len(varied) != 1:
        return ""
    try:
        [float(line.row.at[varied[0]]) for line in lines if varied[0] in line.row.at]
    except ValueError:
        return ""
    return varied[0]


def _curves(axes: Any, lines: Sequence[Line], path: str) -> None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        name = f"{line.row.suffix or 'plain'}, {line.scorer}"
        if path in line.row.at:
            curves.setdefault(name, []).append((float(line.row.at[path]), line.result.val_bpb))
        else:
            axes.axhline(line.result.val_bpb, linestyle="--", linewidth=1, label=name)
    for name, points in curves.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel=path, ylabel="bits per byte")
    axes.legend(fontsize=8)


def _points(axes: Any, lines: Sequence[Line]) -> None:
    names = [" ".join(filter(None, cells(line)[:3])) for line in lines]
    values = [line.result.val_bpb for line in lines]
    at = range(len(lines))
    axes.plot(values, at, "o", color="tab:blue")  # no bars: they would have to begin at 0
    axes.set_yticks(at, names, fontsize=8)
    axes.invert_yaxis()
    for y, value in zip(at, values, strict=True):
        axes.annotate(f"{value:.4f}", (value, y), (6, -3), textcoords="offset points", fontsize=8)
    axes.margins(x=0.15)
    axes.set_xlabel("bits per byte")
