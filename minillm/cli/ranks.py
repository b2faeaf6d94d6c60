"""One command line in several processes: what torchrun says of them, and that the user reads everything once."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ..errors import ConfigError
from ..shard import Team

SECONDS_TO_SPEAK = 1.0  # that the others leave to the one who tells the user: torchrun stops all when one ends
SECONDS_TO_HEAR = 2.0  # that this one stays, and with it, if it is the first, what the others ask whether to speak
TOGETHER = ("generate", "score", "bench")  # commands that run in several processes


@contextmanager
def together() -> Iterator[Team]:
    """The processes that torchrun has started, where it has started several; only the first of them prints.

    What goes wrong is told by whoever meets it first, be it on one rank alone or on all.  Ctrl-C ends all at once.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Team()
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch tells of a lost connection, with 30 lines of stack
    from ..parallel import connected

    with open(os.devnull, "w", encoding="utf-8") as nowhere, connected() as team:  # noqa: PTH123
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # a rank that unwinds leaves the others waiting
        stdout, stderr = (sys.stdout, sys.stderr) if team.rank == 0 else (nowhere, nowhere)
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                yield team
            except Exception:
                if team.first_to_speak():
                    atexit.register(lambda: time.sleep(SECONDS_TO_HEAR if team.ranks > 1 else 0))
                    raise
                time.sleep(SECONDS_TO_SPEAK)
                os._exit(2)


def refuse_what_is_for_one(args: argparse.Namespace) -> None:
    """Raise ConfigError for what several processes cannot do together."""
    if args.team.ranks == 1:
        return
    if args.command not in TOGETHER:
        raise ConfigError(
            f"{args.command} runs in one process, and {args.team.ranks} were started: leave torchrun out (only "
            f"{', '.join(TOGETHER)} run in several)"
        )
    if args.command == "generate" and args.session is not None:
        raise ConfigError("--session keeps the heads of one process: leave torchrun out, or the session")
