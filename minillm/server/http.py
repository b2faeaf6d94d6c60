"""HTTP/1.1 as uvicorn speaks it, with an end to patience: for clients that never say what they want, or never read.

uvicorn's own timeout begins after a first answer, starts again with every byte, and closes politely, which waits for
those who do not read.  Knows nothing of what is served.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE = 75.0  # seconds, until the head of the first or of the next request has to be there
SLOW_READER = 30.0  # seconds, in which a client has to read some of what is sent


class Connection(H11Protocol):
    """One connection, which is broken off when its client is too slow: then all that waits for it is told."""

    _late: asyncio.TimerHandle | None = None  # runs while no request is being answered
    _stuck: asyncio.TimerHandle | None = None  # runs while the client is behind with reading

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._late, self._stuck):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        self.cycle.body.clear()  # what was sent along and not asked for
        super().on_response_complete()
        self._expect_head()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._expect_reading()

    def resume_writing(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
        super().resume_writing()

    def _expect_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(IDLE, self._end_if_idle)

    def _end_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()

    def _expect_reading(self) -> None:
        self._stuck = self.loop.call_later(SLOW_READER, self._end_if_stuck, self.transport.get_write_buffer_size())

    def _end_if_stuck(self, unread: int) -> None:
        if self.transport.get_write_buffer_size() < unread:
            self._expect_reading()
        else:
            self.transport.abort()
