"""`hashevict`: evict the token whose key points away from where the current query looks, judged from hash bits alone.

Liu, Rabbani et al., "HashEvict: A Pre-Attention KV Cache Eviction Strategy using Locality-Sensitive Hashing",
arXiv 2412.16187.  The Hamming distance between the code of the query and the codes of the cached keys ranks keys by
angle, hence by expected attention, for P bits a key and before any attention is computed.  Codes are made at the next
eviction, from the key as it is stored: the hash costs nothing where nothing has to go.

Without options this is the paper's rule.  The options are ours, and each is off by default:

    per_head         a projection for every KV head, so that errors of heads are not correlated
    orthogonal       hyperplanes at right angles, which spreads them evenly
    centred          bits of k - mean instead of k: q . k and q . (k - mean) rank alike, and the bits are not spent on a
                     direction that all keys share.  The mean of the first min(S, 64) keys, sinks excluded, is frozen
                     before the first eviction
    norm_weighted    multiply the estimated cosine by ||k - mean|| (||k|| if not centred): attention knows lengths
    decay            judge by all past queries, each `decay` times as important as the next one (0: the current only).
                     Their codes are summed as P numbers a head, so that it costs nothing per slot
    recent_queries   judge by the one of the last so many queries that likes the key most (1: the current only)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import lsh
from ..config import ModelConfig
from ..errors import ConfigError
from ..eviction import TAGGED_TOGETHER, EvictionPolicy, Retention, TensorSpec
from ..slots import LayerCache

MAX_BITS = 1024
CENTRE_KEYS = 64  # the first so many keys make the mean


@dataclass(frozen=True)
class HashEvict(EvictionPolicy):
    """The largest Hamming distance to the code of the current query goes first.

    Under grouped-query attention the distances to the G query heads that share a KV head are summed (the paper gives no
    rule).  hash_bits = 16 is the default of the authors' code; the rows are drawn per layer and shared by its heads.
    """

    hash_bits: int = 16
    policy_seed: int = 0
    per_head: bool = False
    orthogonal: bool = False
    centred: bool = False
    norm_weighted: bool = False
    decay: float = 0.0
    recent_queries: int = 1
    name: ClassVar[str] = "hashevict"
    needs_keys: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 1 <= self.hash_bits <= MAX_BITS:
            raise ConfigError(f"--hash-bits must lie in 1..{MAX_BITS}, not {self.hash_bits}; 16 is the paper's")
        if not 0 <= self.decay < 1:
            raise ConfigError(f"decay must lie in [0, 1), not {self.decay}: 0 is the paper's rule, try 0.9")
        if self.recent_queries < 1:
            raise ConfigError(f"recent_queries must be at least 1, not {self.recent_queries}: 1 is the paper's rule")
        if self.decay and self.recent_queries > 1:
            raise ConfigError("decay and recent_queries are two ways to remember queries: leave one of them out")

    @property
    def needs_queries(self) -> bool:
        """Where past queries count."""
        return self.decay > 0 or self.recent_queries > 1

    def slot_state(self, config: ModelConfig) -> dict[str, TensorSpec]:  # noqa: ARG002
        """The packed code of the key, and its length if that counts."""
        words, dtype = lsh.code_words(self.hash_bits)
        norms: dict[str, TensorSpec] = {"norms": ((), torch.bfloat16)} if self.norm_weighted else {}
        return {"codes": ((words,), dtype)} | norms

    def head_state(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """The mean key, the profile of all queries, or a ring of the codes of the last ones."""
        words, dtype = lsh.code_words(self.hash_bits)
        spec: dict[str, TensorSpec] = {}
        if self.centred:
            spec["centre"] = ((config.head_dim,), torch.float32)
        if self.decay:
            spec["profile"] = ((self.hash_bits,), torch.float64)
        if self.recent_queries > 1:
            spec["queries"] = ((self.recent_queries - 1, config.query_group, words), dtype)
        return spec

    def constants_spec(self, config: ModelConfig) -> dict[str, TensorSpec]:
        """The projection."""
        heads = config.num_key_value_heads if self.per_head else 1
        return {"projection": ((heads, self.hash_bits, config.head_dim), torch.float32)}

    def constants(self, config: ModelConfig, layer: int) -> dict[str, Tensor]:
        """The layer's projection [1 or Hkv, P, D]; a rank that holds some of the heads has their part of all."""
        rows = lsh.projection(
            self.hash_bits,
            config.head_dim,
            seed=self.policy_seed,
            layer=layer,
            heads=config.whole.num_key_value_heads if self.per_head else 1,
            orthogonal=self.orthogonal,
        )
        first = config.first_kv_head if self.per_head else 0
        return {"projection": rows[first : first + config.num_key_value_heads]}

    def scratch(self, config: ModelConfig, retention: Retention, narrow: bool) -> int:
        """Codes while their ones are counted and numbers for each query; or keys that are tagged together, as they are
        stored, in float32, and centred.
        """
        words, dtype = lsh.code_words(self.hash_bits)
        counting = 4 * words * dtype.itemsize * config.query_group + 16 * self.recent_queries
        tagging = ((6 if narrow else 4) + 4 * self.centred) * config.head_dim + 10 * self.hash_bits
        return max(retention.slots * counting, min(TAGGED_TOGETHER, retention.slots) * tagging)

    def tag_(self, layer: LayerCache, keys: Tensor, due: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Codes and lengths, which depend on nothing but the key and the frozen mean."""
        return self._tags(layer, keys)

    def _tags(self, layer: LayerCache, keys: Tensor) -> dict[str, Tensor]:
        """Codes [B, Hkv, n, W] and lengths [B, Hkv, n] of keys [B, Hkv, n, D]."""
        if self.centred:
            keys = keys.to(torch.promote_types(keys.dtype, torch.float32)) - layer.state["centre"].unsqueeze(2)
        tags = {"codes": self._code(layer, keys)}
        if self.norm_weighted:
            tags["norms"] = keys.to(torch.float32).norm(dim=-1).to(torch.bfloat16)
        return tags

    def settle_(self, layer: LayerCache, due: Tensor) -> None:
        """Freeze the mean of the first keys, before the first S of them are coded."""
        if self.centred:
            centre, precise = layer.state["centre"], torch.promote_types(layer.keys.dtype, torch.float32)
            slots = layer.all_slots()  # [1, 1, S]
            first = slots[:, :, layer.retention.sinks : CENTRE_KEYS]
            first = first if first.shape[2] else slots  # more sinks than that: of all
            sums = [layer.keys_in(some, precise).sum(2) for some in first.split(TAGGED_TOGETHER, 2)]  # [B, Hkv, D] each
            mean = torch.stack(sums).sum(0) / first.shape[2]  # [B, Hkv, D]
            centre.copy_(torch.where(due[:, None, None], mean.to(centre.dtype), centre))
        super().settle_(layer, due)

    def observe_queries_(self, layer: LayerCache, queries: Tensor, positions: Tensor) -> None:
        """Add the codes of queries [B, H, n, D] to the profile, or put them into the ring."""
        codes = self._query_codes(layer, queries)  # [B, Hkv, n, G, W]
        if self.decay:
            ages = torch.arange(codes.shape[2] - 1, -1, -1, device=codes.device, dtype=torch.float64)  # [n]
            layer.state["profile"] *= self.decay ** len(ages)
            layer.state["profile"] += torch.einsum("bhnp,n->bhp", self._signs(codes).sum(3), self.decay**ages)
            return
        ring = layer.state["queries"].transpose(1, 2)  # [B, recent_queries - 1, Hkv, G, W]
        size = ring.shape[1]
        rows = torch.arange(len(ring), device=ring.device)[:, None]  # [B, 1]
        ring[rows, positions[:, -size:] % size] = codes[:, :, -size:].transpose(1, 2)

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """How much past and present queries like the key: [B, Hkv, S]."""
        return self._liking(layer, self._query_codes(layer, query.unsqueeze(2))[:, :, 0], now)

    def _liking(self, layer: LayerCache, probe: Tensor, now: Tensor) -> Tensor:
        """P - 2 Hamming of every key to the codes of one query (or key) [B, Hkv, G, W], summed over G: [B, Hkv, S].

        That is the dot product of codes read as +1 and -1, the one number that distances and profiles have in common.
        """
        codes = layer.state["codes"]  # [B, Hkv, S, W]
        if self.decay:
            profile = self.decay * layer.state["profile"] + self._signs(probe).sum(2)  # [B, Hkv, P]
            liking: Tensor = lsh.dot(codes, profile)  # [B, Hkv, S]
        elif self.recent_queries > 1:
            probes = torch.cat((layer.state["queries"], probe.unsqueeze(2)), 2)  # [B, Hkv, r, G, W]
            each = torch.stack([self._agreement(codes, probes[:, :, i]) for i in range(probes.shape[2])])
            # An entry of the ring that no query has reached yet has no say; the last one is the current query.
            empty = torch.arange(len(each) - 1, device=now.device)[:, None] >= now  # [r - 1, B]
            each[:-1].masked_fill_(empty[:, :, None, None], torch.iinfo(each.dtype).min)
            liking = each.amax(0)  # [r, B, Hkv, S] -> [B, Hkv, S]
        else:
            liking = self._agreement(codes, probe)
        return liking * layer.state["norms"].to(torch.float32) if self.norm_weighted else liking

    def _agreement(self, codes: Tensor, probes: Tensor) -> Tensor:
        """codes [B, Hkv, S, W] and probes [B, Hkv, G, W] -> the sum of P - 2 Hamming over G: int64 [B, Hkv, S]."""
        distances = lsh.hamming(codes.unsqueeze(2), probes.unsqueeze(3)).sum(2)  # [B, Hkv, G, S] -> [B, Hkv, S]
        return self.hash_bits * probes.shape[2] - 2 * distances

    def _query_codes(self, layer: LayerCache, queries: Tensor) -> Tensor:
        """queries [B, H, n, D] -> [B, Hkv, n, G, W]."""
        heads = layer.positions.shape[1]
        grouped = queries.unflatten(1, (heads, -1)).transpose(2, 3)  # [B, Hkv, n, G, D]
        codes = self._code(layer, grouped.flatten(2, 3))  # [B, Hkv, n * G, W]
        return codes.view(*grouped.shape[:4], -1)

    def _code(self, layer: LayerCache, x: Tensor) -> Tensor:
        """x [B, Hkv, n, D] -> [B, Hkv, n, W]."""
        return lsh.encode(x, layer.state["projection"])

    def _signs(self, codes: Tensor) -> Tensor:
        """Packed codes [..., W] -> +1 and -1 in float64 [..., P]."""
        return lsh.unpack(codes, self.hash_bits).to(torch.float64) * 2 - 1


@dataclass(frozen=True)
class HashEvictKey(HashEvict):
    """What the authors' code does: compare with the code of the newest key; the query never reaches the cache."""

    name: ClassVar[str] = "hashevict-key"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.needs_queries:
            raise ConfigError("policy 'hashevict-key' never sees a query: decay and recent_queries are for 'hashevict'")

    def score(self, layer: LayerCache, query: Tensor, key: Tensor, now: Tensor) -> Tensor:  # noqa: ARG002
        """P - 2 Hamming to the newest key: [B, Hkv, S]."""
        return self._liking(layer, self._tags(layer, key.unsqueeze(2))["codes"], now)
