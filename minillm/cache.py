"""The bounded KV cache: a fixed number of slots per layer, allocated once, each tagged with the position of its token.

This module knows where tensors live and how big they are.  It does not know how a victim is chosen (eviction.py), what
a policy stores (policies/), or how attention is computed (backends/).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import ContextFullError

if TYPE_CHECKING:
    from .eviction import EvictionPolicy, Retention

PINNED, SPECIAL, PUNCTUATION = 1, 2, 4  # bits of the flags that are written with a token
NOTHING = -1  # the position of an empty slot and of a padding token: visible to nobody
MAX_POSITION = torch.iinfo(torch.int32).max
QUERY_BLOCK = 64  # queries that attend together, at most ...
SCORE_BYTES = 4 << 20  # ... and so many fewer that their float32 scores over all slots stay below this
SMALLEST_VIEW = 64  # attention reads a power-of-two number of slots from here up to S, so only a few shapes ever exist

TensorSpec = tuple[tuple[int, ...], torch.dtype]
PositionMode = Literal["absolute", "window"]
Overflow = Literal["evict", "warn", "error"]


@dataclass(frozen=True)
class Span:
    """The tokens of one forward pass: `length` tokens for each of B rows, at consecutive positions.

    `positions` [B, T] lies on the model's device, `host` is the same on the CPU, `first` the same as plain integers:
    the decode loop knows positions without asking the device.  T may exceed `length`: the rest is padding at -1.
    """

    positions: Tensor  # [B, T] int64, on the model's device
    host: Tensor  # [B, T] int64, on the CPU
    first: tuple[int, ...]  # B positions
    length: int
    flags: Tensor | None = None  # [B, T] uint8; None = no flags


class Stretch(NamedTuple):
    """Tokens start..stop of a span: within it nothing is evicted.  evict, settle: what some row does before it."""

    start: int
    stop: int
    evict: bool
    settle: bool


@dataclass
class LayerCache:
    """One layer's slots.  Invariant: after construction no tensor here is ever replaced or resized, only written into.

    Worked example with S = 8 slots and evict_every = 2.  Tokens 0..7 fill slots 0..7.  Token 8 finds no free slot, so
    two victims go, say slots 3 and 5: free = [3, 5].  Token 8 is written to free[(8-8) % 2] = slot 3, token 9 to
    free[(9-8) % 2] = slot 5, and token 10 finds no free slot again.  The slot of a token follows from its position and
    `free` alone; nothing has to be counted.
    """

    index: int
    keys: Tensor  # [B, Hkv, S, D], after RoPE
    values: Tensor  # [B, Hkv, S, D]
    scales: Tensor | None  # [B, Hkv, S, 2] float32: what one step of an int8 key, and of a value, is worth
    positions: Tensor  # [B, Hkv, S] int32: the token in the slot, -1 = nothing
    flags: Tensor  # [B, Hkv, S] uint8: what was written with the token
    free: Tensor  # [B, Hkv, evict_every] int64: the slots freed by the last eviction, in the order they are filled
    state: dict[str, Tensor]  # what the policy keeps: per slot, per head, and fixed for the layer
    slot_state: tuple[str, ...]  # names of what is kept per slot
    policy: EvictionPolicy
    retention: Retention
    window: int | None  # a query sees positions > its own - window; None = all
    far: bool  # whether it sees sinks and pinned tokens even outside the window
    query_block: int  # queries that attend together
    pins: bool = False  # whether a token was ever pinned: known to the host, so that it costs nothing if not

    def __post_init__(self) -> None:
        rows, heads = self.positions.shape[:2]
        device = self.positions.device
        self._row = torch.arange(rows, device=device)[:, None, None]  # [B, 1, 1]
        self._head = torch.arange(heads, device=device)[None, :, None]  # [1, Hkv, 1]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was allocated for this layer, by name."""
        named = {"keys": self.keys, "values": self.values, "positions": self.positions, "flags": self.flags}
        scales = {} if self.scales is None else {"scales": self.scales}
        return named | scales | {"free": self.free} | self.state

    def stretches(self, span: Span) -> Iterator[Stretch]:
        """Cut a span so that no row evicts anywhere but at the start of a stretch."""
        start = 0
        while start < span.length:
            now = [first + start for first in span.first]
            stop = min(span.length, start + self.query_block, start + min(map(self.until_eviction, now)))
            yield Stretch(start, stop, any(map(self.is_due, now)), self.retention.slots in now)
            start = stop

    def until_eviction(self, position: int) -> int:
        """Tokens written before the next eviction, this one included.  S = 8, every 2: 5 -> 3, 8 -> 2, 9 -> 1."""
        slots, every = self.retention.slots, self.retention.evict_every
        return slots - position if position < slots else every - (position - slots) % every

    def is_due(self, position: int) -> bool:
        """Whether the token at this position finds no free slot."""
        slots, every = self.retention.slots, self.retention.evict_every
        return position >= slots and (position - slots) % every == 0

    def slots_of(self, span: Span, start: int, stop: int) -> Tensor:
        """Where the tokens start..stop of a span go: [B, Hkv, n] (or broadcastable) slot indices."""
        slots, every = self.retention.slots, self.retention.evict_every
        first = span.first[0]
        if all(other == first for other in span.first):  # rows in step: a slice says it all
            if first + start < slots:
                return span.positions[:, None, start:stop]  # [B, 1, n]
            phase = (first + start - slots) % every
            return self.free[:, :, phase : phase + stop - start]  # [B, Hkv, n]
        positions = span.positions[:, None, start:stop]  # [B, 1, n]
        phases = ((positions - slots) % every).expand(-1, self.free.shape[1], -1)  # [B, Hkv, n]
        return torch.where(positions < slots, positions, self.free.gather(2, phases))  # [B, Hkv, n]

    def write_(self, keys: Tensor, values: Tensor, span: Span, start: int, stop: int) -> None:
        """Store the tokens start..stop: `keys` and `values` are [B, Hkv, n, D]."""
        at = (self._row, self._head, self.slots_of(span, start, stop))
        self.positions[at] = span.positions[:, None, start:stop].to(torch.int32)  # [B, 1, n]
        self.flags[at] = 0 if span.flags is None else span.flags[:, None, start:stop]  # [B, 1, n]
        tags = self.policy.tag(self, keys)
        for name in self.slot_state:
            self.state[name][at] = tags.get(name, 0)
        if self.scales is None:
            self.keys[at], self.values[at] = keys, values
        else:
            (self.keys[at], key_scale), (self.values[at], value_scale) = to_int8(keys), to_int8(values)
            self.scales[at] = torch.cat((key_scale, value_scale), -1)  # [B, Hkv, n, 2]

    def free_(self, victims: Tensor, due: Tensor) -> None:
        """Empty the slots `victims` [B, Hkv, evict_every] in the rows that are `due` [B], and remember them as free."""
        due = due[:, None, None]  # [B, 1, 1]
        at = (self._row, self._head, victims)
        self.positions[at] = torch.where(due, NOTHING, self.positions[at])
        self.free.copy_(torch.where(due, victims, self.free))

    def reach(self, span: Span, stop: int) -> int:
        """How many slots may hold a token once `stop - 1` is written: they fill from 0, so attention skips the rest."""
        needed, view = max(span.first) + stop, SMALLEST_VIEW
        while view < needed:
            view *= 2
        return min(view, self.retention.slots)

    def can_see(self, queries: Tensor, reach: int | None = None) -> Tensor:
        """Which of the first `reach` slots the queries at positions [B, n] see: [B, Hkv, n, reach].

        One rule: 0 <= slot <= query, and slot > query - window where there is a window that does not exempt it.
        """
        slots = self.positions[:, :, None, :reach]  # [B, Hkv, 1, reach]
        queries = queries[:, None, :, None]  # [B, 1, n, 1]
        visible = (slots >= 0) & (slots <= queries)
        if self.window is None:
            return visible
        inside = slots > queries - self.window
        return visible & (inside | self.exempt(reach) if self.far else inside)

    def exempt(self, reach: int | None = None) -> Tensor:
        """Which of the first `reach` slots are seen from any distance: [B, Hkv, 1, reach].

        The sinks, and tokens that were pinned within the first window, the only ones that a query can be turned to.
        """
        slots = self.positions[:, :, None, :reach]  # [B, Hkv, 1, reach]
        stay = slots < self.retention.sinks
        if self.pins and self.window is not None:
            pinned = self.flags[:, :, None, :reach] & PINNED > 0
            stay = stay | (pinned & (slots < self.window + self.retention.sinks))
        return stay

    def dense(self, reach: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values of the first `reach` slots, each [B, Hkv, reach, D], as numbers to compute with."""
        return self.dense_keys(reach, dtype), self._dense(self.values, 1, reach, dtype)

    def dense_keys(self, reach: int | None, dtype: torch.dtype) -> Tensor:
        """Keys alone: [B, Hkv, reach, D]."""
        return self._dense(self.keys, 0, reach, dtype)

    def _dense(self, stored: Tensor, which: int, reach: int | None, dtype: torch.dtype) -> Tensor:
        dense = stored[:, :, :reach].to(dtype)  # [B, Hkv, reach, D]
        if self.scales is None:
            return dense
        return dense.mul_(self.scales[:, :, :reach, which, None].to(dtype))


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., D] -> int8 [..., D] and float32 scales [..., 1], so that x is about int8 * scale.

    The largest element becomes 127: (0.5, -1.0) -> (64, -127) with scale 1 / 127.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127  # [..., 1]
    return (x / scale).round_().to(torch.int8), scale.to(torch.float32)


class KVCache:
    """The caches of all layers and the number of tokens each row has seen.

    Append-only: positions come from `append` and nowhere else, so a token can be neither rewound nor written twice.
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
                )
            )
        self._fewest = min(retention.slots for retention in self.retentions)
        self.fixed = frozenset(policy.constants_spec(config))  # names of what needs neither reset nor saving
        self.seen = [0] * rows
        self.reset()

    def reset(self) -> None:
        """Forget everything.  Keys and values are not cleared: a slot at position -1 is visible to nobody."""
        self.seen = [0] * self.rows
        for layer in self.layers:
            layer.positions.fill_(NOTHING)
            layer.pins = False
            for tensor in (layer.flags, layer.free):
                tensor.zero_()
            for name, tensor in layer.state.items():
                if name not in self.fixed:
                    tensor.zero_()

    def append(self, length: int, *, padded: int | None = None, flags: Tensor | None = None) -> Span:
        """Reserve the next `length` positions of every row (`padded` >= length: the width T of the forward pass).

        flags [B, T] uint8 are written with the tokens.  Raises ContextFullError, before anything is written, if nothing
        may be evicted and the tokens do not fit.
        """
        most = max(self.seen)
        if most + length > self._fewest:
            self._overflow(most, most + length)
        if flags is not None and (flags & PINNED).any():
            self.note_pins()
        first = tuple(self.seen)
        host = torch.tensor(first)[:, None] + torch.arange(padded or length)  # [B, T]
        host[:, length:] = NOTHING
        self.seen = [position + length for position in first]
        return Span(host.to(self.device), host, first, length, None if flags is None else flags.to(self.device))

    def note_pins(self) -> None:
        """From now on some token may be pinned."""
        for layer in self.layers:
            layer.pins = True

    def _overflow(self, seen: int, needed: int) -> None:
        """The tokens up to `needed` do not all fit: refuse them, or say so the first time."""
        slots = self._fewest
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
