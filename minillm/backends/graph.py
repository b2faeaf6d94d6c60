"""Decode steps recorded once and replayed: a CUDA graph for each number of rows, and no host value in any of them.

A step feeds every row one token and leaves the logits of what comes next; all that it reads and writes lies at
addresses that never change.  Which rows are due for an eviction only the kernels find out (triton.py).  Tokens are
drawn outside (sampling.py), put into place without the host having seen them, and read while the next step runs:

    drawn = sampler.draw(logits[0])              # on the device
    read = steps.fetch([drawn])                  # on its way to the host
    logits = steps.feed([0], [position], [drawn])  # launched
    sample = sampler.note(read()[0])             # waits for the copy, not for the step

Who may feed a token before it is known is for the loops to say (ahead.py, engine.py).  Everything but the recording
itself runs on a CPU, too (`Eager`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import ClassVar, NamedTuple, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

from ..cache import KVCache
from ..sampling import MOST_FACTS
from ..slots import NOTHING, LayerRows, Span


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
    """Makes a replay of a step, and fetches what was drawn."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """What repeats the step.  It may run in the meantime: every row is idle."""

    def fetch(self, numbers: Tensor) -> Callable[[], list[float]]:
        """What waits until numbers [n], as they are at this moment, are on the host; to be read before the next."""


class Eager:
    """Replays by running the step again."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """The step itself."""
        step()
        return step

    def fetch(self, numbers: Tensor) -> Callable[[], list[float]]:
        """A copy."""
        copy: Callable[[], list[float]] = numbers.clone().tolist
        return copy


class Cuda:
    """CUDA graphs, which share one pool of memory: no two of them ever run at once.

    And one stream, as cuBLAS keeps a workspace for each.  A graph that goes frees the workspace of its stream (torch
    2.13), and torch hands out 32 streams in turn: one is taken that no other recorder has.
    """

    _living: ClassVar[WeakSet[Cuda]] = WeakSet()

    def __init__(self, rows: int) -> None:
        self._pool: torch.cuda._POOL_HANDLE | None = None
        taken = {other._stream for other in self._living}
        streams = (torch.cuda.Stream() for _ in range(32))
        self._stream: torch.cuda.Stream = next((one for one in streams if one not in taken), torch.cuda.Stream())
        self._living.add(self)
        self._held = torch.empty(rows * MOST_FACTS, pin_memory=True)
        self._copied = torch.cuda.Event()

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        """Run twice, so that kernels are compiled and libraries have what they keep; then capture."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            step()
            step()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            step()
        self._pool = graph.pool()
        return graph.replay

    def fetch(self, numbers: Tensor) -> Callable[[], list[float]]:
        """Into pinned memory, after what was launched before and beside what comes next."""
        held = self._held[: len(numbers)]
        held.copy_(numbers, non_blocking=True)
        self._copied.record()

        def read() -> list[float]:
            self._copied.synchronize()
            return held.tolist()

        return read


class Steps:
    """Decode steps of some rows of one cache.  Recorded when it is made: nothing is allocated later.

    Invariant: row and position of every place in the batch lie on the device, as `_places` says (None: a step was cut
    off); a step moves all positions on by one, so that only rows that come, leave or were taken back are told to the
    device.
    """

    @torch.inference_mode()
    def __init__(
        self, model: Model, cache: KVCache, recorder: Recorder, *, rows: int | None = None, fewest: int = 1
    ) -> None:
        """Record a step for every batch: `fewest` rows, the powers of two above, and `rows` (None: the cache's).

        fewest: so many round as `rows` do, see `engine.rows_alike`; places that nobody takes are idle.
        """
        self._model, self._cache, self._recorder = model, cache, recorder
        most, device = rows or cache.rows, cache.device
        self._tokens = torch.zeros(most, 1, dtype=torch.int64, device=device)  # [B, 1], to be fed
        self._positions = torch.full((most, 1), NOTHING, device=device)  # [B, 1], where
        self._rows = torch.zeros(most, dtype=torch.int64, device=device)  # [B], of the cache
        self._logits = torch.zeros(most, cache.config.vocab_size, device=device)  # [B, V] float32
        self._places: list[tuple[int, int] | None] = [(0, NOTHING)] * most  # row and position
        powers = (1 << power for power in range(most.bit_length()))
        batches = sorted({fewest, *(power for power in powers if power > fewest), most})
        # The largest first: the others find room in its memory.
        replays = {batch: recorder.record(partial(self._step, batch)) for batch in reversed(batches)}
        self._replays = dict(sorted(replays.items()))

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """What lies there from the start: tokens [B, 1], positions [B, 1], rows [B], logits [B, V]."""
        return self._tokens, self._positions, self._rows, self._logits

    def _step(self, batch: int) -> None:
        """What is recorded.  Rows at NOTHING see nothing, are written nowhere, and stay there."""
        at = self._positions[:batch]  # [B, 1]
        layers = tuple(LayerRows(layer, self._rows[:batch], ()) for layer in self._cache.layers)
        hidden = self._model(self._tokens[:batch], Span(at, at, (), 1), Rows(layers, self._cache.trained))
        self._logits[:batch].copy_(self._model.logits(hidden[:, -1]))  # [B, V]
        at += at >= 0

    @torch.inference_mode()
    def feed(self, rows: Sequence[int], positions: Sequence[int], drawn: Sequence[Tensor]) -> Tensor:
        """Launch a step: the token that each `drawn` begins with, see `Sampler.draw`, enters its row at its position.

        Logits [n, V] of these rows, in the same memory until the next step; the host waits for nothing.
        """
        count = len(rows)
        batch = next(batch for batch in self._replays if batch >= count)
        wanted = [*zip(rows, positions, strict=True), *[(0, NOTHING)] * (batch - count)]
        known, self._places[:batch] = self._places[:batch], [None] * batch
        for place, (row, position) in enumerate(wanted):
            if known[place] != (row, position):
                self._rows[place].fill_(row)
                self._positions[place].fill_(position)
        self._tokens[:count, 0].copy_(torch.cat([one[:1] for one in drawn]))
        self._replays[batch]()
        self._places[:batch] = [(row, position + (position >= 0)) for row, position in wanted]
        return self._logits[:count]

    @torch.inference_mode()
    def fetch(self, drawn: Sequence[Tensor]) -> Callable[[], list[list[float]]]:
        """What gives the numbers of every `drawn` to the host; it waits for what was launched before, and no more."""
        read = self._recorder.fetch(torch.cat(tuple(drawn)))

        def parts() -> list[list[float]]:
            numbers = iter(read())
            return [list(islice(numbers, len(one))) for one in drawn]

        return parts


def recorder_for(device: torch.device, rows: int) -> Recorder:
    """Graphs on CUDA; elsewhere, where kernels are interpreted, the steps themselves."""
    return Cuda(rows) if device.type == "cuda" else Eager()


def refusal(cache: KVCache, dtype: torch.dtype) -> str | None:
    """Why no step of this cache, computed in dtype, can be recorded; None where it can.  A cache on meta will do."""
    from . import triton

    if cache.policy.needs_kinds or not all(triton.serves_step(layer, dtype) for layer in cache.layers):
        return f"policy '{cache.policy.name}' with its options needs the host in every step"
    return None


def served_by(cache: KVCache, dtype: torch.dtype) -> dict[str, str]:
    """Who evicts, writes and attends in a step of one token computed in dtype: "triton", or else "torch".

    Of the layer with the most slots; all are alike in what else decides it: policy, dtype and width of a head.
    """
    from . import triton

    layer = max(cache.layers, key=lambda layer: layer.retention.slots)
    whole = triton.serves_step(layer, dtype)
    served = {"eviction": whole, "write": whole, "attention": triton.serves_attention(layer, dtype)}
    return {what: "triton" if kernels else "torch" for what, kernels in served.items()}
