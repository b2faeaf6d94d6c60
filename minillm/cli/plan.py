"""`minillm plan`: every byte that a process would hold, before anything is loaded, and whether and how it fits."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..shard import Team
from ..units import size
from .opening import open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, positive
from .report import facts_before
from .serve import add_rows_options, requests_bytes


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="show the bytes a budget needs, and whether they fit",
        description="Show the bytes of weights, cache, workspace and runtime for a model, context and budget; say "
        "whether they fit into --memory, or this machine, and if not, three ways to make them fit. Loads nothing.",
    )
    add_model_options(parser)
    add_cache_options(parser)
    group = parser.add_argument_group("server")
    group.add_argument("--rows", type=positive, metavar="N", help="as `serve` needs it, for N answers drawn together")
    add_rows_options(group)
    parser.add_argument(
        "--ranks", type=positive, default=1, metavar="N", help="for one of N processes that compute it together"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A table of bytes by part, or one JSON object."""
    args.team = Team(ranks=args.ranks)
    checkpoint = open_checkpoint(args, with_weights=False)

    from .. import llm  # noqa: F401  # what the commands that run have loaded counts as base
    from ..memory import room

    server: dict[str, int] = {}
    if args.rows is not None:
        server = {"reading": 1, "requests": requests_bytes(args)}

        from ..server import app  # noqa: F401  # counts as base, too
    plan = plan_cache(
        args, checkpoint, context=None, rows=1 if args.rows is None else args.rows + args.prefixes, **server
    )
    memory = checkpoint.memory_plan(plan, memory=args.memory, chunk=args.chunk, logit_rows=1, **server)
    ever = room(checkpoint.device).ever
    limit = ever if memory.promise is None else min(ever, memory.promise)
    fits = memory.total <= limit
    ways = [] if fits else memory.three_ways(limit)
    if args.json:
        parts: dict[str, Any] = {}
        for name, count in memory.parts.items():
            group, _, part = name.partition(" ")
            parts = parts | {group: parts.get(group, {}) | {part: count} if part else count}
        options = [way.options | {"total": way.plan.total} for way in ways]
        verdict = {"limit": limit, "fits": fits, "ways": options, "weights_from": checkpoint.weights.origin}
        print(json.dumps({"cache": plan.summary(), "bytes": parts | {"total": memory.total}, **verdict}))
        return 0
    print(facts_before(checkpoint, plan))
    for name, count in [*memory.parts.items(), ("total", memory.total)]:
        print(f"  {name:<22} {count:>16,} B  {size(count):>10}")
    print(f"weights: by {checkpoint.weights.origin}")
    whose = "this machine" if limit == ever else "--memory"
    if fits:
        print(f"fits into the {size(limit)} of {whose}")
        return 0
    print(f"does not fit into the {size(limit)} of {whose}: {size(memory.total - limit)} too much")
    for way in ways:
        print(f"  {way.what}: {way.flags}, {size(way.plan.total)} in all")
    if not ways:
        print("  no budget, dtype or context makes it fit: choose a smaller model")
    return 0
