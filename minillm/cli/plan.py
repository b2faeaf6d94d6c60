"""`minillm plan`: what a budget would cost, before anything is loaded."""

from __future__ import annotations

import argparse
import json

from .opening import open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options
from .report import facts_before, size


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="show the bytes a budget needs",
        description="Show the bytes of weights, cache and workspace for a model, context and budget; loads nothing.",
    )
    add_model_options(parser)
    add_cache_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """A table of bytes by part, or one JSON object."""
    checkpoint = open_checkpoint(args, weights=False)

    from ..budget import workspace_bytes

    plan = plan_cache(args, checkpoint, context=None)
    workspace = workspace_bytes(plan, args.chunk)
    weights = checkpoint.weight_bytes()
    total = weights + plan.nbytes + sum(workspace.values())
    if args.json:
        parts = {"weights": weights, "cache": plan.bytes_by_part(), "workspace": workspace, "total": total}
        print(json.dumps({"cache": plan.summary(), "bytes": parts}))
        return 0
    print(facts_before(checkpoint, plan))
    rows = [("weights", weights), *((f"cache {name}", count) for name, count in plan.bytes_by_part().items())]
    rows += [(f"workspace {name}", count) for name, count in workspace.items()]
    for name, count in [*rows, ("total", total)]:
        print(f"  {name:<22} {count:>16,} B  {size(count):>10}")
    return 0
