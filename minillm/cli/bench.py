"""`minillm bench`: how fast this machine reads prompts and decodes, and where the time goes."""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import BudgetError, ConfigError
from ..units import size
from .info import versions
from .interrupt import ctrl_c_ends_at_once
from .opening import choose_threads, open_checkpoint
from .options import add_model_options, positive
from .report import Meter, on_ranks

if TYPE_CHECKING:
    from ..bench import Case, Figures, Report
    from ..checkpoint import Checkpoint

BUSY = 0.2  # cores that others may have before it is said
COLUMNS: tuple[str, ...] = ("rows", "context", "slots", "prompt tok/s", "decode tok/s", "step ms", "p95 ms", "GB/s")
COLUMNS += ("roofline", "linears", "attention", "hashing", "rest")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `bench` to the command line."""
    parser = subparsers.add_parser(
        "bench",
        help="how fast this machine is, and where the time goes",
        description="Measure how many tokens per second a model reads and decodes on this machine, how near that "
        "comes to the speed of its memory, and what a decode step spends its time on. A table, and JSON in the last "
        "line. Takes 512 MiB beside the model for a moment.",
    )
    add_model_options(parser)
    group = parser.add_argument_group("what is measured")
    add = group.add_argument
    add("--shape", metavar="NAME", help="random weights in the shape of a known model: tinyllama, mistral-7b, ...")
    add("--layers", type=positive, metavar="N", help="of a shape: only so many layers (default: all)")
    numbers: dict[str, Any] = {"type": positive, "nargs": "+", "metavar": "N"}
    add(
        "--context",
        default=[16, 512, 2048],
        help="tokens before the first decoded one (default: 16 512 2048)",
        **numbers,
    )
    add("--rows", default=[1], help="sequences that are decoded together (default: 1)", **numbers)
    add("--tokens", type=positive, default=32, metavar="N", help="decoded in each round (default: 32)")
    add("--rounds", type=positive, default=3, metavar="N", help="that are counted (default: 3)")
    add("--chunk", type=positive, default=256, metavar="TOKENS", help="tokens read at once (default: 256)")
    add("--budget", metavar="B", help="what is kept, as in generate; a fraction is one of context + tokens")
    add("--policy", metavar="NAME", help="as in generate (default: hashevict-plus under a budget, else full)")
    add("--kv-dtype", choices=("auto", "int8"), default="auto", help="precision of the cache (default: the model's)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A table and a line of JSON, or that line alone."""
    checkpoint = open_subject(args)

    import torch

    from ..bench import Bench
    from ..sampling import SamplingParams

    seed = SamplingParams(seed=args.seed).seed  # refuses what no generator takes
    seed = secrets.randbits(32) if seed is None else seed
    seed = int(args.team.agreed(torch.tensor(seed)))
    cases = plan_cases(args, checkpoint)
    plans = [checkpoint.memory_plan(case.plan, chunk=args.chunk, logit_rows=1) for case in cases]
    memory = max(plans, key=lambda plan: plan.total)  # one case has a cache at a time
    memory.require()
    model = checkpoint.load_model(Meter("loading", "bytes").update)
    bench = Bench(model, checkpoint, tokens=args.tokens, rounds=args.rounds, chunk=args.chunk, seed=seed)
    report = bench.run(cases, Meter("measuring", "tokens").update)
    cache = cases[0].plan.summary()
    facts = facts_of(checkpoint) | {"cache": {name: cache[name] for name in ("policy", "budget", "kv_dtype")}}
    facts |= {"tokens": args.tokens, "rounds": args.rounds, "chunk": args.chunk, "seed": seed}
    facts |= {"planned_bytes": memory.total} | asdict(report)
    if not args.json:
        print("\n".join((*head(facts), *table(report.cases), *remarks(facts, report))))
    print(json.dumps(facts, ensure_ascii=False))
    return 0


def open_subject(args: argparse.Namespace) -> Checkpoint:
    """What is measured: a checkpoint, or a shape; raises ConfigError for options that cannot go together."""
    if args.shape is None:
        if args.layers is not None:
            raise ConfigError("--layers is of a shape, and a checkpoint has the layers that it has: add --shape NAME")
        return open_checkpoint(args)
    named = [f"--{name}" for name in ("model", "revision", "offline") if getattr(args, name)]
    if named:
        raise ConfigError(f"--shape has random weights and {' and '.join(named)} no meaning for it: leave one out")
    with ctrl_c_ends_at_once():
        from ..shapes import Shape

    choose_threads(args)
    computation = {name: getattr(args, name) for name in ("dtype", "device", "weights", "backend")}
    return Shape.of(args.shape, args.layers, team=args.team, **computation)


def plan_cases(args: argparse.Namespace, checkpoint: Checkpoint) -> list[Case]:
    """Every context with every number of rows, each with its cache; raises BudgetError where one cannot be."""
    from ..bench import Case

    cases = []
    for context in dict.fromkeys(args.context):
        for rows in dict.fromkeys(args.rows):
            whole = context + args.tokens
            options = {"policy": args.policy, "kv_dtype": args.kv_dtype, "rows": rows}
            plan = checkpoint.plan(budget=args.budget, context=whole, chunk=args.chunk, **options)
            if whole > plan.retention.slots and not plan.evicts:
                raise BudgetError(
                    f"{whole:,} tokens (--context {context} and --tokens {args.tokens}) do not fit into "
                    f"{plan.retention.slots:,} slots and policy '{plan.policy.name}' never evicts; raise --budget, or "
                    "choose a policy that evicts"
                )
            cases.append(Case(rows, context, plan))
    return cases


def facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the figures depend on: model, precision, backend, machine, versions."""
    import torch

    from ..machine import cpu_name

    dtype, on_gpu = str(checkpoint.dtype).removeprefix("torch."), checkpoint.device.type == "cuda"
    return {
        "model": checkpoint.name,
        "layers": checkpoint.config.num_hidden_layers,
        "weights": dtype if checkpoint.scheme is None else checkpoint.scheme.name,
        "dtype": dtype,
        "backend": checkpoint.computed_by,
        "device": str(checkpoint.device),
        "ranks": checkpoint.team.ranks,
        "gpu": torch.cuda.get_device_name(checkpoint.device) if on_gpu else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        "versions": versions(),
    }


def head(facts: dict[str, Any]) -> Iterator[str]:
    """What was measured, on what."""
    cache, versions = facts["cache"], facts["versions"]
    precision = facts["weights"] if facts["weights"] == facts["dtype"] else f"{facts['weights']} and {facts['dtype']}"
    yield (
        f"{facts['model']}: {size(facts['weight_bytes'])} of weights, read in every step; {precision}, "
        f"backend {facts['backend']}{on_ranks(facts['ranks'])}; "
        f"cache in {cache['kv_dtype']}, policy {cache['policy']}, budget {cache['budget']}"
    )
    threads, rounds = (
        f"{facts[name]} {name.removesuffix('s')}{'s' * (facts[name] > 1)}" for name in ("threads", "rounds")
    )
    yield (
        f"{facts['gpu'] or ', '.join((facts['cpu'], threads, facts['kernels']))}, device {facts['device']}; "
        f"minillm {versions['minillm']}, torch {versions['torch']}"
    )
    yield f"{rounds} of {facts['tokens']} decoded tokens; linears to rest: where a step's time went"
    yield ""


def table(cases: list[Figures]) -> Iterator[str]:
    """A line for every case; the last columns are shares of the time of a decode step."""
    yield "  ".join(COLUMNS)
    for case in cases:
        cells = [f"{case.rows}", f"{case.context:,}", f"{case.slots:,}"]
        cells += [f"{case.prefill_tokens_per_s:,.1f}", f"{case.decode_tokens_per_s:,.1f}"]
        cells += [f"{case.token_s * 1e3:,.2f}", f"{case.token_p95_s * 1e3:,.2f}"]
        cells += [f"{case.read_bytes_per_s / 1e9:.1f}", f"{case.of_bandwidth:.0%}"]
        cells += [f"{share:.1%}" for share in case.shares.values()]
        yield "  ".join(cell.rjust(len(title)) for cell, title in zip(cells, COLUMNS, strict=True))
    yield ""


def remarks(facts: dict[str, Any], report: Report) -> Iterator[str]:
    """What no line of the table says."""
    yield f"roofline: memory is read at {report.bandwidth / 1e9:.1f} GB/s where nothing is computed"
    for case in report.cases[:1]:  # all are alike in it
        if case.kernel_coverage is not None:
            others = [f"{what} by {who}" for what, who in case.kernels.items() if who != "triton"]
            yield (
                f"graphs: {case.graph_coverage:.0%} of decode steps were replayed; Triton's kernels: "
                f"{case.kernel_coverage:.0%} of eviction, write and attention of every layer"
                + (f", {' and '.join(others)}" if others else "")
            )
            yield "linears to rest: of steps that were not replayed, in which Python can look on"
    for cost in report.rows_cost:
        than = f"{cost.than} row" + "s" * (cost.than > 1)
        yield f"after {cost.context:,} tokens a step of {cost.rows} rows takes {cost.ratio:.2f} times one of {than}"
    if report.others is not None and report.others > BUSY:
        yield f"other processes had {report.others:.1f} cores meanwhile: this is slower than the machine is when alone"
    yield f"memory planned {size(facts['planned_bytes'])}, peak {size(report.peak)}"
