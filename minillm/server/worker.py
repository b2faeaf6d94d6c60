"""The one thread that owns the model: it gives rows to requests, lets the engine step, and keeps sessions.

Everybody else talks to it by `submit`, `ask` and `drain`, and hears from it by the events of a Call.  A request is
refused at once or served: as many wait as the queue holds, and every row has its memory from the start.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..answer import Answer
from ..cache import KVCache
from ..engine import Engine
from ..errors import MinillmError, RankError, SessionError
from ..llm import LLM
from ..memory import trim
from ..results import Usage
from ..session import Session
from .call import Call, Choice
from .fields import ApiError
from .leader import Leader
from .metrics import Metrics
from .prefixes import Prefixes
from .prompting import refusal
from .refusals import broken, busy_session, lost, no_session, shutting_down, too_late
from .sessions import Sessions

T = TypeVar("T")
QUIET = 1.0  # seconds without anything to do, after which freed memory is handed back and other processes are met
STRETCHES = 256  # of a conversation, in what `remembered` tells


@dataclass(frozen=True)
class Settings:
    """rows: answers drawn together; prefixes: beginnings that are kept; queue: answers that may wait.

    folder: where sessions are saved, if at all; most_sessions, session_seconds: how many are kept, and how long.
    """

    rows: int
    prefixes: int = 0
    queue: int = 64
    folder: Path | None = None
    most_sessions: int = 100
    session_seconds: float = 86_400.0


class Worker(threading.Thread):
    """Start it, `submit` calls, `drain` it."""

    def __init__(self, llm: LLM, settings: Settings, metrics: Metrics, log: Callable[[str], None]) -> None:
        """llm: over a cache of rows + prefixes rows."""
        super().__init__(name="minillm worker", daemon=True)
        self._settings, self._metrics, self._log = settings, metrics, log
        self._leader = Leader.of(llm)
        steps = llm.checkpoint.recorded(llm.model, llm.cache, settings.rows)
        self.engine = Engine(llm.model, llm.cache, chunk=llm.chunk, rows=settings.rows, steps=steps)
        self._llms = [_of_row(llm, row.cache, self._leader) for row in self.engine.rows]
        spare = range(settings.rows, settings.rows + settings.prefixes)
        self._prefixes = Prefixes([llm.cache.row(row) for row in spare], llm.chunk, self._leader.copy_)
        self.sessions = Sessions(
            settings.folder, most=settings.most_sessions, seconds=settings.session_seconds, log=log
        )
        self._changed = threading.Condition()
        self._waiting: deque[Choice] = deque()
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running: dict[int, Choice] = {}  # by row
        self._draining = self._stopping = False
        self._trimmed, self._met = True, 0.0
        self.failure: RankError | None = None  # what ended the thread, if it was not drained
        self._threads = torch.get_num_threads()

    # --- for other threads ---

    def submit(self, call: Call) -> None:
        """Queue a call.  Raises ApiError where it cannot be served now."""
        choices = call.choices()
        with self._changed:
            if self._draining:
                raise shutting_down()
            idle = self._settings.rows - len(self._running)
            if len(self._waiting) + len(choices) > self._settings.queue + idle:
                raise ApiError(
                    429,
                    f"{len(self._waiting)} answers wait already, and the queue holds {self._settings.queue}: try again",
                    "rate_limit_error",
                    code="queue_full",
                    retry_after=1 + len(self._waiting) // self._settings.rows,
                )
            self._waiting += choices
            self._changed.notify()

    def leave(self, call: Call) -> None:
        """Nobody listens to a call any more: its rows are free within a step."""
        with self._changed:
            call.over = True
            self._changed.notify()

    def ask(self, order: Callable[[], T]) -> Future[T]:
        """Have something done by the worker's thread, between two steps.  Raises ApiError where it is too late."""
        future: Future[T] = Future()
        with self._changed:
            if self._draining:  # the thread may have ended
                raise shutting_down()
            self._orders.append((order, future))
            self._changed.notify()
        return future

    def drain(self) -> None:
        """Take no more, refuse what waits, finish what runs, save sessions, and end."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def stop(self) -> None:
        """The same, without finishing what runs."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify()

    @property
    def draining(self) -> bool:
        """Whether nothing is taken any more."""
        return self._draining

    @property
    def waiting(self) -> int:
        """Answers that have no row yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Answers that have one."""
        return len(self._running)

    def describe(self, name: str) -> dict[str, Any]:
        """What is remembered of a session; ApiError where there is none.  For `ask`."""
        if name not in self.sessions:
            raise no_session(name)
        session = self.sessions.session(name)
        if session is None:  # in its file: it has not changed since somebody last asked
            return {"id": name, "resident": False}
        usage = session.usage()
        facts = {"seen_tokens": usage.seen_tokens, "kept_tokens": usage.kept_tokens}
        facts |= {"evicted_tokens": usage.evicted_tokens, "slots": session.llm.plan.slots}
        return {"id": name, "resident": True, **facts, "remembered": remembered(session, usage)}

    def session_notes(self, name: str) -> dict[str, Any] | None:
        """What a session was begun with; None where there is none, ApiError where it is in use.  For `ask`."""
        if self.sessions.running(name):
            raise busy_session(name)
        return self.sessions.notes(name)

    def forget(self, name: str) -> None:
        """Delete a session; ApiError where there is none, or it is in use.  For `ask`."""
        if self.sessions.running(name):
            raise busy_session(name)
        if not self.sessions.forget(name):
            raise no_session(name)

    # --- the thread ---

    def run(self) -> None:
        """Until drained, or until a process is gone that computes the model, too."""
        torch.set_num_threads(self._threads)  # a thread has a number of its own
        try:
            while not self._done():
                self._try_turn()
            self.sessions.save_all()
            self._leader.end()
        except RankError as error:
            self.failure = error
            self._fail_all(lost())
            self.stop()
            self._turn()  # who waits hears of it

    def _try_turn(self) -> None:
        try:
            self._turn()
        except RankError:
            raise
        except Exception as error:  # a bug: nobody's answer can be trusted, but the next one's can
            self._log(f"an answer failed, which is a bug of minillm: {error!r}")
            self._fail_all(broken())
            if self._leader.ranks > 1:
                raise RankError("other processes may be elsewhere in the model after this: start all again") from error

    def _done(self) -> bool:
        return self._draining and not (self._running or self._waiting or self._orders)

    def _turn(self) -> None:
        """Hear what is new, give rows to who waits, and step."""
        pause, quiet = self.sessions.tidy(), False
        with self._changed:
            if not (self._waiting or self._running or self._orders or self._draining):
                waits = self._trimmed and self._leader.ranks == 1
                quiet = not self._changed.wait(max(0.05, pause if waits else min(pause, QUIET)))
            orders = list(self._orders)
            self._orders.clear()
        for order, future in orders:
            _obey(order, future)
        self._drop()
        self._admit()
        if not (self.engine.busy or self._draining) and time.monotonic() - self._met > QUIET:
            self._leader.here()
            self._met = time.monotonic()
        if quiet and not self._trimmed:
            trim()
            self._trimmed = True
        if self.engine.busy:
            self._trimmed = False
            begun = time.perf_counter()
            self.engine.step()
            self._metrics.step.observe(time.perf_counter() - begun)

    def _drop(self) -> None:
        """Whose client has left, or whose time is up, or whom a shutdown does not wait for."""
        now = time.monotonic()
        with self._changed:
            waiting = list(self._waiting)
        for choice in [*waiting, *self._running.values()]:
            if choice.call.deadline <= now and not choice.call.over:
                choice.call.fail(too_late())
                self._metrics.left.labels("timeout").inc()
        if self._draining:
            for choice in [*waiting, *(self._running.values() if self._stopping else ())]:
                choice.call.fail(shutting_down())
        with self._changed:
            self._waiting = deque(choice for choice in self._waiting if not choice.call.over)
        for row, choice in list(self._running.items()):
            if choice.call.over:
                self.engine.stop(row)
                choice.on_end()

    def _admit(self) -> None:
        """Give a row to each of those who wait, in order, as long as there are rows."""
        while self._waiting and len(self._running) < self._settings.rows:
            with self._changed:
                choice = self._waiting.popleft()
            try:
                self._check_session(choice.call)
                self._start(self._row_for(choice), choice)
            except ApiError as error:
                self._refuse(choice, error)
            except SessionError as error:
                self._refuse(choice, ApiError(404, str(error), "not_found_error", "session", "session_not_found"))
            except RankError:
                self._refuse(choice, lost())
                raise
            except MinillmError as error:
                self._refuse(choice, refusal(error, choice.call.ask))
            except Exception:
                self._refuse(choice, broken())
                raise

    def _check_session(self, call: Call) -> None:
        """Its prompt was written for a session that is there, or for one that begins."""
        name = call.ask.session
        if name is not None and self.sessions.running(name):
            raise busy_session(name)
        if name is not None and call.goes_on != (name in self.sessions):
            raise no_session(name) if call.goes_on else busy_session(name)

    def _row_for(self, choice: Choice) -> int:
        """The row of its session; else one that nobody uses; else that of the session that was idle for longest."""
        free = [row for row in range(self._settings.rows) if row not in self._running]
        name = choice.call.ask.session
        own = None if name is None else self.sessions.row_of(name)
        if own is not None and own in free:
            return own
        empty = [row for row in free if self.sessions.of_row(row) is None]
        if empty:
            return empty[0]
        row = self.sessions.idlest(free)
        self.sessions.leave_row(row)
        return row

    def _start(self, row: int, choice: Choice) -> None:
        call, llm = choice.call, self._llms[row]
        name, cached = call.ask.session, 0
        self._running[row] = choice
        choice.on_end = lambda: self._ended(row, choice)
        if name is not None:
            session = self.sessions.open(name, row, llm, choice.params)
            session.notes |= call.notes
            answer = session.begin(choice.tokens, continuation=call.continuation)
        else:
            session = Session(llm, choice.params)
            answer, cached = self._begin(session, choice)
        choice.begin(answer, self._metrics, cached=cached)
        self.engine.start(row, choice)

    def _begin(self, session: Session, choice: Choice) -> tuple[Answer, int]:
        """An answer to a prompt from its first token, and how many of its tokens are restored instead of read."""
        cache, tokens = session.llm.cache, choice.tokens
        session.llm.plan.require_room(len(tokens))
        cache.reset()
        beginnings = self._prefixes.beginnings(tokens)
        cached = 0 if choice.params.prompt_logprobs is not None else self._prefixes.restore_(cache, beginnings)
        wanted = self._prefixes.worth_keeping(beginnings)
        if wanted > cached:

            def keep(read: int) -> None:
                if read == wanted:
                    self._prefixes.keep(beginnings, read, cache)

            choice.on_read = keep
        if cached:
            session.sampler.observe_prompt(tokens[:cached])
            session.latest = session.llm.owner = object()
            self._metrics.restored.inc(cached)
        return session.begin(tokens[cached:], continuation=choice.call.continuation), cached

    def _refuse(self, choice: Choice, error: ApiError) -> None:
        choice.on_end()
        choice.call.fail(error)

    def _ended(self, row: int, choice: Choice) -> None:
        if self._running.get(row) is choice:
            del self._running[row]
        name = choice.call.ask.session
        if name is not None and self.sessions.row_of(name) == row:
            self.sessions.rest(name)

    def _fail_all(self, error: ApiError) -> None:
        for row, choice in list(self._running.items()):
            choice.call.fail(error)
            self.engine.stop(row)
        self._running.clear()
        self.sessions.forget_rows()


def remembered(session: Session, usage: Usage) -> list[float]:
    """For equal stretches of a session from its first token to its last: the share of layers and heads that hold it.

    Of the heads that are here, where several processes have some each.
    """
    seen, cache = usage.seen_tokens, session.llm.cache
    if seen == 0:
        return []
    bins = min(STRETCHES, seen)
    last = torch.tensor([[seen - 1]], device=cache.device)  # [1, 1]
    counts, holders = torch.zeros(bins), 0
    for layer in cache.layers:
        kept = layer.can_see(last)[0, :, 0]  # [Hkv, S]
        at = layer.positions[0][kept].to(torch.int64) * bins // seen  # [n]
        counts += torch.bincount(at.cpu(), minlength=bins)
        holders += len(kept)
    edges = torch.arange(bins + 1) * seen
    first = (edges + bins - 1) // bins  # the first position of each stretch
    return (counts / (holders * first.diff().clamp(min=1))).tolist()


def _of_row(llm: LLM, cache: KVCache, leader: Leader) -> LLM:
    """An LLM over one row; several share a model."""
    one = copy(llm)
    one.cache, one.owner, one.plan, one.team = cache, None, replace(llm.plan, rows=1), leader
    one.steps = None  # the engine has them
    return one


def _obey(order: Callable[[], T], future: Future[T]) -> None:
    if future.set_running_or_notify_cancel():
        try:
            future.set_result(order())
        except RankError:  # the next step, or the next moment without one, will meet it, too
            future.set_exception(lost())
        except Exception as error:
            future.set_exception(error)
