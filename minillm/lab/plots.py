"""Score against budget, or against something else, one panel per family, as PNG and SVG.  Needs the `lab` extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import TEXT
from .compare import Row

Point = tuple[float, float, float]  # x, y, and half the confidence interval of y


@dataclass(frozen=True)
class Axis:
    """What is drawn against what.

    place: the line that a row belongs to, and where on the x axis it lies.
    """

    name: str
    place: Callable[[Row], tuple[str, float]]
    logarithmic: bool = False


@dataclass(frozen=True)
class Panel:
    """One of the pictures side by side: its lines by label."""

    title: str
    y_name: str
    lines: Mapping[str, Sequence[Point]]


COLUMNS = 4  # panels side by side; more go into further rows
by_budget = Axis("budget (% of the context)", lambda row: (row.policy, 100 * row.budget))


def plot(rows: Sequence[Row], files: Sequence[Path], title: str, axis: Axis = by_budget) -> None:
    """Draw the difference to the full cache with its confidence interval.  Raises ImportError without matplotlib."""
    panels = []
    for name in dict.fromkeys(row.family for row in rows):
        scale = 1 if name == TEXT else 100
        lines: dict[str, list[Point]] = {}
        for row in rows:
            if row.family == name:
                line, x = axis.place(row)
                lines.setdefault(line, []).append((x, scale * row.difference, scale * row.interval))
        panels.append(Panel(name, "nats per token" if name == TEXT else "points against the full cache", lines))
    draw(panels, files, title, axis.name, logarithmic=axis.logarithmic, zero=True)


def draw(
    panels: Sequence[Panel],
    files: Sequence[Path],
    title: str,
    x_name: str,
    *,
    logarithmic: bool = False,
    zero: bool = False,
) -> None:
    """Panels that share the x axis and the colours of their lines.  Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(label for panel in panels for label in panel.lines))
    legend = 0.7 + 0.07 * max(map(len, labels))  # inches
    columns = min(len(panels), COLUMNS)
    rows = -(-len(panels) // columns)
    width = 3.6 * columns + legend
    figure, grid = pyplot.subplots(rows, columns, figsize=(width, 3.9 * rows), squeeze=False)
    places = list(grid.flat)
    for spare in places[len(panels) :]:
        spare.set_axis_off()
    colours = pyplot.get_cmap("tab20").colors
    for place, panel in zip(places, panels, strict=False):
        for number, label in enumerate(labels):
            points, ours = sorted(panel.lines.get(label, ())), label.startswith("hashevict-plus")
            place.errorbar(
                [x for x, _, _ in points],
                [y for _, y, _ in points],
                yerr=[half for _, _, half in points],
                label=label,
                color="black" if ours else colours[number % len(colours)],
                marker="o^sv"[number % 4],
                linewidth=2.4 if ours else 1.2,
                markersize=4,
                capsize=2,
            )
        if zero:
            place.axhline(0, color="grey", linewidth=0.8)
        place.set(title=panel.title, xlabel=x_name, ylabel=panel.y_name)
        if logarithmic:
            place.set_xscale("log", base=2)
            place.xaxis.set_major_formatter("{x:g}")  # 16, not 2 to the power of 4
    handles, names = places[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="center right", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1 - legend / width, 1))
    for file in files:
        figure.savefig(file, dpi=110)
    pyplot.close(figure)
