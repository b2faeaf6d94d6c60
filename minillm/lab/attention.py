"""What one query loses where a bounded cache has evicted tokens: attention, and how far off the output is without it.

No matrix of queries by tokens ever exists: what is held is the last query of a chunk, per layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..cache import KVCache
from ..fused import listening
from ..model import Attend, Transformer
from ..slots import LayerCache, LayerSlots, Span

Query = tuple[Tensor, Tensor | None]  # of one token [H, D], and as it asks what is far (model.py)


def lost_mass(full: LayerCache, bounded: LayerCache, query: Query, position: int) -> Tensor:
    """What the query at `position` loses in one layer, and what it would at best: [2, Hkv], means over the group."""
    at = torch.tensor([[position]], device=full.positions.device)  # [1, 1]
    weights = full_attention(full, query, at)  # [Hkv, n]
    held = held_tokens(bounded, at, weights.shape[1])  # [Hkv, n]
    best = most_attended(weights, held)  # [Hkv, n]
    return torch.stack([weights.masked_fill(kept, 0).sum(1) for kept in (held, best)])  # [2, Hkv]


def output_error(full: LayerCache, bounded: LayerCache, query: Query, position: int) -> Tensor:
    """How far off the query's output is if it attends to nothing but what the bounded cache holds: [2, Hkv].

    ||o' - o|| / ||o|| over the G outputs of a KV head, where o attends to everything and o' to the tokens held, both
    with the full cache's keys and values; second, the same for the most attended tokens, as many as are held.
    """
    at = torch.tensor([[position]], device=full.positions.device)  # [1, 1]
    scores = attention_scores(full, query, at)  # [Hkv, G, n]
    weights = scores.softmax(-1)
    values = full.values[0].to(scores.dtype)  # [Hkv, n, D]
    held = held_tokens(bounded, at, scores.shape[2])  # [Hkv, n]
    right = weights @ values  # [Hkv, G, D]
    errors = []
    for kept in (held, most_attended(weights.mean(1), held)):
        # The softmax of what is kept, and not weights divided by their sum: that may be too small for a float.
        found = scores.masked_fill(~kept.unsqueeze(1), -torch.inf).softmax(-1) @ values  # [Hkv, G, D]
        errors.append((found - right).flatten(1).norm(dim=1) / right.flatten(1).norm(dim=1))  # [Hkv]
    return torch.stack(errors)  # [2, Hkv]


def held_tokens(bounded: LayerCache, at: Tensor, n: int) -> Tensor:
    """Which of the first n tokens the query at position `at` [1, 1] sees in a bounded cache: [Hkv, n]."""
    seen = bounded.can_see(at)[0, :, 0]  # [Hkv, S]
    tokens = torch.where(seen, bounded.positions[0], n).to(torch.int64)  # [Hkv, S]
    held = torch.zeros(len(seen), n + 1, dtype=torch.bool, device=at.device)  # [Hkv, n + 1]
    return held.scatter_(1, tokens, True)[:, :n]  # [Hkv, n]


def most_attended(weights: Tensor, held: Tensor) -> Tensor:
    """The tokens with the largest weights [Hkv, n], as many as are held [Hkv, n]: the ideal choice, [Hkv, n]."""
    first = torch.arange(weights.shape[1], device=weights.device) < held.sum(1, keepdim=True)  # [Hkv, n]
    order = weights.argsort(descending=True, stable=True)  # [Hkv, n]
    return torch.zeros_like(held).scatter_(1, order, first)


def full_attention(layer: LayerCache, query: Query, at: Tensor) -> Tensor:
    """Softmax of the query at position `at` [1, 1] over all n slots of a cache that keeps everything: [Hkv, n].

    The mean over the query heads of each KV head; slot i holds token i.
    """
    return attention_scores(layer, query, at).softmax(-1).mean(1)  # [Hkv, n]


def attention_scores(layer: LayerCache, query: Query, at: Tensor) -> Tensor:
    """q . k / sqrt(D) of the query at position `at` [1, 1] over all n slots: [Hkv, G, n]; -inf is out of sight."""
    own, to_far = query
    heads, dim = layer.keys.shape[1], own.shape[1]
    keys = layer.keys[0].to(own.dtype).transpose(1, 2) * dim**-0.5  # [Hkv, D, n]
    scores: Tensor = own.unflatten(0, (heads, -1)) @ keys  # [Hkv, G, n]
    if to_far is not None and layer.far:
        sinks = layer.retention.sinks
        scores[..., :sinks] = to_far.unflatten(0, (heads, -1)) @ keys[..., :sinks]
    return scores.masked_fill_(~layer.can_see(at)[0], -torch.inf)


@contextmanager
def last_queries(model: Transformer, cache: KVCache) -> Iterator[dict[int, Query]]:
    """While this is open, it holds for every layer the query of the last token that entered `cache`."""
    found: dict[int, Query] = {}

    def watching(attend: Attend) -> Attend:
        def listen(
            layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None
        ) -> Tensor:
            if isinstance(layer, LayerCache) and layer is cache.layers[layer.index]:
                exact = torch.promote_types(q.dtype, torch.float32)
                # Copies: a view would hold the queries of the whole chunk.
                own = q[0, :, span.length - 1].to(exact, copy=True)  # [H, D]
                to_far = None if q_far is None else q_far[0, :, span.length - 1].to(exact, copy=True)  # [H, D]
                found[layer.index] = own, to_far
            return attend(layer, q, k, v, span, q_far)

        return listen

    with listening(model, watching):
        yield found
