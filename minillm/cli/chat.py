"""`minillm chat`: a conversation that lives in one bounded cache, however long it gets."""

from __future__ import annotations

import argparse
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import MinillmError, PromptError
from .interrupt import ctrl_c_stops
from .opening import choose_sampling, load, open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, add_sampling_options
from .report import Meter, facts_after, facts_before, remembered, say, size, with_memory

if TYPE_CHECKING:
    from ..conversation import Conversation
    from ..sampling import SamplingParams

HELP = (
    "/reset forgets the conversation, /stats shows what is remembered, /save FILE and /load FILE keep and restore it, "
    "/pin TEXT says what is never to be forgotten, /quit ends; Ctrl-C stops an answer"
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `chat` to the command line."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description=f"Talk with a model; the conversation lives in one bounded cache. {HELP}.",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message for the chat template")
    parser.add_argument("--pin-system", action="store_true", help="never evict the system message")
    add_model_options(parser)
    add_cache_options(parser)
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Read a line, answer it, and again, until /quit or the end of input."""
    checkpoint = open_checkpoint(args)

    from ..conversation import Conversation

    if args.system is not None and checkpoint.template is None:
        raise PromptError(f"--system needs a chat template, and {checkpoint.name} has none: leave it out")
    if args.pin_system and args.system is None:
        raise PromptError("--pin-system needs a message to pin: add --system TEXT")
    params = choose_sampling(args, checkpoint)
    plan = plan_cache(args, checkpoint, context=None)
    say(facts_before(checkpoint, plan))
    conversation = Conversation(load(args, checkpoint, plan), system=args.system, pin_system=args.pin_system)
    if sys.stdin.isatty():
        with suppress(ImportError):
            import readline  # noqa: F401  # line editing and history for input()
        say(HELP)
    while (line := _read_line()) is not None:
        if line.startswith("/"):
            if line == "/quit":
                break
            command, _, rest = line.partition(" ")
            if command == "/pin" and rest.strip():
                _answer(args, conversation, rest.strip(), params, pin=True)
            else:
                _command(command, rest.strip(), conversation)
        elif line:
            _answer(args, conversation, line, params)
    return 0


def _read_line() -> str | None:
    """One line without the white space around it; None at the end of input.  Ctrl-C at the prompt discards the line."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(file=sys.stderr)
            say("/quit or Ctrl-D ends the conversation")


def _command(command: str, rest: str, conversation: Conversation) -> None:
    if command in ("/save", "/load") and rest:
        try:
            (conversation.save if command == "/save" else conversation.load)(Path(rest).expanduser())
        except MinillmError as error:
            say(f"error: {error}")
            return
        done = "saved to" if command == "/save" else "goes on from"
        say(f"the conversation {done} {rest}, {size(conversation.session.nbytes)}; {remembered(conversation.usage())}")
    elif command == "/reset" and not rest:
        conversation.reset()
        say("the conversation is forgotten")
    elif command == "/stats" and not rest:
        usage = conversation.usage()
        plan = conversation.llm.plan
        say(f"{remembered(usage)}; {plan.slots:,} slots, {size(plan.nbytes)}, policy {plan.policy.name}")
    else:
        say(f"unknown command {command} {rest}".rstrip() + f": {HELP}")


def _answer(
    args: argparse.Namespace, conversation: Conversation, line: str, params: SamplingParams, *, pin: bool = False
) -> None:
    """Stream one answer; what goes wrong with one message does not end the conversation."""
    try:
        stream = conversation.send(line, params, pin=pin, progress=Meter("reading", "tokens").update)
        with ctrl_c_stops(stream):
            for piece in stream:
                if not args.json:
                    print(piece, end="", flush=True)
    except MinillmError as error:
        say(f"error: {error}")
        return
    except KeyboardInterrupt:  # before there was a stream to stop
        print(file=sys.stderr)
        say("the message was not sent")
        return
    result = stream.result
    print(with_memory(result.to_dict(), conversation.llm.memory) if args.json else "", flush=True)
    if not args.json:
        say(facts_after(result.usage, result.timings, conversation.llm.memory))
