"""Where the time of a decode step goes.

    linears     by hooks around the linear layers, and with the output projection
    attention   by a watch on `attend`, less the evictions in it; what a policy observes of every token belongs to it
    hashing     the backend's `evict_`, which tags the keys since the last eviction and chooses victims: run alone on
                the same cache afterwards and spread over the `evict_every` tokens that share it; 0 while nothing has
                been evicted.  Triton's kernel writes the token with it
    rest        norms, rotary positions, gates, the embedding, Python, and what watching itself costs

Watching costs time, so what is watched here is timed by nobody else (bench.py).  And it is Python that is watched:
steps are taken one operation at a time, even where the backend has recordings of them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor, nn

from .backends.linear import Linear
from .cache import KVCache
from .eviction import evict_
from .fused import listening
from .machine import now
from .model import Attend, Transformer
from .slots import LayerCache, LayerSlots, Span

Evict = Callable[..., None]  # eviction.evict_, or what does the same


@dataclass
class Spent:
    """Seconds in the linear layers and in attention; by layer, evictions, and the last query and key of every row."""

    linears: float = 0.0
    attend: float = 0.0
    evictions: Counter[int] = field(default_factory=Counter)
    asked: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # [B, H, D], [B, Hkv, D]


@contextmanager
def watched(model: Transformer) -> Iterator[Spent]:
    """While this is open, what the layers of a model spend on decode steps is added up; rows are in step."""
    spent, began, device = Spent(), 0.0, model.model.embed_tokens.weight.device

    def before(*_: object) -> None:
        nonlocal began
        began = now(device)

    def after(*_: object) -> None:
        spent.linears += now(device) - began

    def watching(attend: Attend) -> Attend:
        def watch(
            layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None
        ) -> Tensor:
            assert isinstance(layer, LayerCache)
            begin = now(device)
            attended = attend(layer, q, k, v, span, q_far)  # [B, H, T, D]
            spent.attend += now(device) - begin
            spent.evictions[layer.index] += layer.is_due(span.first[0])
            spent.asked[layer.index] = q[:, :, -1], k[:, :, -1]
            return attended

        return watch

    linears = [module for module in model.model.modules() if isinstance(module, (Linear, nn.Linear))]
    hooks = [linear.register_forward_pre_hook(before) for linear in linears]
    hooks += [linear.register_forward_hook(after) for linear in linears]
    try:
        with listening(model, watching):
            yield spent
    finally:
        for hook in hooks:
            hook.remove()


def shares(
    spent: Spent, steps: Sequence[tuple[float, float]], cache: KVCache, evict: Evict = evict_
) -> dict[str, float]:
    """What part of the time of watched steps went where; sums to 1.  The cache is of no use afterwards.

    steps: seconds of the layers and of the output projection of each.  evict: the backend's own.  Worked example: in 32
    steps of 20 ms, linears took 512 ms and attention 96 ms, of which 3 ms were one eviction, which alone takes 2 ms and
    is due every 16 tokens: attention is 94 ms, hashing 2 * 32 / 16 = 4 ms, and the rest 640 - 512 - 96 = 32 ms.
    """
    layers, head = (sum(seconds) for seconds in zip(*steps, strict=True))
    parts = {"linears": spent.linears + head, "attention": spent.attend, "hashing": 0.0}
    parts["rest"] = layers - spent.linears - spent.attend
    for layer in cache.layers:
        once = eviction_seconds(layer, cache.seen[0], *spent.asked[layer.index], evict)
        parts["attention"] -= once * spent.evictions[layer.index]
        parts["hashing"] += once * len(steps) / layer.retention.evict_every
    parts = {name: max(0.0, seconds) for name, seconds in parts.items()}
    return {name: seconds / sum(parts.values()) for name, seconds in parts.items()}


def eviction_seconds(layer: LayerCache, seen: int, query: Tensor, key: Tensor, evict: Evict = evict_) -> float:
    """Seconds of an eviction in a layer that has seen `seen` tokens: the median of three, for query [B, H, D] and
    key [B, Hkv, D].

    0 if it has not evicted yet: the first time it does other things, too.
    """
    slots, every, times = layer.retention.slots, layer.retention.evict_every, []
    if seen <= slots:
        return 0.0
    due = slots + math.ceil((seen - slots) / every) * every
    at = torch.full((len(query),), due, device=query.device)  # [B]
    for _ in range(3):
        begin = now(query.device)
        evict(layer, query, key, at, settle=False)
        times.append(now(query.device) - begin)
    return median(times)
