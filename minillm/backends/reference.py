"""The specification of bounded attention in plain torch: evict, write, attend.

Other backends have the same signatures and the same in-place effects, and are compared with this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache import LayerCache, Span
from ..eviction import evict_


def attend_(layer: LayerCache, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Tensor:
    """Attention of new tokens over a layer's slots, which the tokens enter one stretch at a time.

    q [B, H, T, D], k and v [B, Hkv, T, D], all after RoPE -> [B, H, T, D]; padding gives zeros.  A stretch lies between
    two
    evictions: its first token may free slots (judged by that token's query and key), then the whole stretch is written,
    then it attends.  One token at a time or a thousand: the same evictions, so the same result.
    """
    outputs = []
    for start, stop, evict in layer.stretches(span):
        if evict:
            evict_(layer, q[:, :, start], k[:, :, start], span.positions[:, start])
        layer.write_(k[:, :, start:stop], v[:, :, start:stop], span, start, stop)
        outputs.append(attend_slots(layer, q[:, :, start:stop], span.positions[:, start:stop], layer.reach(span, stop)))
    if span.length < q.shape[2]:
        outputs.append(torch.zeros_like(q[:, :, span.length :]))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)  # [B, H, T, D]


def attend_slots(layer: LayerCache, q: Tensor, positions: Tensor, reach: int) -> Tensor:
    """Queries q [B, H, n, D] at `positions` [B, n] over the first `reach` slots of a layer -> [B, H, n, D]."""
    batch, heads, n, dim = q.shape
    keys, values = layer.keys[:, :, :reach], layer.values[:, :, :reach]  # [B, Hkv, S, D]
    visible = can_see(positions, layer.positions[:, :, :reach], layer.window)  # [B, Hkv, n, S]
    # The G query heads of a KV head are folded into its rows, so that keys and values are read once for the group.
    folded = (q * dim**-0.5).reshape(batch, keys.shape[1], -1, dim)  # [B, Hkv, G * n, D]
    scores = (folded @ keys.transpose(2, 3)).unflatten(2, (-1, n))  # [B, Hkv, G, n, S]
    weights = scores.masked_fill_(~visible.unsqueeze(2), -torch.inf).softmax(-1)
    attended: Tensor = weights.flatten(2, 3) @ values  # [B, Hkv, G * n, D]
    return attended.view(batch, heads, n, dim)  # [B, H, n, D]


def can_see(queries: Tensor, slots: Tensor, window: int | None) -> Tensor:
    """Which slots, holding positions [B, Hkv, S], the queries at positions [B, n] see: [B, Hkv, n, S].

    One rule: 0 <= slot <= query, and slot > query - window where the model has a sliding window.
    """
    queries, slots = queries[:, None, :, None], slots[:, :, None, :]  # [B, 1, n, 1], [B, Hkv, 1, S]
    visible = (slots >= 0) & (slots <= queries)
    return visible if window is None else visible & (slots > queries - window)
