"""`minillm generate`: answer one prompt inside a memory budget."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PromptError
from .opening import choose_sampling, load, open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, add_sampling_options
from .prompt_text import add_text_options, read_text
from .report import Meter, facts_after, facts_before, say, with_memory
from .resume import run_session

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint import Checkpoint


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `generate` to the command line."""
    parser = subparsers.add_parser(
        "generate",
        help="answer a prompt",
        description="Answer a prompt inside a memory budget. The answer goes to stdout, facts about it to stderr.",
    )
    add_text_options(parser)
    parser.add_argument("--raw", action="store_true", help="feed the text as it is, without the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="a system message for the chat template")
    parser.add_argument(
        "--session",
        type=Path,
        metavar="FILE",
        help="go on from this file if there is one, with its sampling where no other is named, and save to it at the "
        "end; no text goes on with the answer (default context: 8,192 or the model's)",
    )
    parser.add_argument("--pin-system", action="store_true", help="never evict the system message (with --session)")
    add_model_options(parser)
    add_cache_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Everything that can be wrong with the request is found before the weights are read."""
    text = read_text(args)
    checkpoint = open_checkpoint(args)
    if args.session is not None:
        return run_session(args, checkpoint, text)
    if args.pin_system:
        raise PromptError("--pin-system is for what goes on: add --session FILE, or use chat")
    params = choose_sampling(args, checkpoint)
    tokens, length = _prompt(args, checkpoint, text)
    whole = None if length is None else length + params.max_tokens
    plan = plan_cache(args, checkpoint, context=whole)
    if not plan.policy.evicts and args.context is None:  # ends where the model's training did, unless told otherwise
        plan = plan_cache(args, checkpoint, context=min(plan.whole, checkpoint.config.max_position_embeddings))
    plan.require_room(length or 1)
    say(facts_before(checkpoint, plan))
    llm = load(args, checkpoint, plan)
    meter = Meter("reading the prompt", "tokens", lambda: f"kept {llm.cache.kept():,.0f}")
    stream = llm.stream(tokens, params, raw=args.raw, length=length, progress=meter.update)
    status = 0
    try:
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:  # what was printed stays
        status = 130
    result = stream.result
    print(with_memory(result.to_dict(), llm.memory) if args.json else "", flush=True)
    say(("interrupted; " if status else "") + facts_after(result.usage, result.timings, llm.memory))
    return status


def _prompt(
    args: argparse.Namespace, checkpoint: Checkpoint, text: Iterator[str]
) -> tuple[Iterator[Tensor], int | None]:
    """The prompt's tokens, piece by piece, and how many there are, if that can be known before they are fed.

    A file is read twice, to be counted and to be fed.  Stdin can be read only once: it is fed as it comes, unless the
    budget is a fraction of a length that only the end of the text tells; then its ids are held, at 4 bytes a token.
    """
    from ..budget import Budget
    from ..llm import encode_prompt

    def encoded(pieces: str | Iterator[str]) -> Iterator[Tensor]:
        return encode_prompt(checkpoint, pieces, raw=args.raw, system=args.system)

    in_argument = args.text is not None and args.text != "-"
    if args.file is not None:
        meter, length = Meter("counting the prompt", "tokens"), 0
        for piece in encoded(text):
            length += len(piece)
            meter.update(length, None)
        meter.close()
        return encoded(read_text(args)), length
    tokens = encoded("".join(text) if in_argument else text)
    kind = Budget.of(args.budget).kind
    whole_counts = kind == "fraction" or (kind == "all" and args.memory is None)
    if in_argument or (args.context is None and whole_counts):
        held = list(tokens)
        return iter(held), sum(map(len, held))
    return tokens, None
