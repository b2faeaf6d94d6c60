"""`full`: keep everything; a sequence that cannot fit is refused before it is started."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..eviction import EvictionPolicy


@dataclass(frozen=True)
class Full(EvictionPolicy):
    """The ordinary KV cache, for comparison: nothing is ever evicted."""

    name: ClassVar[str] = "full"
    evicts: ClassVar[bool] = False

    def score(self, *_: object) -> Tensor:
        """Never reached: the cache refuses tokens that do not fit."""
        raise AssertionError("a cache that never evicts was asked to evict")
