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
from .slots import NOTHING, PINNED, LayerCache

TensorSpec = tuple[tuple[int, ...], torch.dtype]  # a shape, and what is in it
TAGGED_TOGETHER = 256  # keys of a KV head that a policy tags at once, at most


class EvictionPolicy(ABC):
    """A stateless rule that gives every slot a number; the lowest goes first.

    Whatever it needs to remember lies in tensors that it declares here, by name, and the cache allocates: every byte is
    planned, saved with a session, and found in `layer.state`.  A shape may depend on the model alone.
    """

    name: ClassVar[str]
    evicts: ClassVar[bool] = True
    recent_share: ClassVar[int] = 4  # by default the last slots / recent_share tokens are protected
    needs_kinds: ClassVar[bool] = False  # whether tokens must be flagged as SPECIAL and PUNCTUATION
    needs_keys: ClassVar[bool] = False  # whether `tag_` wants the key of every token
    needs_attention: ClassVar[bool] = False  # whether `observe_attention_` wants the weights of every query
    mixes_heads: ClassVar[bool] = False  # whether `observe_attention_` wants the last query's weights in all KV heads
    needs_token: ClassVar[bool] = True  # whether `score` looks at the query or key of the incoming token
    watching: ClassVar[int] = 0  # bytes per query, slot and KV head that it holds for a moment

    @property
    def needs_queries(self) -> bool:
        """Whether `observe_queries_` wants every query."""
        return False

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Shape (after [B, Hkv, S]) and dtype of what is kept for a slot; 0 for a token not tagged or observed yet."""
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

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:  # noqa: ARG002
        """Bytes per KV head that `settle_`, `tag_` or `score` hold for a moment, as test_memory_plan.py checks.

        narrow: keys are stored in less than 32 bits, so that whoever reads them as float32 makes a copy.
        """
        return 0

    def tag_(self, layer: LayerCache, keys: Tensor, due: Tensor) -> dict[str, Tensor]:
        """What to store beside keys [B, Hkv, n, D], at least in float32: [B, Hkv, n, ...] by name of `slot_state`.

        Keys are tagged when an eviction needs it and not when they come: those since the last eviction together, at
        most TAGGED_TOGETHER at once.  They are what the cache has stored, in 8 bits if it does.  Every token passes
        once, in order, and may be noted in `layer.state`, in the rows that are `due` [B] only: what is returned for
        other rows is not stored.
        """
        raise NotImplementedError(f"{self.name} does not tag keys")

    def settle_(self, layer: LayerCache, due: Tensor) -> None:
        """Tag the first S tokens, and fix what follows from them, in the rows that are `due` [B].

        Once, before their first eviction; the tokens 0..S-1 lie in the slots 0..S-1.  Nothing is noted before, so that
        a session can take tokens back.
        """
        if self.needs_keys:
            tag_slots_(layer, layer.all_slots(), due)

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

    Its query [B, H, D] and key [B, Hkv, D] may be anything where the policy does not look at them (`needs_token`).

    Rows that are not due are left as they are: the decision is a mask, so rows of a batch may be in different phases.
    settle: whether some row does this for the first time.  Otherwise the tokens since the last time, which lie in what
    was free then, are tagged first.
    """
    since = now - layer.retention.slots  # [B]
    due = (since >= 0) & (since % layer.retention.evict_every == 0)  # [B]
    if settle:
        layer.policy.settle_(layer, since == 0)
    if layer.policy.needs_keys:
        tag_slots_(layer, layer.free, due & (since > 0))
    score = layer.policy.score(layer, query, key, now)  # [B, Hkv, S]
    layer.free_(choose(score, layer, now), due)


def tag_slots_(layer: LayerCache, slots: Tensor, due: Tensor) -> None:
    """Tag the tokens in the slots [B, Hkv, n] (or broadcastable), in this order, in the rows that are `due` [B]."""
    precise = torch.promote_types(layer.keys.dtype, torch.float32)
    for some in slots.split(TAGGED_TOGETHER, 2):
        for name, tag in layer.policy.tag_(layer, layer.keys_in(some, precise), due).items():
            layer.update_(name, some, tag, due)


def choose(score: Tensor, layer: LayerCache, now: Tensor) -> Tensor:
    """The `evict_every` slots that go, per row and KV head: [B, Hkv, evict_every] indices, first to go first.

    Order: slots that nobody will see again (empty, or outside the sliding window, even if protected), then the lowest
    score, and always ties to the oldest token.  All of it is one 64-bit integer per slot - score in the upper half,
    position in the lower, or for an empty slot a number of its own - so that no two slots compare equal and every
    device makes the same choice.
    """
    positions, retention = layer.positions, layer.retention
    protected = (positions < retention.sinks) | (positions >= now[:, None, None] - retention.recent)
    if layer.flagged:
        protected |= layer.flags & PINNED > 0
    order = torch.where(protected, _LAST, _sortable(score))  # [B, Hkv, S]
    order = torch.where(layer.can_see(now[:, None])[:, :, 0], order, _FIRST)
    age = torch.where(
        positions == NOTHING, layer.all_slots() - retention.slots, positions
    )  # [B, Hkv, S], -S.. if empty
    order = (order.to(torch.int64) << 32) + age
    return order.topk(retention.evict_every, largest=False, sorted=True).indices  # [B, Hkv, evict_every]


_FIRST, _LAST = torch.iinfo(torch.int32).min + 1, torch.iinfo(torch.int32).max  # + 1: room for ages below 0


def _sortable(score: Tensor) -> Tensor:
    """Floats as int32 in the same order: the bits of an IEEE float sort like an integer once negatives are flipped."""
    bits = (score.to(torch.float32) + 0.0).view(torch.int32)  # + 0.0 turns -0.0 into 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
