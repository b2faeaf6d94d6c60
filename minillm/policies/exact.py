"""`exact`: the true q . k of the current query, where HashEvict has an estimate from hash bits.

What infinitely many bits, and norms, would give: the rule to hold the hash against.  It reads every key, which is what
hashing avoids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import ModelConfig
from ..eviction import EvictionPolicy, Retention
from ..slots import LayerCache


@dataclass(frozen=True)
class Exact(EvictionPolicy):
    """The lowest q . k goes first, summed over the G query heads of the KV head."""

    name: ClassVar[str] = "exact"

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:
        """All keys."""
        return retention.slots * 4 * config.head_dim if narrow else 0

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """The sum of q . k over the group: [B, Hkv, S]."""
        query = query.to(torch.promote_types(query.dtype, torch.float32))  # in bfloat16 many would tie
        summed = query.unflatten(1, (key.shape[1], -1)).sum(2).unsqueeze(3)  # [B, Hkv, D, 1]
        products: Tensor = layer.dense_keys(None, query.dtype) @ summed  # [B, Hkv, S, 1]
        return products.squeeze(-1)
