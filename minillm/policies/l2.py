"""`l2`: a key of small norm tends to receive much attention, so the largest norm goes first.

Devoto et al., "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv 2406.11430.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import ModelConfig
from ..eviction import TAGGED_TOGETHER, EvictionPolicy, Retention, TensorSpec
from ..slots import LayerCache


@dataclass(frozen=True)
class L2(EvictionPolicy):
    """The largest ||k|| goes first.

    skip_layers: the paper leaves the first two layers alone, where the relation does not hold.  Under a hard cap some
    token has to go there too: the oldest one.
    """

    skip_layers: int = 0
    name: ClassVar[str] = "l2"
    needs_token: ClassVar[bool] = False
    needs_keys: ClassVar[bool] = True

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """The norm of the key.

        Three digits are enough, and better: keys of the same token have the same norm but for rounding, and what is
        equal should tie, so that the oldest goes.
        """
        return {"norms": ((), torch.bfloat16)}

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:
        """Keys that are tagged together, as they are stored and in float32."""
        return min(TAGGED_TOGETHER, retention.slots) * (6 if narrow else 4) * config.head_dim

    def tag_(self, layer: LayerCache, keys: Tensor, due: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """||k|| of keys [B, Hkv, n, D]: [B, Hkv, n]."""
        return {"norms": keys.to(torch.float32).norm(dim=-1).to(torch.bfloat16)}

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """Minus the norm: [B, Hkv, S]."""
        return layer.positions if layer.index < self.skip_layers else -layer.state["norms"]
