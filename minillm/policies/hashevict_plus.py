"""`hashevict-plus`: keep what is unlike the rest or what queries have been asking for, judged from hash codes alone.

HashEvict asks what the current query likes.  A query over filler does not ask for the fact that will be asked for
later, so the fact goes first, and the better the estimate the worse.  Here a token may stay for any of two reasons:

    distinct  its code disagrees with the others: minus its dot product with the sum of all live codes.  What is unlike
              everything else cannot be reconstructed from it (as in KeyDiff, arXiv 2504.15364, but P bits a key)
    used      its code agrees with the profile, the sum of past queries' codes, each `decay` times as important as the
              next one

Both are standardised over the live slots of a KV head, and the larger counts; `age` adds a preference for recent tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import lsh
from ..config import ModelConfig
from ..errors import ConfigError
from ..slots import LayerCache
from .hashevict import HashEvict


@dataclass(frozen=True)
class HashEvictPlus(HashEvict):
    """The token that is neither distinct nor used goes first."""

    hash_bits: int = 64
    per_head: bool = True
    decay: float = 0.9
    age: float = 0.25
    name: ClassVar[str] = "hashevict-plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.age < 0:
            raise ConfigError(f"age must not be below 0, not {self.age}: 0 counts every token alike")

    def scratch(self, config: ModelConfig, narrow: bool) -> int:
        """Beside what HashEvict holds: codes as numbers while they are added, and three scores."""
        return super().scratch(config, narrow) + 18 * self.hash_bits + 64

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:
        """The larger of how distinct and how used a token is, and its age: [B, Hkv, S]."""
        live = layer.positions >= 0  # [B, Hkv, S]
        codes = layer.state["codes"]  # [B, Hkv, S, W]
        total = (self._signs(codes) * live.unsqueeze(-1)).sum(2)  # [B, Hkv, P]
        distinct = standardised(-lsh.dot(codes, total), live)
        used = standardised(super().score(layer, query, key, now), live)
        return torch.maximum(distinct, used) + self.age * standardised(layer.positions, live)


def standardised(x: Tensor, live: Tensor) -> Tensor:
    """x [B, Hkv, S] moved and scaled so that its live entries have mean 0 and deviation 1 in each head: float64."""
    x = x.to(torch.float64)
    count = live.sum(-1, keepdim=True).clamp(min=1)  # [B, Hkv, 1]
    off = x - (x * live).sum(-1, keepdim=True) / count
    deviation = ((off * live).square().sum(-1, keepdim=True) / count).sqrt()  # [B, Hkv, 1]
    return off / deviation.clamp(min=1e-9)
