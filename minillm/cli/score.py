"""`minillm score`: how well a model predicts a text under a memory budget."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from ..errors import PromptError
from .opening import load, open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, positive
from .prompt_text import add_text_options, read_text
from .report import Meter, facts_before, memory_after, remembered, say, with_memory

if TYPE_CHECKING:
    from torch import Tensor

    from ..tokenizer import Tokenizer


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `score` to the command line."""
    parser = subparsers.add_parser(
        "score",
        help="nats per token and perplexity of a text",
        description="Score a text under a memory budget, each row of --context + 1 tokens from an empty cache.",
    )
    add_text_options(parser)
    parser.add_argument("--separator", metavar="TEXT", help="ends a document; each document gets its own BOS")
    parser.add_argument("--rows", type=positive, metavar="N", help="score the first N rows only (default: all)")
    add_model_options(parser)
    add_cache_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """One line on stdout, or one JSON object."""
    text = read_text(args)
    checkpoint = open_checkpoint(args)
    enough = args.rows * (args.context + 1) if args.rows and args.context else None
    tokens = encode_documents(checkpoint.tokenizer, text, args.separator, enough)
    if len(tokens) < 2:
        raise PromptError(
            f"a text of {len(tokens)} tokens has nothing to score: the first token is given, not predicted"
        )
    plan = plan_cache(args, checkpoint, context=len(tokens) - 1)
    plan.require_room(min(args.context or len(tokens), len(tokens) - 1))
    say(facts_before(checkpoint, plan))
    llm = load(args, checkpoint, plan)
    score = llm.score(tokens, rows=args.rows, context=args.context, progress=Meter("scoring", "tokens").update)
    if args.json:
        print(with_memory(score.to_dict(), llm.memory))
    else:
        print(f"{score.nats_per_token:.4f} nats per token, perplexity {score.perplexity:.3f}, {score.tokens:,} tokens")
        say(f"the last row: {remembered(score.usage)}{memory_after(llm.memory)}")
    return 0


def encode_documents(
    tokenizer: Tokenizer, pieces: Iterable[str], separator: str | None, enough: int | None = None
) -> Tensor:
    """Token ids [n] int32 of all documents one after the other, each with its BOS; stops once there are `enough`."""
    import torch

    found, count = [torch.empty(0, dtype=torch.int32)], 0
    documents = [pieces] if separator is None else split_documents(pieces, separator)
    for document in documents:
        found.append(tokenizer.encode_stream(document, bos=True))
        count += len(found[-1])
        if enough is not None and count >= enough:
            break
    return torch.cat(found)  # [n]


def split_documents(pieces: Iterable[str], separator: str) -> Iterator[list[str]]:
    """Documents between separators, without the white space around them; empty ones are left out."""
    held = ""
    for piece in pieces:
        *whole, held = (held + piece).split(separator)
        yield from ([text.strip()] for text in whole if text.strip())
    if held.strip():
        yield [held.strip()]
