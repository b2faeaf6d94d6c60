"""`minillm generate`: answer one prompt inside a memory budget."""

from __future__ import annotations

import argparse
import json

from .opening import choose_sampling, load, open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, add_sampling_options
from .prompt_text import add_text_options, read_text
from .report import Meter, facts_after, facts_before, say


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
    add_model_options(parser)
    add_cache_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Everything that can be wrong with the request is found before the weights are read."""
    text = read_text(args)
    checkpoint = open_checkpoint(args)

    from ..llm import encode_prompt

    params = choose_sampling(args, checkpoint)
    short = args.text is not None and args.text != "-"
    tokens = encode_prompt(checkpoint, "".join(text) if short else text, raw=args.raw, system=args.system)
    plan = plan_cache(args, checkpoint, context=len(tokens) + params.max_tokens)
    plan.require_room(len(tokens))
    say(facts_before(checkpoint, plan))
    llm = load(args, checkpoint, plan)
    stream = llm.stream(tokens, params, raw=args.raw, progress=Meter("reading the prompt", "tokens").update)
    status = 0
    try:
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:  # what was printed stays
        status = 130
    result = stream.result
    print(json.dumps(result.to_dict(), ensure_ascii=False) if args.json else "", flush=True)
    say(("interrupted; " if status else "") + facts_after(result.usage, result.timings))
    return status
