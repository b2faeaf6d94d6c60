"""Decode steps recorded once and replayed: a CUDA graph for each number of rows, and no host value in any of them.

A step feeds every row the token that it drew last, draws the next one, and moves all positions on by one; what it reads
and writes lies at addresses that never change.  Which rows are due for an eviction only the kernels find out
(triton.py).  The host launches step n + 1 before it reads what step n drew, so that neither waits for the other: a row
that ends by what it drew has been fed that token as well.  That is for rows whose cache is given up then, not for
sessions.

Everything but the recording itself runs on a CPU, too (`Eager`).  Drawing is greedy: samplers live on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..cache import KVCache
from ..errors import CheckpointError, ConfigError
from ..slots import NOTHING, LayerRows, Span
from . import triton

BROKEN = -1  # what is drawn from logits that are no numbers
Drawn = dict[int, int]  # row of the cache -> token id
Unread = tuple[list[int | None], Callable[[], list[int]]]  # whose ids these will be; None has left


class Rows(NamedTuple):
    """What a model asks of a cache."""

    layers: tuple[LayerRows, ...]
    trained: int | None


class Model(Protocol):
    """`model.Transformer`, its layers attending by triton.py."""

    def __call__(self, tokens: Tensor, span: Span, cache: Rows, /) -> Tensor:
        """tokens [B, 1] -> hidden states [B, 1, hidden]."""

    def logits(self, hidden: Tensor, /) -> Tensor:
        """hidden [B, hidden] -> logits [B, V]."""


class Recorder(Protocol):
    """Makes a replay of a step, and fetches what it drew."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What repeats the step.  It may run in the meantime: every row is idle."""

    def fetch(self, ids: Tensor) -> Callable[[], list[int]]:
        """What waits until ids [B], as they are at this moment, are on the host, and returns them."""


class Eager:
    """Replays by running the step again."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step itself."""
        step()
        return step

    def fetch(self, ids: Tensor) -> Callable[[], list[int]]:
        """A copy."""
        copy: Callable[[], list[int]] = ids.clone().tolist
        return copy


class Cuda:
    """CUDA graphs, which share one pool of memory: no two of them ever run at once."""

    def __init__(self, rows: int) -> None:
        self._pool: torch.cuda._POOL_HANDLE | None = None
        self._held = [torch.empty(rows, dtype=torch.int64, pin_memory=True) for _ in range(2)]  # one is being read

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run twice, so that kernels are compiled and libraries have what they keep; then capture."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            step()
        self._pool = graph.pool()
        return graph.replay

    def fetch(self, ids: Tensor) -> Callable[[], list[int]]:
        """Into pinned memory, after what was launched before and beside what comes next."""
        self._held.reverse()
        held, event = self._held[0][: len(ids)], torch.cuda.Event()
        held.copy_(ids, non_blocking=True)
        event.record()

        def read() -> list[int]:
            event.synchronize()
            return held.tolist()

        return read


class Steps:
    """Rows of one cache that decode together: `enter`, then `step` again and again, `leave`; `finish` reads the rest.

    Worked example: rows 2 and 0 enter with the tokens a and b.  The first step() feeds a and b, draws c and d, and
    returns {}; the second feeds c and d and returns {2: c, 0: d}.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, cache: KVCache, recorder: Recorder, *, real_vocab: int | None = None) -> None:
        """Record a step for 1, 2, 4, ... rows, up to the cache's.  real_vocab: ids that may be drawn.

        Raises ConfigError where a step needs the host.
        """
        self._model, self._cache, self._recorder, self._real_vocab = model, cache, recorder, real_vocab
        for layer in cache.layers:
            dtype = torch.float32 if layer.scales is not None else layer.values.dtype
            if not triton.serves_step(layer, dtype):
                raise ConfigError(
                    f"policy '{cache.policy.name}' with its options, in {dtype}, needs the host in every step, so no "
                    "step can be recorded; choose hashevict-plus, hashevict, hashevict-key or window, in 16 or 32 bits"
                )
        most, device = cache.rows, cache.device
        self._tokens = torch.zeros(most, 1, dtype=torch.int64, device=device)  # [B, 1], to be fed
        self._positions = torch.full((most, 1), NOTHING, device=device)  # [B, 1], where
        self._rows = torch.zeros(most, dtype=torch.int64, device=device)  # [B], of the cache
        self._drawn = torch.zeros(most, dtype=torch.int64, device=device)  # [B]
        self._views: dict[int, KVCache] = {}  # by row of the cache, in the order of the batch
        self._unread: Unread | None = None
        batches = [1 << power for power in range(most.bit_length()) if 1 << power < most] + [most]
        self._replays = {batch: recorder.record(partial(self._step, batch)) for batch in reversed(batches)}

    def _step(self, batch: int) -> None:
        """What is recorded.  Rows at NOTHING see nothing, are written nowhere, and stay there."""
        at = self._positions[:batch]  # [B, 1]
        layers = tuple(LayerRows(layer, self._rows[:batch], ()) for layer in self._cache.layers)
        hidden = self._model(self._tokens[:batch], Span(at, at, (), 1), Rows(layers, self._cache.trained))
        best, drawn = self._model.logits(hidden[:, -1])[:, : self._real_vocab].max(-1)  # [B]
        self._tokens[:batch, 0] = drawn
        self._drawn[:batch] = torch.where(best.isfinite(), drawn, BROKEN)
        at += at >= 0

    @torch.inference_mode()
    def enter(self, row: int, view: KVCache, token: int) -> None:
        """A row of the cache, see `KVCache.row`, whose next token this is."""
        assert row not in self._views, "a row enters once"
        place = len(self._views)
        self._views[row] = view
        self._tokens[place], self._positions[place], self._rows[place] = token, view.seen[0], row

    @torch.inference_mode()
    def leave(self, row: int) -> None:
        """The row takes part no more; the last one takes its place."""
        order = list(self._views)
        place, last = order.index(row), len(order) - 1
        for tensor in (self._tokens, self._positions, self._rows):
            tensor[place] = tensor[last]
        self._positions[last] = NOTHING
        order[place] = order[last]
        self._views = {other: self._views[other] for other in order[:last]}
        if self._unread is not None:  # another sequence may enter with its number
            rows, read = self._unread
            self._unread = [None if other == row else other for other in rows], read

    @torch.inference_mode()
    def step(self) -> Drawn:
        """Launch a step of all rows; what the one before drew.

        Raises ContextFullError before, and CheckpointError after, as `KVCache.append` and `Sampler.sample` do.
        """
        for view in self._views.values():
            view.check_room(1)
        for view in self._views.values():
            view.seen = [view.seen[0] + 1]
        count = len(self._views)
        self._replays[min(batch for batch in self._replays if batch >= count)]()
        drawn = self._recorder.fetch(self._drawn[:count])
        before, self._unread = self._unread, ([*self._views], drawn)
        return self._read(before)

    def finish(self) -> Drawn:
        """What the last step drew."""
        before, self._unread = self._unread, None
        return self._read(before)

    def _read(self, unread: Unread | None) -> Drawn:
        if unread is None:
            return {}
        rows, read = unread
        found = {row: token for row, token in zip(rows, read(), strict=True) if row is not None}
        if BROKEN in found.values():
            raise CheckpointError(
                "the model's logits are not finite: the weights are damaged or overflow in this dtype; try float32"
            )
        return found
