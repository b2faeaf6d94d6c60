"""One command line in several processes: what torchrun says of them, and that the user reads everything once."""

from __future__ import annotations

import argparse
import atexit
import io
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

from ..errors import ConfigError
from ..shard import ALONE, Team

SECONDS_TO_SPEAK = 1.0  # that the others leave to the one who tells the user: torchrun stops all when one ends
SECONDS_TO_HEAR = 2.0  # that the first one stays after it has spoken
TOGETHER = ("generate", "score", "bench", "serve")  # commands that run in several processes


@contextmanager
def together() -> Iterator[Team]:
    """The processes that torchrun has started, where it has started several; only the first of them prints.

    What goes wrong is told by whoever meets it first, be it on one rank alone or on all.  Ctrl-C ends all at once, but
    for a server (serve.py).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch tells of a lost connection, with 30 lines of stack
    from ..parallel import connected

    with connected() as team:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # a rank that unwinds leaves the others waiting
        stdout, stderr = (sys.stdout, sys.stderr) if team.rank == 0 else (_Nowhere(), _Nowhere())
        with redirect_stdout(stdout), redirect_stderr(stderr):
            try:
                yield team
            except Exception:
                if team.first_to_speak():
                    atexit.register(_stay, team)
                    raise
                time.sleep(SECONDS_TO_SPEAK)
                os._exit(2)


def _stay(team: Team) -> None:
    """Let the others ask who has spoken: what they ask may live in the first of them."""
    if team.rank == 0:
        time.sleep(SECONDS_TO_HEAR)


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
    if args.command == "serve" and args.sessions is not None:
        raise ConfigError("--sessions saves the heads of one process: leave torchrun out, or the folder")


class _Nowhere(io.StringIO):
    """Forgets what is written to it."""

    def write(self, text: str) -> int:
        return len(text)
