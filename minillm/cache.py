"""The bounded KV cache: a fixed number of slots per layer, allocated once, and how big all of it is.

What happens in one layer's slots is slots.py's business.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import ContextFullError
from .slots import NOTHING, LayerCache, LayerRows, Span

if TYPE_CHECKING:
    from .eviction import EvictionPolicy, Retention, TensorSpec

MAX_POSITION = torch.iinfo(torch.int32).max
QUERY_BLOCK = 64  # queries that attend together, at most ...
SCORE_BYTES = 4 << 20  # ... and so many fewer that their float32 scores over all slots stay below this

PositionMode = Literal["absolute", "window"]
Overflow = Literal["evict", "warn", "error"]


class KVCache:
    """The caches of all layers and the number of tokens each row has seen.

    Append-only: positions come from `append` and nowhere else, so no token is written twice.  Only a session may take
    the last ones back, and only while nothing has been evicted (session.py).
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: EvictionPolicy,
        retentions: Retention | Sequence[Retention],
        *,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        int8: bool = False,
        position_mode: PositionMode = "absolute",
        on_overflow: Overflow = "evict",
    ) -> None:
        """Allocate everything: the slots of each layer (one Retention for all, or one each), for `rows` sequences.

        int8: store keys and values in 8 bits.  position_mode "window": the length that the model was trained on is a
        sliding window, and the sinks always lie just behind the oldest token in it; so do, at their distance from the
        sinks, tokens that were pinned before that length was reached.  on_overflow: what a token that
        finds no free slot means: another one goes, silently or with a warning the first time, or an error.
        """
        layers = config.num_hidden_layers
        self.retentions = tuple(retentions) if isinstance(retentions, Sequence) else (retentions,) * layers
        self.config = config
        self.policy, self.rows, self.device, self.on_overflow = policy, rows, torch.device(device), on_overflow
        self.trained = config.max_position_embeddings if position_mode == "window" else None
        self.kinds: Tensor | None = None  # [V] uint8 flags of every token id, for policies that need them
        self.layers = []
        for index, (window, retention) in enumerate(zip(config.sliding_windows, self.retentions, strict=True)):
            specs = layer_specs(config, policy, retention, rows=rows, dtype=dtype, int8=int8)
            made = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in specs.items()}
            for name, constant in policy.constants(config, index).items():
                made[name].copy_(constant)
            # Sinks stay visible from afar only where the model itself was trained to see as far as that.
            far = self.trained is not None and (window is None or window >= self.trained)
            self.layers.append(
                LayerCache(
                    index,
                    keys=made.pop("keys"),
                    values=made.pop("values"),
                    scales=made.pop("scales", None),
                    positions=made.pop("positions"),
                    flags=made.pop("flags"),
                    free=made.pop("free"),
                    state=made,
                    slot_state=tuple(policy.slot_state(config)),
                    policy=policy,
                    retention=retention,
                    window=self.trained - retention.sinks if far and self.trained is not None else window,
                    far=far,
                    query_block=query_block(config, retention, rows),
                    first_head=config.first_kv_head,
                )
            )
        self._fewest = min(retention.slots for retention in self.retentions)
        self._unlike = tuple({layer.retention: layer for layer in self.layers}.values())  # one layer of each kind
        self.fixed = frozenset(policy.constants_spec(config))  # names of what needs neither reset nor saving
        self.seen = [0] * rows
        self.number = 0  # which row of a larger cache this one is, see `row`
        self.ahead = False  # whether the next token is fed already: see `feed_ahead`
        self.reset()

    def reset(self) -> None:
        """Forget everything.  Keys and values are not cleared: a slot at position -1 is visible to nobody."""
        self.seen, self.ahead = [0] * self.rows, False
        for layer in self.layers:
            layer.positions.fill_(NOTHING)
            layer.flagged = False
            for tensor in (layer.flags, layer.free):
                tensor.zero_()
            for name, tensor in layer.state.items():
                if name not in self.fixed:
                    tensor.zero_()

    def row(self, row: int) -> KVCache:
        """One row of it, which is a cache in itself: the same memory, and a count of tokens of its own.

        Whoever works with rows works with nothing else: `seen` of the whole does not follow.
        """
        one = copy(self)
        one.rows, one.seen, one.number = 1, [self.seen[row]], row
        one.layers = [
            replace(layer.row(row, self.fixed), query_block=query_block(self.config, layer.retention, 1))
            for layer in self.layers
        ]
        return one

    def copy_(self, other: KVCache) -> None:
        """Hold what another cache holds, of the same model, policy, slots and rows."""
        other.take_back_()
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            for name, tensor in theirs.tensors().items():
                if name not in self.fixed:
                    mine.tensors()[name].copy_(tensor)
            mine.flagged = theirs.flagged
        self.seen, self.ahead = list(other.seen), False

    def append(self, length: int, *, padded: int | None = None, flags: Tensor | None = None) -> Span:
        """Reserve the next `length` positions of every row (`padded` >= length: the width T of the forward pass).

        flags [B, T] uint8 are written with the tokens.  Raises ContextFullError, before anything is written, if nothing
        may be evicted and the tokens do not fit.
        """
        self.take_back_()
        self.check_room(length)
        if flags is not None and flags.any():
            self.note_flags()
        first = tuple(self.seen)
        host = torch.tensor(first)[:, None] + torch.arange(padded or length)  # [B, T]
        host[:, length:] = NOTHING
        self.seen = [position + length for position in first]
        return Span(host.to(self.device), host, first, length, None if flags is None else flags.to(self.device))

    @property
    def due(self) -> bool:
        """Whether the next token pushes out others, in some row and layer."""
        return any(layer.is_due(seen) for seen in set(self.seen) for layer in self._unlike)

    def feed_ahead(self) -> list[int]:
        """The next position of every row, for a token that is fed before it is known whether it belongs there.

        Until `keep` says so nothing here has seen it, and what is done next takes it back.  That leaves no trace, as
        long as it was not `due`: it was written into a slot that was free.  Raises as `append` does.
        """
        self.take_back_()
        self.check_room(1)
        self.ahead = True
        return self.seen

    def keep(self) -> None:
        """The token that was fed ahead belongs there."""
        assert self.ahead, "a token is fed before it is kept"
        self.seen, self.ahead = [seen + 1 for seen in self.seen], False

    def take_back_(self) -> None:
        """Empty the slots of a token that was fed ahead, if there is one; the device is not waited for."""
        if not self.ahead:  # as in every step that is not recorded
            return
        self.ahead = False
        with torch.inference_mode():
            for layer in self.layers:
                for row, seen in enumerate(self.seen):
                    fed = layer.positions[row] >= seen  # [Hkv, S]
                    layer.positions[row].masked_fill_(fed, NOTHING)
                    layer.flags[row].masked_fill_(fed, 0)

    def note_flags(self) -> None:
        """From now on some token may have flags."""
        for layer in self.layers:
            layer.flagged = True

    def check_room(self, length: int) -> None:
        """Where the next `length` tokens do not all fit: refuse them as `append` says, or say so the first time."""
        slots, seen = self._fewest, max(self.seen)
        needed = seen + length
        if needed <= slots:
            return
        if not self.policy.evicts or self.on_overflow == "error":
            why = "--on-overflow is error" if self.policy.evicts else f"policy '{self.policy.name}' never evicts"
            raise ContextFullError(
                f"the sequence needs {needed:,} tokens but the cache holds {slots:,} and {why}; "
                "raise --context or --budget, or choose a policy that evicts"
            )
        if self.on_overflow == "warn" and seen <= slots:
            warnings.warn(f"the cache of {slots:,} slots is full: from here on tokens are evicted", stacklevel=4)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, which is what `cache_bytes` says before allocation."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    def live(self, row: int = 0) -> Tensor:
        """Tokens of a row that its last token sees: [L, Hkv] int64 on the CPU.

        What lies outside a sliding window counts as gone.  Reads the device: once per answer, not per token.
        """
        last = torch.tensor([[seen - 1] for seen in self.seen], device=self.device)  # [B, 1]
        return torch.stack([layer.can_see(last)[row, :, 0].sum(-1) for layer in self.layers]).cpu()  # [L, Hkv]

    def kept(self, row: int = 0) -> float:
        """Live slots of a row, averaged over layers and KV heads."""
        return float(self.live(row).to(torch.float64).mean(1).mean())

    def oldest(self, row: int = 0) -> int | None:
        """The oldest position kept anywhere outside the sinks; None where there is none.  Reads the device."""
        last = torch.tensor([[seen - 1] for seen in self.seen], device=self.device)  # [B, 1]
        found = []
        for layer in self.layers:
            kept = layer.can_see(last)[row, :, 0] & (layer.positions[row] >= layer.retention.sinks)  # [Hkv, S]
            found.append(torch.where(kept, layer.positions[row], MAX_POSITION).amin())
        oldest = int(torch.stack(found).amin())
        return None if oldest == MAX_POSITION else oldest


class CacheRows:
    """Rows of a cache (see `KVCache.row`) that take a step of one token together: the rest of what a model asks of a
    cache.
    """

    def __init__(self, whole: KVCache, rows: Sequence[int], views: Sequence[KVCache], batch: int) -> None:
        """rows: which of `whole` the views are.  batch: rows of the step; those that are missing are filled up."""
        self.views, self.batch, self.trained, self.device = tuple(views), batch, whole.trained, whole.device
        which = torch.tensor([*rows, *[0] * (batch - len(rows))], device=whole.device)  # [B]
        self.layers = [
            LayerRows(layer, which, tuple(view.layers[layer.index] for view in views)) for layer in whole.layers
        ]

    def append(self, flags: Tensor | None = None) -> Span:
        """Reserve the next position of every row; flags [B, 1] uint8 are written with the tokens."""
        first = [NOTHING] * self.batch
        for row, view in enumerate(self.views):
            view.check_room(1)
            if flags is not None and flags[row].any():
                view.note_flags()
            first[row], view.seen = view.seen[0], [view.seen[0] + 1]
        host = torch.tensor(first)[:, None]  # [B, 1]
        return Span(host.to(self.device), host, tuple(first), 1, None if flags is None else flags.to(self.device))


def query_block(config: ModelConfig, retention: Retention, rows: int) -> int:
    """Queries that attend together: bounds the scores however large the chunk and however many the slots are."""
    return max(1, min(QUERY_BLOCK, SCORE_BYTES // (4 * rows * config.num_attention_heads * retention.slots)))


def layer_specs(
    config: ModelConfig,
    policy: EvictionPolicy,
    retention: Retention,
    *,
    rows: int,
    dtype: torch.dtype,
    int8: bool = False,
) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor of one layer: the one place that knows, for planning and for allocation."""
    head = (rows, config.num_key_value_heads)
    slot = (*head, retention.slots)
    specs: dict[str, TensorSpec] = {
        "keys": ((*slot, config.head_dim), torch.int8 if int8 else dtype),
        "values": ((*slot, config.head_dim), torch.int8 if int8 else dtype),
        "positions": (slot, torch.int32),
        "flags": (slot, torch.uint8),
        "free": ((*head, retention.evict_every), torch.int64),
    }
    if int8:
        specs["scales"] = ((*slot, 2), torch.float32)
    specs |= {name: ((*slot, *shape), kind) for name, (shape, kind) in policy.slot_state(config).items()}
    specs |= {name: ((*head, *shape), kind) for name, (shape, kind) in policy.head_state(config).items()}
    return specs | policy.constants_spec(config)


def cache_bytes(
    config: ModelConfig,
    policy: EvictionPolicy,
    retentions: Sequence[Retention],
    *,
    rows: int = 1,
    dtype: torch.dtype,
    int8: bool = False,
) -> dict[str, int]:
    """Bytes of the cache by part, over all layers, without allocating anything."""
    parts: dict[str, int] = {}
    for retention in retentions:
        for name, (shape, kind) in layer_specs(config, policy, retention, rows=rows, dtype=dtype, int8=int8).items():
            parts[name] = parts.get(name, 0) + prod(shape) * kind.itemsize
    return parts
