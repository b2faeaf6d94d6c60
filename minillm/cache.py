"""The bounded KV cache: a fixed number of slots per layer, allocated once, each tagged with the position of its token.

This module knows where tensors live and how big they are.  It does not know how a victim is chosen (eviction.py), what
a policy stores (policies/), or how attention is computed (backends/).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import ContextFullError

if TYPE_CHECKING:
    from .eviction import EvictionPolicy, Retention

NOTHING = -1  # the position of an empty slot and of a padding token: visible to nobody
QUERY_BLOCK = 64  # queries that attend together: bounds the scores to H x 64 x S however large the chunk is
SMALLEST_VIEW = 64  # attention reads a power-of-two number of slots from here up to S, so only a few shapes ever exist

TensorSpec = tuple[tuple[int, ...], torch.dtype]


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


@dataclass
class LayerCache:
    """One layer's slots.  Invariant: after construction no tensor here is ever replaced or resized, only written into.

    Worked example with S = 8 slots and evict_every = 2.  Tokens 0..7 fill slots 0..7.  Token 8 finds no free slot, so
    two victims go, say slots 3 and 5: free = [3, 5].  Token 8 is written to free[(8-8) % 2] = slot 3, token 9 to
    free[(9-8) % 2] = slot 5, and token 10 finds no free slot again.  The slot of a token follows from its position and
    `free` alone; nothing has to be counted.
    """

    keys: Tensor  # [B, Hkv, S, D], after RoPE
    values: Tensor  # [B, Hkv, S, D]
    positions: Tensor  # [B, Hkv, S] int32: the token in the slot, -1 = nothing
    free: Tensor  # [B, Hkv, evict_every] int64: the slots freed by the last eviction, in the order they are filled
    tags: Tensor | None  # [B, Hkv, S, ...] what the policy stores beside a key
    constants: Tensor | None  # what the policy fixes per layer, e.g. the hash projection
    policy: EvictionPolicy
    retention: Retention
    window: int | None  # a query sees positions > its own - window; None = all

    def __post_init__(self) -> None:
        rows, heads = self.positions.shape[:2]
        device = self.positions.device
        self._row = torch.arange(rows, device=device)[:, None, None]  # [B, 1, 1]
        self._head = torch.arange(heads, device=device)[None, :, None]  # [1, Hkv, 1]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that was allocated for this layer, by name."""
        named = {"keys": self.keys, "values": self.values, "positions": self.positions, "free": self.free}
        optional = {"tags": self.tags, "constants": self.constants}
        return named | {name: tensor for name, tensor in optional.items() if tensor is not None}

    def until_eviction(self, position: int) -> int:
        """Tokens written before the next eviction, this one included.  S = 8, every 2: 5 -> 3, 8 -> 2, 9 -> 1."""
        slots, every = self.retention.slots, self.retention.evict_every
        return slots - position if position < slots else every - (position - slots) % every

    def is_due(self, position: int) -> bool:
        """Whether the token at this position finds no free slot."""
        slots, every = self.retention.slots, self.retention.evict_every
        return position >= slots and (position - slots) % every == 0

    def stretches(self, span: Span) -> Iterator[tuple[int, int, bool]]:
        """Cut a span into (start, stop, evict first?) so that no row evicts anywhere but at the start of a stretch."""
        start = 0
        while start < span.length:
            step = min(self.until_eviction(first + start) for first in span.first)
            stop = min(span.length, start + step, start + QUERY_BLOCK)
            yield start, stop, any(self.is_due(first + start) for first in span.first)
            start = stop

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
        self.keys[at] = keys
        self.values[at] = values
        self.positions[at] = span.positions[:, None, start:stop].to(torch.int32)  # [B, 1, n]
        if self.tags is not None:
            self.tags[at] = self.policy.tag(keys, self.constants)

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


class KVCache:
    """The caches of all layers and the number of tokens each row has seen.

    Append-only: positions come from `append` and nowhere else, so a token can be neither rewound nor written twice.
    """

    def __init__(
        self,
        config: ModelConfig,
        policy: EvictionPolicy,
        retention: Retention,
        *,
        rows: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate everything: `retention.slots` slots in each of the config's layers, for `rows` sequences."""
        self.policy, self.retention, self.rows = policy, retention, rows
        self.device = torch.device(device)
        specs = layer_specs(config, policy, retention, rows=rows, dtype=dtype)
        self.layers = []
        for index, window in enumerate(config.sliding_windows):
            made = {name: torch.zeros(shape, dtype=kind, device=device) for name, (shape, kind) in specs.items()}
            if "constants" in made:
                made["constants"].copy_(policy.constants(config.head_dim, index))
            self.layers.append(
                LayerCache(
                    made["keys"],
                    made["values"],
                    made["positions"],
                    made["free"],
                    made.get("tags"),
                    made.get("constants"),
                    policy,
                    retention,
                    window,
                )
            )
        self.seen = [0] * rows
        self.reset()

    def reset(self) -> None:
        """Forget everything.  Keys and values are not cleared: a slot at position -1 is visible to nobody."""
        self.seen = [0] * self.rows
        for layer in self.layers:
            layer.positions.fill_(NOTHING)
            layer.free.zero_()

    def append(self, length: int, *, padded: int | None = None) -> Span:
        """Reserve the next `length` positions of every row (`padded` >= length: the width T of the forward pass).

        Raises ContextFullError, before anything is written, if the policy may not evict and the tokens do not fit.
        """
        slots = self.retention.slots
        if not self.policy.evicts and max(self.seen) + length > slots:
            raise ContextFullError(
                f"the sequence needs {max(self.seen) + length:,} tokens but the cache holds {slots:,} and policy "
                f"'{self.policy.name}' never evicts; raise --context or name a --budget with another policy"
            )
        first = tuple(self.seen)
        host = torch.tensor(first)[:, None] + torch.arange(padded or length)  # [B, T]
        host[:, length:] = NOTHING
        self.seen = [position + length for position in first]
        return Span(host.to(self.device), host, first, length)

    @property
    def nbytes(self) -> int:
        """Bytes of every tensor held, which is what `cache_bytes` says before allocation."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    def kept(self, row: int = 0) -> float:
        """Live slots of a row, averaged over layers and KV heads.  Reads the device: once per answer, not per token."""
        live = [(layer.positions[row] >= 0).sum(-1, dtype=torch.float64).mean() for layer in self.layers]
        return float(torch.stack(live).mean())


def layer_specs(
    config: ModelConfig, policy: EvictionPolicy, retention: Retention, *, rows: int, dtype: torch.dtype
) -> dict[str, TensorSpec]:
    """Shape and dtype of every tensor of one layer: the one place that knows, for planning and for allocation."""
    heads, slots, head_dim = config.num_key_value_heads, retention.slots, config.head_dim
    specs: dict[str, TensorSpec] = {
        "keys": ((rows, heads, slots, head_dim), dtype),
        "values": ((rows, heads, slots, head_dim), dtype),
        "positions": ((rows, heads, slots), torch.int32),
        "free": ((rows, heads, retention.evict_every), torch.int64),
    }
    tag = policy.tag_spec(head_dim)
    if tag is not None:
        shape, kind = tag
        specs["tags"] = ((rows, heads, slots, *shape), kind)
    constants = policy.constants_spec(head_dim)
    if constants is not None:
        specs["constants"] = constants
    return specs


def cache_bytes(
    config: ModelConfig, policy: EvictionPolicy, retention: Retention, *, rows: int = 1, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes of the cache by part, over all layers, without allocating anything."""
    specs = layer_specs(config, policy, retention, rows=rows, dtype=dtype)
    return {name: config.num_hidden_layers * prod(shape) * kind.itemsize for name, (shape, kind) in specs.items()}
