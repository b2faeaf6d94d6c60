"""`hashevict`: evict the token whose key points away from where the current query looks, judged from hash bits alone.

Liu, Rabbani et al., "HashEvict: A Pre-Attention KV Cache Eviction Strategy using Locality-Sensitive Hashing",
arXiv 2412.16187.  The Hamming distance between the code of the query and the codes of the cached keys ranks keys by
angle, hence by expected attention, for P bits a key and before any attention is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import lsh
from ..cache import LayerCache, TensorSpec
from ..errors import ConfigError
from ..eviction import EvictionPolicy

MAX_BITS = 1024


@dataclass(frozen=True)
class HashEvict(EvictionPolicy):
    """The paper's rule: the largest Hamming distance to the code of the current query goes first.

    Under grouped-query attention the distances to the G query heads that share a KV head are summed (the paper gives no
    rule).  hash_bits = 16 is the default of the authors' code; the rows are drawn per layer and shared by its heads.
    """

    hash_bits: int = 16
    policy_seed: int = 0
    name: ClassVar[str] = "hashevict"

    def __post_init__(self) -> None:
        if not 1 <= self.hash_bits <= MAX_BITS:
            raise ConfigError(f"--hash-bits must lie in 1..{MAX_BITS}, not {self.hash_bits}; 16 is the paper's")

    def tag_spec(self, head_dim: int) -> TensorSpec | None:  # noqa: ARG002
        """The packed code of the key."""
        words, dtype = lsh.code_words(self.hash_bits)
        return (words,), dtype

    def constants_spec(self, head_dim: int) -> TensorSpec | None:
        """The layer's projection."""
        return (self.hash_bits, head_dim), torch.float32

    def constants(self, head_dim: int, layer: int) -> Tensor:
        """The layer's projection [P, D]."""
        return lsh.projection(self.hash_bits, head_dim, seed=self.policy_seed, layer=layer)

    def tag(self, keys: Tensor, constants: Tensor | None) -> Tensor:
        """Codes of keys [B, Hkv, n, D]: [B, Hkv, n, W]."""
        assert constants is not None
        return lsh.encode(keys, constants)

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """Minus the Hamming distance to the query's code, summed over the group: [B, Hkv, S]."""
        return self._closeness(layer, query.unflatten(1, (key.shape[1], -1)))  # [B, Hkv, G, D]

    def _closeness(self, layer: LayerCache, probes: Tensor) -> Tensor:
        """Minus the Hamming distance of every slot to the probes [B, Hkv, n, D], summed over n: [B, Hkv, S]."""
        assert layer.tags is not None
        codes = self.tag(probes, layer.constants).unsqueeze(3)  # [B, Hkv, n, 1, W]
        return -lsh.hamming(codes, layer.tags.unsqueeze(2)).sum(2)  # [B, Hkv, n, S] -> [B, Hkv, S]


@dataclass(frozen=True)
class HashEvictKey(HashEvict):
    """What the authors' code does: compare with the code of the newest key; the query never reaches the cache."""

    name: ClassVar[str] = "hashevict-key"

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """Minus the Hamming distance to the newest key's code: [B, Hkv, S]."""
        return self._closeness(layer, key.unsqueeze(2))  # [B, Hkv, 1, D]
