"""What a token is worth under every policy, from the whole history of a naive layer: the lowest goes first.

Follows the papers as hashevict.md (sections 2 to 4) and the policies' docstrings state them, one token at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch

from minillm import lsh
from minillm.policies.fastgen import FastGen
from minillm.policies.h2o import H2O
from minillm.policies.hashevict import HashEvict
from minillm.policies.hashevict_plus import HashEvictPlus
from minillm.policies.l2 import L2
from minillm.policies.random import Random
from minillm.policies.scissorhands import Scissorhands
from minillm.policies.snapkv import SnapKV
from minillm.slots import PUNCTUATION, SPECIAL

if TYPE_CHECKING:
    from .oracle import NaiveLayer

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def norm(a: Vector) -> float:
    return math.sqrt(dot(a, a))


def float32(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).item()


def bfloat16(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).to(torch.bfloat16).item()


class Candidate(NamedTuple):
    """The token at `position` in a KV head, while the one at `now` waits for a slot."""

    layer: NaiveLayer
    head: int
    position: int
    now: int

    @property
    def key(self) -> Vector:
        return self.layer.keys[self.position][self.head]

    @property
    def received(self) -> float:
        """Attention it has got so far, over the query group."""
        return received(self.layer, self.head, self.position, self.now)


def received(layer: NaiveLayer, head: int, position: int, until: int) -> float:
    """Attention that a token got from the queries before `until`, over the group."""
    return sum(layer.attention[t][h].get(position, 0) for t in range(position, until) for h in layer.group_of(head))


def window(c: Candidate) -> float:
    return c.position


def random(c: Candidate) -> float:
    def mix(x: int) -> int:
        x %= 2**32
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    assert isinstance(c.layer.policy, Random)
    stream = mix(mix(c.head + c.layer.policy.policy_seed * 1_000_003) + c.layer.index)
    return mix(stream + c.position) // 2**8


def exact(c: Candidate) -> float:
    return sum(dot(c.layer.queries[c.now][h], c.key) for h in c.layer.group_of(c.head))


def keydiff(c: Candidate) -> float:
    keys = [c.layer.keys[p][c.head] for p in c.layer.live[c.head]]
    directions = [[x / norm(key) for x in key] for key in keys]
    mean = [sum(column) / len(keys) for column in zip(*directions, strict=True)]
    return -dot(c.key, mean) / norm(c.key) / norm(mean)


def l2(c: Candidate) -> float:
    assert isinstance(c.layer.policy, L2)
    return c.position if c.layer.index < c.layer.policy.skip_layers else -bfloat16(norm(c.key))


def h2o(c: Candidate) -> float:
    assert isinstance(c.layer.policy, H2O)
    return c.received / (c.now - c.position) if c.layer.policy.mean else c.received


def tova(c: Candidate) -> float:
    last = c.layer.attention[c.now - 1]
    return sum(weights.get(c.position, 0) for weights in last) / len(last)


def scissorhands(c: Candidate) -> float:
    assert isinstance(c.layer.policy, Scissorhands)
    hits = 0
    for t in range(max(c.position, c.now - c.layer.policy.history), c.now):
        group = [c.layer.attention[t][h] for h in c.layer.group_of(c.head)]
        mean = sum(weights.get(c.position, 0) for weights in group) / len(group)
        hits += mean >= 1 / len(group[0])
    return hits


def snapkv(c: Candidate) -> float:
    assert isinstance(c.layer.policy, SnapKV)
    live, reach = c.layer.live[c.head], c.layer.policy.pooling // 2
    looks = [
        c.layer.attend(h, t, live)
        for t in range(max(0, c.now - c.layer.policy.observed), c.now + 1)
        for h in c.layer.group_of(c.head)
    ]
    at = live.index(c.position)
    near = live[max(0, at - reach) : at + reach + 1]
    return sum(sum(look.get(p, 0) for look in looks) for p in near) / len(near)


def fastgen(c: Candidate) -> float:
    layer, head, slots, policy = c.layer, c.head, c.layer.retention.slots, c.layer.policy
    assert isinstance(policy, FastGen)

    def named(choice: int, live: list[int], until: int) -> list[int]:
        """Special tokens; from choice 1 on punctuation; from choice 2 on those that received most."""
        wanted = SPECIAL if choice == 0 else SPECIAL | PUNCTUATION
        ranked = sorted(live, key=lambda p: received(layer, head, p, until), reverse=True)
        heavy = ranked[: max(1, int(policy.heavy * slots))] if choice >= 2 else []
        return [p for p in live if layer.flags[p] & wanted or p in heavy]

    first = list(range(slots))
    share = {p: received(layer, head, p, slots) for p in first}
    enough = policy.recovered * sum(share.values())
    choice = next((i for i in range(3) if sum(share[p] for p in named(i, first, slots)) >= enough), 3)
    return 2 * (c.position in named(choice, layer.live[head], c.now)) + c.position / (c.now + 1)


@dataclass(frozen=True, eq=False)
class NaiveCodes:
    """Hash codes of a layer's queries and keys, each as one integer, worked out when they are asked for."""

    layer: NaiveLayer

    @cache  # noqa: B019  # a layer lives as long as its test
    def rows(self, head: int) -> list[Vector]:
        policy = self.policy
        heads = self.layer.kv_heads if policy.per_head else 1
        drawn = lsh.projection(
            policy.hash_bits,
            len(self.layer.keys[0][0]),
            seed=policy.policy_seed,
            layer=self.layer.index,
            heads=heads,
            orthogonal=policy.orthogonal,
        )
        rows: list[Vector] = drawn[head % heads].tolist()
        return rows

    @property
    def policy(self) -> HashEvict:
        assert isinstance(self.layer.policy, HashEvict)
        return self.layer.policy

    @cache  # noqa: B019
    def query(self, h: int, t: int) -> int:
        """The code of query head h of token t."""
        return self.code(h // self.layer.group, self.layer.queries[t][h])

    @cache  # noqa: B019
    def key(self, head: int, t: int) -> int:
        """The code of a key, without the mean of the first keys if the policy wants that."""
        return self.code(head, self.difference(head, t))

    def code(self, head: int, x: Vector) -> int:
        return sum(1 << bit for bit, row in enumerate(self.rows(head)) if dot(row, x) >= 0)

    @cache  # noqa: B019
    def difference(self, head: int, t: int) -> Vector:
        """k, or k - mean."""
        key = self.layer.keys[t][head]
        if not self.policy.centred:
            return key
        first = self.layer.keys[self.layer.retention.sinks : min(self.layer.retention.slots, 64)]
        return [x - sum(keys[head][i] for keys in first) / len(first) for i, x in enumerate(key)]

    def agreement(self, a: int, b: int) -> int:
        """Bits that agree, less bits that do not."""
        return self.policy.hash_bits - 2 * (a ^ b).bit_count()

    def weighted(self, c: Candidate, liking: float) -> float:
        return liking * bfloat16(norm(self.difference(c.head, c.position))) if self.policy.norm_weighted else liking


def hashevict(c: Candidate) -> float:
    codes, policy = c.layer.codes, c.layer.codes.policy
    mine = codes.key(c.head, c.position)

    def liking(t: int) -> int:
        return sum(codes.agreement(mine, codes.query(h, t)) for h in c.layer.group_of(c.head))

    if policy.decay:
        return codes.weighted(c, sum(policy.decay ** (c.now - t) * liking(t) for t in range(c.now + 1)))
    return codes.weighted(c, max(liking(t) for t in range(max(0, c.now - policy.recent_queries + 1), c.now + 1)))


def hashevict_key(c: Candidate) -> float:
    codes = c.layer.codes
    return codes.weighted(c, codes.agreement(codes.key(c.head, c.position), codes.key(c.head, c.now)))


def hashevict_plus(c: Candidate) -> float:
    policy, slots = c.layer.policy, c.layer.retention.slots
    assert isinstance(policy, HashEvictPlus)
    directions = [[x / norm(keys[c.head]) for x in keys[c.head]] for keys in c.layer.keys[: max(slots, c.position + 1)]]
    if c.position < slots:  # judged together, when the first had to go
        reference = [sum(column) for column in zip(*directions, strict=True)]
    else:
        ages = range(c.position, -1, -1)
        reference = [
            sum(policy.decay**age * x for age, x in zip(ages, column, strict=True))
            for column in zip(*directions, strict=True)
        ]
    return bfloat16(-dot(directions[c.position], reference) / norm(reference))


RULES = (
    window,
    random,
    exact,
    keydiff,
    l2,
    h2o,
    tova,
    scissorhands,
    snapkv,
    fastgen,
    hashevict,
    hashevict_key,
    hashevict_plus,
)
WORTH: dict[str, Callable[[Candidate], float]] = {rule.__name__.replace("_", "-"): rule for rule in RULES}
