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

Each prints its table and keeps it under OUTPUT/EXPERIMENT: table.csv, .json, .md, plot.png and plot.svg (matplotlib),
and results.jsonl, from which a run that was stopped goes on.  Without options: the model weights/minillm-recall over
the small sample of prose that is shipped; the README's figures are over a whole book that the model has never seen.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from minillm import LLM
from minillm.cli.compare import SAMPLE
from minillm.cli.report import Meter, say
from minillm.errors import MinillmError, PromptError
from minillm.generate import feed
from minillm.lab import codes, diagnose, tables
from minillm.lab.ask import reader
from minillm.lab.compare import POLICY_LIST, Contender, Grid, Row, run
from minillm.lab.plots import Axis
from minillm.lab.store import Store
from minillm.lab.tasks import STRESS, TASKS, Prose

RECALL = Path(__file__).parents[1] / "weights" / "minillm-recall"
FAMILIES = [task for task in TASKS if task != "keys-first"]
SEES_ATTENTION = ("h2o", "tova", "snapkv", "scissorhands")
BITS = (4, 8, 16, 24, 32, 64, 128)


@dataclass(frozen=True)
class Bench:
    """What all experiments share."""

    args: argparse.Namespace
    prose: Prose
    models: dict[str, LLM]

    @property
    def llm(self) -> LLM:
        """The first model."""
        return next(iter(self.models.values()))

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
        tasks: Sequence[str] = FAMILIES,
        equal: str = "bytes",
        llm: LLM | None = None,
    ) -> list[Row]:
        """The rows of a grid; what is kept already is not computed again."""
        args = self.args
        grid = Grid(
            tasks,
            [Contender(label) for label in policies],
            budgets,
            contexts=4 if args.quick else args.contexts,
            rows=args.rows,
            seeds=1 if args.quick else args.seeds,
            tokens=256 if args.quick else None,
            equal=equal,
        )
        store = Store(self.folder(experiment) / "results.jsonl")
        return run(llm or self.llm, grid, self.prose, store, Meter(f"{experiment}:", "cells").update)

    def show(self, experiment: str, rows: Sequence[Row], axis: Axis | None = None) -> None:
        """Print a table, and keep it with its plot."""
        for line in tables.table(rows):
            print(line)
        title = f"{experiment}: {', '.join(self.models)}"
        if not tables.save(rows, self.folder(experiment), title, *(() if axis is None else (axis,))):
            say("no plots, for they need matplotlib: pip install 'minillm[lab]'")

    def keep(self, experiment: str, found: object, lines: Iterable[str]) -> None:
        """Print and keep what is no grid."""
        folder, text = self.folder(experiment), "\n".join(lines)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "table.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        (folder / "table.txt").write_text(text + "\n", "utf-8")
        print(text)

    def text(self, tokens: int) -> Tensor:
        """The first tokens of the prose: [n]."""
        ids: list[int] = []
        for at in range(0, len(self.prose.sentences), 64):
            part = " ".join(self.prose.sentences[at : at + 64])
            ids += self.llm.checkpoint.tokenizer.encode(part, bos=not ids, continuation=bool(ids))
            if len(ids) >= tokens:
                return torch.tensor(ids[:tokens])
        raise PromptError(
            f"the haystack has {len(ids):,} tokens of {tokens:,} that are needed: give a longer --haystack"
        )


def main_table(bench: Bench) -> None:
    budgets = bench.quick((0.1, 0.3, 0.5, 0.7, 0.9), (0.1, 0.3))
    policies = ("window", "hashevict", "hashevict-plus", "h2o") if bench.args.quick else POLICY_LIST
    tasks = ("keys", "choice", "arithmetic", "summary", "text") if bench.args.quick else (*TASKS, "text")
    bench.show("main", bench.compare("main", policies, budgets, tasks))


def curve(bench: Bench) -> None:
    whole = (0.95, 0.9, 0.7, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.07, 0.05, 0.03, 0.02)
    policies = ("window", "random", "keydiff", "h2o", "hashevict", "hashevict-plus")
    rows = bench.compare("curve", policies, bench.quick(whole, (0.5, 0.1)), (*_few(bench), "text"))
    bench.show("curve", rows, Axis("budget (% of the context)", lambda row: (row.policy, 100 * row.budget), True))


def bits(bench: Bench) -> None:
    lengths = (16, 64) if bench.args.quick else BITS
    policies = [f"hashevict,hash_bits={length}" for length in lengths]
    policies += [f"hashevict,orthogonal=true,hash_bits={length}" for length in lengths]

    def place(row: Row) -> tuple[str, float]:
        name, _, length = row.policy.rpartition(",hash_bits=")
        return f"{name} at {row.budget:.0%}", float(length)

    rows = bench.compare("bits", policies, bench.quick((0.1, 0.3, 0.5), (0.3,)), (*_few(bench), "text"))
    bench.show("bits", rows, Axis("hash bits", place, True))


def nearest(bench: Bench) -> None:
    policies = ["exact", *(f"hashevict,hash_bits={length}" for length in (16, 64, 128)), "keydiff", "hashevict-plus"]
    budgets = bench.quick((0.1, 0.3, 0.5), (0.3,))
    bench.show("nearest", bench.compare("nearest", policies, budgets, _few(bench), "slots"))
    lengths, seeds = ((16, 64), (0,)) if bench.args.quick else (BITS, tuple(range(bench.args.seeds)))
    tokens = bench.text(512 if bench.args.quick else 1024)
    found = codes.hash_quality(bench.llm, tokens, bits=lengths, seeds=seeds)
    bench.keep("nearest/codes", [one.to_dict() for one in found], codes.quality_table(found))


def stress(bench: Bench) -> None:
    policies = ("window", "random", "keydiff", "h2o", "tova", "hashevict", "hashevict-plus")
    bench.show("stress", bench.compare("stress", policies, bench.quick((0.1, 0.3, 0.5), (0.3,)), tuple(STRESS)))


def diagnosis(bench: Bench) -> None:
    labels = ("window", "keydiff", "exact", "tova", "h2o", "hashevict", "hashevict,hash_bits=64", "hashevict-plus")
    tokens = 512 if bench.args.quick else 1024
    for share in bench.quick((0.1, 0.3), (0.3,)):
        contenders = [Contender(label) for label in labels]
        found = diagnose.diagnose(bench.llm, bench.text(tokens), contenders, int(share * tokens))
        bench.keep(f"diagnose/{share:.0%}", found.to_dict(), diagnose.table(found))


def sizes(bench: Bench) -> None:
    policies, budgets = ("window", "keydiff", "hashevict", "hashevict-plus"), bench.quick((0.1, 0.3, 0.5), (0.3,))
    every, parameters = [], {}
    for name, llm in bench.models.items():
        rows = bench.compare("sizes", policies, budgets, (*_few(bench), "text"), llm=llm)
        print(f"\n{name}")
        for line in tables.table(rows):
            print(line)
        for row in rows:
            every.append(replace(row, policy=f"{row.policy}, {name}"))
            parameters[every[-1].policy] = sum(weight.numel() for weight in llm.model.parameters()) / 1e6

    def place(row: Row) -> tuple[str, float]:
        return f"{row.policy.rpartition(', ')[0]} at {row.budget:.0%}", parameters[row.policy]

    tables.save(every, bench.folder("sizes"), "sizes", Axis("parameters (millions)", place, True))


def speed(bench: Bench) -> None:
    """Interleaved rounds: every policy takes its turn in each."""
    prompt, rounds, steps = (256, 2, 8) if bench.args.quick else (2048, 5, 64)
    tokens, found, lines = bench.text(prompt + steps), {}, []
    for slots in (64,) if bench.args.quick else (256, 1024):
        times: dict[str, list[tuple[float, float]]] = {label: [] for label in ("full", *POLICY_LIST)}
        for turn in range(rounds + 1):  # the first is a warm-up
            for label, mine in times.items():
                plan = diagnose.plan_of(
                    bench.llm, Contender(label), slots if label != "full" else len(tokens), len(tokens)
                )
                taken = _time(reader(bench.llm, plan), tokens, prompt)
                mine += [taken] if turn else []
        lines += [
            f"{slots:,} slots, a prompt of {prompt:,} tokens; medians of {rounds} rounds, times `window` in brackets"
        ]
        lines += [f"  {'':<16}{'prefill tokens/s':>24}{'decode ms/token':>24}"]
        for label, mine in times.items():
            cells = [(prompt / median(a for a, _ in mine), 1), (1000 * median(b for _, b in mine) / steps, 2)]
            ratios = [median(x[i] / y[i] for x, y in zip(mine, times["window"], strict=True)) for i in (0, 1)]
            texts = [
                f"{value:,.{d}f} ({1 / r if i == 0 else r:.2f})"
                for i, ((value, d), r) in enumerate(zip(cells, ratios, strict=True))
            ]
            lines.append(f"  {label:<16}" + "".join(f"{text:>24}" for text in texts))
            found[f"{label} at {slots}"] = {"prefill_tokens_per_second": cells[0][0], "decode_ms": cells[1][0]}
    bench.keep("speed", found, lines)


@torch.inference_mode()
def _time(llm: LLM, tokens: Tensor, prompt: int) -> tuple[float, float]:
    """Seconds to read a prompt, and to feed what follows it one token at a time, predicting each."""
    begun = time.perf_counter()
    for _, hidden in feed(llm.model, llm.cache, tokens[None, :prompt], llm.chunk):
        last = hidden
    llm.model.logits(last[:, -1])
    between = time.perf_counter()
    for token in tokens[prompt:]:
        for _, hidden in feed(llm.model, llm.cache, token[None, None], 1):
            llm.model.logits(hidden[:, -1])
    return between - begun, time.perf_counter() - between


def _few(bench: Bench) -> Sequence[str]:
    """The four families; with --quick one task of two."""
    return ("keys", "choice") if bench.args.quick else tuple(FAMILIES)


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
    add("--contexts", type=int, default=64, metavar="N", help="of each task (default: 64)")
    add("--rows", type=int, default=32, metavar="N", help="contexts read side by side (default: 32)")
    add("--seeds", type=int, default=3, metavar="N", help="of projections (default: 3)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: as torch chooses)")
    add("--output", type=Path, default=Path("runs/reproduce"), metavar="FOLDER", help="(default: runs/reproduce)")
    add("--quick", action="store_true", help="4 short contexts, one seed, few budgets: does it work at all?")
    args = parser.parse_args(argv)
    for name in ("contexts", "rows", "seeds", "threads"):
        if (value := getattr(args, name)) is not None and value < 1:
            parser.error(f"--{name} must be at least 1, not {value}")
    if len(args.model or ()) > 1 and args.experiment not in ("sizes", "all"):
        parser.error(f"{args.experiment} takes one --model; several are for sizes")
    return args


def main(argv: Sequence[str]) -> int:
    """Exit status 2 and one line for a mistake of the user."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        prose, models = Prose.of(args.haystack), {}
        for name in args.model or [str(RECALL)]:
            llm = LLM.load(name, context=1)
            models[llm.checkpoint.name] = llm
        bench = Bench(args, prose, models)
        for name, experiment in EXPERIMENTS.items():
            if args.experiment in (name, "all"):
                print(f"\n{name}")
                experiment(bench)
    except MinillmError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("stopped; the same command goes on from here")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
