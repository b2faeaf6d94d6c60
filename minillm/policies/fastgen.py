"""`fastgen`: every head keeps what it was seen to need: special tokens, punctuation, heavy hitters, or the window.

Ge et al., "Model Tells You What to Discard: Adaptive KV Cache Compression for LLMs" (FastGen), arXiv 2310.01801.  The
paper profiles heads on the prompt and gives each as much as it needs; under one hard cap the profile is taken on the
first S tokens and decides what goes first.  It has seen attention up to the previous token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ConfigError
from ..eviction import EvictionPolicy, TensorSpec
from ..slots import PUNCTUATION, SPECIAL, LayerCache


@dataclass(frozen=True)
class FastGen(EvictionPolicy):
    """A head takes the first of these that holds a share `recovered` of its attention over the first S tokens.

    0: special tokens.  1: and punctuation.  2: and heavy hitters.  3: and the most recent, which is also what it takes
    when none suffices.  What the choice does not name goes oldest first.  heavy: the share of slots for heavy hitters.
    """

    recovered: float = 0.95
    heavy: float = 0.3
    name: ClassVar[str] = "fastgen"
    needs_kinds: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for option, value in (("recovered", self.recovered), ("heavy", self.heavy)):
            if not 0 < value <= 1:
                raise ConfigError(f"{option} must lie in (0, 1], not {value}")

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Attention received since the token came."""
        return {"attention": ((), torch.float32)}

    def head_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """Which of the four the head has taken."""
        return {"choice": ((), torch.uint8)}

    def observe_attention_(self, layer: LayerCache, weights: Tensor, positions: Tensor) -> None:  # noqa: ARG002
        """Add weights [B, Hkv, G, n, S'], over group and queries."""
        layer.state["attention"][:, :, : weights.shape[-1]] += weights.sum((2, 3))  # [B, Hkv, S']

    def settle_(self, layer: LayerCache, due: Tensor) -> None:
        """Choose for every head of the rows that are due."""
        received = layer.state["attention"]  # [B, Hkv, S]
        kept, enough = torch.zeros_like(received, dtype=torch.bool), []
        for more in (layer.flags & SPECIAL > 0, layer.flags & PUNCTUATION > 0, self._heavy(received)):
            kept = kept | more
            enough.append((received * kept).sum(-1) >= self.recovered * received.sum(-1))  # [B, Hkv]
        choice = 3 - torch.stack(enough).sum(0)  # what one holds, the next holds too: so many suffice
        layer.state["choice"].copy_(torch.where(due[:, None], choice.to(torch.uint8), layer.state["choice"]))

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """2 for what the head's choice names, and the token's position as a fraction of now: [B, Hkv, S]."""
        choice = layer.state["choice"].unsqueeze(-1)  # [B, Hkv, 1]
        kept = layer.flags & SPECIAL > 0
        kept |= (choice >= 1) & (layer.flags & PUNCTUATION > 0)
        kept |= (choice >= 2) & self._heavy(layer.state["attention"])
        return 2 * kept + layer.positions / (now[:, None, None] + 1)

    def _heavy(self, received: Tensor) -> Tensor:
        """Which slots are among the `heavy` share that received most: [B, Hkv, S]."""
        count = max(1, int(self.heavy * received.shape[-1]))
        return torch.zeros_like(received, dtype=torch.bool).scatter_(-1, received.topk(count).indices, True)
