"""Results as people read them: a table in the terminal, Markdown, CSV, JSON and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from .cases import TEXT
from .compare import Row
from .plots import Axis, by_budget, plot


def save(rows: Sequence[Row], folder: Path, title: str, axis: Axis = by_budget) -> bool:
    """Write table.csv, .json and .md, and plot.png and plot.svg into a folder.  False: no matplotlib, no plots."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.csv").write_text("\n".join(to_csv(rows)) + "\n", "utf-8")
    (folder / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", "utf-8")
    (folder / "table.md").write_text("\n".join(markdown(rows)) + "\n", "utf-8")
    try:
        plot(rows, [folder / "plot.png", folder / "plot.svg"], title, axis)
    except ImportError:
        return False
    return True


def to_csv(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of a CSV file with a header."""
    yield ",".join(Row.__dataclass_fields__)
    for row in rows:
        cells = [str(cell) for cell in asdict(row).values()]
        yield ",".join(f'"{cell}"' if "," in cell else cell for cell in cells)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One block per budget: a line for each policy, a column for each family."""
    families = _families(rows)
    policies = list(dict.fromkeys(row.policy for row in rows))
    found = {(row.family, row.budget, row.policy): row for row in rows}
    width = max(map(len, policies)) + 2
    counts = {row.family: f"{row.questions} q" for row in rows if row.family != TEXT}
    yield "points (text: nats per token) against the full cache, on the same questions, with 95% intervals"
    yield " " * width + "".join(f"{name:>18}" for name in families)
    yield f"{'':<{width}}" + "".join(f"{counts.get(name, ''):>18}" for name in families)
    yield f"{'full, itself':<{width}}" + "".join(f"{_itself(rows, name):>18}" for name in families)
    for budget in dict.fromkeys(row.budget for row in rows):
        yield f"budget {budget:g}"
        for policy in policies:
            cells = [_cell(found[name, budget, policy]) for name in families]
            yield f"  {policy:<{width - 2}}" + "".join(f"{cell:>18}" for cell in cells)


def _cell(row: Row) -> str:
    if row.family == TEXT:
        return f"{row.difference:+.3f} ±{row.interval:.3f}"
    return f"{100 * row.difference:+.1f} ±{100 * row.interval:.1f}"


def markdown(rows: Sequence[Row]) -> Iterator[str]:
    """The same table for a page: a line for each budget and policy."""
    families, found = _families(rows), {(row.family, row.budget, row.policy): row for row in rows}
    yield "| budget | policy | " + " | ".join(families) + " |"
    yield "|---|---|" + "--:|" * len(families)
    yield "| | `full`, itself | " + " | ".join(_itself(rows, name) for name in families) + " |"
    for budget, policy in dict.fromkeys((row.budget, row.policy) for row in rows):
        cells = [_cell(found[name, budget, policy]) for name in families]
        yield f"| {100 * budget:g}% | `{policy}` | " + " | ".join(cells) + " |"


def _families(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.family for row in rows))


def _itself(rows: Sequence[Row], name: str) -> str:
    """What the full cache scores in a family."""
    full = next(row.full for row in rows if row.family == name)
    return f"{-full:.3f}" if name == TEXT else f"{100 * full:.1f}"
