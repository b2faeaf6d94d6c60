"""`hashevict-plus`: keep what is unlike the rest or what queries have been asking for, judged from hash codes alone.

HashEvict asks what the current query likes.  A query over filler does not ask for the fact that will be asked for
later, so the fact goes first, and the better the estimate the worse.  Here a token stays mostly for what it is:

    distinct  its code disagrees with the others: minus its dot product with the sum of all live codes.  What is unlike
              everything else cannot be reconstructed from it (as in KeyDiff, arXiv 2504.15364, but P bits a key)
    used      its code agrees with the profile, the sum of past queries' codes, each `decay` times as important as the
              next one

and the later it came.  The three are standardised over the live slots of a KV head and added: distinct + 0.5 used +
0.1 age.

Where the defaults come from: about forty variants on other contexts and other prose than those reported, points lost on
average at 10% and 30% of the bytes (tools/NOTES.md).  Hyperplanes at right angles matter most (from -14.8 to -7.1 at
10%): in blocks of head_dim they cover every direction once.  64 bits: 32 lose 5 points more at 10%, and 96 or 128 cost
in slots what they gain.  One projection for all heads of a layer: a projection each buys nothing for its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import lsh
from ..config import ModelConfig
from ..errors import ConfigError
from ..slots import LayerCache
from .hashevict import HashEvict


@dataclass(frozen=True)
class HashEvictPlus(HashEvict):
    """The token that is least distinct goes first; being used and being recent count a little."""

    hash_bits: int = 64
    orthogonal: bool = True
    decay: float = 0.9
    used: float = 0.5
    age: float = 0.1
    name: ClassVar[str] = "hashevict-plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.decay:
            raise ConfigError("hashevict-plus needs a profile: decay must lie between 0 and 1, try 0.9")

    def scratch(self, config: ModelConfig, narrow: bool) -> int:
        """Beside what HashEvict holds: codes as numbers while they are added, and three scores."""
        return super().scratch(config, narrow) + 18 * self.hash_bits + 64

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:
        """How distinct, used and recent each token is: [B, Hkv, S]."""
        live = layer.positions >= 0  # [B, Hkv, S]
        codes = layer.state["codes"]  # [B, Hkv, S, W]
        total = (self._signs(codes) * live.unsqueeze(-1)).sum(2)  # [B, Hkv, P]
        distinct = standardised(-lsh.dot(codes, total), live)
        used = standardised(super().score(layer, query, key, now), live)
        return distinct + self.used * used + self.age * standardised(layer.positions, live)


def standardised(x: Tensor, live: Tensor) -> Tensor:
    """x [B, Hkv, S] moved and scaled so that its live entries have mean 0 and deviation 1 in each head: float64."""
    x = x.to(torch.float64)
    count = live.sum(-1, keepdim=True).clamp(min=1)  # [B, Hkv, 1]
    off = x - (x * live).sum(-1, keepdim=True) / count
    deviation = ((off * live).square().sum(-1, keepdim=True) / count).sqrt()  # [B, Hkv, 1]
    return off / deviation.clamp(min=1e-9)
