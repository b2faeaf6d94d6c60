"""One request on its way through the worker: its answers, each a task of the engine, tell what happens as events.

Events go to whoever holds the connection, by a function that may be called from the worker's thread.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from ..answer import Answer
from ..errors import MemoryPromiseError, MinillmError
from ..results import TokenLogprob
from ..sampling import Sample
from .fields import ApiError
from .metrics import Metrics
from .protocol import Ask, Finished, Piece


@dataclass(frozen=True)
class Reading:
    """So many tokens of a prompt are read, and so many there are."""

    read: int
    tokens: int


Event = Reading | Piece | Finished | ApiError


class Call:
    """What one request asks for, and whether somebody still listens."""

    def __init__(
        self,
        ask: Ask,
        prompts: Sequence[Tensor],
        emit: Callable[[Event], None],
        *,
        continuation: bool,
        deadline: float,
        texts: Sequence[str] = (),
        goes_on: bool = False,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """prompts: token ids [n] each.  deadline: on the clock of time.monotonic.  texts: the prompts, to be echoed.

        goes_on: the prompt was written for a session that there is.  notes: to be kept with the session.
        """
        self.goes_on, self.notes = goes_on, dict(notes or {})
        self.ask, self.prompts, self.emit, self.continuation = ask, prompts, emit, continuation
        self.deadline, self.texts = deadline, texts
        self.begun = time.monotonic()
        self.over = False  # nobody listens any more: set by whoever held the connection, or after an error

    def choices(self) -> list[Choice]:
        """The answers to be drawn."""
        return [Choice(self, index) for index in range(len(self.prompts) * self.ask.n)]

    def fail(self, error: ApiError) -> None:
        """End all of it."""
        if not self.over:
            self.over = True
            self.emit(error)


class Choice:
    """One answer: waits, then is a Task of the engine (see there), then has ended."""

    def __init__(self, call: Call, index: int) -> None:
        self.call, self.index = call, index
        self.tokens = call.prompts[index // call.ask.n]  # [n] what has to be in the cache before the answer
        params = call.ask.params
        self.params = params if params.seed is None else replace(params, seed=_seed(params.seed, index % call.ask.n))
        self.on_read: Callable[[int], None] = lambda read: None  # noqa: ARG005  # for the prefixes
        self.on_end: Callable[[], None] = lambda: None

    def begin(self, answer: Answer, metrics: Metrics, *, cached: int = 0) -> None:
        """It has a row.  cached: tokens of the prompt that did not have to be read."""
        self.answer, self.metrics, self.cached = answer, metrics, cached
        assert isinstance(answer.prompt, Tensor)
        self.prompt, self.pins, self.sampler = answer.prompt, answer.pins, answer.sampler
        self.max_tokens = answer.max_tokens
        self._held: deque[tuple[int, TokenLogprob]] = deque()  # tokens whose text is not shown yet, and where it begins
        self._shown, self._told = 0, 0.0
        answer.begin()
        metrics.queued.observe(time.monotonic() - self.call.begun)

    def read(self, tokens: Tensor, hidden: Tensor) -> None:
        self.answer.read(tokens, hidden)
        self.metrics.prompt_tokens.inc(tokens.shape[1])
        read, count = self.answer.prompt_tokens, len(self.prompt)
        self.on_read(self.cached + read)
        if read < count:
            self.call.emit(Reading(self.cached + read, self.cached + count))
        elif self.call.ask.echo:
            self._echo()

    def draw(self, sample: Sample) -> bool:
        now, begins = time.monotonic(), self.answer.decoded
        (self.metrics.between if self._told else self.metrics.first).observe(now - (self._told or self.call.begun))
        self._told = now
        text = self.answer.draw(sample)
        self.metrics.completion_tokens.inc()
        if self.answer.logprobs:
            self._held.append((begins, self.answer.logprobs[-1]))
        self._tell(text)
        if self.answer.over:
            return False
        self.answer.session.pending = []  # the engine feeds it within this very step
        return True

    def end(self, error: MinillmError | None) -> None:
        """See engine.Task; tells the end to whoever listens."""
        if error is not None:
            self.on_end()
            status = 503 if isinstance(error, MemoryPromiseError) else 500
            return self.call.fail(ApiError(status, str(error), "server_error"))
        self._tell(self.answer.close(), last=True)
        result = self.answer.result  # asks other processes: if they are gone, the call has not ended yet
        self.on_end()
        usage = replace(result.usage, prompt_tokens=self.cached + len(self.prompt))
        self.metrics.ended(result.finish_reason, usage)
        self.call.emit(Finished(self.index, result.finish_reason, usage, self.cached, result.seed))
        return None

    def _tell(self, text: str, *, last: bool = False) -> None:
        """Text and the tokens that it shows; at last those without text, too, such as the one that ended it all."""
        self._shown += len(text)
        ready, rest = [], last and not self.answer.cut
        while self._held and (rest or self._held[0][0] < self._shown):
            ready.append(self._held.popleft()[1])
        if text or ready:
            ids = tuple(entry.token_id for entry in ready)
            self.call.emit(Piece(self.index, text, tuple(ready), token_ids=ids))

    def _echo(self) -> None:
        number = self.index // self.call.ask.n
        logprobs = tuple(self.answer.prompt_logprobs[-len(self.tokens) :])  # without a session's pending token
        ids = tuple(self.tokens.tolist()) if logprobs else ()
        self.call.emit(Piece(self.index, self.call.texts[number], logprobs, prompt=True, token_ids=ids))


def _seed(seed: int, choice: int) -> int:
    """Several answers to one prompt are drawn by different seeds, the first by that which was asked for."""
    most = 2**63
    return (seed + choice + most) % (2 * most) - most
