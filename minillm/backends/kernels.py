"""The kernels of triton.py, which says what they are for and is the only one to launch them.

`line` is a KV head of a row of the batch, `place` the same head in the cache: the rows of a step may be any of the
cache's.  Names in capitals are known when a kernel is compiled; sizes that must be powers of two are among them, and
what lies beyond the real size is masked.  Where a pointer may be None, what it points to does not exist.
"""

import triton
import triton.language as tl

from ..eviction import _FIRST, _LAST

FIRST, LAST = tl.constexpr(_FIRST), tl.constexpr(_LAST)
NEVER = tl.constexpr(2**63 - 1)  # later than any order
ROUND = tl.constexpr(1.5 * 2**23)  # added to a small float32 and taken away again, it rounds to even
AGE, HASH, NOVELTY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # what a policy judges by


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
def numbers(stored, scales, which, slot, d, mask, dim):
    """Keys (which = 0) or values (1) as float32: [n, D]."""
    x = tl.load(stored + slot[:, None] * dim + d[None, :], mask[:, None] & (d < dim)[None, :], other=0).to(tl.float32)
    if scales is not None:
        x = x * tl.load(scales + slot * 2 + which, mask, other=0)[:, None]
    return x


@triton.jit
def attend(
    q, q_far, keys, values, scales, positions, flags, rows, now, parts, sums,
    kv_heads, slots, dim, group, cuts, window, sinks, scale,
    FAR: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """One cut of the slots, for all query heads of a KV head: its weighted values, largest score and sum of exp."""
    line, cut = tl.program_id(0), tl.program_id(1)
    place = place_of(line, rows, kv_heads) * slots
    at = tl.load(now + line // kv_heads).to(tl.int32)
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    heads = line * group + g  # [G]
    here = heads[:, None] * dim + d[None, :]  # [G, D]
    real = (g < group)[:, None] & (d < dim)[None, :]
    query = tl.load(q + here, real, other=0).to(MATH)
    far = query
    if q_far is not None:
        far = tl.load(q_far + here, real, other=0).to(MATH)
    top = tl.full([GROUP], -float("inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    found = tl.zeros([GROUP, DIM], tl.float32)
    # Slots fill from 0, so that those from now + 1 on are empty.
    for start in range(cut * CUT, tl.minimum(tl.minimum(cut * CUT + CUT, slots), at + 1), BLOCK):
        n = start + tl.arange(0, BLOCK)
        slot = place + n
        position = tl.load(positions + slot, n < slots, other=-1)
        flag = tl.load(flags + slot, n < slots, other=0)
        seen = visible(position, flag, at, window, sinks, FAR)  # [S]
        wanted = seen[:, None] & (d < dim)[None, :]  # what nobody sees is not read
        key = tl.trans(tl.load(keys + slot[:, None] * dim + d[None, :], wanted, other=0)).to(MATH)  # [D, S]
        score = tl.dot(query, key, input_precision="ieee") * scale  # [G, S]
        if q_far is not None:
            from_afar = tl.dot(far, key, input_precision="ieee") * scale
            score = tl.where((position <= at - window)[None, :], from_afar, score)
        value = tl.load(values + slot[:, None] * dim + d[None, :], wanted, other=0).to(MATH)  # [S, D]
        if scales is not None:
            score = score * tl.load(scales + slot * 2, seen, other=0)[None, :]
        score = tl.where(seen[None, :], score, -float("inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet: no -inf - -inf
        weight = tl.exp(score - base[:, None])  # [G, S]
        fading = tl.exp(top - base)
        total = total * fading + tl.sum(weight, 1)
        if scales is not None:
            weight = weight * tl.load(scales + slot * 2 + 1, seen, other=0)[None, :]
        found = found * fading[:, None] + tl.dot(weight.to(MATH), value, input_precision="ieee")
        top = higher
    part = heads * cuts + cut
    tl.store(parts + part[:, None] * dim + d[None, :], found, real)
    tl.store(sums + part * 2, top, g < group)
    tl.store(sums + part * 2 + 1, total, g < group)


@triton.jit
def join(parts, sums, out, cuts, dim, DIM: tl.constexpr, BLOCK: tl.constexpr):
    """The cuts of one query head put together; zeros where none has seen anything."""
    head, d = tl.program_id(0).to(tl.int64), tl.arange(0, DIM)
    top = -float("inf")
    for start in range(0, cuts, BLOCK):
        cut = start + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.max(tl.load(sums + (head * cuts + cut) * 2, cut < cuts, other=-float("inf")), 0))
    base = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    found = tl.zeros([DIM], tl.float32)
    for start in range(0, cuts, BLOCK):
        cut = start + tl.arange(0, BLOCK)
        part = head * cuts + cut
        share = tl.exp(tl.load(sums + part * 2, cut < cuts, other=-float("inf")) - base)  # [cuts]
        total += tl.sum(share * tl.load(sums + part * 2 + 1, cut < cuts, other=0), 0)
        real = (cut < cuts)[:, None] & (d < dim)[None, :]
        found += tl.sum(share[:, None] * tl.load(parts + part[:, None] * dim + d[None, :], real, other=0), 0)
    tl.store(out + head * dim + d, found / tl.maximum(total, 1e-30), d < dim)  # a total of what was seen is at least 1


@triton.jit
def write(
    k, v, keys, values, scales, positions, flags, new_flags, free, rows, now,
    kv_heads, slots, every, dim, DIM: tl.constexpr,
):  # fmt: skip
    """A token into its slot, as `LayerCache.slots_of` and `write_` say."""
    line = tl.program_id(0)
    place = place_of(line, rows, kv_heads)
    at = tl.load(now + line // kv_heads).to(tl.int32)
    if at < 0:
        return
    slot = at
    if at >= slots:
        slot = tl.load(free + place * every + (at - slots) % every).to(tl.int32)
    here = place * slots + slot
    flag = 0
    if new_flags is not None:
        flag = tl.load(new_flags + line // kv_heads)
    tl.store(positions + here, at)
    tl.store(flags + here, flag)
    d = tl.arange(0, DIM)
    key = tl.load(k + line * dim + d, d < dim, other=0)
    value = tl.load(v + line * dim + d, d < dim, other=0)
    if scales is not None:
        key = eight_bits(key, scales + here * 2)
        value = eight_bits(value, scales + here * 2 + 1)
    tl.store(keys + here * dim + d, key, d < dim)
    tl.store(values + here * dim + d, value, d < dim)


@triton.jit
def eight_bits(x, scale_at):
    """`slots.to_int8`: the int8 of a vector [D], whose scale is stored."""
    x = x.to(tl.float32)
    scale = tl.math.div_rn(tl.maximum(tl.max(tl.abs(x), 0), 1.1754943508222875e-38 * 127), 127.0)
    tl.store(scale_at, scale)
    return (tl.math.div_rn(x, scale + tl.zeros_like(x)) + ROUND - ROUND).to(tl.int8)


@triton.jit
def hash_keys(
    keys, scales, codes, projection, judge, votes, free, rows, now,
    kv_heads, slots, every, dim, bits, width, group,
    PER_HEAD: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Codes of the keys that have none yet, BLOCK of them; and in the last program the votes of who judges them.

    The sum over g of P - 2 Hamming(code, code of g) is the sum over bits p of +-votes[p], where votes[p] counts the g
    whose bit is 1 less those whose bit is 0, and the sign is the bit of the code.  So a group costs no more than one.
    """
    line, tile = tl.program_id(0), tl.program_id(1)
    since = tl.load(now + line // kv_heads).to(tl.int32) - slots
    if (since < 0) | (since % every != 0):
        return
    place = place_of(line, rows, kv_heads)
    d, p = tl.arange(0, DIM), tl.arange(0, 16)
    if PER_HEAD:
        projection += (line % kv_heads) * bits * dim
    new = tl.where(since == 0, slots, every)  # the first S tokens, or those since the last time
    if tile == tl.num_programs(1) - 1:
        g = tl.arange(0, GROUP)
        real = (g < group)[:, None] & (d < dim)[None, :]
        x = tl.load(judge + (line * group + g)[:, None] * dim + d[None, :], real, other=0).to(tl.float32)  # [G, D]
        for first in range(0, bits, 16):
            liked = above(x, projection, first + p, d, bits, dim)  # [G, 16]
            vote = tl.where((g < group)[:, None], tl.where(liked, 1.0, -1.0), 0.0)
            tl.store(votes + line * bits + first + p, tl.sum(vote, 0), first + p < bits)
    elif tile * BLOCK < new:
        n = tile * BLOCK + tl.arange(0, BLOCK)
        slot = n.to(tl.int64)
        if since > 0:
            slot = tl.load(free + place * every + n, n < new, other=0)
        slot = place * slots + slot
        key = numbers(keys, scales, 0, slot, d, n < new, dim)  # [n, D]
        for first in range(0, bits, 16):
            one = above(key, projection, first + p, d, bits, dim) & (first + p < bits)[None, :]  # [n, 16]
            pair = tl.reshape(one.to(tl.int32), [BLOCK, 2, 8]) << tl.arange(0, 8)[None, None, :]
            b = first // 8 + tl.arange(0, 2)
            kept = (n < new)[:, None] & (b < width)[None, :]
            tl.store(codes + slot[:, None] * width + b[None, :], tl.sum(pair, 2).to(tl.uint8), kept)


@triton.jit
def above(x, projection, p, d, bits, dim):
    """On which side of the hyperplanes p [16] vectors x [n, D] lie: [n, 16]."""
    real = (d < dim)[:, None] & (p < bits)[None, :]
    planes = tl.load(projection + p[None, :] * dim + d[:, None], real, other=0)  # [D, 16]
    return tl.dot(x, planes, input_precision="ieee") >= 0


@triton.jit
def novelty(
    keys, scales, tags, totals, free, rows, now,
    kv_heads, slots, every, dim,
    DECAY: tl.constexpr, LOG_DECAY: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What `hashevict-plus` keeps: see policies/hashevict_plus.py, `settle_` and `tag_`."""
    line = tl.program_id(0)
    since = tl.load(now + line // kv_heads).to(tl.int32) - slots
    if (since < 0) | (since % every != 0):
        return
    place, d = place_of(line, rows, kv_heads), tl.arange(0, DIM)
    if since == 0:
        total, plain = tl.zeros([DIM], tl.float64), tl.zeros([DIM], tl.float64)
        for start in range(0, slots, BLOCK):
            n = start + tl.arange(0, BLOCK)
            direction = directions(numbers(keys, scales, 0, place * slots + n, d, n < slots, dim))  # [n, D]
            share = tl.exp2((slots - 1 - n).to(tl.float64) * LOG_DECAY).to(tl.float32)  # [n]; masked rows are zero
            total += tl.sum(share[:, None] * direction, 0).to(tl.float64)
            plain += tl.sum(direction, 0).to(tl.float64)
        mean = (plain / tl.maximum(tl.sqrt(tl.sum(plain * plain, 0)), 1e-12)).to(tl.float32)  # [D]
        for start in range(0, slots, BLOCK):
            n = start + tl.arange(0, BLOCK)
            direction = directions(numbers(keys, scales, 0, place * slots + n, d, n < slots, dim))  # [n, D]
            cosine = tl.sum(direction * mean[None, :], 1)  # [n]
            tl.store(tags + place * slots + n, nearest(-cosine).to(tl.bfloat16), n < slots)
    else:
        total = tl.load(totals + place * dim + d, d < dim, other=0)  # [D] float64
        for i in range(every):
            slot = (place * slots + tl.load(free + place * every + i)) + tl.zeros([1], tl.int64)
            x = tl.sum(numbers(keys, scales, 0, slot, d, slot >= 0, dim), 0).to(tl.float64)  # [D], of one key
            direction = x / tl.maximum(tl.sqrt(tl.sum(x * x, 0)), 1e-12)
            total = total * DECAY + direction
            cosine = tl.sum(direction * total, 0) / tl.maximum(tl.sqrt(tl.sum(total * total, 0)), 1e-12)
            tl.store(tags + slot, nearest((-cosine).to(tl.float32) + tl.zeros([1], tl.float32)).to(tl.bfloat16))
    tl.store(totals + place * dim + d, total, d < dim)


@triton.jit
def nearest(x):
    """The float32 next to x that bfloat16 has, ties to even: the interpreter's own conversion cuts off."""
    number = x.to(tl.int32, bitcast=True)
    number += 0x7FFF + ((number >> 16) & 1)
    return (number & -0x10000).to(tl.float32, bitcast=True)


@triton.jit
def directions(x):
    """Vectors [n, D] at length 1; zeros stay zero."""
    return x / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), 1e-12)[:, None]


@triton.jit
def evict(
    positions, flags, tags, votes, orders, free, rows, now,
    kv_heads, slots, every, window, sinks, recent, bits, width,
    RULE: tl.constexpr, FAR: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """`eviction.choose` and `LayerCache.free_`, by the same 64-bit numbers: each victim is the least above the last."""
    line = tl.program_id(0)
    at = tl.load(now + line // kv_heads).to(tl.int32)
    if (at < slots) | ((at - slots) % every != 0):
        return
    place = place_of(line, rows, kv_heads)
    orders += line.to(tl.int64) * slots
    for start in range(0, slots, BLOCK):
        n = start + tl.arange(0, BLOCK)
        slot = place * slots + n
        position = tl.load(positions + slot, n < slots, other=-1)
        flag = tl.load(flags + slot, n < slots, other=0)
        if RULE == HASH:
            p = tl.arange(0, BITS)
            vote = tl.load(votes + line * bits + p, p < bits, other=0)  # [P]
            real = (n < slots)[:, None] & (p < bits)[None, :]
            byte = tl.load(tags + slot[:, None] * width + (p // 8)[None, :], real, other=0).to(tl.int32)  # [S, P]
            score = tl.sum(tl.where((byte >> (p % 8)[None, :]) & 1 > 0, vote[None, :], -vote[None, :]), 1)  # [S]
        elif RULE == NOVELTY:
            score = tl.load(tags + slot, n < slots, other=0).to(tl.float32)
        else:
            score = position.to(tl.float32)
        number = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True)  # no -0.0
        order = number ^ ((number >> 31) & 0x7FFFFFFF)
        protected = (position < sinks) | (position >= at - recent) | ((flag & 1) > 0)
        order = tl.where(protected, LAST, order)
        order = tl.where(visible(position, flag, at, window, sinks, FAR), order, FIRST)
        age = tl.where(position == -1, n - slots, position)
        tl.store(orders + n, (order.to(tl.int64) << 32) + age.to(tl.int64), n < slots)
    tl.debug_barrier()  # what one thread wrote another one reads
    last = tl.full([], -NEVER, tl.int64)
    for i in range(every):
        least, victim = tl.full([], NEVER, tl.int64), tl.full([], 0, tl.int32)
        for start in range(0, slots, WIDE):
            n = start + tl.arange(0, WIDE)
            order = tl.load(orders + n, n < slots, other=NEVER)
            order = tl.where(order > last, order, NEVER)
            low = tl.min(order, 0)
            victim = tl.where(low < least, tl.min(tl.where(order == low, n, slots), 0), victim)
            least = tl.minimum(least, low)
        last = least
        slot = place * slots + victim
        tl.store(free + place * every + i, victim.to(tl.int64))
        tl.store(positions + slot, -1)
        if RULE == HASH:
            b = tl.arange(0, BITS // 8)
            tl.store(tags + slot * width + b, tl.zeros([BITS // 8], tl.uint8), b < width)
        elif RULE == NOVELTY:
            tl.store(tags + slot, 0.0)
