"""The GPU backend: tokens enter a layer's slots, and attend, in three launches, and nothing is asked of the host.

    enter     for each KV head of each row: tags keys, chooses victims, writes tokens, in the order of the tokens.  What
              has left between two of them is carried out, with the position from which on nobody sees it
    attend    attention over cuts of the slots, and over what was carried out
    join      the cuts put together, where there are several

So a chunk of a prompt is one call of attention however often it evicts: a query sees what was born before it and has
not died yet, as it would if tokens came one by one.  A program (kernels.py, kernels_attend.py) belongs to one KV head
of one row: rows may be in different phases, and no bit of one depends on its neighbours.

The rest is the reference's: policies that watch attention weights, and float64.  For policies without a kernel
eviction.py chooses, and stretches between evictions attend one by one.  Nothing here has state.

What stands between linear layers - norms, rotary positions, gates - is a kernel each, too (kernels_between.py): a step
of few tokens spends more time on launches, and on passing numbers on, than on such arithmetic.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eviction import evict_
from ..policies.hashevict import HashEvict, HashEvictKey
from ..policies.hashevict_plus import HashEvictPlus
from ..policies.window import Window
from ..slots import LayerCache, LayerRows, LayerSlots, Span
from . import kernels, kernels_attend, kernels_between, reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (3, 4)  # which has `tl.topk`
WIDEST = 256  # numbers of a head, at most
CUT, BLOCK = 256, 64  # slots of a program of `attend`, the same for every batch; and those it takes at a time
CUT_MANY, TILE = 1 << 16, 64  # the same where many tokens attend, and how many queries it takes
SHARED = 1 << 15  # bytes that keys alone may take there
RUNS, RUN = 256, 16  # runs of slots that are compared at a time, and slots of one, see `kernels.choose`
PASSED = 1024  # numbers of a program that passes them on
MOST_SLOTS, MOST_BITS, MOST_GROUP = 1 << 16, 256, 127  # what `choose` has bits for: distances add up over a group


def missing(device: torch.device) -> str | None:
    """Why the kernels do not run on a device; None where they do."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"its kernels need Triton {OLDEST[0]}.{OLDEST[1]} (torch 2.8 brings it), not {triton.__version__}"
    if device.type == "cuda" or (device.type == "cpu" and triton.knobs.runtime.interpret):
        return None
    return f"its kernels run on CUDA, and on a CPU under TRITON_INTERPRET=1 alone, for tests; not on {device.type}"


def rule_of(layer: LayerCache) -> int | None:
    """By what a kernel chooses victims here; None where eviction.py does."""
    policy, kind = layer.policy, type(layer.policy)
    if not policy.evicts:
        return int(kernels.NOBODY.value)
    if layer.retention.slots > MOST_SLOTS:
        return None
    if isinstance(policy, HashEvict) and kind in (HashEvict, HashEvictKey):
        plain = not (policy.centred or policy.norm_weighted or policy.needs_queries) and policy.hash_bits <= MOST_BITS
        return int(kernels.HASH.value) if plain else None
    return {Window: int(kernels.AGE.value), HashEvictPlus: int(kernels.NOVELTY.value)}.get(kind)


def serves_attention(layer: LayerCache, dtype: torch.dtype) -> bool:
    """Whether `attend_slots` serves this layer's slots."""
    return dtype in DTYPES and layer.keys.shape[3] <= WIDEST and not layer.policy.needs_attention


def serves_step(layer: LayerCache, dtype: torch.dtype) -> bool:
    """Whether tokens pass this layer in kernels alone: only then can a step be recorded (graph.py)."""
    return rule_of(layer) is not None and serves_attention(layer, dtype)


class Gone(NamedTuple):
    """What left a layer's slots while the tokens of a span entered, `most` entries for each of its KV heads at most.

    scales as in slots.py.  An entry was seen by queries before its death.
    """

    keys: Tensor  # [B, Hkv, most, D]
    values: Tensor  # [B, Hkv, most, D]
    scales: Tensor | None  # [B, Hkv, most, 2] float32
    positions: Tensor  # [B, Hkv, most] int32
    deaths: Tensor  # [B, Hkv, most] int32
    left: Tensor  # [B, Hkv] int32: how many

    @classmethod
    def room_for(cls, layer: LayerCache, rows: int, tokens: int) -> Gone:
        """Room for what so many tokens of so many rows may push out: nothing is written yet."""
        every = layer.retention.evict_every
        heads, dim = layer.keys.shape[1], layer.keys.shape[3]
        shape = (rows, heads, ((tokens - 1) // every + 1) * every)  # [B, Hkv, most]
        return cls(
            layer.keys.new_empty(*shape, dim),
            layer.values.new_empty(*shape, dim),
            None if layer.scales is None else layer.scales.new_empty(*shape, 2),
            layer.positions.new_empty(shape),
            layer.positions.new_empty(shape),
            layer.positions.new_zeros(rows, heads),
        )


def attend_(layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span, q_far: Tensor | None = None) -> Tensor:
    """What `reference.attend_` does, with its arguments, effects and result."""
    whole, _ = _parts(layer)
    q_far = q_far if whole.far else None
    if serves_step(whole, q.dtype):
        return attend_slots(layer, q, span.positions, q_far, enter_(layer, q, k, v, span))
    if isinstance(layer, LayerRows):
        return layer.each(attend_, q, k, v, span, q_far)
    if not serves_attention(layer, q.dtype):
        return reference.attend_(layer, q, k, v, span, q_far)
    result = torch.zeros_like(q)  # [B, H, T, D]; padding gives zeros
    for start, stop, evict, settle in layer.stretches(span, q.shape[2]):
        queries, positions = q[:, :, start:stop], span.positions[:, start:stop]
        if evict:
            evict_(layer, queries[:, :, 0], k[:, :, start], positions[:, 0], settle=settle)
        layer.write_(k[:, :, start:stop], v[:, :, start:stop], span, start, stop)
        far = None if q_far is None else q_far[:, :, start:stop]
        result[:, :, start:stop] = attend_slots(layer, queries, positions, far)
        if layer.policy.needs_queries:
            layer.policy.observe_queries_(layer, queries, positions)
    return result


def enter_(layer: LayerSlots, q: Tensor, k: Tensor, v: Tensor, span: Span) -> Gone | None:
    """Let tokens into a layer's slots: evict, write, evict, write, ...; what has left meanwhile.

    q [B, H, T, D], k and v [B, Hkv, T, D], a row's tokens at consecutive positions, or at -1 where nothing is to
    happen.  Of one token no query sees what it pushed out: None.
    """
    whole, rows = _parts(layer)
    policy, state, rule = whole.policy, whole.state, rule_of(whole)
    assert rule is not None, "eviction.py chooses for this policy"
    (batch, kv_heads, tokens, dim), slots, every = k.shape, whole.retention.slots, whole.retention.evict_every
    now, bits, judges, judge_stride, decay = span.positions.contiguous(), 1, 1, 0, 1.0
    (k, k_stride), (v, v_stride) = _by_row(k), _by_row(v)
    judge = tags = projection = probes = totals = now  # what is never read
    if isinstance(policy, HashEvict):
        bits, projection, tags = policy.hash_bits, state["projection"], state["codes"]  # [B, Hkv, S, W]
        judge, judge_stride = _by_row(k if isinstance(policy, HashEvictKey) else q)  # [B, G * Hkv, T, D]
        judges = judge.shape[1] // kv_heads
        assert judges <= MOST_GROUP, f"codes of {judges} query heads a KV head add up to more than the kernel counts"
        probes = tags.new_empty(batch, kv_heads, judges, tags.shape[3])  # [B, Hkv, G, W]
    elif isinstance(policy, HashEvictPlus):
        tags, totals, decay = state["novelty"], state["total"], policy.decay  # [B, Hkv, S], [B, Hkv, D]
    # Where the host knows that nothing is evicted, nothing has to be carried out.
    keeps = policy.evicts and tokens > 1 and span.may_pass(slots)
    gone = Gone.room_for(whole, batch, tokens) if keeps else None
    many, words = _padded(every), tags.shape[-1]
    run = min(RUN, max(1, _padded(slots) // many))
    kernels.enter[(batch * kv_heads,)](
        *(judge, k, v, judge_stride, k_stride, v_stride, span.flags, whole.keys, whole.values, whole.scales),
        *(whole.positions, whole.flags, whole.free, rows, now),
        *(tags, tags.view(torch.uint8), projection, probes, probes.view(torch.uint8), totals),
        *((None,) * 6 if gone is None else gone),
        *(kv_heads, slots, every, dim, judges, tokens, span.length, 0 if gone is None else gone.keys.shape[2]),
        *(_window(whole), whole.retention.sinks, whole.retention.recent, bits, words, words * tags.itemsize),
        RULE=rule,
        FAR=whole.far,
        PER_HEAD=isinstance(policy, HashEvict) and policy.per_head,
        LOG_DECAY=math.log2(decay),
        GROUP=_padded(judges),
        DIM=_padded(dim),
        MASK=(1 << 8 * tags.itemsize) - 1 if tags.itemsize < 8 else -1,  # of a word that has become int64
        RUNS=max(many, min(RUNS, _padded(slots) // run)),
        RUN=run,
        K=many,
        num_warps=8,
    )
    return gone


def evict_one_(layer: LayerCache, query: Tensor, key: Tensor, now: Tensor, *, settle: bool) -> None:
    """What `eviction.evict_` does, as a step of one token does it: where that is a kernel, it writes the token, too."""
    if not serves_step(layer, query.dtype):
        return evict_(layer, query, key, now, settle=settle)
    q, k, at = query[:, :, None], key[:, :, None], now[:, None]  # [B, H, 1, D], [B, Hkv, 1, D], [B, 1]
    enter_(layer, q, k, k, Span(at, at, (), 1))  # any numbers will do for its value
    return None


def attend_slots(
    layer: LayerSlots, q: Tensor, positions: Tensor, q_far: Tensor | None, gone: Gone | None = None
) -> Tensor:
    """Queries q, q_far [B, H, n, D] at positions [B, n] over a layer's slots, and over what has left while the last
    of them entered -> [B, H, n, D]; at -1: zeros.
    """
    whole, rows = _parts(layer)
    (batch, heads, tokens, dim), (kv_heads, slots) = q.shape, whole.positions.shape[1:]
    cut, group = CUT if tokens == 1 else CUT_MANY, heads // kv_heads
    most = SHARED // (_padded(dim) * q.element_size())  # queries, keys and values lie in shared memory
    tile, block = (_padded(group), min(BLOCK, most)) if tokens == 1 else (min(TILE, most // 2), min(BLOCK, most // 2))
    asked, cuts = batch * heads * tokens, triton.cdiv(slots, cut)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # [B, H, n, D]
    parts = sums = None
    if cuts > 1:
        parts = torch.empty(asked, cuts, dim, device=q.device)  # [B * H * n, cuts, D]
        sums = torch.empty(asked, cuts, 2, device=q.device)  # [B * H * n, cuts, 2]
    (q, stride), (q_far, far_stride) = _by_row(q), (None, 0) if q_far is None else _by_row(q_far)
    kernels_attend.attend[(batch * kv_heads, cuts, triton.cdiv(group * tokens, tile))](
        *(q, q_far, stride, far_stride, whole.keys, whole.values, whole.scales),
        *(whole.positions, whole.flags, *((None,) * 6 if gone is None else gone)),
        *(rows, positions.contiguous(), parts, sums, out),
        *(kv_heads, slots, dim, group, tokens, cuts, 0 if gone is None else gone.keys.shape[2]),
        *(_window(whole), whole.retention.sinks, dim**-0.5),
        FAR=whole.far,
        TILE=tile,
        DIM=_padded(dim),
        CUT=cut,
        BLOCK=block,
        MATH=_number_kind(q.dtype),
        num_warps=4 if tokens == 1 else 8,
    )
    if cuts > 1:
        kernels_attend.join[(asked,)](parts, sums, out, cuts, dim, DIM=_padded(dim), BLOCK=16)
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float, delta: Tensor | None = None) -> Tensor:
    """x [M, size] += delta where there is one; the normalised x."""
    out, (rows, size) = torch.empty_like(x), x.shape
    kernels_between.rms_norm[(rows,)](x, delta, weight, out, size, eps, SIZE=_padded(size), num_warps=8)
    return out


def gated(x: Tensor) -> Tensor:
    """Gate and up [M, 2 I] -> silu(gate) * up [M, I]."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = x.new_empty(rows, size)
    kernels_between.gated[(rows, triton.cdiv(size, PASSED))](x, out, size, BLOCK=PASSED)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads x [B, T, n, D] turned by cos and sin [B, 1, T, D], see model.rotate -> [B, n, T, D]."""
    (batch, tokens, heads, dim), block = x.shape, 8
    out = x.new_empty(batch, heads, tokens, dim)
    lines = x.flatten(0, 1)  # [B * T, n, D]
    kernels_between.rotate[(batch * tokens, triton.cdiv(heads, block))](
        *(lines, cos.contiguous(), sin.contiguous(), out, lines.stride(0), heads, tokens, dim),
        DIM=_padded(dim),
        BLOCK=block,
    )
    return out


def _by_row(x: Tensor) -> tuple[Tensor, int]:
    """x [B, heads, T, D], or a copy, whose rows are each one piece of memory, and how far apart they are."""
    x = x if x[0].is_contiguous() else x.contiguous()
    return x, x.stride(0)


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
