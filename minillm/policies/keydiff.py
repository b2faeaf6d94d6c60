"""`keydiff`: keep keys that are unlike the others, judged by the angle to their mean.

Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in Resource-Constrained
Environments", arXiv 2504.15364.  The strongest rule here that sees neither queries nor attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..config import ModelConfig
from ..eviction import EvictionPolicy, Retention
from ..slots import LayerCache


@dataclass(frozen=True)
class KeyDiff(EvictionPolicy):
    """The key most similar to the mean of the normalised keys in the cache goes first."""

    name: ClassVar[str] = "keydiff"

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:
        """The directions of all keys, and the keys."""
        return retention.slots * (8 if narrow else 4) * config.head_dim

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """Minus the cosine to the mean, up to its length, which is the same for all slots: [B, Hkv, S]."""
        precise = torch.promote_types(query.dtype, torch.float32)  # cosines are close: in bfloat16 many would tie
        directions = normalize(layer.dense_keys(None, precise), dim=-1)  # [B, Hkv, S, D]
        live = (layer.positions >= 0).to(directions.dtype).unsqueeze(2)  # [B, Hkv, 1, S]
        total = live @ directions  # [B, Hkv, 1, D]: the mean, but for its length
        return -(directions @ total.transpose(2, 3)).squeeze(-1)
