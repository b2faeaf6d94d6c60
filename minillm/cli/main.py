"""`minillm`: finds the command, and turns whatever can go wrong into one line and an exit status.

Text goes to stdout, everything else to stderr.  Statuses: 0 done, 2 the user's mistake, 130 Ctrl-C, 141 nobody reads
our output any more (as a shell reports SIGPIPE).  Commands import torch inside `run`, so that help answers at once.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn, TextIO

from .. import __version__
from ..errors import MinillmError
from ..shard import Team
from .ranks import refuse_what_is_for_one, together

COMMANDS = (
    "generate",
    "chat",
    "score",
    "verify",
    "compare",
    "trace",
    "plan",
    "serve",
    "bench",
    "pull",
    "quantize",
    "tokens",
    "info",
)  # in the order of the help text


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: the process's own) and return its exit status."""
    _use_utf8()
    # torch's allocator then asks for huge pages, in which weights are read an eighth to a fifth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # torch's; we do without
        try:
            with together() as team:
                status = _run(argv, team)
                sys.stdout.flush()
            return status
        except MinillmError as error:
            return _fail(str(error))
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            # Python flushes stdout once more at exit: let that go nowhere instead of failing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 141
        except OSError as error:
            return _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))


def _run(argv: Sequence[str] | None, team: Team) -> int:
    try:
        args = build_parser().parse_args(argv, argparse.Namespace(team=team))
    except SystemExit as done:  # argparse has answered: --help, --version, or a mistake
        return int(done.code or 0)
    refuse_what_is_for_one(args)
    status: int = args.run(args)
    return status


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; each `minillm.cli.<command>` adds its own."""
    parser = _Parser(prog="minillm", description="Run a language model inside a memory budget that you name.")
    parser.add_argument("--version", action="version", version=f"minillm {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        import_module(f"minillm.cli.{command}").add_parser(subparsers)
    return parser


class _Parser(argparse.ArgumentParser):
    """Mistakes in one line; options are written out, so that a new one never changes what an old script means."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minillm: error: {_one_line(message)} (see {self.prog} --help)\n")


def _fail(message: str) -> int:
    print(f"minillm: error: {_one_line(message)}", file=sys.stderr)
    return 2


def _show_warning(
    message: Warning | str,
    category: type[Warning],  # noqa: ARG001
    filename: str,  # noqa: ARG001
    lineno: int,  # noqa: ARG001
    file: TextIO | None = None,
    line: str | None = None,  # noqa: ARG001
) -> None:
    print(f"minillm: warning: {_one_line(str(message))}", file=file or sys.stderr)


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def _use_utf8() -> None:
    """Write UTF-8 whatever the terminal claims to be: a model's text does not fit a smaller alphabet."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
