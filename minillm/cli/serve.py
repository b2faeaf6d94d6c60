"""`minillm serve`: an OpenAI-compatible server whose memory is all allocated before the first request."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import BudgetError, ConfigError
from ..units import size
from .opening import load, open_checkpoint, plan_cache
from .options import add_cache_options, add_model_options, positive
from .report import facts_before, say

if TYPE_CHECKING:
    from types import FrameType

    from ..llm import LLM
    from ..server.app import Server
    from ..server.door import Options
    from ..server.worker import Worker

LOOPBACK = ("127.0.0.1", "localhost", "::1")
CONNECTIONS = 2048  # more are refused
CONNECTION_BYTES = 24 << 10  # of each: 4 KB were measured of an idle one, and one that streams has buffers
BODY_BYTES = 28  # JSON of small objects becomes 25 times as much when it is parsed; and there is the text itself


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `serve` to the command line."""
    parser = subparsers.add_parser(
        "serve",
        help="serve an OpenAI-compatible API and a chat page",
        description="Serve an OpenAI-compatible API at /v1, and a chat page at /. Every answer has a row of the cache, "
        "allocated at start: what does not find one waits, and what does not find room to wait is told to come back. "
        "SIGTERM or Ctrl-C finishes what runs; a second one stops at once.",
    )
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine only")
    group.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0: any free one")
    group.add_argument("--rows", type=positive, default=4, metavar="N", help="answers drawn together (default: 4)")
    add_rows_options(group)
    group.add_argument("--queue", type=int, default=64, metavar="N", help="answers that may wait (default: 64)")
    group.add_argument("--name", metavar="NAME", help="what the model is called (default: as in --model)")
    group.add_argument(
        "--api-key", metavar="KEY", help="what clients have to send; needed to listen on other addresses than loopback"
    )
    group.add_argument("--api-key-file", type=Path, metavar="FILE", help="that holds the key (or set MINILLM_API_KEY)")
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="a page elsewhere that may ask; repeatable"
    )
    group.add_argument(
        "--timeout", type=positive, default=600, metavar="SECONDS", help="that a request may take (default: 600)"
    )
    group.add_argument("--max-tokens", type=positive, metavar="N", help="longest answer that may be asked for")
    group = parser.add_argument_group("sessions")
    group.add_argument(
        "--sessions", type=Path, metavar="FOLDER", help="where idle sessions are saved (default: nowhere, they may go)"
    )
    group.add_argument("--max-sessions", type=positive, default=100, metavar="N", help="that are kept (default: 100)")
    group.add_argument(
        "--session-hours", type=positive, default=24, metavar="N", help="how long an idle one is kept (default: 24)"
    )
    add_model_options(parser, draws=False)
    add_cache_options(parser)
    parser.set_defaults(run=run)


def add_rows_options(group: argparse._ArgumentGroup) -> None:
    """What decides how much a server holds, beside the budget and --rows."""
    group.add_argument(
        "--prefixes", type=int, default=1, metavar="N", help="shared beginnings of prompts that are kept (default: 1)"
    )
    group.add_argument(
        "--max-body", default="1MiB", metavar="SIZE", help="largest request, 1 MiB is some 250,000 tokens of text"
    )


def requests_bytes(args: argparse.Namespace) -> int:
    """What a server holds for its clients at most, beside the cache."""
    require_packages()
    from ..server.connection import BODIES

    return CONNECTIONS * CONNECTION_BYTES + BODIES * BODY_BYTES * _max_body(args)


def require_packages() -> None:
    """Raise ConfigError where the server's packages are not installed."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"a server needs the package {error.name}: pip install 'minillm[serve]'") from None


def _max_body(args: argparse.Namespace) -> int:
    from ..planner import size_of

    try:
        return size_of(args.max_body)
    except BudgetError:
        raise ConfigError(f"--max-body {args.max_body} is not a size such as 1MiB") from None


def run(args: argparse.Namespace) -> int:
    """Serve until a signal comes."""
    require_packages()
    key = _key(args)
    if args.host not in LOOPBACK and key is None:
        raise ConfigError(f"--host {args.host} lets other machines in: give --api-key-file FILE, or stay on 127.0.0.1")
    for option, value in (("--queue", args.queue), ("--prefixes", args.prefixes), ("--port", args.port)):
        if value < 0:
            raise ConfigError(f"{option} must be at least 0, not {value}")
    if args.team.rank > 0:
        _follow(args)
        return 0
    with _listen(args) as listening:
        _load_and_serve(args, key, listening)
    return 0


def _load(args: argparse.Namespace) -> LLM:
    """The model, over a cache of all rows; alike in all processes."""
    checkpoint = open_checkpoint(args)

    from ..server import app  # noqa: F401  # counts as base, see planner.py

    checkpoint.tokenizer, checkpoint.template  # noqa: B018  # what is wrong with them is to be said now
    rows, requests = args.rows + args.prefixes, requests_bytes(args)
    plan = plan_cache(args, checkpoint, context=None, rows=rows, reading=1, requests=requests)
    say(facts_before(checkpoint, plan))
    return load(args, checkpoint, plan, reading=1, requests=requests)


def _follow(args: argparse.Namespace) -> None:
    """Where other processes have clients."""
    llm = _load(args)

    from ..server.leader import Follower

    for sent_to_all in (signal.SIGTERM, signal.SIGINT):  # by torchrun: the leader finishes what runs, and says when
        signal.signal(sent_to_all, signal.SIG_IGN)
    Follower(llm).run()


def _load_and_serve(args: argparse.Namespace, key: str | None, listening: socket.socket) -> None:
    llm = _load(args)
    plan = llm.plan

    from ..server.app import Server
    from ..server.metrics import Metrics
    from ..server.worker import Settings, Worker

    settings = Settings(
        rows=args.rows,
        prefixes=args.prefixes,
        queue=args.queue,
        folder=args.sessions,
        most_sessions=args.max_sessions,
        session_seconds=args.session_hours * 3600.0,
    )
    metrics = Metrics()
    worker = Worker(llm, settings, metrics, say)
    server = Server(llm, worker, metrics, _options(args, llm, key))
    worker.start()
    address = f"http://{_written(args.host)}:{listening.getsockname()[1]}"
    say(f"{args.rows} rows of {plan.slots:,} slots, {size(plan.nbytes)} of cache in all; {args.queue} answers may wait")
    say(f"chat at {address}/ and the API at {address}/v1; Ctrl-C finishes what runs and ends")
    asyncio.run(_serve(server, worker, listening))
    worker.drain()
    worker.join()
    if worker.failure is not None:
        raise worker.failure
    say("done")


def _options(args: argparse.Namespace, llm: LLM, key: str | None) -> Options:
    from ..server.door import Options
    from ..server.protocol import Limits

    name = args.name or llm.checkpoint.name
    limits = Limits(
        model=name,
        real_vocab=llm.real_vocab,
        choices=args.rows + args.queue,
        max_tokens=args.max_tokens,
        timeout=float(args.timeout),
    )
    return Options(
        name=name,
        limits=limits,
        max_body=_max_body(args),
        seconds=float(args.timeout),
        key=key,
        origins=tuple(args.allow_origin),
        # Without a key, a page elsewhere whose name leads here could ask; with one, a proxy may call us what it likes.
        hosts=("127.0.0.1", "localhost", "[::1]") if args.host in LOOPBACK and key is None else (),
    )


async def _serve(server: Server, worker: Worker, listening: socket.socket) -> None:
    import uvicorn

    from ..server.http import IDLE, Connection

    class Ending(uvicorn.Server):
        """Signals: the first lets running answers finish, the second does not.  Ends with the worker, in any case."""

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = self.should_exit or not worker.is_alive()
            return await super().on_tick(counter)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
            if self.should_exit:
                worker.stop()
                self.force_exit = True
                for connection in list(self.server_state.connections):
                    loop.call_soon_threadsafe(connection.transport.abort)
            else:
                say("finishing what runs; once more to stop at once")
                worker.drain()
                self.should_exit = True

    config = uvicorn.Config(
        server.app,
        log_level="error",  # who sends junk shall not fill the log
        access_log=False,
        limit_concurrency=CONNECTIONS,
        http=Connection,
        ws="none",
        timeout_keep_alive=int(IDLE),
        h11_max_incomplete_event_size=64 << 10,
        server_header=False,
        lifespan="off",
    )
    server.ready, loop = True, asyncio.get_running_loop()
    await Ending(config).serve(sockets=[listening])


def _key(args: argparse.Namespace) -> str | None:
    if args.api_key is not None and args.api_key_file is not None:
        raise ConfigError("both --api-key and --api-key-file were given: leave one of them out")
    key = args.api_key if args.api_key is not None else os.environ.get("MINILLM_API_KEY")
    if args.api_key_file is not None:
        key = args.api_key_file.read_text("utf-8").strip()
    if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
        raise ConfigError("the API key is empty or has characters that a header cannot carry: use letters and digits")
    return key


def _listen(args: argparse.Namespace) -> socket.socket:
    """Before anything is loaded: a port that is taken is said at once."""
    with suppress(ImportError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16) if hard > 0 else hard, hard))
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    # asyncio sends small pieces at once (TCP_NODELAY) only where the protocol is named; else some wait for 40 ms.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((args.host, args.port))
    except (OSError, OverflowError) as error:
        listening.close()
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot listen on {args.host}:{args.port}: {reason}; choose another --port") from None
    listening.listen(1024)
    return listening


def _written(host: str) -> str:
    return f"[{host}]" if ":" in host else host
