"""Bounded attention written out naively: Python lists, one token and one head at a time, no state in tensors.

Follows hashevict.md sections 1 and 2 (distance to the current query's code, summed over the group; or to the newest
key's code) and design.md's order of events: evict, write, attend.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(eq=False)
class Entry:
    """A live token; compared by identity."""

    position: int
    key: Tensor
    value: Tensor
    code: list[int]


@dataclass
class NaiveHead:
    """One KV head: a list of live entries, never longer than `slots`."""

    policy: str
    slots: int
    sinks: int
    recent: int
    every: int
    window: int | None
    rows: Tensor  # [P, D] hash projection
    live: list[Entry] = field(default_factory=list)

    def code(self, x: Tensor) -> list[int]:
        return [1 if float(row.to(x.dtype) @ x) >= 0 else 0 for row in self.rows]

    def distance(self, probe: list[int], entry: Entry) -> int:
        return sum(bit != other for bit, other in zip(probe, entry.code, strict=True))

    def worth(self, entry: Entry, probes: list[list[int]]) -> int:
        """Lowest goes first."""
        return entry.position if self.policy == "window" else -sum(self.distance(probe, entry) for probe in probes)

    def step(self, position: int, queries: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """queries [G, D], key and value [D] of the token at `position` -> [G, D]."""
        if len(self.live) == self.slots:
            unseen = [e for e in self.live if self.window is not None and e.position <= position - self.window]
            candidates = [e for e in self.live if e not in unseen and self.sinks <= e.position < position - self.recent]
            probes = [self.code(x) for x in ([key] if self.policy == "hashevict-key" else queries)]
            candidates.sort(key=lambda e: (self.worth(e, probes), e.position))
            victims = (unseen + candidates)[: self.every]
            self.live = [e for e in self.live if e not in victims]
        self.live.append(Entry(position, key, value, self.code(key)))
        visible = [e for e in self.live if self.window is None or e.position > position - self.window]
        keys, values = torch.stack([e.key for e in visible]), torch.stack([e.value for e in visible])
        weights = (queries @ keys.T * key.shape[0] ** -0.5).softmax(-1)
        return weights @ values
