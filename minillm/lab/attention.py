"""How much of the full cache's attention falls on tokens that a bounded cache has evicted, one query at a time.

No matrix of queries by tokens ever exists: what is held is the last query of a chunk, per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..cache import KVCache
from ..model import Attend, Attention, Transformer
from ..slots import LayerCache, Span

Query = tuple[Tensor, Tensor | None]  # of one token [H, D], and as it asks what is far (model.py)


def lost_mass(full: LayerCache, bounded: LayerCache, query: Query, position: int) -> Tensor:
    """What the query at `position` loses in one layer, and what it would at best: [2, Hkv], means over the group."""
    at = torch.tensor([[position]], device=full.positions.device)  # [1, 1]
    weights = full_attention(full, query, at)  # [Hkv, n]
    heads, n = weights.shape
    seen = bounded.can_see(at)[0, :, 0]  # [Hkv, S]
    tokens = torch.where(seen, bounded.positions[0], n).to(torch.int64)  # [Hkv, S]
    held = torch.zeros(heads, n + 1, dtype=torch.bool, device=at.device).scatter_(1, tokens, True)[:, :n]  # [Hkv, n]
    best = torch.arange(n, device=at.device) < seen.sum(1, keepdim=True)  # [Hkv, n]: the largest, as many as are held
    ranked = weights.sort(descending=True).values  # [Hkv, n]
    return torch.stack((weights.masked_fill(held, 0).sum(1), ranked.masked_fill(best, 0).sum(1)))  # [2, Hkv]


def full_attention(layer: LayerCache, query: Query, at: Tensor) -> Tensor:
    """Softmax of the query at position `at` [1, 1] over all n slots of a cache that keeps everything: [Hkv, n].

    The mean over the query heads of each KV head; slot i holds token i.
    """
    own, to_far = query
    heads, dim = layer.keys.shape[1], own.shape[1]
    keys = layer.keys[0].to(own.dtype).transpose(1, 2) * dim**-0.5  # [Hkv, D, n]
    scores = own.unflatten(0, (heads, -1)) @ keys  # [Hkv, G, n]
    if to_far is not None and layer.far:
        sinks = layer.retention.sinks
        scores[..., :sinks] = to_far.unflatten(0, (heads, -1)) @ keys[..., :sinks]
    weights: Tensor = scores.masked_fill_(~layer.can_see(at)[0], -torch.inf).softmax(-1)  # [Hkv, G, n]
    return weights.mean(1)


@contextmanager
def last_queries(model: Transformer, cache: KVCache) -> Iterator[dict[int, Query]]:
    """While this is open, it holds for every layer the query of the last token that entered `cache`."""
    found: dict[int, Query] = {}

    def listening(attend: Attend) -> Attend:
        def listen(
            layer: LayerCache, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None
        ) -> Tensor:
            if layer is cache.layers[layer.index]:
                exact = torch.promote_types(q.dtype, torch.float32)
                # Copies: a view would hold the queries of the whole chunk.
                own = q[0, :, span.length - 1].to(exact, copy=True)  # [H, D]
                to_far = None if q_far is None else q_far[0, :, span.length - 1].to(exact, copy=True)  # [H, D]
                found[layer.index] = own, to_far
            return attend(layer, q, k, v, span, q_far)

        return listen

    attentions = [module for module in model.modules() if isinstance(module, Attention)]
    before = [attention.attend for attention in attentions]
    try:
        for attention in attentions:
            attention.attend = listening(attention.attend)
        yield found
    finally:
        for attention, attend in zip(attentions, before, strict=True):
            attention.attend = attend
