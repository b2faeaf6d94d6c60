"""Score against budget, one panel per family, as PNG and SVG.  Needs matplotlib (the `lab` extra)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .cases import TEXT
from .compare import Row


def plot(rows: Sequence[Row], files: Sequence[Path], title: str) -> None:
    """Draw the difference to the full cache with its confidence interval.  Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    families = list(dict.fromkeys(row.family for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    figure, panels = pyplot.subplots(1, len(families), figsize=(3.6 * len(families) + 1.6, 4.2), squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    for panel, name in zip(panels[0], families, strict=True):
        for number, policy in enumerate(policies):
            mine = sorted((row for row in rows if (row.family, row.policy) == (name, policy)), key=lambda r: r.budget)
            scale = 1 if name == TEXT else 100
            panel.errorbar(
                [100 * row.budget for row in mine],
                [scale * row.difference for row in mine],
                yerr=[scale * row.interval for row in mine],
                label=policy,
                color=colours[number % len(colours)],
                marker="o^sv"[number % 4],
                linewidth=2.6 if policy.startswith("hashevict-plus") else 1.2,
                markersize=4,
                capsize=2,
            )
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.set(title=name, xlabel="budget (% of the context)")
        panel.set_ylabel("nats per token lost" if name == TEXT else "points against the full cache")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="center right", fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1 - 1.6 / (3.6 * len(families) + 1.6), 1))
    for file in files:
        figure.savefig(file, dpi=110)
    pyplot.close(figure)
