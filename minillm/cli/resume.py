"""`minillm generate --session FILE`: one sequence over many calls, of which each feeds only what is new."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import PromptError, SessionError
from .interrupt import ctrl_c_stops
from .opening import choose_sampling, load, plan_cache
from .options import sampling_from_args
from .report import Meter, facts_after, facts_before, say, size, with_memory

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint


def run_session(args: argparse.Namespace, checkpoint: Checkpoint, text: Iterator[str]) -> int:
    """Load, answer, save; Ctrl-C ends the answer early and saves it.  Whatever else goes wrong leaves the file alone.

    The whole of a fraction is the context, as in `chat`: it must be the same in every call.
    """
    from ..conversation import Conversation
    from ..saved import check_settings

    path: Path = args.session
    goes_on = path.exists()
    _check_writable(path)
    params = choose_sampling(args, checkpoint)
    plan = plan_cache(args, checkpoint, context=None)
    say(facts_before(checkpoint, plan))
    if goes_on:
        check_settings(path, checkpoint, plan, chunk=args.chunk)
    llm = load(args, checkpoint, plan)
    talk = Conversation(llm, system=args.system, pin_system=args.pin_system, raw=args.raw)
    if goes_on:
        talk.load(path)
        if args.system not in (None, talk.system):
            raise PromptError(f"{path} began with another system message: leave --system out, or start a new session")
        params = sampling_from_args(args, talk.session.params.to_json())
    seen = f"goes on behind {talk.session.seen:,} tokens" if goes_on else "begins"
    say(f"session {path} {seen}; {size(talk.session.nbytes)}")
    first = next(text, "")
    if first or not talk.session.pending:
        meter = Meter("reading the prompt", "tokens")
        whole = args.text is not None and args.text != "-"
        stream = talk.send(first if whole else chain([first], text), params, progress=meter.update)
    else:
        stream = talk.go_on(params)
    with ctrl_c_stops(stream):
        for piece in stream:
            if not args.json:
                print(piece, end="", flush=True)
        result = stream.result
        stopped, begun = result.finish_reason == "abort", result.usage.completion_tokens > 0
        if begun or not stopped:
            talk.save(path)
    print(with_memory(result.to_dict(), llm.memory) if args.json else "", flush=True)
    kept = f"saved to {path}" if begun or not stopped else f"{path} is as it was"
    say(f"{'interrupted; ' if stopped else ''}{facts_after(result.usage, result.timings, llm.memory)}; {kept}")
    return 130 if stopped else 0


def _check_writable(path: Path) -> None:
    """Now, and not when the answer is there."""
    folder = path.resolve().parent
    if path.is_dir() or not folder.is_dir():
        raise SessionError(f"--session {path} is no file that could be written: name one in a folder that there is")
    if not os.access(folder, os.W_OK):
        raise SessionError(f"--session {path}: no permission to write in {folder}")
