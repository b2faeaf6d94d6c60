"""`window`: attention sinks and a sliding window.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (StreamingLLM), arXiv 2309.17453.  Positions are
not re-numbered inside the cache here: a token keeps the RoPE angle of its place in the text (see --positions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..eviction import EvictionPolicy
from ..slots import LayerCache


@dataclass(frozen=True)
class Window(EvictionPolicy):
    """The oldest token goes first, so the slots are a ring behind the protected sinks."""

    name: ClassVar[str] = "window"
    needs_token: ClassVar[bool] = False

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """A token's worth is its position."""
        return layer.positions
