"""Ctrl-C while libraries are imported, which takes a second or two."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
