"""Score against budget, or against something else, one panel per family, as PNG and SVG.  Needs the `lab` extra."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .cases import TEXT
from .compare import Row


@dataclass(frozen=True)
class Axis:
    """What is drawn against what.

    place: the line that a row belongs to, and where on the x axis it lies.
    """

    name: str
    place: Callable[[Row], tuple[str, float]]
    logarithmic: bool = False


by_budget = Axis("budget (% of the context)", lambda row: (row.policy, 100 * row.budget))


def plot(rows: Sequence[Row], files: Sequence[Path], title: str, axis: Axis = by_budget) -> None:
    """Draw the difference to the full cache with its confidence interval.  Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(row.family for row in rows))
    lines = list(dict.fromkeys(axis.place(row)[0] for row in rows))
    figure, panels = pyplot.subplots(1, len(families), figsize=(3.6 * len(families) + 1.6, 4.2), squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    for panel, name in zip(panels[0], families, strict=True):
        for number, line in enumerate(lines):
            mine = [(axis.place(row)[1], row) for row in rows if (row.family, axis.place(row)[0]) == (name, line)]
            mine.sort(key=lambda pair: pair[0])
            scale = 1 if name == TEXT else 100
            panel.errorbar(
                [x for x, _ in mine],
                [scale * row.difference for _, row in mine],
                yerr=[scale * row.interval for _, row in mine],
                label=line,
                color=colours[number % len(colours)],
                marker="o^sv"[number % 4],
                linewidth=2.6 if line.startswith("hashevict-plus") else 1.2,
                markersize=4,
                capsize=2,
            )
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(title=name, xlabel=axis.name)
        if axis.logarithmic:
            panel.set_xscale("log", base=2)
        panel.set_ylabel("nats per token" if name == TEXT else "points against the full cache")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / (3.6 * len(families) + 1.6), 1))
    for file in files:
        figure.savefig(file, dpi=110)
    pyplot.close(figure)
