"""Conversations that stay between requests: each is a `Session`, in a row of the cache, in a file, or in both.

A session's row is needed for nobody else as long as rows are free.  When it has been idle for a moment it is saved, if
there is a folder to save it in; then its row may go to another request, and comes back from the file.  Without a
folder an idle session whose row is needed is gone.  Belongs to the worker's thread.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SessionError
from ..llm import LLM
from ..sampling import SamplingParams
from ..saved import saved_notes
from ..session import Session

SUFFIX = ".session"
SAVE_AFTER = 2.0  # seconds of quiet
AGAIN_AFTER = 30.0  # seconds, when a file could not be written


@dataclass
class Kept:
    """Where a session is: row and session as long as it has a row; whether the file is as new."""

    row: int | None = None
    session: Session | None = None
    saved: bool = False
    running: bool = False
    used: float = 0.0  # seconds since 1970, when it last did something
    save_at: float = 0.0  # on the clock of time.monotonic


class Sessions:
    """Sessions by name, the least recently used first."""

    def __init__(self, folder: Path | None, *, most: int, seconds: float, log: Callable[[str], None]) -> None:
        """Finds what is in the folder.  most: how many are kept; seconds: how long an idle one is."""
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # what was said in them is nobody else's business
        self._folder, self._most, self._seconds, self._log = folder, most, seconds, log
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        for leftover in folder.glob(f"*{SUFFIX}.*.tmp") if folder else []:  # of a server that was killed as it saved
            leftover.unlink(missing_ok=True)
        files = sorted(folder.glob(f"*{SUFFIX}"), key=lambda file: file.stat().st_mtime) if folder else []
        for file in files:
            self._kept[file.name.removesuffix(SUFFIX)] = Kept(saved=True, used=file.stat().st_mtime)
        self.tidy()

    def __len__(self) -> int:
        return len(self._kept)

    def __contains__(self, name: str) -> bool:
        return name in self._kept

    def row_of(self, name: str) -> int | None:
        """Where it is, if it has a row."""
        return self._kept[name].row if name in self._kept else None

    def running(self, name: str) -> bool:
        """Whether an answer is being drawn in it."""
        return name in self._kept and self._kept[name].running

    def of_row(self, row: int) -> str | None:
        """Who is in that row."""
        return next((name for name, kept in self._kept.items() if kept.row == row), None)

    def session(self, name: str) -> Session | None:
        """The one that is in a row."""
        return self._kept[name].session if name in self._kept else None

    def idlest(self, rows: Collection[int]) -> int:
        """Of rows that all hold a session, that of the one that was used least lately."""
        return next(kept.row for kept in self._kept.values() if kept.row in rows)  # type: ignore[return-value]

    def notes(self, name: str) -> dict[str, Any] | None:
        """What was written beside a session; None where there is none, or its file cannot be read."""
        kept = self._kept.get(name)
        if kept is None or kept.session is not None:
            return None if kept is None or kept.session is None else kept.session.notes
        try:
            return saved_notes(self._file(name))
        except SessionError as error:
            self._set_aside(name, error)
            return None

    def open(self, name: str, row: int, llm: LLM, params: SamplingParams) -> Session:
        """The session of that name in this row, a new one if there is none.

        Raises SessionError for a file that cannot be used: it is then set aside.
        """
        kept = self._kept.setdefault(name, Kept())
        self._kept.move_to_end(name)
        if kept.session is None:
            kept.session = Session(llm, params)
            if kept.saved:
                try:
                    kept.session.load(self._file(name))
                except SessionError as error:
                    self._set_aside(name, error)
                    raise
        kept.session.use(params)
        kept.row, kept.running, kept.saved, kept.used = row, True, False, time.time()
        return kept.session

    def rest(self, name: str) -> None:
        """Its answer has ended, in one way or another."""
        kept = self._kept.get(name)
        if kept is not None:
            kept.running, kept.used, kept.save_at = False, time.time(), time.monotonic() + SAVE_AFTER

    def leave_row(self, row: int) -> None:
        """Somebody else needs the row: save who is in it, or forget it."""
        name = self.of_row(row)
        if name is None:
            return
        kept = self._kept[name]
        if self._folder is None or not (kept.saved or self._save(name, kept)):
            self.forget(name)
            self._log(
                f"session {name} is gone: its row was needed" + ("" if self._folder else ", and nothing is saved")
            )
        else:
            kept.row = kept.session = None

    def forget(self, name: str) -> bool:
        """Remove it, and its file; whether there was one."""
        kept = self._kept.pop(name, None)
        if kept is not None and self._folder is not None:
            with suppress(OSError):
                self._file(name).unlink(missing_ok=True)
        return kept is not None

    def tidy(self) -> float:
        """Save what has been quiet, and forget what is too old or too many; seconds until there is more to do."""
        now, old = time.monotonic(), time.time() - self._seconds
        idle = [(name, kept) for name, kept in self._kept.items() if not kept.running]
        for position, (name, kept) in enumerate(idle):
            if kept.used < old or len(idle) - position > self._most:
                self.forget(name)
            elif self._folder is not None and not kept.saved and kept.save_at <= now:
                self._save(name, kept)
        waiting = [kept.save_at - now for kept in self._kept.values() if not (kept.saved or kept.running)]
        return min(waiting, default=60.0) if self._folder else 60.0

    def save_all(self) -> None:
        """The server stops."""
        for name, kept in list(self._kept.items()):
            if self._folder is not None and not kept.saved and kept.session is not None:
                self._save(name, kept)

    def forget_rows(self) -> None:
        """What is in the rows can no longer be trusted: sessions go back to their files, or are gone."""
        for name, kept in list(self._kept.items()):
            if kept.row is not None and kept.saved:
                kept.row = kept.session = None
            elif kept.row is not None:
                self.forget(name)

    def _set_aside(self, name: str, error: SessionError) -> None:
        """A file that is damaged, or was saved under other options, which may come back: not ours to delete."""
        del self._kept[name]
        with suppress(OSError):
            file = self._file(name)
            file.replace(file.with_suffix(f"{SUFFIX}.refused"))
        self._log(f"session {name} cannot be used, its file is set aside as {name}{SUFFIX}.refused: {error}")

    def _save(self, name: str, kept: Kept) -> bool:
        assert kept.session is not None
        try:
            kept.session.save(self._file(name))
        except SessionError as error:
            kept.save_at = time.monotonic() + AGAIN_AFTER
            self._log(f"session {name} could not be saved: {error}")
            return False
        kept.saved = True
        return True

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{name}{SUFFIX}"
