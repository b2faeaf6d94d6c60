"""Bounded attention and every eviction rule written out naively: Python lists, one token and one head at a time.

Follows hashevict.md sections 2 to 4, the rules as the policies' docstrings state them, and design.md's order of events:
evict, write, attend.  Nothing is updated from step to step: the layer remembers everything that ever happened, and a
rule works its answer out from that history, which is what the policies' running state has to amount to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch

from minillm import lsh
from minillm.eviction import PINNED, PUNCTUATION, SPECIAL, EvictionPolicy, Retention
from minillm.policies.fastgen import FastGen
from minillm.policies.h2o import H2O
from minillm.policies.hashevict import HashEvict
from minillm.policies.l2 import L2
from minillm.policies.random import Random
from minillm.policies.scissorhands import Scissorhands
from minillm.policies.snapkv import SnapKV

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def softmax(scores: dict[int, float]) -> dict[int, float]:
    top = max(scores.values())
    parts = {position: math.exp(score - top) for position, score in scores.items()}
    total = sum(parts.values())
    return {position: part / total for position, part in parts.items()}


def rounded(x: float, dtype: torch.dtype) -> float:
    return torch.tensor(x, dtype=torch.float64).to(dtype).item()


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
            if p not in unseen
            and p >= retention.sinks
            and p < now - retention.recent
            and not self.flags[p] & PINNED
        ]
        # Scores are read as float32: what is equal there is a tie, and ties go to the oldest.
        others.sort(key=lambda p: (rounded(worth(self, head, p, now), torch.float32), p))
        gone = (unseen + others)[: retention.evict_every]
        self.live[head] = [p for p in live if p not in gone]

    def sees(self, query: int, position: int) -> bool:
        return position <= query and (self.window is None or position > query - self.window)

    def attend(self, h: int, t: int, live: list[int]) -> dict[int, float]:
        """Attention of query head h of token t over those of `live` that it sees; nothing if it sees none."""
        query, scale = self.queries[t][h], len(self.queries[t][h]) ** -0.5
        scores = {p: dot(query, self.keys[p][h // self.group]) * scale for p in live if self.sees(t, p)}
        return softmax(scores) if scores else {}

    def group_of(self, head: int) -> range:
        return range(head * self.group, (head + 1) * self.group)

    def received(self, head: int, position: int, until: int) -> float:
        """Attention that a token got from the queries before `until`, over the group."""
        return sum(self.attention[t][h].get(position, 0) for t in range(position, until) for h in self.group_of(head))

    # --- hashing -------------------------------------------------------------------------------------------------

    @cached_property
    def hyperplanes(self) -> list[list[Vector]]:
        """Per KV head, P rows of D numbers."""
        policy = self.policy
        assert isinstance(policy, HashEvict)
        rows = lsh.projection(
            policy.hash_bits,
            len(self.keys[0][0]),
            seed=policy.policy_seed,
            layer=self.index,
            heads=self.kv_heads if policy.per_head else 1,
            orthogonal=policy.orthogonal,
        ).tolist()
        return [rows[head if policy.per_head else 0] for head in range(self.kv_heads)]

    @cached_property
    def codes(self) -> dict[tuple[str, int, int], int]:
        """What has been hashed already."""
        return {}

    def code(self, kind: str, head: int, t: int) -> int:
        """Bits of the "query" of query head, or of the "key" of KV head, of token t, as one integer."""
        if (kind, head, t) not in self.codes:
            kv_head = head // self.group if kind == "query" else head
            x = self.queries[t][head] if kind == "query" else self.centred(head, t)
            bits = [dot(row, x) >= 0 for row in self.hyperplanes[kv_head]]
            self.codes[kind, head, t] = sum(bit << place for place, bit in enumerate(bits))
        return self.codes[kind, head, t]

    def centred(self, head: int, t: int) -> Vector:
        """A key, less the mean of the first keys if the policy wants that."""
        assert isinstance(self.policy, HashEvict)
        key = self.keys[t][head]
        if not self.policy.centred:
            return key
        first = self.keys[self.retention.sinks : min(self.retention.slots, 64)]
        return [x - sum(keys[head][i] for keys in first) / len(first) for i, x in enumerate(key)]

    def agreement(self, head: int, position: int, probes: list[int]) -> int:
        """Bits that agree less bits that do not, of a key's code and others."""
        assert isinstance(self.policy, HashEvict)
        code = self.code("key", head, position)
        return sum(self.policy.hash_bits - 2 * (code ^ probe).bit_count() for probe in probes)


# What a token is worth to a KV head at the time `now`: the lowest goes first.


def window(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    return position


def random(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    def mix(x: int) -> int:
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    assert isinstance(layer.policy, Random)
    stream = mix(mix(head + layer.policy.policy_seed * 1_000_003) + layer.index)
    return mix(stream + position) // 2**8


def exact(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    return sum(dot(layer.queries[now][h], layer.keys[position][head]) for h in layer.group_of(head))


def keydiff(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    directions = {p: [x / norm(layer.keys[p][head]) for x in layer.keys[p][head]] for p in layer.live[head]}
    mean = [sum(column) for column in zip(*directions.values(), strict=True)]
    return -dot(directions[position], mean)


def l2(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    assert isinstance(layer.policy, L2)
    if layer.index < layer.policy.skip_layers:
        return position
    return -rounded(norm(layer.keys[position][head]), torch.bfloat16)


def h2o(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    assert isinstance(layer.policy, H2O)
    received = layer.received(head, position, now)
    return received / (now - position) if layer.policy.mean else received


def tova(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    last = layer.attention[now - 1]
    return sum(weights.get(position, 0) for weights in last) / len(last)


def scissorhands(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    assert isinstance(layer.policy, Scissorhands)
    hits = 0
    for t in range(max(position, now - layer.policy.history), now):
        group = [layer.attention[t][h] for h in layer.group_of(head)]
        mean = sum(weights.get(position, 0) for weights in group) / len(group)
        hits += mean >= 1 / len(group[0])
    return hits


def snapkv(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    assert isinstance(layer.policy, SnapKV)
    live, reach = layer.live[head], layer.policy.pooling // 2
    looks = [
        layer.attend(h, t, live)
        for t in range(max(0, now - layer.policy.observed), now + 1)
        for h in layer.group_of(head)
    ]
    at = live.index(position)
    near = live[max(0, at - reach) : at + reach + 1]
    return sum(sum(look.get(p, 0) for look in looks) for p in near) / len(near)


def fastgen(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    policy = layer.policy
    assert isinstance(policy, FastGen)
    slots = layer.retention.slots

    def heavy(live: list[int], until: int) -> list[int]:
        ranked = sorted(live, key=lambda p: layer.received(head, p, until), reverse=True)
        return ranked[: max(1, int(policy.heavy * slots))]

    def named(choice: int, p: int, hitters: list[int]) -> bool:
        wanted = SPECIAL if choice == 0 else SPECIAL | PUNCTUATION
        return bool(layer.flags[p] & wanted) or (choice >= 2 and p in hitters)

    first, choice = list(range(slots)), 0
    share = {p: layer.received(head, p, slots) for p in first}
    hitters = heavy(first, slots)
    while choice < 3 and sum(share[p] for p in first if named(choice, p, hitters)) < policy.recovered * sum(
        share.values()
    ):
        choice += 1
    return 2 * named(choice, position, heavy(layer.live[head], now)) + position / (now + 1)


def hashevict(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    policy = layer.policy
    assert isinstance(policy, HashEvict)

    def liking(t: int) -> int:
        return layer.agreement(head, position, [layer.code("query", h, t) for h in layer.group_of(head)])

    if policy.decay:
        worth = sum(policy.decay ** (now - t) * liking(t) for t in range(now + 1))
    else:
        worth = max(liking(t) for t in range(max(0, now - policy.recent_queries + 1), now + 1))
    if policy.norm_weighted:
        worth *= rounded(norm(layer.centred(head, position)), torch.bfloat16)
    return worth


def hashevict_key(layer: NaiveLayer, head: int, position: int, now: int) -> float:
    return layer.agreement(head, position, [layer.code("key", head, now)])


WORTH: dict[str, Callable[[NaiveLayer, int, int, int], float]] = {
    **{"window": window, "random": random, "exact": exact, "keydiff": keydiff, "l2": l2},
    **{"h2o": h2o, "tova": tova, "scissorhands": scissorhands, "snapkv": snapkv, "fastgen": fastgen},
    **{"hashevict": hashevict, "hashevict-key": hashevict_key},
}
