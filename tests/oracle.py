"""Bounded attention written out naively: Python lists, one token and one head at a time.

Follows design.md's order of events: evict, write, attend.  Nothing is updated from step to step: the layer remembers
everything that ever happened, and the rules (oracle_rules.py) work their answers out from that history, which is what
the policies' running state has to amount to.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

from minillm.eviction import EvictionPolicy, Retention
from minillm.slots import PINNED

from .oracle_rules import WORTH, Candidate, NaiveCodes, Vector, dot, float32


@dataclass
class NaiveLayer:
    """One layer and row: for each KV head the positions that live, never more than the slots; and all of history."""

    policy: EvictionPolicy
    retention: Retention
    kv_heads: int
    group: int
    window: int | None = None
    index: int = 0
    queries: list[list[Vector]] = field(default_factory=list)  # of every token so far, per query head
    keys: list[list[Vector]] = field(default_factory=list)  # per KV head
    values: list[list[Vector]] = field(default_factory=list)
    flags: list[int] = field(default_factory=list)
    attention: list[list[dict[int, float]]] = field(default_factory=list)  # per query head: position -> weight

    def __post_init__(self) -> None:
        self.live: list[list[int]] = [[] for _ in range(self.kv_heads)]  # oldest first

    def step(self, queries: list[Vector], keys: list[Vector], values: list[Vector], flags: int = 0) -> list[Vector]:
        """The next token's queries [H][D], keys and values [Hkv][D] -> outputs [H][D]."""
        now = len(self.queries)
        self.queries.append(queries)
        self.keys.append(keys)
        self.values.append(values)
        self.flags.append(flags)
        for head in range(self.kv_heads):
            if len(self.live[head]) == self.retention.slots:
                self.evict(head, now)
            self.live[head].append(now)
        self.attention.append([self.attend(h, now, self.live[h // self.group]) for h in range(len(queries))])
        return [
            [sum(w * self.values[p][h // self.group][i] for p, w in weights.items()) for i in range(len(values[0]))]
            for h, weights in enumerate(self.attention[now])
        ]

    def evict(self, head: int, now: int) -> None:
        live, retention, worth = self.live[head], self.retention, WORTH[self.policy.name]
        unseen = [p for p in live if not self.sees(now, p)]
        others = [
            p
            for p in live
            if p not in unseen and p >= retention.sinks and p < now - retention.recent and not self.flags[p] & PINNED
        ]
        # Scores are read as float32: what is equal there is a tie, and ties go to the oldest.
        others.sort(key=lambda p: (float32(worth(Candidate(self, head, p, now))), p))
        gone = (unseen + others)[: retention.evict_every]
        self.live[head] = [p for p in live if p not in gone]

    def sees(self, query: int, position: int) -> bool:
        return position <= query and (self.window is None or position > query - self.window)

    def attend(self, h: int, t: int, live: list[int]) -> dict[int, float]:
        """Attention of query head h of token t over those of `live` that it sees; nothing if it sees none."""
        query, scale = self.queries[t][h], len(self.queries[t][h]) ** -0.5
        scores = {p: dot(query, self.keys[p][h // self.group]) * scale for p in live if self.sees(t, p)}
        parts = {p: math.exp(score - max(scores.values())) for p, score in scores.items()}
        return {p: part / sum(parts.values()) for p, part in parts.items()}

    def group_of(self, head: int) -> range:
        """The query heads that share a KV head."""
        return range(head * self.group, (head + 1) * self.group)

    @cached_property
    def codes(self) -> NaiveCodes:
        return NaiveCodes(self)
