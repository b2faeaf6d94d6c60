"""The GPU backend: one token a row in a few launches, whatever the rows are doing, and nothing asked of the host.

    hash_keys or novelty   what the policy keeps beside the keys that came since the last eviction
    evict                  which tokens go, of every row and KV head that has no slot free
    write                  the token into its slot
    attend, join           attention over cuts of the slots, and the cuts put together

A program (kernels.py) belongs to one KV head of one row: it loads that row's position, and leaves at once where nothing
is to do.  So rows may be in different phases, and no bit of one depends on its neighbours.  Stretches of prompts go
through torch's fused attention.  The rest is the reference's: policies that watch attention weights, float64, prompts
that ask from afar; policies without a kernel choose their victims in eviction.py.  Nothing here has state.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import eviction
from ..eviction import EvictionPolicy
from ..policies.hashevict import HashEvict, HashEvictKey
from ..policies.hashevict_plus import HashEvictPlus
from ..policies.window import Window
from ..slots import LayerCache, LayerRows, LayerSlots, Span
from . import cpu, kernels, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # numbers of a head, at most
CUT, BLOCK = 256, 64  # slots of a program of `attend`, the same for every batch; and those it takes at a time
TAGGED = 32  # keys that are tagged at a time
ORDERED, SEARCHED = 4096, 1024  # bits of codes that are compared at a time, and slots that are searched for a victim


def missing(device: torch.device) -> str | None:
    """Why the kernels do not run on a device; None where they do."""
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return None
    return f"its kernels run on CUDA, and on a CPU under TRITON_INTERPRET=1 alone, for tests; not on {device.type}"


def rule_of(policy: EvictionPolicy) -> int | None:
    """By what a kernel evicts for this policy; None where eviction.py does."""
    kind = type(policy)
    if isinstance(policy, HashEvict) and kind in (HashEvict, HashEvictKey):
        plain = not (policy.centred or policy.norm_weighted or policy.needs_queries)
        return kernels.HASH.value if plain else None
    return {Window: kernels.AGE.value, HashEvictPlus: kernels.NOVELTY.value}.get(kind)


def serves_attention(layer: LayerCache, dtype: torch.dtype) -> bool:
    """Whether `attend_one` serves this layer's slots."""
    return dtype in DTYPES and layer.keys.shape[3] <= WIDEST and not layer.policy.needs_attention


def serves_step(layer: LayerCache, dtype: torch.dtype) -> bool:
    """Whether one token a row passes this layer in kernels alone: only then can a step be recorded (graph.py)."""
    evicts = not layer.policy.evicts or rule_of(layer.policy) is not None
    return evicts and serves_attention(layer, dtype)


def attend_(layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None) -> Tensor:
    """What `reference.attend_` does, with its arguments, effects and result."""
    whole, _ = _parts(layer)
    q_far = q_far if whole.far else None
    if q.shape[2] == 1 and serves_step(whole, q.dtype):
        now = span.positions[:, 0]  # [B]
        evict_(layer, q[:, :, 0], k[:, :, 0], now)
        write_(layer, k, v, span)
        return attend_one(layer, q, now, q_far)
    if isinstance(layer, LayerRows):
        return layer.each(attend_, q, k, v, span, q_far)
    if not serves_attention(layer, q.dtype):
        return reference.attend_(layer, q, k, v, span, q_far)
    block = cpu.query_block(layer, span, None) if q_far is None else layer.query_block
    return cpu.by_stretches_(layer, q, k, v, span, q_far, block, evict_, attend_slots)


def attend_slots(layer: LayerCache, q: Tensor, span: Span, start: int, stop: int, q_far: Tensor | None) -> Tensor:
    """Queries q [B, H, n, D] of the tokens start..stop of a span over a layer's slots -> [B, H, n, D]."""
    positions = span.positions[:, start:stop]  # [B, n]
    if stop - start == 1:
        return attend_one(layer, q, positions[:, 0], q_far)
    if q_far is not None:
        return reference.attend_slots(layer, q, positions, layer.reach(span, stop), q_far)
    return cpu.attend_many(layer, q, span, start, stop, None)


def evict_(layer: LayerSlots, query: Tensor, key: Tensor, now: Tensor, *, settle: bool = True) -> None:
    """What `eviction.evict_` does; where a kernel does it, each row finds out for itself what is due."""
    whole, rows = _parts(layer)
    policy, state, rule = whole.policy, whole.state, rule_of(whole.policy)
    if rule is None and policy.evicts:
        assert isinstance(layer, LayerCache), "rows are evicted for one by one"
        eviction.evict_(layer, query, key, now, settle=settle)
    if rule is None:
        return
    kv_heads, slots, dim = whole.keys.shape[1:]
    lines, every, now = len(now) * kv_heads, whole.retention.evict_every, now.contiguous()
    sizes, bits = (kv_heads, slots, every), 1
    tags = votes = now  # what is never read
    if isinstance(policy, HashEvict):
        judge = (key if isinstance(policy, HashEvictKey) else query).contiguous()  # [B, G * Hkv, D]
        group, bits = judge.shape[1] // kv_heads, policy.hash_bits
        tags = state["codes"].view(torch.uint8)  # [B, Hkv, S, bytes]: bit p is bit p % 8 of byte p // 8
        votes = torch.empty(lines, bits, device=now.device)  # [B * Hkv, P]
        kernels.hash_keys[(lines, triton.cdiv(slots, TAGGED) + 1)](
            *(whole.keys, whole.scales, tags, state["projection"], judge, votes, whole.free, rows, now),
            *(*sizes, dim, bits, tags.shape[3], group),
            PER_HEAD=policy.per_head,
            GROUP=_padded(group),
            DIM=_padded(dim),
            BLOCK=TAGGED,
        )
    elif isinstance(policy, HashEvictPlus):
        tags = state["novelty"]  # [B, Hkv, S]
        kernels.novelty[(lines,)](
            *(whole.keys, whole.scales, tags, state["total"], whole.free, rows, now),
            *(*sizes, dim),
            DECAY=policy.decay,
            LOG_DECAY=math.log2(policy.decay),
            DIM=_padded(dim),
            BLOCK=TAGGED,
        )
    orders = torch.empty(lines, slots, dtype=torch.int64, device=now.device)  # [B * Hkv, S]
    kernels.evict[(lines,)](
        *(whole.positions, whole.flags, tags, votes, orders, whole.free, rows, now),
        *(*sizes, _window(whole), whole.retention.sinks, whole.retention.recent, bits, tags.shape[-1]),
        RULE=rule,
        FAR=whole.far,
        BITS=_padded(bits),
        BLOCK=min(128, max(1, ORDERED // _padded(bits))),
        WIDE=min(SEARCHED, _padded(slots)),
    )


def write_(layer: LayerSlots, k: Tensor, v: Tensor, span: Span) -> None:
    """What `LayerCache.write_` does with one token a row: k and v [B, Hkv, 1, D].  Rows at -1 write nothing."""
    whole, rows = _parts(layer)
    kv_heads, slots, dim = whole.keys.shape[1:]
    kernels.write[(k.shape[0] * kv_heads,)](
        *(k.contiguous(), v.contiguous(), whole.keys, whole.values, whole.scales, whole.positions),
        *(whole.flags, span.flags, whole.free, rows, span.positions),
        *(kv_heads, slots, whole.retention.evict_every, dim),
        DIM=_padded(dim),
    )


def attend_one(layer: LayerSlots, q: Tensor, now: Tensor, q_far: Tensor | None) -> Tensor:
    """Queries q, q_far [B, H, 1, D] at positions now [B] over a layer's slots -> [B, H, 1, D]; at -1: zeros."""
    whole, rows = _parts(layer)
    (batch, heads, _, dim), (kv_heads, slots) = q.shape, whole.positions.shape[1:]
    cuts, group = triton.cdiv(slots, CUT), heads // kv_heads
    block = BLOCK if _padded(dim) * q.element_size() <= 512 else BLOCK // 2  # keys and values lie in shared memory
    parts = torch.empty(batch * heads, cuts, dim, device=q.device)  # [B * H, cuts, D]
    sums = torch.empty(batch * heads, cuts, 2, device=q.device)  # [B * H, cuts, 2]
    kernels.attend[(batch * kv_heads, cuts)](
        *(q.contiguous(), None if q_far is None else q_far.contiguous(), whole.keys, whole.values, whole.scales),
        *(whole.positions, whole.flags, rows, now.contiguous(), parts, sums),
        *(kv_heads, slots, dim, group, cuts, _window(whole), whole.retention.sinks, dim**-0.5),
        FAR=whole.far,
        GROUP=_padded(group),
        DIM=_padded(dim),
        CUT=CUT,
        BLOCK=block,
        MATH=_number_kind(q.dtype),
    )
    out = q.new_empty(q.shape)  # [B, H, 1, D]
    kernels.join[(batch * heads,)](parts, sums, out, cuts, dim, DIM=_padded(dim), BLOCK=16)
    return out


def _parts(layer: LayerSlots) -> tuple[LayerCache, Tensor | None]:
    """The layer's tensors, and which of their rows take part: [B], or None for all."""
    return (layer.whole, layer.rows) if isinstance(layer, LayerRows) else (layer, None)


def _padded(size: int) -> int:
    """As tensor cores want it: a power of two, and 16 at least."""
    return max(16, int(triton.next_power_of_2(size)))


def _number_kind(dtype: torch.dtype) -> Any:
    """In what products are taken; the interpreter takes none of bfloat16."""
    if triton.knobs.runtime.interpret:
        return tl.float32
    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]


def _window(layer: LayerCache) -> int:
    return 2**31 - 1 if layer.window is None else layer.window
