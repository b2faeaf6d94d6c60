"""From parsed options to a checkpoint and a planned cache: what generate, chat, score and plan share."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from .interrupt import ctrl_c_ends_at_once
from .options import sampling_from_args
from .report import Meter

if TYPE_CHECKING:
    from ..budget import CachePlan
    from ..checkpoint import Checkpoint
    from ..llm import LLM
    from ..sampling import SamplingParams


def open_checkpoint(args: argparse.Namespace, *, with_weights: bool = True) -> Checkpoint:
    """The checkpoint that the options name, see Checkpoint.open; sets the number of threads on the way."""
    with ctrl_c_ends_at_once():
        from ..checkpoint import Checkpoint
        from ..hub import EMBEDDED

    choose_threads(args)
    return Checkpoint.open(
        args.model or EMBEDDED,
        dtype=args.dtype,
        device=args.device,
        revision=args.revision,
        offline=args.offline,
        weights=args.weights,
        backend=args.backend,
        with_weights=with_weights,
        team=args.team,
    )


def choose_threads(args: argparse.Namespace) -> None:
    """As many threads as --threads says, else as OMP_NUM_THREADS does, else as there are cores for this process."""
    import torch

    from ..cores import usable_cores

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())


def choose_sampling(args: argparse.Namespace, checkpoint: Checkpoint) -> SamplingParams:
    """The sampling that the options name, over the checkpoint's defaults; raises SamplingError, also for odd ids."""
    from ..sampling import Sampler

    params = sampling_from_args(args, checkpoint.sampling_defaults)
    # A sampler refuses ids that the tokenizer does not have: find out before the weights are read.
    Sampler(
        params, checkpoint.config.vocab_size, checkpoint.tokenizer.vocab_size, checkpoint.eos_ids, checkpoint.device
    )
    return params


def plan_cache(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    *,
    context: int | None,
    rows: int = 1,
    reading: int | None = None,
    requests: int = 0,
) -> CachePlan:
    """The cache that the options name; `context` is the whole where --context is not given, see Checkpoint.plan.

    rows, reading, requests: of a server, see MemoryPlan.
    """
    options = dict(option.split("=", 1) for option in args.policy_option or ())
    return checkpoint.plan(
        budget=args.budget,
        context=args.context or context,
        memory=args.memory,
        chunk=args.chunk,
        logit_rows=logit_rows(args),
        reading=reading,
        requests=requests,
        rows=rows,
        policy=args.policy,
        sinks=args.sinks,
        recent=args.recent,
        evict_every=args.evict_every,
        layer_budget=args.layer_budget,
        kv_dtype=args.kv_dtype,
        positions=args.positions,
        on_overflow=args.on_overflow,
        **{"hash_bits": args.hash_bits, "policy_seed": args.policy_seed, **options},
    )


def load(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    plan: CachePlan,
    *,
    reading: int | None = None,
    requests: int = 0,
) -> LLM:
    """Read the weights, with a progress meter, and allocate the cache; BudgetError before, if there is no room."""
    from ..llm import LLM

    memory = checkpoint.memory_plan(
        plan,
        memory=args.memory,
        chunk=args.chunk,
        logit_rows=logit_rows(args),
        reading=reading,
        requests=requests,
    )
    memory.require()
    model = checkpoint.load_model(Meter("loading", "bytes").update)
    return LLM(checkpoint, model, plan, chunk=args.chunk, memory=memory)


def logit_rows(args: argparse.Namespace) -> int:
    """Positions whose logits the command computes together."""
    from ..answer import LOGIT_ROWS

    return LOGIT_ROWS if args.command == "score" else 1
