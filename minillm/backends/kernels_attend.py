"""Attention over position-tagged slots, and over what has left them: the kernels of triton.py that only read.

`line` is a KV head of a row of the batch, `place` the same head in the cache: the rows of a step may be any of the
cache's.  Names in capitals are known when a kernel is compiled; sizes that must be powers of two are among them, and
what lies beyond the real size is masked.  Where a pointer may be None, what it points to does not exist.
"""

import triton
import triton.language as tl


@triton.jit
def place_of(line, rows, kv_heads):
    """Which KV head of the cache this is."""
    if rows is None:
        place = line.to(tl.int64)
    else:
        place = tl.load(rows + line // kv_heads).to(tl.int64) * kv_heads + line % kv_heads
    return place


@triton.jit
def visible(position, flag, now, window, sinks, FAR: tl.constexpr):
    """`LayerCache.can_see`: what the query at `now` sees; flag & 1 is PINNED."""
    inside = position > now - window
    if FAR:
        inside = inside | (position < sinks) | (((flag & 1) > 0) & (position < window + sinks))
    return (position >= 0) & (position <= now) & inside


@triton.jit
def attend(
    q, q_far, stride, far_stride, keys, values, scales, positions, flags,
    gone_keys, gone_values, gone_scales, gone_positions, deaths, gone,
    rows, now, parts, sums, out,
    kv_heads, slots, dim, group, tokens, cuts, most, window, sinks, scale,
    FAR: tl.constexpr, TILE: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """One cut of the slots for a tile of the queries of a KV head, those of its query heads one after the other: their
    weighted values, largest score and sum of exp; or, where there is one cut, what they come to.  The last cut takes
    what has left in the meantime as well.
    """
    line, cut = tl.program_id(0), tl.program_id(1)
    place = place_of(line, rows, kv_heads) * slots
    m, d = tl.program_id(2) * TILE + tl.arange(0, TILE), tl.arange(0, DIM)
    real = m < group * tokens
    at = tl.load(now + line // kv_heads * tokens + m % tokens, real, other=-1).to(tl.int32)  # [M]
    asked = line.to(tl.int64) * group * tokens + m  # [M]
    batch = (line // kv_heads).to(tl.int64)
    here = (line % kv_heads * group * tokens + m)[:, None] * dim + d[None, :]  # [M, D], within a row
    there = real[:, None] & (d < dim)[None, :]
    query = tl.load(q + batch * stride + here, there, other=0).to(MATH)
    far = query
    if q_far is not None:
        far = tl.load(q_far + batch * far_stride + here, there, other=0).to(MATH)
    top = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    found = tl.zeros([TILE, DIM], tl.float32)
    # Slots fill from 0, so that those beyond the newest query's are empty.
    for start in range(cut * CUT, tl.minimum(tl.minimum(cut * CUT + CUT, slots), tl.max(at, 0) + 1), BLOCK):
        n = start + tl.arange(0, BLOCK)
        slot = place + n
        position = tl.load(positions + slot, n < slots, other=-1)
        seen = visible(
            position[None, :], tl.load(flags + slot, n < slots, other=0)[None, :], at[:, None], window, sinks, FAR
        )  # [M, S]
        top, total, found = absorb(
            query, far, top, total, found, seen, position[None, :] <= (at - window)[:, None], keys, values, scales,
            slot, position >= 0, d, dim, scale, q_far is not None, MATH,
        )  # fmt: skip
    if gone is not None:
        for start in range(0, tl.where(cut == cuts - 1, tl.load(gone + line), 0), BLOCK):
            n = start + tl.arange(0, BLOCK)
            slot = line.to(tl.int64) * most + n
            left = n < tl.load(gone + line)
            position = tl.load(gone_positions + slot, left, other=-1)
            seen = visible(position[None, :], 0, at[:, None], window, sinks, FAR)  # pinned tokens never leave
            seen = seen & (at[:, None] < tl.load(deaths + slot, left, other=0)[None, :])  # [M, n]
            top, total, found = absorb(
                query, far, top, total, found, seen, position[None, :] <= (at - window)[:, None], gone_keys,
                gone_values, gone_scales, slot, position >= 0, d, dim, scale, q_far is not None, MATH,
            )  # fmt: skip
    if parts is None:
        tl.store(out + asked[:, None] * dim + d[None, :], found / tl.maximum(total, 1e-30)[:, None], there)
    else:
        part = asked * cuts + cut
        tl.store(parts + part[:, None] * dim + d[None, :], found, there)
        tl.store(sums + part * 2, top, real)
        tl.store(sums + part * 2 + 1, total, real)


@triton.jit
def absorb(
    query, far, top, total, found, seen, distant, keys, values, scales, slot, live, d, dim, scale,
    ASKS_FAR: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """A softmax over what came before, and what it becomes with some more slots, of which queries see `seen` [M, n]."""
    wanted = live[:, None] & (d < dim)[None, :]  # what nobody can see is not read
    key = tl.trans(tl.load(keys + slot[:, None] * dim + d[None, :], wanted, other=0)).to(MATH)  # [D, n]
    score = tl.dot(query, key, input_precision="ieee") * scale  # [M, n]
    if ASKS_FAR:
        score = tl.where(distant, tl.dot(far, key, input_precision="ieee") * scale, score)
    value = tl.load(values + slot[:, None] * dim + d[None, :], wanted, other=0).to(MATH)  # [n, D]
    if scales is not None:
        score = score * tl.load(scales + slot * 2, live, other=0)[None, :]
    score = tl.where(seen, score, -float("inf"))
    higher = tl.maximum(top, tl.max(score, 1))
    base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet: no -inf - -inf
    weight = tl.exp(score - base[:, None])  # [M, n]
    fading = tl.exp(top - base)
    total = total * fading + tl.sum(weight, 1)
    if scales is not None:
        weight = weight * tl.load(scales + slot * 2 + 1, live, other=0)[None, :]
    found = found * fading[:, None] + tl.dot(weight.to(MATH), value, input_precision="ieee")
    return higher, total, found


@triton.jit
def join(parts, sums, out, cuts, dim, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The cuts of one query put together; zeros where none has seen anything."""
    asked, d = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    top = -float("inf")
    for start in range(0, cuts, BLOCK):
        cut = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.load(sums + (asked * cuts + cut) * 2, cut < cuts, other=-float("inf")), 0))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    found = tl.zeros([DIM], tl.float32)
    for start in range(0, cuts, BLOCK):
        cut = start + tl.arange(0, BLOCK)
        part = asked * cuts + cut
        share = tl.exp(tl.load(sums + part * 2, cut < cuts, other=-float("inf")) - base)  # [cuts]
        total += tl.sum(share * tl.load(sums + part * 2 + 1, cut < cuts, other=0), 0)
        real = (cut < cuts)[:, None] & (d < dim)[None, :]
        found += tl.sum(share[:, None] * tl.load(parts + part[:, None] * dim + d[None, :], real, other=0), 0)
    tl.store(out + asked * dim + d, found / tl.maximum(total, 1e-30), d < dim)  # a total of what was seen is at least 1
