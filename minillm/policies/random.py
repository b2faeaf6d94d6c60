"""`random`: a fixed random priority per token, so that what is kept is a uniform sample of the whole history.

The control that every other policy has to beat.  Keeping the S highest of independent priorities is reservoir sampling
(Vitter, "Random Sampling with a Reservoir", ACM TOMS 11(1), 1985).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..eviction import EvictionPolicy
from ..slots import LayerCache

MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class Random(EvictionPolicy):
    """The lowest priority goes first; it is a function of (seed, layer, head, position) and nothing else."""

    policy_seed: int = 0
    name: ClassVar[str] = "random"
    needs_token: ClassVar[bool] = False

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """24 random bits for every slot's token: [B, Hkv, S]."""
        heads = torch.arange(layer.positions.shape[1], device=layer.positions.device)[:, None]  # [Hkv, 1]
        heads = heads + layer.first_head
        stream = mix(mix(heads + self.policy_seed * 1_000_003) + layer.index)  # [Hkv, 1]
        return mix(stream + layer.positions) >> 8  # [B, Hkv, S]


def mix(x: Tensor) -> Tensor:
    """Integers to well-mixed 32-bit integers, in int64 (the finaliser of MurmurHash3, public domain)."""
    x = x.to(torch.int64) & MASK
    x = (x ^ x >> 16) * 0x85EBCA6B & MASK
    x = (x ^ x >> 13) * 0xC2B2AE35 & MASK
    return x ^ x >> 16
