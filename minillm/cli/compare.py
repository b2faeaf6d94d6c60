"""`minillm compare`: policies by budgets by tasks by seeds, on any model; cached, resumable."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .opening import open_checkpoint
from .options import add_model_options, positive
from .report import Meter, say

if TYPE_CHECKING:
    from ..lab.compare import Row

SAMPLE = Path(__file__).parents[1] / "lab" / "haystack.txt"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `compare` to the command line."""
    parser = subparsers.add_parser(
        "compare",
        help="what each policy costs at each budget",
        description="Ask the same questions of every policy at every budget, after the context was read, and print the "
        "difference to the full cache with its 95%% confidence interval. Results are kept as they come; the same "
        "command goes on where it was stopped.",
    )
    add = parser.add_argument
    add("--task", action="append", metavar="NAME", help="a task, a family, or text; repeatable (default: all)")
    add("--task-file", type=Path, metavar="JSONL", help="your own: context, prompt, answer or choices on every line")
    add("--policy", action="append", metavar="NAME[,OPTION=VALUE]", help="repeatable (default: all)")
    add("--budget", action="append", metavar="B", help="a fraction of the context; repeatable (default: 0.1 to 0.9)")
    add("--contexts", type=positive, default=32, metavar="N", help="of each task (default: 32)")
    add("--rows", type=positive, default=16, metavar="N", help="contexts read side by side (default: 16)")
    add("--seeds", type=positive, default=3, metavar="N", help="of policies that draw something (default: 3)")
    add("--first-seed", type=int, default=0, metavar="N", help="of the contexts (default: 0)")
    add("--tokens", type=positive, metavar="N", help="of a context (default: 1,024 for retrieval, else 512)")
    add("--equal", choices=("bytes", "slots"), default="bytes", help="what a budget makes equal (default: bytes)")
    add("--haystack", type=Path, metavar="PATH", help="prose: a text or a folder of texts (default: a small sample)")
    add("-o", "--output", type=Path, metavar="FOLDER", help="results.jsonl, table.csv, table.json, plots")
    add("--quick", action="store_true", help="4 contexts, one seed, 10%% and 30%%: does it work at all?")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A table on stdout, or one JSON object."""
    checkpoint = open_checkpoint(args)

    from ..fingerprint import model_digest
    from ..lab.cases import check_tasks, read_cases
    from ..lab.compare import POLICY_LIST, Contender, Grid, to_csv
    from ..lab.compare import run as compare
    from ..lab.store import Store
    from ..lab.tasks import TASKS, Prose
    from ..llm import LLM
    from ..version import __version__

    own = {}
    if args.task_file is not None:
        if args.task:
            raise ConfigError("--task and --task-file exclude each other: run one after the other")
        own = {args.task_file.stem: read_cases(args.task_file, checkpoint.tokenizer)}
    source = args.haystack or SAMPLE
    prose = None if own else Prose.of(source)
    grid = Grid(
        [] if own else check_tasks(args.task or [*TASKS, "text"]),
        [Contender(label) for label in args.policy or POLICY_LIST],
        _budgets(args.budget or (["0.1", "0.3"] if args.quick else ["0.1", "0.3", "0.5", "0.7", "0.9"])),
        contexts=4 if args.quick else args.contexts,
        rows=args.rows,
        seeds=1 if args.quick else args.seeds,
        first_seed=args.first_seed,
        tokens=args.tokens,
        equal=args.equal,
        own=own,
    )
    for contender in grid.policies:
        contender.seeds(1)  # says what is wrong with it before the weights are read
    store = Store(None if args.output is None else args.output / "results.jsonl")
    llm = LLM(checkpoint, checkpoint.load_model(Meter("loading", "bytes").update), checkpoint.plan(context=1))
    text = repr(own) if prose is None else "\n".join(prose.sentences)
    dtype = str(llm.plan.dtype).removeprefix("torch.")
    identity = "/".join(
        (model_digest(checkpoint.folder, checkpoint.config), dtype, sha256(text.encode()).hexdigest()[:8], __version__)
    )
    rows = compare(llm, grid, prose, store, identity, Meter("comparing", "cells").update)
    if args.output is not None:
        (args.output / "table.csv").write_text("\n".join(to_csv(rows)) + "\n", "utf-8")
        (args.output / "table.json").write_text(json.dumps([asdict(row) for row in rows], indent=1), "utf-8")
        _plot(rows, args.output, checkpoint.name)
    if args.json:
        print(json.dumps({"model": checkpoint.name, "equal": args.equal, "rows": [asdict(row) for row in rows]}))
    else:
        for line in table(rows):
            print(line)
    return 0


def _budgets(texts: Sequence[str]) -> list[float]:
    """Fractions, given one by one or with commas between."""
    found = []
    for text in ",".join(texts).split(","):
        try:
            value = float(text)
        except ValueError:
            value = 0.0
        if not 0 < value <= 1:
            raise ConfigError(f"budget '{text}' must be a fraction in (0, 1] such as 0.3, so that contexts can differ")
        found.append(value)
    return found


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One block per budget: a line for each policy, a column for each family."""
    families = list(dict.fromkeys(row.family for row in rows))
    policies = list(dict.fromkeys(row.policy for row in rows))
    found = {(row.family, row.budget, row.policy): row for row in rows}
    width = max(map(len, policies)) + 2
    counts = {row.family: f"{row.questions} q" for row in rows if row.family != "text"}
    yield "points (text: nats per token) against the full cache, on the same questions, with 95% intervals"
    yield " " * width + "".join(f"{name:>18}" for name in families)
    yield f"{'':<{width}}" + "".join(f"{counts.get(name, ''):>18}" for name in families)
    full = [next(row.full for row in rows if row.family == name) for name in families]
    yield f"{'full, itself':<{width}}" + "".join(
        f"{-score:>18.3f}" if name == "text" else f"{100 * score:>18.1f}"
        for name, score in zip(families, full, strict=True)
    )
    for budget in dict.fromkeys(row.budget for row in rows):
        yield f"budget {budget:g}"
        for policy in policies:
            cells = [_cell(found[name, budget, policy]) for name in families]
            yield f"  {policy:<{width - 2}}" + "".join(f"{cell:>18}" for cell in cells)


def _cell(row: Row) -> str:
    if row.family == "text":
        return f"{row.difference:+.3f} ±{row.interval:.3f}"
    return f"{100 * row.difference:+.1f} ±{100 * row.interval:.1f}"


def _plot(rows: Sequence[Row], folder: Path, model: str) -> None:
    from ..lab.plots import plot

    try:
        plot(rows, [folder / "compare.png", folder / "compare.svg"], f"What a budget costs: {model}")
    except ImportError:
        say("no plots, for they need matplotlib: pip install 'minillm[lab]'")
