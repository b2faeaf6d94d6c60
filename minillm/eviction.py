"""Who leaves when no slot is free: what a policy is, what is protected, and the one place where victims are chosen.

A policy only gives scores.  Everything that all policies share - empty slots first, protection, ties, how many go at
once - is decided here, before attention, for every policy alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .config import ModelConfig
from .errors import BudgetError
from .slots import PINNED, LayerCache

TensorSpec = tuple[tuple[int, ...], torch.dtype]  # a shape, and what is in it


class EvictionPolicy(ABC):
    """A stateless rule that gives every slot a number; the lowest goes first.

    Whatever it needs to remember lies in tensors that it declares here, by name, and the cache allocates: every byte is
    planned, saved with a session, and found in `layer.state`.  A shape may depend on the model alone.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    recent_share: ClassVar[int] = 4  # by default the last slots / recent_share tokens are protected
    needs_kinds: ClassVar[bool] = False  # whether tokens must be flagged as SPECIAL and PUNCTUATION
    needs_attention: ClassVar[bool] = False  # whether `observe_attention_` wants the weights of every query
    watching: ClassVar[int] = 0  # bytes per query, slot and KV head that it holds for a moment

    @property
    def needs_queries(self) -> bool:
        """Whether `observe_queries_` wants every query."""
        return False

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Shape (after [B, Hkv, S]) and dtype of what is kept for a slot; cleared to 0 when a token enters it."""
        return {}

    def head_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Shape (after [B, Hkv]) and dtype of what is kept for a row and KV head."""
        return {}

    def constants_spec(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Shape and dtype of what is fixed for a layer."""
        return {}

    def constants(self, config: ModelConfig, layer: int) -> dict[str, Tensor]:  # noqa: ARG002
        """What `constants_spec` declares: a function of options, model and layer alone, so it need not be saved."""
        return {}

    def scratch(self, config: ModelConfig, narrow: bool) -> int:  # noqa: ARG002
        """Bytes per slot and KV head that `settle_` or `score` hold for a moment, as test_memory_plan.py checks.

        narrow: keys are stored in less than 32 bits, so that whoever reads them as float32 makes a copy.
        """
        return 0

    def tag_(self, layer: LayerCache, keys: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """What to store beside keys [B, Hkv, n, D], exact whatever the cache stores: [B, Hkv, n, ...] by name.

        Every token passes once, in order, and may be noted in `layer.state`; before `settle_` it may not, so that a
        session can take tokens back.
        """
        return {}

    def settle_(self, layer: LayerCache, due: Tensor) -> None:  # noqa: B027
        """Fix what follows from the first S tokens, in the rows that are `due` [B]: once, before their first eviction.

        Until then the tokens 0..S-1 lie in the slots 0..S-1.
        """

    def observe_queries_(self, layer: LayerCache, queries: Tensor, positions: Tensor) -> None:
        """Note queries [B, H, n, D] at `positions` [B, n], in order, after their attention."""
        raise NotImplementedError(f"{self.name} does not observe queries")

    def observe_attention_(self, layer: LayerCache, weights: Tensor, positions: Tensor) -> None:
        """Note attention weights [B, Hkv, G, n, S'] of queries at `positions` [B, n] over the first S' slots."""
        raise NotImplementedError(f"{self.name} does not observe attention")

    @abstractmethod
    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:
        """How much each slot deserves to stay, lowest goes first: [B, Hkv, S] (or broadcastable), read as float32.

        `query` [B, H, D] and `key` [B, Hkv, D] belong to the incoming token at position `now` [B], which is not in the
        cache yet; everything before it has been observed.  Empty and protected slots may get any number.
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
        cls,
        slots: int,
        *,
        sinks: int | None = None,
        recent: int | None = None,
        evict_every: int | None = None,
        recent_share: int = EvictionPolicy.recent_share,
    ) -> Retention:
        """Defaults that always fit; what is given explicitly is kept, and the defaults make room for it.

        Defaults: evict_every = slots / 16 in 1..32, sinks = min(4, slots / 16), recent = slots / recent_share.  Raises
        BudgetError if sinks + recent + evict_every exceed the slots.
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
            recent = min(slots // recent_share, room)
        return cls(slots, sinks, recent, evict_every)

    @property
    def room_for_pins(self) -> int:
        """Tokens that may be pinned: what is neither protected already nor must be free to go."""
        return self.slots - self.sinks - self.recent - self.evict_every


def evict_(layer: LayerCache, query: Tensor, key: Tensor, now: Tensor, *, settle: bool) -> None:
    """Free `evict_every` slots per KV head in every row whose incoming token, at position `now` [B], finds none free.

    Rows that are not due are left as they are: the decision is a mask, so rows of a batch may be in different phases.
    settle: whether some row does this for the first time.
    """
    retention = layer.retention
    if settle:
        layer.policy.settle_(layer, now == retention.slots)
    score = layer.policy.score(layer, query, key, now)  # [B, Hkv, S]
    victims = choose(score, layer, now)  # [B, Hkv, evict_every]
    since = now - retention.slots
    layer.free_(victims, due=(since >= 0) & (since % retention.evict_every == 0))


def choose(score: Tensor, layer: LayerCache, now: Tensor) -> Tensor:
    """The `evict_every` slots that go, per row and KV head: [B, Hkv, evict_every] indices, first to go first.

    Order: slots that nobody will see again (empty, or outside the sliding window, even if protected), then the lowest
    score, and always ties to the oldest token.  All of it is one 64-bit integer per slot - score in the upper half,
    position in the lower - so that no two slots compare equal and every device makes the same choice.
    """
    positions, retention = layer.positions, layer.retention
    seat = torch.arange(positions.shape[2], device=positions.device)  # [S]
    order = (_sortable(score) << 32) + positions  # [B, Hkv, S]
    protected = (positions < retention.sinks) | (positions >= now[:, None, None] - retention.recent)
    if layer.flagged:
        protected |= layer.flags & PINNED > 0
    order = torch.where(protected, _LAST, order)
    unseen = ~layer.can_see(now[:, None])[:, :, 0]  # [B, Hkv, S]
    age = (positions + 1).to(torch.int64) * len(seat) + seat  # [B, Hkv, S], distinct for empty slots too
    order = torch.where(unseen, _FIRST + age, order)
    return order.topk(retention.evict_every, largest=False, sorted=True).indices  # [B, Hkv, evict_every]


_FIRST, _LAST = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max


def _sortable(score: Tensor) -> Tensor:
    """Floats as int64 in the same order: the bits of an IEEE float sort like an integer once negatives are flipped."""
    bits = (score.to(torch.float32) + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64)
