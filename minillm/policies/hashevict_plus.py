"""`hashevict-plus`: keep what was new when it came, judged by one number of 16 bits that stands beside the key.

HashEvict spends its 16 bits on the signs of 16 random projections, and asks which key the current query likes.  Both
choices lose what matters.  A query over filler does not ask for the fact that somebody will ask for later, so the fact
goes first, and the better the estimate, the worse.  And sixteen random directions say little about the one direction
that matters: what all keys have in common.  A key that points there is like many others, and what it says can be had
from them; one that does not is unlike everything (KeyDiff, arXiv 2504.15364).  So here the projection is adapted to the
data, there is one of it, and its 16 bits hold its value instead of 16 signs:

    mean     the sum of the directions of all keys so far, of which each token leaves 0.995; that of RoPE's keys turns
             with position
    novelty  minus the cosine of a key to that mean, at the moment when the key came

Both are worked out at the next eviction, for the keys since the last one together and as they are stored, so that a
token costs nothing when it comes; what an old key is worth is not asked again: the smallest novelty goes.  KeyDiff
reads every key at every eviction, and compares with the mean of those that are left, which its own choices have made
unlike the text.

Where the defaults come from (tools/NOTES.md; other contexts and other prose than those reported): at 10% decay = 0.99,
0.995 and 0.998 lose 0.3, 0.3 and 0.5 points, at 5% 19, 14 and 18.  A third of the slots for recent tokens instead of a
quarter costs no recall at 10%, gains 7 points at 5%, and running text loses a fifth less.  Hash codes of past queries
beside the novelty, 16 or 64 bits, bought nothing for their bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..config import ModelConfig
from ..errors import ConfigError
from ..eviction import TAGGED_TOGETHER, EvictionPolicy, Retention, TensorSpec
from ..slots import LayerCache


@dataclass(frozen=True)
class HashEvictPlus(EvictionPolicy):
    """The key that was most like the fading mean of the keys before it goes first.

    The first S tokens are compared with their own mean instead.
    """

    decay: float = 0.995
    name: ClassVar[str] = "hashevict-plus"
    needs_token: ClassVar[bool] = False
    recent_share: ClassVar[int] = 3
    needs_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0.5 <= self.decay < 1:
            raise ConfigError(f"decay must lie in [0.5, 1), not {self.decay}: 0.995 remembers about 200 tokens")

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """The novelty of the key: three digits, so that what is equal but for rounding ties, and the oldest goes."""
        return {"novelty": ((), torch.bfloat16)}

    def head_state(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """The fading sum of directions; float64, so that it does not matter how the input was cut."""
        return {"total": ((config.head_dim,), torch.float64)}

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:  # noqa: ARG002
        """Of the first keys that are read together: in float32, their directions, and those before.  Of later ones: in
        float32, and in float64 directions and sums.
        """
        first, later = min(TAGGED_TOGETHER, retention.slots), min(TAGGED_TOGETHER, retention.evict_every)
        return max(12 * first, 20 * later) * config.head_dim

    def settle_(self, layer: LayerCache, due: Tensor) -> None:
        """Begin with the sum over the first S keys, and judge them by their plain mean."""
        precise, held = torch.promote_types(layer.keys.dtype, torch.float32), layer.state["total"]
        total, plain = torch.zeros_like(held), torch.zeros_like(held)  # [B, Hkv, D]
        pieces = layer.all_slots().split(TAGGED_TOGETHER, 2)  # [1, 1, n] each
        for some in pieces:
            directions = normalize(layer.keys_in(some, precise), dim=-1)  # [B, Hkv, n, D]
            ages = layer.retention.slots - 1 - some[0, 0].to(torch.float64)  # [n]
            total += (self.decay**ages).to(precise) @ directions
            plain += directions.sum(2)
        held.copy_(torch.where(due[:, None, None], total, held))
        mean = normalize(plain, dim=-1).to(precise).unsqueeze(3)  # [B, Hkv, D, 1]
        for some in pieces:
            cosines = (normalize(layer.keys_in(some, precise), dim=-1) @ mean).squeeze(3)  # [B, Hkv, n]
            layer.update_("novelty", some, -cosines.to(torch.bfloat16), due)

    def tag_(self, layer: LayerCache, keys: Tensor, due: Tensor) -> dict[str, Tensor]:
        """Add the directions of keys [B, Hkv, n, D], one after the other, and compare each with the sum: [B, Hkv, n].

        The sum after key i is decay^(i + 1) (total + the sum over j <= i of direction_j / decay^(j + 1)).
        """
        directions, total = normalize(keys.to(torch.float64), dim=-1), layer.state["total"]
        powers = self.decay ** torch.arange(1, keys.shape[2] + 1, device=keys.device, dtype=torch.float64)[:, None]
        sums = (directions / powers).cumsum_(2).add_(total.unsqueeze(2)).mul_(powers)  # [B, Hkv, n, D]
        total.copy_(torch.where(due[:, None, None], sums[:, :, -1], total))
        lengths = torch.linalg.vector_norm(sums, dim=-1).clamp(min=1e-12)  # [B, Hkv, n]; of zero keys: 0
        cosines = torch.linalg.vecdot(directions, sums) / lengths  # [B, Hkv, n]
        return {"novelty": -cosines.to(torch.bfloat16)}

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """The novelty, which stays what it was: [B, Hkv, S]."""
        return layer.state["novelty"]
