"""`scissorhands`: a token that mattered keeps mattering, so count how often it did.

Liu et al., "Scissorhands: Exploiting the Persistence of Importance Hypothesis for LLM KV Cache Compression at Test
Time", arXiv 2305.17118.  It has seen attention up to the previous token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import lsh
from ..config import ModelConfig
from ..errors import ConfigError
from ..eviction import EvictionPolicy, Retention, TensorSpec
from ..slots import LayerCache


@dataclass(frozen=True)
class Scissorhands(EvictionPolicy):
    """The fewest of the last `history` steps with at least average attention, 1 / (tokens seen), goes first.

    Attention is the mean over the query group.  The history is one bit a step, `history / 8` bytes a slot, written in
    place as a ring: step t is bit t % history.
    """

    history: int = 256
    name: ClassVar[str] = "scissorhands"
    needs_attention: ClassVar[bool] = True
    watching: ClassVar[int] = 21  # 8-byte products of hits and bits, and what the sum and the comparison need

    def __post_init__(self) -> None:
        if self.history < 64 or self.history % 64:
            raise ConfigError(f"history must be a multiple of 64 steps, not {self.history}: the default is 256")

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """The bits of the last steps."""
        return {"history": ((self.history // 64,), torch.int64)}

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:  # noqa: ARG002
        """Four copies of the bits, while they are counted."""
        return retention.slots * self.history // 2

    def observe_attention_(self, layer: LayerCache, weights: Tensor, positions: Tensor) -> None:
        """Note for weights [B, Hkv, G, n, S'] where they reach the average; n <= 64, so no bit is met twice."""
        reach = weights.shape[-1]
        seen = layer.can_see(positions, reach).sum(-1, keepdim=True, dtype=torch.float64)  # [B, Hkv, n, 1]
        average = (1 / seen).to(weights.dtype)  # rounded as the weights are: flat attention reaches it
        hits = weights.mean(2) >= average  # [B, Hkv, n, S']
        step = positions % self.history  # [B, n]
        bits = 1 << step % 64  # [B, n] int64
        history = layer.state["history"]
        for word in range(history.shape[-1]):
            mine = torch.where(step // 64 == word, bits, 0)  # [B, n]; distinct bits, so sums are unions
            old = history[:, :, :reach, word] & ~mine.sum(1)[:, None, None]  # [B, Hkv, S']
            history[:, :, :reach, word] = old | (hits * mine[:, None, :, None]).sum(2)

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """How often the token mattered: [B, Hkv, S]."""
        return lsh.popcount(layer.state["history"]).sum(-1)
