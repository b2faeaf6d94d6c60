"""`tova`: the token that the last query attends to least.

Oren et al., "Transformers are Multi-State RNNs" (Token Omission Via Attention), arXiv 2401.06104.  It has seen
attention up to the previous token: the eviction comes before the current one.
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
class Tova(EvictionPolicy):
    """The lowest attention of the last query goes first, averaged over all heads, so that all heads drop the same."""

    name: ClassVar[str] = "tova"
    needs_attention: ClassVar[bool] = True
    mixes_heads: ClassVar[bool] = True

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """What the last query gave; the same for every head."""
        return {"attention": ((), torch.float32)}

    def observe_attention_(self, layer: LayerCache, weights: Tensor, positions: Tensor) -> None:  # noqa: ARG002
        """Keep the last of weights [B, Hkv, G, n, S'], averaged over the heads."""
        layer.state["attention"][:, :, : weights.shape[-1]] = weights[:, :, :, -1].mean((1, 2)).unsqueeze(1)

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """Attention of the last query: [B, Hkv, S]."""
        return layer.state["attention"]
