"""Who leaves when no slot is free: what a policy is, what is protected, and the one place where victims are chosen.

A policy only gives scores.  Everything that all policies share - empty slots first, protection, ties, how many go at
once - is decided here, before attention, for every policy alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .errors import BudgetError

if TYPE_CHECKING:
    from .cache import LayerCache, TensorSpec


class EvictionPolicy(ABC):
    """A stateless rule that gives every slot a number; the lowest goes first.

    Whatever it needs to remember lies in tensors that it declares here and the cache allocates, so that every byte is
    planned: a `tag` beside each key, and `constants` per layer.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True

    def tag_spec(self, head_dim: int) -> TensorSpec | None:  # noqa: ARG002
        """Shape (after [B, Hkv, S]) and dtype of what is stored beside a key; None = nothing."""
        return None

    def constants_spec(self, head_dim: int) -> TensorSpec | None:  # noqa: ARG002
        """Shape and dtype of what is fixed for a layer; None = nothing."""
        return None

    def constants(self, head_dim: int, layer: int) -> Tensor:
        """The fixed tensor of a layer, as `constants_spec` declares it: a function of options and layer alone."""
        raise NotImplementedError(f"{self.name} declares no constants")

    def tag(self, keys: Tensor, constants: Tensor | None) -> Tensor:
        """What to store beside keys [B, Hkv, n, D]: [B, Hkv, n, ...] as `tag_spec` declares it."""
        raise NotImplementedError(f"{self.name} declares no tag")

    @abstractmethod
    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:
        """How much each slot deserves to stay, lowest goes first: [B, Hkv, S] (or broadcastable), read as float32.

        `query` [B, H, D] and `key` [B, Hkv, D] belong to the incoming token at position `now` [B], which is not in the
        cache yet.  Empty and protected slots may get any number.
        """


@dataclass(frozen=True)
class Retention:
    """How many slots a layer has, which of them are protected, and how many are freed at once.

    sinks: tokens at positions < sinks stay for ever.  recent: the last `recent` tokens before the incoming one stay.
    """

    slots: int
    sinks: int
    recent: int
    evict_every: int

    @classmethod
    def of(
        cls, slots: int, *, sinks: int | None = None, recent: int | None = None, evict_every: int | None = None
    ) -> Retention:
        """Defaults that always fit; what is given explicitly is kept, and the defaults make room for it.

        Defaults: evict_every = slots / 16 in 1..32, sinks = min(4, slots / 16), recent = slots / 4.  Raises BudgetError
        if sinks + recent + evict_every exceed the slots.
        """
        for option, value, lowest in (
            ("slots", slots, 1),
            ("--sinks", sinks, 0),
            ("--recent", recent, 0),
            ("--evict-every", evict_every, 1),
        ):
            if value is not None and value < lowest:
                raise BudgetError(f"{option} must be at least {lowest}, not {value}")
        room = slots - (sinks or 0) - (recent or 0) - (evict_every or 1)
        if room < 0:
            raise BudgetError(
                f"--sinks {sinks or 0} + --recent {recent or 0} + --evict-every {evict_every or 1} do not fit into "
                f"{slots} slots; lower them or raise --budget"
            )
        if evict_every is None:
            evict_every = max(1, min(slots // 16, 32, room + 1))
            room -= evict_every - 1
        if sinks is None:
            sinks = min(4, slots // 16, room)
            room -= sinks
        if recent is None:
            recent = min(slots // 4, room)
        return cls(slots, sinks, recent, evict_every)


def evict_(layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> None:
    """Free `evict_every` slots per KV head in every row whose incoming token, at position `now` [B], finds none free.

    Rows that are not due are left as they are: the decision is a mask, so rows of a batch may be in different phases.
    """
    retention = layer.retention
    score = layer.policy.score(layer, query, key, now)  # [B, Hkv, S]
    victims = choose(score, layer.positions, now, retention, layer.window)  # [B, Hkv, evict_every]
    since = now - retention.slots
    layer.free_(victims, due=(since >= 0) & (since % retention.evict_every == 0))


def choose(score: Tensor, positions: Tensor, now: Tensor, retention: Retention, window: int | None) -> Tensor:
    """The `evict_every` slots that go, per row and KV head: [B, Hkv, evict_every] indices, first to go first.

    Order: slots that nobody will see again (empty, or outside the sliding window, even if protected), then the lowest
    score, and always ties to the oldest token.  All of it is one 64-bit integer per slot - score in the upper half,
    position in the lower - so that no two slots compare equal and every device makes the same choice.
    """
    now = now[:, None, None]  # [B, 1, 1]
    seat = torch.arange(positions.shape[2], device=positions.device)  # [S]
    order = (_sortable(score) << 32) + positions  # [B, Hkv, S]
    protected = (positions < retention.sinks) | (positions >= now - retention.recent)
    order = torch.where(protected, _LAST, order)
    unseen = positions < 0 if window is None else (positions < 0) | (positions <= now - window)
    age = (positions + 1).to(torch.int64) * len(seat) + seat  # [B, Hkv, S], distinct for empty slots too
    order = torch.where(unseen, _FIRST + age, order)
    return order.topk(retention.evict_every, largest=False, sorted=True).indices  # [B, Hkv, evict_every]


_FIRST, _LAST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def _sortable(score: Tensor) -> Tensor:
    """Floats as int64 in the same order: the bits of an IEEE float sort like an integer once negatives are flipped."""
    bits = (score.to(torch.float32) + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
