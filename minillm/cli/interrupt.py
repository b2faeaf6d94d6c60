"""Ctrl-C: at once while libraries are imported, between two tokens while an answer is to stay whole."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType

    from ..stream import Stream


@contextmanager
def ctrl_c_ends_at_once() -> Iterator[None]:
    """Exit with status 130 on Ctrl-C, without unwinding: nothing is half-done yet.

    A KeyboardInterrupt would get lost: torch imports NumPy from C and takes whatever goes wrong there for its absence.
    """
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield  # whoever embeds us has ideas of their own about signals
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def ctrl_c_stops(stream: Stream) -> Iterator[None]:
    """Ctrl-C ends the answer between two tokens, so that the cache stays whole; a second one is the usual exception."""

    def stop(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        stream.stop()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
