"""The decode loop of generate.py, for many sequences: rows that read and draw side by side in one cache.

A step is one chunk of one row that still reads its prompt, then one token for every row that draws.  So a long prompt
delays running answers by one chunk at a time, and a step's time is bounded.  Like generate.py this knows token ids
only; who asks, and what becomes of the tokens, is the task's business.

The tokens of a row do not depend on what else is computed: attention is each row's own, chunks have fixed borders, and
products are taken at numbers of rows that round alike (`Engine.batch`).

Where steps are recorded (backends/graph.py), the tokens of a step are fed before the host has read them, as in
ahead.py, but only if that pushes out no token in any row, so that each can be taken back: a step costs about the same
for one row as for all, and is not to be cut in two.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .backends.linear import fewest_alike
from .cache import CacheRows, KVCache
from .errors import MinillmError, RankError
from .generate import Pins, feed, flags_of
from .model import Transformer
from .sampling import Sample, Sampler

if TYPE_CHECKING:
    from .backends.graph import Steps


class Task(Protocol):
    """A prompt to be read and an answer to be drawn; `read` and `draw` tell what has happened."""

    prompt: Tensor  # [n] token ids, n >= 1
    pins: Pins
    sampler: Sampler
    max_tokens: int

    def read(self, tokens: Tensor, hidden: Tensor) -> None:
        """A chunk of the prompt is in the cache: tokens [1, T], hidden states [1, T, hidden]."""

    def draw(self, sample: Sample) -> bool:
        """A token was drawn; whether another one is wanted.  The last one does not stay in the cache."""

    def end(self, error: MinillmError | None) -> None:
        """Nothing more will come: all was drawn, or what `read`, `draw` or the sampler raised."""


@dataclass
class Row:
    """One sequence's place in the cache, and what it does: nothing, reading (there are `chunks`), or drawing."""

    cache: KVCache
    task: Task | None = None
    chunks: Iterator[tuple[Tensor, Tensor]] | None = None
    unread: int = 0  # tokens of the prompt
    hidden: Tensor = field(default_factory=lambda: torch.empty(0))  # [hidden], of the latest token
    logits: Tensor | None = None  # [V], of the latest token, once they are computed


class Engine:
    """Rows of one cache.  `start` gives a row something to do, `step` does some of it, `stop` ends it early.

    Not to be used from two threads at a time.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        *,
        chunk: int = 256,
        rows: int | None = None,
        steps: Steps | None = None,
    ) -> None:
        """rows: use only the first so many of the cache's.  steps: recorded ones of these rows, see Checkpoint."""
        self.model, self.cache, self.chunk, self.steps = model, cache, chunk, steps
        self.rows = [Row(cache.row(row)) for row in range(cache.rows if rows is None else rows)]
        self.batch, self.logit_batch = rows_alike(model, len(self.rows))  # rows that are missing are filled up
        self._reading: deque[int] = deque()
        self._together: tuple[list[int], CacheRows] | None = None

    @property
    def drawing(self) -> list[int]:
        """Rows whose prompt is read."""
        return [number for number, row in enumerate(self.rows) if row.task is not None and row.chunks is None]

    @property
    def busy(self) -> bool:
        """Whether `step` has something to do."""
        return any(row.task is not None for row in self.rows)

    def start(self, number: int, task: Task) -> None:
        """Feed the task's prompt after what the row has seen so far, then draw."""
        row = self.rows[number]
        assert row.task is None, "a row does one thing at a time"
        row.task, row.unread = task, len(task.prompt)
        row.chunks = feed(self.model, row.cache, task.prompt[None], self.chunk, task.pins)
        self._reading.append(number)

    def stop(self, number: int) -> None:
        """Forget what the row is doing; its cache is whole, and stays as it is."""
        row = self.rows[number]
        if row.chunks is not None:
            self._reading.remove(number)
        row.task = row.chunks = row.logits = None

    @torch.inference_mode()
    def step(self) -> None:
        """Read one chunk of one prompt, then draw one token in every row whose prompt is read."""
        if self._reading:
            self._read(self._reading[0])
        drawing = self.drawing
        if not drawing:
            return
        if self.steps is None:
            drawn = self._draw(drawing)
            self._feed(self._tell(drawing, [facts.tolist() for facts in drawn]))
        else:
            self._step_ahead(self.steps, drawing)

    def _read(self, number: int) -> None:
        row = self.rows[number]
        assert row.chunks is not None
        assert row.task is not None
        tokens, hidden = next(row.chunks)  # [1, T], [1, T, hidden]
        row.unread -= tokens.shape[1]
        row.hidden = hidden[0, -1]
        self._reading.rotate(-1)  # the next prompt has its turn
        try:
            row.task.read(tokens, hidden)
        except RankError:  # which ends all rows
            raise
        except MinillmError as error:
            return self._end(number, error)
        if row.unread == 0:
            self._reading.remove(number)
            row.chunks = None
            if row.task.max_tokens < 1:
                self._end(number)
        return None

    def _draw(self, drawing: list[int]) -> list[Tensor]:
        """What every row's sampler draws, see `Sampler.draw`: on the device."""
        rows = [self.rows[number] for number in drawing]
        without = [row for row in rows if row.logits is None]
        if without:
            hidden = torch.stack([row.hidden for row in without])  # [n, hidden]
            for row, logits in zip(without, self.model.logits(filled(hidden, self.logit_batch)), strict=False):
                row.logits = logits  # [V]
        drawn = []
        for row in rows:
            assert row.task is not None
            assert row.logits is not None
            drawn.append(row.task.sampler.draw(row.logits))
            row.logits = None
        return drawn

    def _tell(self, drawing: list[int], read: list[list[float]]) -> dict[int, int]:
        """Tell the tasks what was drawn; the token of every row that wants another one."""
        wanted = {}
        for number, facts in zip(drawing, read, strict=True):
            row = self.rows[number]
            assert row.task is not None
            error = None
            try:
                sample = row.task.sampler.note(facts)
                if row.task.draw(sample):
                    wanted[number] = sample.token_id
                    continue
            except RankError:  # which ends all rows
                raise
            except MinillmError as raised:
                error = raised
            row.cache.take_back_()
            self._end(number, error)
        return wanted

    def _step_ahead(self, steps: Steps, drawing: list[int]) -> None:
        """Draw, feed if it can be taken back, and only then read, tell, and feed what was not fed."""
        drawn = dict(zip(drawing, self._draw(drawing), strict=True))
        read = steps.fetch(list(drawn.values()))
        ahead = not any(self.rows[number].cache.due for number in drawing)
        if ahead:
            self._launch(steps, drawn)
        wanted = self._tell(drawing, read())
        if wanted and not ahead:
            self._launch(steps, {number: drawn[number] for number in wanted})
        for number in wanted:
            self.rows[number].cache.keep()

    def _launch(self, steps: Steps, drawn: dict[int, Tensor]) -> None:
        """A recorded step that feeds every row what was drawn for it."""
        positions = [self.rows[number].cache.feed_ahead()[0] for number in drawn]
        for number, logits in zip(drawn, steps.feed(list(drawn), positions, list(drawn.values())), strict=True):
            self.rows[number].logits = logits  # [V]

    def _feed(self, drawn: dict[int, int]) -> None:
        """One token into every row that was drawn for."""
        numbers = list(drawn)
        if not numbers:
            return
        if self._together is None or self._together[0] != numbers:
            views = [self.rows[number].cache for number in numbers]
            batch = max(len(numbers), self.batch)
            self._together = numbers, CacheRows(self.cache, numbers, views, batch)
        together = self._together[1]
        tokens = filled(torch.tensor(list(drawn.values()))[:, None], together.batch)  # [B, 1]
        span = together.append(flags_of(self.cache, tokens))
        hidden = self.model(tokens.to(self.cache.device), span, together)  # [B, 1, hidden]
        for number, latest in zip(numbers, hidden[:, -1], strict=False):
            self.rows[number].hidden = latest

    def _end(self, number: int, error: MinillmError | None = None) -> None:
        task = self.rows[number].task
        assert task is not None
        self.stop(number)
        task.end(error)


def rows_alike(model: Transformer, rows: int) -> tuple[int, int]:
    """The fewest rows of a step, and of its logits, that round as `rows` do: see `Linear.fewest_alike`."""
    dtype, head = model.model.embed_tokens.weight.dtype, model.lm_head
    return fewest_alike(model.model, rows, dtype), rows if head is None else fewest_alike(head, rows, dtype)


def filled(rows: Tensor, batch: int) -> Tensor:
    """rows [n, ...] and zeros below them, at least `batch` in all."""
    return torch.cat((rows, rows.new_zeros(max(0, batch - len(rows)), *rows.shape[1:])))
