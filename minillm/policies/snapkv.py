"""`snapkv`: what a window of recent queries attends to, smoothed over neighbouring tokens.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469: one observation window, at
the end of the prompt.  Here the window moves along and is applied whenever slots are needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

from ..config import ModelConfig
from ..errors import ConfigError
from ..eviction import EvictionPolicy, Retention, TensorSpec
from ..slots import LayerCache


@dataclass(frozen=True)
class SnapKV(EvictionPolicy):
    """The least attention of the last `observed` queries and the current one goes first, averaged over `pooling`
    neighbours in the text.

    The queries are kept (not their weights), and attend again, over the slots only, when a choice is due: the state
    does not grow with the slots.
    """

    observed: int = 16
    pooling: int = 5
    name: ClassVar[str] = "snapkv"

    def __post_init__(self) -> None:
        if self.observed < 1:
            raise ConfigError(f"observed must be at least 1 query, not {self.observed}: the default is 16")
        if self.pooling < 1 or self.pooling % 2 == 0:
            raise ConfigError(f"pooling must be an odd number of tokens, not {self.pooling}: the default is 5")

    @property
    def needs_queries(self) -> bool:
        """Always."""
        return True

    def head_state(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """A ring of queries: that of position t at t % observed."""
        return {"queries": ((self.observed, config.query_group, config.head_dim), torch.float32)}

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:
        """Scores of the window, masked and as weights, its queries, and all keys."""
        window = (self.observed + 1) * config.query_group
        return 12 * window * retention.slots + 4 * config.head_dim * (window + (retention.slots if narrow else 0))

    def observe_queries_(self, layer: LayerCache, queries: Tensor, positions: Tensor) -> None:
        """Keep the last of the queries [B, H, n, D]."""
        ring = layer.state["queries"]  # [B, Hkv, observed, G, D]
        newest = queries[:, :, -self.observed :].unflatten(1, (ring.shape[1], -1)).permute(0, 3, 1, 2, 4)
        rows = torch.arange(len(ring), device=ring.device)[:, None]  # [B, 1]
        ring.transpose(1, 2)[rows, positions[:, -self.observed :] % self.observed] = newest.to(ring.dtype)

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:
        """Attention of the window, summed over group and queries, pooled along the text: [B, Hkv, S]."""
        ring = layer.state["queries"]
        current = query.unflatten(1, (key.shape[1], -1)).unsqueeze(2).to(ring.dtype)  # [B, Hkv, 1, G, D]
        queries = torch.cat((ring, current), 2)  # [B, Hkv, observed + 1, G, D]
        at = torch.arange(self.observed, device=ring.device)  # [observed]
        back = (now[:, None] - 1 - at) % self.observed + 1  # [B, observed]: how long ago, 1..observed
        at = torch.cat((now[:, None] - back, now[:, None]), 1)  # [B, observed + 1] positions, < 0 where there was none
        keys = layer.dense_keys(None, ring.dtype)  # [B, Hkv, S, D]
        scores = queries.flatten(2, 3) @ keys.transpose(2, 3) * keys.shape[-1] ** -0.5
        scores = scores.unflatten(2, (-1, queries.shape[3]))  # [B, Hkv, observed + 1, G, S]
        visible = layer.can_see(at).unsqueeze(3)  # [B, Hkv, observed + 1, 1, S]
        # A query that sees nothing (there was none) gives NaN: it has no say.
        received = scores.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num().sum((2, 3))  # [B, Hkv, S]
        order = layer.positions.argsort(dim=-1, stable=True)  # [B, Hkv, S]: slots in the order of the text
        pooled = avg_pool1d(received.gather(-1, order), self.pooling, 1, self.pooling // 2, count_include_pad=False)
        return torch.empty_like(pooled).scatter_(-1, order, pooled)
