"""One HTTP exchange at the level of ASGI: bodies of bounded size, events while the client listens, and its leaving.

Bodies are bounded one by one and together, so that clients cannot make the server hold more than was planned.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.types import Receive, Send

from .fields import ApiError

T = TypeVar("T")
SLOW_SENDER = 30.0  # seconds that a body may take to come
BODIES = 4  # times the largest body: what all bodies together may hold


class ClientLeftError(Exception):
    """Nobody listens any more."""


class Bodies:
    """Reads bodies of at most `most` bytes, and of `BODIES` times as many in all."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0

    @asynccontextmanager
    async def json(self, receive: Receive) -> AsyncIterator[Any]:
        """What a body says; counted as long as this is open.  Raises ApiError, ClientLeftError."""
        body = bytearray()
        try:
            async for piece in pieces(receive):
                if len(body) + len(piece) > self.most:
                    raise ApiError(
                        413,
                        f"the body is larger than {self.most:,} bytes: send a shorter prompt, or start the server with "
                        "a larger --max-body",
                        code="body_too_large",
                    )
                if self.held + len(piece) > BODIES * self.most:
                    raise ApiError(429, "too many large requests at once: try again", "rate_limit_error", retry_after=2)
                body += piece
                self.held += len(piece)
            yield await asyncio.to_thread(parsed, bytes(body)) if len(body) > 1 << 16 else parsed(bytes(body))
        finally:
            self.held -= len(body)


async def pieces(receive: Receive) -> AsyncIterator[bytes]:
    """A body as it comes; who takes too long for it would keep others from sending theirs."""
    more, end = True, time.monotonic() + SLOW_SENDER
    while more:
        try:
            message = await within(end - time.monotonic(), receive())
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body has not come within {SLOW_SENDER:g} s: send it at once") from None
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        yield message.get("body", b"")
        more = message.get("more_body", False)


def parsed(body: bytes) -> Any:
    """JSON in UTF-8; ApiError for anything else."""
    try:
        return json.loads(body.decode())
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8: send JSON in UTF-8") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply: JSON of a few levels is expected") from None
    except ValueError as error:  # also whole numbers of thousands of digits
        raise ApiError(400, f"the body is not JSON: {str(error)[:200]}") from None


async def left(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def within(seconds: float, what: Awaitable[T]) -> T:
    """Its result; asyncio.TimeoutError if that takes longer.

    Unlike asyncio.wait_for, which before Python 3.12 forgets that it was cancelled if the result comes at that moment:
    whoever streams to a client that has left would wait for ever.
    """
    task = asyncio.ensure_future(what)
    try:
        await asyncio.wait((task,), timeout=seconds)
    finally:
        task.cancel()  # does nothing where it is done
    if not task.done():
        raise asyncio.TimeoutError
    return task.result()


class EventStream:
    """Server-sent events: the headers go out with the first of them."""

    def __init__(self, send: Send) -> None:
        self._send, self.begun = send, False

    async def begin(self) -> None:
        """Now it is too late for a status other than 200."""
        if self.begun:
            return
        self.begun = True
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self._out({"type": "http.response.start", "status": 200, "headers": raw})

    async def event(self, *values: dict[str, Any]) -> None:
        """Each value as an event."""
        await self.begin()
        text = "".join(f"data: {json.dumps(value, separators=(',', ':'))}\n\n" for value in values)
        if text:
            await self._out({"type": "http.response.body", "body": text.encode(), "more_body": True})

    async def comment(self, text: str) -> None:
        """Keeps the connection alive; clients ignore it."""
        await self.begin()
        await self._out({"type": "http.response.body", "body": f": {text}\n\n".encode(), "more_body": True})

    async def done(self) -> None:
        """The end."""
        await self.begin()
        await self._out({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _out(self, message: dict[str, Any]) -> None:
        try:
            await self._send(message)  # waits for slow readers, as long as http.py does
        except OSError:
            raise ClientLeftError from None
