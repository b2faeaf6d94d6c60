"""The specification of bounded attention in plain torch: evict, write, attend.

Other backends have the same signatures and the same in-place effects, and are compared with this one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..eviction import evict_
from ..slots import LayerCache, LayerRows, LayerSlots, Span


def attend_(layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None) -> Tensor:
    """Attention of new tokens over a layer's slots, which the tokens enter one stretch at a time.

    q [B, H, T, D], k and v [B, Hkv, T, D], all after RoPE -> [B, H, T, D]; padding gives zeros.  A stretch lies between
    two evictions: its first token may free slots (judged by that token's query and key), then the whole stretch is
    written, then it attends, then the policy sees what it asked to see.  One token at a time or a thousand: the same
    evictions, so the same result.  q_far: what to ask tokens outside the window that are seen all the same, as if they
    were nearer (model.py).
    """
    if isinstance(layer, LayerRows):
        return layer.each(attend_, q, k, v, span, q_far)
    # Written piece by piece: pieces that are collected would lie between the scores and keep the heap from reuse.
    result = torch.zeros_like(q)  # [B, H, T, D]
    for start, stop, evict, settle in layer.stretches(span):
        queries, positions = q[:, :, start:stop], span.positions[:, start:stop]
        if evict:
            evict_(layer, queries[:, :, 0], k[:, :, start], positions[:, 0], settle=settle)
        layer.write_(k[:, :, start:stop], v[:, :, start:stop], span, start, stop)
        to_far = None if q_far is None else q_far[:, :, start:stop]
        result[:, :, start:stop] = attend_slots(layer, queries, positions, layer.reach(span, stop), to_far)
        if layer.policy.needs_queries:
            layer.policy.observe_queries_(layer, queries, positions)
    return result


def attend_slots(layer: LayerCache, q: Tensor, positions: Tensor, reach: int, q_far: Tensor | None = None) -> Tensor:
    """Queries q [B, H, n, D] at `positions` [B, n] over the first `reach` slots of a layer -> [B, H, n, D].

    The softmax is explicit, over the slots only, so that a policy can observe it.
    """
    n = q.shape[2]
    keys, values = layer.dense(reach, q.dtype)  # [B, Hkv, S, D] each
    scores = _scores(q, keys)  # [B, Hkv, G, n, S]
    if q_far is not None and layer.far:
        if layer.flagged and layer.window is not None:
            far = layer.positions[:, :, None, :reach] <= positions[:, None, :, None] - layer.window  # [B, Hkv, n, S]
            torch.where(far.unsqueeze(2), _scores(q_far, keys), scores, out=scores)  # no third copy of the scores
        else:  # only sinks, which were written first and never left: slots 0, 1, ...
            sinks = layer.retention.sinks
            scores[..., :sinks] = _scores(q_far, keys[:, :, :sinks])
    visible = layer.can_see(positions, reach).unsqueeze(2)  # [B, Hkv, 1, n, S]
    weights = scores.masked_fill_(~visible, -torch.inf).softmax(-1)
    if layer.policy.needs_attention:
        layer.policy.observe_attention_(layer, weights, positions)
    attended: Tensor = weights.flatten(2, 3) @ values  # [B, Hkv, G * n, D]
    return attended.unflatten(2, (-1, n)).flatten(1, 2)  # type: ignore[no-any-return]  # [B, H, n, D]


def _scores(q: Tensor, keys: Tensor) -> Tensor:
    """q [B, H, n, D] . keys [B, Hkv, S, D] / sqrt(D) -> [B, Hkv, G, n, S].

    The G query heads of a KV head are folded into its rows, so that keys are read once for the group.
    """
    batch, _, n, dim = q.shape
    folded = (q * dim**-0.5).reshape(batch, keys.shape[1], -1, dim)  # [B, Hkv, G * n, D]
    scores: Tensor = folded @ keys.transpose(2, 3)
    return scores.unflatten(2, (-1, n))  # type: ignore[no-any-return]
