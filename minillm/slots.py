"""One layer's slots, each tagged with the position of its token: where a token goes, and who sees it there.

This module knows where tensors live.  It does not know how many layers there are (cache.py), how a victim is chosen
(eviction.py), what a policy stores (policies/), or how attention is computed (backends/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .eviction import EvictionPolicy, Retention

PINNED, SPECIAL, PUNCTUATION = 1, 2, 4  # bits of the flags that are written with a token
NOTHING = -1  # the position of an empty slot and of a padding token: visible to nobody
SMALLEST_VIEW = 64  # attention reads a power-of-two number of slots from here up to S, so only a few shapes ever exist


@dataclass(frozen=True)
class Span:
    """The tokens of one forward pass: `length` tokens for each of B rows, at consecutive positions.

    `positions` [B, T] lies on the model's device, `host` is the same on the CPU, `first` the same as plain integers:
    the decode loop knows positions without asking the device.  T may exceed `length`: the rest is padding at -1.
    In a step that is recorded (backends/graph.py) only the device knows them: `host` is `positions`, `first` is empty.
    """

    positions: Tensor  # [B, T] int64, on the model's device
    host: Tensor  # [B, T] int64, on the CPU
    first: tuple[int, ...]  # B positions
    length: int
    flags: Tensor | None = None  # [B, T] uint8; None = no flags

    def may_pass(self, position: int) -> bool:
        """Whether a token may stand there or further on; where the host does not know, one may."""
        return not self.first or max(self.first) + self.length > position

    @cached_property
    def positions32(self) -> Tensor:
        """`positions` as slots store them, made once for all layers: [B, T] int32."""
        return self.positions.to(torch.int32)

    @cached_property
    def by_row(self) -> tuple[Span, ...]:
        """The same tokens, a span for each row."""
        cut = (slice(row, row + 1) for row in range(len(self.first)))
        return tuple(
            Span(
                self.positions[at],
                self.host[at],
                self.first[at],
                self.length,
                None if self.flags is None else self.flags[at],
            )
            for at in cut
        )


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
    `free` alone; nothing has to be counted.  And `free`, read in order, says which tokens the policy has not seen yet:
    at token 8 the eviction began by showing it the slots 0..7, at token 10 it begins with the slots 3 and 5.

    What the policy keeps for a slot is 0 from the moment when the slot is freed until its new token is observed, or
    tagged at the next eviction (eviction.py): writing a token asks nothing of the policy.
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
    first_head: int = 0  # which of the KV heads of the model is the first one here
    flagged: bool = False  # whether a token ever had flags: known to the host, so that they cost nothing if not

    def __post_init__(self) -> None:
        rows, heads, slots = self.positions.shape
        # Slots of all rows and heads in one line, views of the same memory: an index is one number, and 2x cheaper.
        self._flat = {
            name: tensor.view(-1, *tensor.shape[3:])  # [B * Hkv * S, ...]
            for name, tensor in self.tensors().items()
            if name in ("keys", "values", "scales", "positions", "flags", *self.slot_state)
        }
        self._begin = torch.arange(0, rows * heads * slots, slots, device=self.positions.device).view(rows, heads, 1)

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was allocated for this layer, by name."""
        named = {"keys": self.keys, "values": self.values, "positions": self.positions, "flags": self.flags}
        scales = {} if self.scales is None else {"scales": self.scales}
        return named | scales | {"free": self.free} | self.state

    def row(self, row: int, shared: frozenset[str]) -> LayerCache:
        """One row of it: the same memory.  shared: names of state that is not kept per row."""
        at = slice(row, row + 1)
        return replace(
            self,
            keys=self.keys[at],
            values=self.values[at],
            scales=None if self.scales is None else self.scales[at],
            positions=self.positions[at],
            flags=self.flags[at],
            free=self.free[at],
            state={name: tensor if name in shared else tensor[at] for name, tensor in self.state.items()},
        )

    def stretches(self, span: Span, block: int | None = None) -> Iterator[Stretch]:
        """Cut a span so that no row evicts anywhere but at the start of a stretch, of `block` tokens at most.

        Without `block`, as many as the scores of the reference backend were planned for.
        """
        start, longest = 0, block or self.query_block
        while start < span.length:
            now = [first + start for first in span.first]
            stop = min(span.length, start + longest, start + min(map(self.until_eviction, now)))
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

    def asks_from_afar(self, position: int) -> bool:
        """Whether a query at this position asks sinks and pins as if it stood nearer: it is past the trained length."""
        return self.far and self.window is not None and position >= self.window + self.retention.sinks

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
        at = self._at(self.slots_of(span, start, stop))  # [B * Hkv * n]
        heads = self.positions.shape[1]
        self._put_("positions", at, span.positions32[:, None, start:stop].expand(-1, heads, -1))  # [B, Hkv, n]
        if self.flagged:
            flags = torch.zeros_like(span.positions32, dtype=torch.uint8) if span.flags is None else span.flags
            self._put_("flags", at, flags[:, None, start:stop].expand(-1, heads, -1))  # [B, Hkv, n]
        if self.scales is not None:
            (keys, values), scales = to_int8(torch.stack((keys, values)))  # scales [2, B, Hkv, n, 1]
            self._put_("scales", at, torch.cat(tuple(scales), -1))  # [B, Hkv, n, 2]
        self._put_("keys", at, keys)
        self._put_("values", at, values)

    def free_(self, victims: Tensor, due: Tensor) -> None:
        """Empty the slots `victims` [B, Hkv, evict_every] in the rows that are `due` [B], and remember them as free."""
        self.update_("positions", victims, NOTHING, due)
        for name in self.slot_state:
            self.update_(name, victims, 0, due)
        self.free.copy_(torch.where(due[:, None, None], victims, self.free))

    def update_(self, name: str, slots: Tensor, new: Tensor | int, due: Tensor) -> None:
        """Put `new` [B, Hkv, n, ...] into slots [B, Hkv, n] (or broadcastable), in the rows that are `due` [B]."""
        at = self._at(slots)
        old = self._flat[name].index_select(0, at).unflatten(0, (*self.positions.shape[:2], -1))  # [B, Hkv, n, ...]
        self._put_(name, at, torch.where(due.view(-1, *[1] * (old.ndim - 1)), new, old))

    def keys_in(self, slots: Tensor, dtype: torch.dtype) -> Tensor:
        """Keys in the slots [B, Hkv, n] (or broadcastable), as numbers to compute with: [B, Hkv, n, D]."""
        at = self._at(slots)
        keys = self._flat["keys"].index_select(0, at).to(dtype)  # [B * Hkv * n, D]
        if self.scales is not None:
            keys.mul_(self._flat["scales"].index_select(0, at)[:, :1].to(dtype))
        return keys.unflatten(0, (*self.positions.shape[:2], -1))  # type: ignore[no-any-return]  # [B, Hkv, n, D]

    def all_slots(self) -> Tensor:
        """0..S-1: [1, 1, S]."""
        return torch.arange(self.retention.slots, device=self.positions.device).view(1, 1, -1)

    def _at(self, slots: Tensor) -> Tensor:
        """Slots [B, Hkv, n] (or broadcastable) as places in `_flat`: [B * Hkv * n]."""
        return (slots + self._begin).flatten()

    def _put_(self, name: str, at: Tensor, new: Tensor) -> None:
        """Write new [B, Hkv, n, ...]."""
        self._flat[name].index_copy_(0, at, new.flatten(0, 2))

    def reach(self, span: Span, stop: int) -> int:
        """How many slots may hold a token once `stop - 1` is written: they fill from 0, so attention skips the rest."""
        needed, view = max(span.first) + stop, SMALLEST_VIEW
        while view < needed:
            view *= 2
        return min(view, self.retention.slots)

    def can_see(self, queries: Tensor, reach: int | None = None, newest: int | None = None) -> Tensor:
        """Which of the first `reach` slots the queries at positions [B, n] see: [B, Hkv, n, reach].

        One rule: 0 <= slot <= query, and slot > query - window where there is a window that does not exempt it.
        newest: the last of these positions, where the host knows it: nothing lies outside a window that is not full.
        """
        slots = self.positions[:, :, None, :reach]  # [B, Hkv, 1, reach]
        queries = queries[:, None, :, None]  # [B, 1, n, 1]
        visible = (slots >= 0) & (slots <= queries)
        if self.window is None or (newest is not None and newest < self.window):
            return visible
        inside = slots > queries - self.window
        return visible & (inside | self.exempt(reach) if self.far else inside)

    def exempt(self, reach: int | None = None) -> Tensor:
        """Which of the first `reach` slots are seen from any distance: [B, Hkv, 1, reach].

        The sinks, and tokens that were pinned within the first window, the only ones that a query can be turned to.
        """
        slots = self.positions[:, :, None, :reach]  # [B, Hkv, 1, reach]
        stay = slots < self.retention.sinks
        if self.flagged and self.window is not None:
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


@dataclass(frozen=True)
class LayerRows:
    """One layer's slots of a few rows that take a step together, in any order.

    Attention is each row's own business, so that its result does not depend on its neighbours; only native.c, whose
    loops over slots know no neighbours, takes all rows in one call.  A batch may be longer than `views`: what follows
    are rows that fill it up, at position -1, which see nothing and are written nowhere.
    """

    whole: LayerCache  # all rows of the cache
    rows: Tensor  # [B] int64: which of them take part; 0 for those that fill up
    views: tuple[LayerCache, ...]  # LayerCache.row of each that takes part

    def each(
        self,
        attend: Callable[[LayerCache, Tensor, Tensor, Tensor, Span, Tensor | None], Tensor],
        q: Tensor,
        k: Tensor,
        v: Tensor,
        span: Span,
        q_far: Tensor | None,
    ) -> Tensor:
        """Attention of every row by itself, see `reference.attend_`: [B, H, T, D], zeros for rows that fill up."""
        assert self.views, "a recorded step has no views of rows: only backends/triton.py takes it"
        result = torch.zeros_like(q)
        for row, view in enumerate(self.views):
            at = slice(row, row + 1)
            far = None if q_far is None or not view.asks_from_afar(span.first[row]) else q_far[at]
            result[at] = attend(view, q[at], k[at], v[at], span.by_row[row], far)
        return result


LayerSlots = LayerCache | LayerRows


def to_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors [..., D] -> int8 [..., D] and float32 scales [..., 1], so that x is about int8 * scale.

    The largest element becomes 127: (0.5, -1.0) -> (64, -127) with scale 1 / 127.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 127) / 127  # [..., 1]
    return (x / scale).round_().to(torch.int8), scale.to(torch.float32)
