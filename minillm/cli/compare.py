"""`minillm compare`: policies by budgets by tasks by seeds, on any model; cached, resumable."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..errors import ConfigError
from .opening import open_checkpoint
from .options import add_model_options, positive
from .report import Meter, say

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
    add("-o", "--output", type=Path, metavar="FOLDER", help="results.jsonl, table.csv, .json, .md, plots")
    add("--quick", action="store_true", help="4 contexts, one seed, 10%% and 30%%: does it work at all?")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A table on stdout, or one JSON object."""
    checkpoint = open_checkpoint(args)

    from ..lab.cases import check_tasks, read_cases
    from ..lab.compare import POLICY_LIST, Contender, Grid
    from ..lab.compare import run as compare
    from ..lab.store import Store
    from ..lab.tables import save, table
    from ..lab.tasks import TASKS, Prose
    from ..llm import LLM

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
    rows = compare(llm, grid, prose, store, Meter("comparing", "cells").update)
    if args.output is not None and not save(rows, args.output, f"What a budget costs: {checkpoint.name}"):
        say("no plots, for they need matplotlib: pip install 'minillm[lab]'")
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
