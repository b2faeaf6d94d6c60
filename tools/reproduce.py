"""The experiments of HashEvict (arXiv 2412.16187) and beyond, one command each, on any model.

    python tools/reproduce.py EXPERIMENT [--model M] [--haystack PATH] [--quick] [--output FOLDER]

    main       10/30/50/70/90% of the bytes, every policy, every family of tasks
    curve      from 95% down to 2%
    bits       hash length 4 to 128
    nearest    hash codes against exact nearest neighbours, at equal slots; how well codes rank real keys
    stress     repetition, facts far away, high lexical overlap, queries that point away from what is asked later
    diagnose   attention lost beside the least possible and random, output error, next tokens, by layer and head
    sizes      several models: --model A --model B
    speed      prefill and decode of every policy at equal slots
    all        one after the other

Each prints its table and keeps it under OUTPUT/EXPERIMENT: table.csv, .json, .md (or .txt), plot.png and plot.svg
(matplotlib), and where questions are asked results.jsonl, from which a run that was stopped goes on.  Without options:
the model weights/minillm-recall over the small sample of prose that is shipped; the README's figures are over a whole
book that the model has never seen.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from reproduce_measures import Measured, attention, hash_codes
from reproduce_measures import speed as measure_speed
from torch import Tensor

from minillm import LLM
from minillm.cli.compare import SAMPLE
from minillm.cli.options import positive
from minillm.cli.report import Meter, say
from minillm.errors import MinillmError, PromptError
from minillm.lab import tables
from minillm.lab.compare import POLICY_LIST, Contender, Grid, Row, run
from minillm.lab.plots import Axis, by_budget, draw
from minillm.lab.store import Store
from minillm.lab.tasks import STRESS, TASKS, Prose

RECALL = "minillm-recall"  # in weights/
FAMILIES = tuple(task for task in TASKS if task != "keys-first")
BITS = (4, 8, 16, 24, 32, 64, 128)
WHOLE = {"contexts": 64, "seeds": 3}  # defaults ...
QUICK = {"contexts": 2, "seeds": 1}  # ... and with --quick


@dataclass(frozen=True)
class Bench:
    """What all experiments share: options, prose, and the models by the names they were called."""

    args: argparse.Namespace
    prose: Prose
    models: dict[str, LLM]

    @property
    def llm(self) -> LLM:
        """The first model."""
        return next(iter(self.models.values()))

    @property
    def few(self) -> Sequence[str]:
        """The tasks of the four families; with --quick one task of two."""
        return ("keys", "choice") if self.args.quick else FAMILIES

    def folder(self, experiment: str) -> Path:
        """Where an experiment keeps what it finds."""
        return Path(self.args.output) / experiment

    def quick(self, whole: Sequence[float], few: Sequence[float]) -> Sequence[float]:
        """Budgets, fewer with --quick."""
        return few if self.args.quick else whole

    def compare(
        self,
        experiment: str,
        policies: Iterable[str],
        budgets: Sequence[float],
        tasks: Sequence[str],
        equal: str = "bytes",
        llm: LLM | None = None,
    ) -> list[Row]:
        """The rows of a grid; what is kept already is not computed again."""
        args, size = self.args, QUICK if self.args.quick else WHOLE
        grid = Grid(
            tasks,
            [Contender(label) for label in policies],
            budgets,
            contexts=args.contexts or size["contexts"],
            rows=args.rows,
            seeds=args.seeds or size["seeds"],
            tokens=args.tokens or (192 if args.quick else None),
            equal=equal,
        )
        store = Store(self.folder(experiment) / "results.jsonl")
        return run(llm or self.llm, grid, self.prose, store, Meter(f"{experiment}:", "cells").update)

    def show(self, experiment: str, rows: Sequence[Row], axis: Axis = by_budget) -> None:
        """Print a table, and keep it with its plot."""
        print("\n".join(tables.table(rows)))
        if not tables.save(rows, self.folder(experiment), f"{experiment}: {', '.join(self.models)}", axis):
            say_no_plots()

    def keep(self, experiment: str, found: Measured) -> None:
        """The same for what is no grid."""
        print("\n".join(found.lines))
        folder = self.folder(experiment)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.txt").write_text("\n".join(found.lines) + "\n", "utf-8")
        (folder / "table.json").write_text(json.dumps(found.whole, indent=1) + "\n", "utf-8")
        with (folder / "table.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(found.records[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found.records)
        files, title = [folder / "plot.png", folder / "plot.svg"], f"{experiment}: {self.llm.checkpoint.name}"
        try:
            draw(found.panels, files, title, found.x_name, logarithmic=found.logarithmic)
        except ImportError:
            say_no_plots()

    def text(self, tokens: int, *, repeated: bool = False) -> Tensor:
        """The first tokens of the prose [n], which may begin anew where only their number matters (`repeated`)."""
        sentences, tokenizer = self.prose.sentences, self.llm.checkpoint.tokenizer
        ids: list[int] = []
        while not ids or (repeated and len(ids) < tokens):
            for at in range(0, len(sentences), 64):
                part = " ".join(sentences[at : at + 64])
                ids += tokenizer.encode(f" {part}" if ids else part, bos=not ids, continuation=bool(ids))
                if len(ids) >= tokens:
                    return torch.tensor(ids[:tokens])
        raise PromptError(
            f"the haystack has {len(ids):,} tokens of {tokens:,} that are needed: give a longer --haystack"
        )


def say_no_plots() -> None:
    """One line on stderr."""
    say("no plots, for they need matplotlib: pip install 'minillm[lab]'")


def main_table(bench: Bench) -> None:
    budgets = bench.quick((0.1, 0.3, 0.5, 0.7, 0.9), (0.3,))
    policies = ("window", "hashevict", "hashevict-plus", "h2o") if bench.args.quick else POLICY_LIST
    tasks = ("keys", "choice", "arithmetic", "summary", "text") if bench.args.quick else (*TASKS, "text")
    bench.show("main", bench.compare("main", policies, budgets, tasks))


def curve(bench: Bench) -> None:
    whole = (0.95, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
    policies: tuple[str, ...] = ("window", "random", "keydiff", "h2o", "hashevict", "hashevict-plus")
    if bench.args.quick:
        policies = ("window", "hashevict", "hashevict-plus")
    rows = bench.compare("curve", policies, bench.quick(whole, (0.5, 0.1)), (*bench.few, "text"))
    bench.show("curve", rows, replace(by_budget, logarithmic=True))


def bits(bench: Bench) -> None:
    lengths = (16, 64) if bench.args.quick else BITS
    policies = [f"hashevict,hash_bits={length}" for length in lengths]
    policies += [f"hashevict,orthogonal=true,hash_bits={length}" for length in lengths]

    def place(row: Row) -> tuple[str, float]:
        name, _, length = row.policy.rpartition(",hash_bits=")
        return f"{name} at {row.budget:.0%}", float(length)

    rows = bench.compare("bits", policies, bench.quick((0.1, 0.3, 0.5), (0.3,)), (*bench.few, "text"))
    bench.show("bits", rows, Axis("hash bits", place, True))


def nearest(bench: Bench) -> None:
    policies = ["exact", *(f"hashevict,hash_bits={length}" for length in (16, 64, 128)), "keydiff", "hashevict-plus"]
    budgets = bench.quick((0.1, 0.3, 0.5), (0.3,))
    bench.show("nearest", bench.compare("nearest", policies, budgets, bench.few, "slots"))
    lengths, tokens = ((16, 64), 512) if bench.args.quick else (BITS, 1024)
    seeds = range(bench.args.seeds or (QUICK if bench.args.quick else WHOLE)["seeds"])
    meter = Meter("nearest, codes:", "layers")
    bench.keep("nearest/codes", hash_codes(bench.llm, bench.text(tokens), lengths, seeds, meter.update))


def stress(bench: Bench) -> None:
    policies = ("window", "random", "keydiff", "h2o", "tova", "hashevict", "hashevict-plus")
    bench.show("stress", bench.compare("stress", policies, bench.quick((0.1, 0.3, 0.5), (0.3,)), tuple(STRESS)))


def diagnosis(bench: Bench) -> None:
    tokens = bench.text(512 if bench.args.quick else 1024)
    for share in bench.quick((0.1, 0.3), (0.3,)):
        meter = Meter(f"diagnose at {share:.0%}:", "tokens")
        bench.keep(f"diagnose/{share:.0%}", attention(bench.llm, tokens, int(share * len(tokens)), meter.update))


def sizes(bench: Bench) -> None:
    policies, budgets = ("window", "keydiff", "hashevict", "hashevict-plus"), bench.quick((0.1, 0.3, 0.5), (0.3,))
    every: list[Row] = []
    millions: dict[str, float] = {}
    pages: list[str] = []
    for name, llm in bench.models.items():
        rows = bench.compare("sizes", policies, budgets, (*bench.few, "text"), llm=llm)
        print("\n".join(("", name, *tables.table(rows))))
        pages += [f"**{name}**", "", *tables.markdown(rows), ""]
        for row in rows:
            every.append(replace(row, policy=f"{row.policy}, {name}"))
            millions[every[-1].policy] = sum(weight.numel() for weight in llm.model.parameters()) / 1e6

    def place(row: Row) -> tuple[str, float]:
        return f"{row.policy.rpartition(', ')[0]} at {row.budget:.0%}", millions[row.policy]

    if not tables.save(every, bench.folder("sizes"), "sizes", Axis("parameters (millions)", place, True)):
        say_no_plots()
    (bench.folder("sizes") / "table.md").write_text("\n".join(pages), "utf-8")  # each with its own full cache


def speed(bench: Bench) -> None:
    prompt, steps, slots, rounds = (256, 8, (64,), 2) if bench.args.quick else (2048, 64, (256, 1024), 5)
    tokens, meter = bench.text(prompt + steps, repeated=True), Meter("speed:", "runs")
    bench.keep("speed", measure_speed(bench.llm, tokens, prompt, slots, rounds, meter.update))


EXPERIMENTS: dict[str, Callable[[Bench], None]] = {
    "main": main_table,
    "curve": curve,
    "bits": bits,
    "nearest": nearest,
    "stress": stress,
    "diagnose": diagnosis,
    "sizes": sizes,
    "speed": speed,
}


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("reproduce.py", description="What a budget costs: one experiment a command.")
    add = parser.add_argument
    add("experiment", choices=(*EXPERIMENTS, "all"))
    add("--model", action="append", metavar="MODEL", help="repeatable for sizes (default: weights/minillm-recall)")
    add("--haystack", type=Path, default=SAMPLE, metavar="PATH", help="prose: a text or a folder of texts")
    add("--contexts", type=positive, metavar="N", help="of each task (default: 64; 2 with --quick)")
    add("--tokens", type=positive, metavar="N", help="of a context (default: 1,024 for retrieval, else 512)")
    add("--rows", type=positive, default=32, metavar="N", help="contexts read side by side (default: 32)")
    add("--seeds", type=positive, metavar="N", help="of projections (default: 3; 1 with --quick)")
    add("--threads", type=positive, metavar="N", help="of the CPU (default: as torch chooses)")
    add("--output", type=Path, default=Path("runs/reproduce"), metavar="FOLDER", help="(default: runs/reproduce)")
    add("--quick", action="store_true", help="short contexts, few budgets: does it work at all?")
    args = parser.parse_args(argv)
    if len(args.model or ()) > 1 and args.experiment not in ("sizes", "all"):
        parser.error(f"{args.experiment} takes one --model; several are for sizes")
    if args.output.exists() and not args.output.is_dir():
        parser.error(f"--output {args.output} is a file; name a folder")
    return args


def main(argv: Sequence[str]) -> int:
    """Exit status 2 and one line for a mistake of the user."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        prose = Prose.of(args.haystack)
        models = {name: LLM.load(name, context=1) for name in args.model or [RECALL]}
        bench = Bench(args, prose, models)
        for name, experiment in EXPERIMENTS.items():
            if args.experiment in (name, "all"):
                print(f"\n{name}", flush=True)
                experiment(bench)
    except (MinillmError, OSError) as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
