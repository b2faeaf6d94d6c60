"""`h2o`: heavy hitters, the tokens that have received most attention so far.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048.
It has seen attention up to the previous token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import ModelConfig
from ..eviction import EvictionPolicy, TensorSpec
from ..slots import LayerCache


@dataclass(frozen=True)
class H2O(EvictionPolicy):
    """The least accumulated attention goes first, summed over queries and the query group; half the slots are recent.

    mean: divide by the number of queries that could see the token (as the cold-compress toolkit does), so that old
    tokens are not favoured for their age.
    """

    mean: bool = False
    name: ClassVar[str] = "h2o"
    recent_share: ClassVar[int] = 2
    needs_attention: ClassVar[bool] = True

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Attention received since the token came."""
        return {"attention": ((), torch.float32)}

    def observe_attention_(self, layer: LayerCache, weights: Tensor, positions: Tensor) -> None:  # noqa: ARG002
        """Add weights [B, Hkv, G, n, S'], over group and queries."""
        layer.state["attention"][:, :, : weights.shape[-1]] += weights.sum((2, 3))  # [B, Hkv, S']

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """Attention received, in all or per query: [B, Hkv, S]."""
        received = layer.state["attention"]
        return received / (now[:, None, None] - layer.positions) if self.mean else received
