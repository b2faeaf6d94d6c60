"""The decode loop of generate.py, for many sequences: rows that read and draw side by side in one cache.

A step is one chunk of one row that still reads its prompt, then one token for every row that draws.  So a long prompt
delays running answers by one chunk at a time, and a step's time is bounded.  Like generate.py this knows token ids
only; who asks, and what becomes of the tokens, is the task's business.

The tokens of a row do not depend on what else is computed: attention is each row's own, chunks have fixed borders, and
products are taken at numbers of rows that round alike (`Engine.batch`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .backends.linear import fewest_alike
from .cache import CacheRows, KVCache
from .errors import MinillmError, RankError
from .generate import Pins, feed, flags_of
from .model import Transformer
from .sampling import Sample, Sampler


class Task(Protocol):
    """A prompt to be read and an answer to be drawn; `read` and `draw` tell what has happened."""

    prompt: Tensor  # [n] token ids, n >= 1
    pins: Pins
    sampler: Sampler
    max_tokens: int

    def read(self, tokens: Tensor, hidden: Tensor) -> None:
        """A chunk of the prompt is in the cache: tokens [1, T], hidden states [1, T, hidden]."""

    def draw(self, sample: Sample) -> bool:
        """A token was drawn; whether another one is wanted.  The last one never enters the cache."""

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


class Engine:
    """Rows of one cache.  `start` gives a row something to do, `step` does some of it, `stop` ends it early.

    Not to be used from two threads at a time.
    """

    def __init__(self, model: Transformer, cache: KVCache, *, chunk: int = 256, rows: int | None = None) -> None:
        """rows: use only the first so many of the cache's."""
        self.model, self.cache, self.chunk = model, cache, chunk
        self.rows = [Row(cache.row(row)) for row in range(cache.rows if rows is None else rows)]
        # Few rows together round as many do, from so many on; those that are missing are filled up.
        most, dtype = len(self.rows), model.model.embed_tokens.weight.dtype
        self.batch = fewest_alike(model.model, most, dtype)
        self.logit_batch = most if model.lm_head is None else fewest_alike(model.lm_head, most, dtype)
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
        row.task = row.chunks = None

    @torch.inference_mode()
    def step(self) -> None:
        """Read one chunk of one prompt, then draw one token in every row whose prompt is read."""
        if self._reading:
            self._read(self._reading[0])
        drawing = self.drawing
        if drawing:
            self._feed(self._draw(drawing))

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

    def _draw(self, drawing: list[int]) -> dict[int, int]:
        """The token drawn in every row that wants another one."""
        hidden = torch.stack([self.rows[number].hidden for number in drawing])  # [n, hidden]
        logits = self.model.logits(filled(hidden, self.logit_batch))  # [B, V]
        drawn = {}
        for number, scores in zip(drawing, logits, strict=False):
            task = self.rows[number].task
            assert task is not None
            try:
                sample = task.sampler.sample(scores)
                if task.draw(sample):
                    drawn[number] = sample.token_id
                else:
                    self._end(number)
            except RankError:
                raise
            except MinillmError as error:
                self._end(number, error)
        return drawn

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


def filled(rows: Tensor, batch: int) -> Tensor:
    """rows [n, ...] and zeros below them, at least `batch` in all."""
    return torch.cat((rows, rows.new_zeros(max(0, batch - len(rows)), *rows.shape[1:])))
