"""The CPU backend: the reference's attention with fewer, larger operations, and what stands around linear layers.

Decode (one token a row) runs in native.c where that is built; prefill through torch's fused attention, a whole stretch
between two evictions at once.  Whatever neither can do - policies that observe attention weights, an 8-bit cache under
decode, other dtypes - is the reference's.  Nothing here has state.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..eviction import evict_
from ..slots import LayerCache, LayerRows, LayerSlots, Span
from . import native, reference
from .native import Rotation

LONGEST = 256  # tokens that attend together, at most ...
MASK_BYTES = 8 << 20  # ... and so many fewer that the mask of who sees whom stays below this
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which says the sum of its softmax, too


def attend_(layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None) -> Tensor:
    """What `reference.attend_` does, with its arguments, effects and result."""
    if isinstance(layer, LayerRows):
        return layer.each(attend_, q, k, v, span, q_far)
    if layer.policy.needs_attention:
        return reference.attend_(layer, q, k, v, span, q_far)
    if q_far is not None and not layer.far:
        q_far = None
    result = None  # [B, H, T, D]: whole before its pieces come, which would keep the heap from reuse between them
    for start, stop, evict, settle in layer.stretches(span, query_block(layer, span, q, q_far)):
        queries, positions = q[:, :, start:stop], span.positions[:, start:stop]
        if evict:
            evict_(layer, queries[:, :, 0], k[:, :, start], positions[:, 0], settle=settle)
        layer.write_(k[:, :, start:stop], v[:, :, start:stop], span, start, stop)
        far = None if q_far is None else q_far[:, :, start:stop]
        attended = attend_slots(layer, queries, span, start, stop, far)
        if layer.policy.needs_queries:
            layer.policy.observe_queries_(layer, queries, positions)
        if stop - start == q.shape[2]:
            return attended  # one stretch, no padding
        if result is None:
            result = torch.zeros_like(q)  # padding gives zeros
        result[:, :, start:stop] = attended
    assert result is not None
    return result


def step_(
    layer: LayerSlots, qkv: Tensor, heads: int, rotation: Rotation, far: Rotation | None, span: Span
) -> Tensor | None:
    """A decode step in one call: qkv [B, (H + 2 Hkv) * D] -> [B, H * D], as `rotate` and `attend_` would, if it is one
    that native.c can do whole: one token a row, of which none has to be seen by the policy.
    """
    if not serves_step(layer, qkv.dtype, span):
        return None
    far, reach = _prepare_step(layer, far, span)
    return native.step(qkv, rotation, far, layer, span.positions, heads=heads, reach=reach)


def layer_(
    layer: LayerSlots, x: Tensor, parts: native.Layer, heads: int, rotation: Rotation, far: Rotation | None, span: Span
) -> bool:
    """A decode step through a whole layer, whose linear layers native.c multiplies, in one call: changes x [B, hidden].

    False where it cannot be done so, see `step_`; then nothing has happened.
    """
    if not serves_step(layer, x.dtype, span):
        return False
    far, reach = _prepare_step(layer, far, span)
    native.whole_layer(x, parts, rotation, far, layer, span.positions, heads=heads, reach=reach)
    return True


def serves_step(layer: LayerSlots, dtype: torch.dtype, span: Span) -> bool:
    """Whether native.c takes this step as a whole."""
    whole, views = (layer.whole, layer.views) if isinstance(layer, LayerRows) else (layer, (layer,))
    policy, flagged = whole.policy, any(view.flagged for view in views)
    plain = span.positions.shape[1] == 1 and not (flagged or policy.needs_attention or policy.needs_queries)
    waits = policy.needs_token and any(map(whole.is_due, span.first))
    return plain and not waits and serves_decode(whole, dtype)


def _prepare_step(layer: LayerSlots, far: Rotation | None, span: Span) -> tuple[Rotation | None, int]:
    """Free slots for tokens that find none; what turns the queries for sinks, and how many slots are in use."""
    whole = layer.whole if isinstance(layer, LayerRows) else layer
    if isinstance(layer, LayerRows):
        for view, of_row in zip(layer.views, span.by_row, strict=False):
            _evict_before_(view, of_row)
    else:
        _evict_before_(layer, span)
    return far if whole.far else None, min(max(span.first) + 1, whole.retention.slots)


def _evict_before_(layer: LayerCache, span: Span) -> None:
    """Make room for a step's tokens, which the policy does not look at."""
    if any(map(layer.is_due, span.first)):
        nothing = layer.keys.new_empty(0)
        evict_(layer, nothing, nothing, span.positions[:, 0], settle=layer.retention.slots in span.first)


def attend_slots(layer: LayerCache, q: Tensor, span: Span, start: int, stop: int, q_far: Tensor | None) -> Tensor:
    """Queries q [B, H, n, D] of the tokens start..stop of a span over a layer's slots -> [B, H, n, D]."""
    positions = span.positions[:, start:stop]  # [B, n]
    if q.shape[2] > 1 and not _pins_far(layer, q_far):
        return attend_many(layer, q, span, start, stop, q_far)
    if not serves_decode(layer, q.dtype) or _pins_far(layer, q_far):
        return reference.attend_slots(layer, q, positions, layer.reach(span, stop), q_far)
    return native.attend(
        q,
        q_far,
        layer.keys,
        layer.values,
        layer.positions,
        positions.contiguous(),
        reach=min(max(span.first) + stop, layer.retention.slots),
        window=layer.window if layer.window is not None else 1 << 31,
        sinks=layer.retention.sinks if layer.far else 0,
    )


def _pins_far(layer: LayerCache, q_far: Tensor | None) -> bool:
    """Whether pinned tokens are asked from afar: they lie in any slot, and only the reference looks for them."""
    return layer.far and layer.flagged and q_far is not None


def serves_decode(layer: LayerCache, dtype: torch.dtype) -> bool:
    """Whether native.c attends over this layer's slots."""
    return native.missing() is None and fits_native(dtype, layer.keys.shape[3]) and layer.scales is None


def fits_native(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether native.c has loops for heads of this kind."""
    return dtype == torch.bfloat16 and head_dim % 32 == 0


def query_block(layer: LayerCache, span: Span, q: Tensor, q_far: Tensor | None) -> int:
    """How many tokens attend together, so that their mask stays small: a number of q's kind a slot, and a byte where
    some lie outside a window; or 4 bytes in every KV head.
    """
    if _pins_far(layer, q_far):
        return layer.query_block  # the reference's
    in_order = q.element_size() + (layer.window is not None and span.may_pass(layer.window))
    width = in_order if _in_order(layer, span) else 4 * layer.keys.shape[1]
    return max(1, min(LONGEST, MASK_BYTES // (len(span.first) * width * layer.retention.slots)))


def attend_many(layer: LayerCache, q: Tensor, span: Span, start: int, stop: int, q_far: Tensor | None) -> Tensor:
    """The same for many queries, by torch's fused kernel, whose memory does not grow with the slots."""
    reach = layer.reach(span, stop)
    keys, values = layer.dense(reach, q.dtype)  # [B, Hkv, S, D] each
    if _in_order(layer, span):
        bias = _bias_in_order(layer, q, span, start, reach)  # [B, 1, n, S]: the same for every head
    else:
        hidden = ~layer.can_see(span.positions[:, start:stop], reach, max(span.first) + stop - 1)  # [B, Hkv, n, S]
        bias = torch.zeros_like(hidden, dtype=q.dtype).masked_fill_(hidden, -torch.inf)
    sinks = 0 if q_far is None else layer.retention.sinks
    sink_bias = bias[..., :sinks].clone()  # [B, 1 or Hkv, n, s]
    bias[..., :sinks] = -torch.inf  # they have a query of their own
    rows = []
    for row in range(len(q)):  # query heads that share a KV head become the kernel's heads, the KV heads its batch
        grouped, kv_heads = q[row].unflatten(0, (keys.shape[1], -1)), keys.shape[1]  # [Hkv, G, n, D]
        shared = (-1, grouped.shape[1], -1, -1)
        key, value = keys[row].unsqueeze(1).expand(shared), values[row].unsqueeze(1).expand(shared)  # [Hkv, G, S, D]
        mask = bias[row].unsqueeze(1).expand(kv_heads, *shared[1:])  # [Hkv, G, n, S]
        if q_far is None or not sinks:
            attended = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask)
        else:
            near, total = _FLASH(grouped, key, value, attn_mask=mask)  # [Hkv, G, n, D], [Hkv, G, n] log of the sum
            distant = q_far[row].unflatten(0, (kv_heads, -1))  # [Hkv, G, n, D]
            total[..., : max(0, sinks - span.first[row] - start)] = -torch.inf  # sinks themselves see nothing near
            of_sinks = keys[row, :, None, :sinks], values[row, :, None, :sinks], sink_bias[row].unsqueeze(1)
            attended = _with_sinks(near, total, distant, *of_sinks)
        rows.append(attended.flatten(0, 1))  # [H, n, D]
    return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)


def _with_sinks(near: Tensor, total: Tensor, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
    """Attention [Hkv, G, n, D] with the logarithm of its softmax's sum [Hkv, G, n], and a few more keys and values
    [Hkv, 1, s, D] that are asked with q [Hkv, G, n, D] under a bias [Hkv or 1, 1, n, s]: both as one softmax.
    """
    scores = (q @ keys.transpose(2, 3)).to(total.dtype) * q.shape[3] ** -0.5 + bias  # [Hkv, G, n, s]
    sinks = torch.logsumexp(scores, 3)  # [Hkv, G, n]
    weights = (scores - torch.logaddexp(sinks, total).unsqueeze(3)).exp()  # [Hkv, G, n, s], of the whole softmax
    share = torch.sigmoid(total - sinks).unsqueeze(3)  # of what is near
    return near * share.to(near.dtype) + weights.to(near.dtype) @ values  # type: ignore[no-any-return]


def _in_order(layer: LayerCache, span: Span) -> bool:
    """Whether nothing was evicted yet: then a token lies in the slot of its own position, in every head."""
    return max(span.first) + span.length <= layer.retention.slots and not layer.flagged


def _bias_in_order(layer: LayerCache, q: Tensor, span: Span, start: int, reach: int) -> Tensor:
    """0 where the token at position first + start + i sees slot s, else -inf: [B, 1, n, reach]."""
    bias = q.new_full((len(span.first), q.shape[2], reach), -torch.inf)
    for row, first in zip(bias, span.first, strict=True):
        at = first + start
        row.triu_(at + 1)  # s > position
        if layer.window is not None and at + q.shape[2] > layer.window:
            past = torch.ones_like(row, dtype=torch.bool).tril_(at - layer.window)  # s <= position - window
            if layer.far:
                past[:, : layer.retention.sinks] = False
            row.masked_fill_(past, -torch.inf)
    return bias.unsqueeze(1)


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """x [..., size] += delta where there is one; the normalised x."""
    if x.dtype == torch.bfloat16 and x.shape[-1] % 16 == 0 and native.missing() is None:
        return native.rms_norm(x, weight, eps, delta)
    if delta is not None:
        x.add_(delta)
    return F.rms_norm(x, weight.shape, weight, eps)


def gated(x: Tensor) -> Tensor:
    """Gate and up [..., 2 I] -> silu(gate) * up [..., I]."""
    if x.dtype == torch.bfloat16 and x.shape[-1] % 32 == 0 and native.missing() is None:
        return native.gated(x)
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [B, T, n, D] turned by cos and sin [B, 1, T, D], see model.rotate -> [B, n, T, D]."""
    if fits_native(x.dtype, x.shape[-1]) and native.missing() is None:
        return native.rotate(x, cos, sin)
    x = x.transpose(1, 2)  # [B, n, T, D]
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin
