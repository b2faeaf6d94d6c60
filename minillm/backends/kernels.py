"""Evict and write: the kernel of triton.py that changes the slots.  The notation is that of kernels_attend.py."""

import triton
import triton.language as tl

from .kernels_attend import place_of, visible

FIRST, LAST = tl.constexpr(-(1 << 15)), tl.constexpr((1 << 15) - 1)  # what goes before, and after, every score
ROUND = tl.constexpr(1.5 * 2**23)  # added to a small float32 and taken away again, it rounds to even
TAGGED = tl.constexpr(32)  # tokens that are tagged, written or carried out at a time
NOBODY, AGE, HASH, NOVELTY = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)  # who chooses, by what


@triton.jit(do_not_specialize=["length", "most"])  # every prompt ends otherwise: not one to compile for each
def enter(
    judge, k, v, judge_stride, k_stride, v_stride, new_flags, keys, values, scales, positions, flags, free, rows, now,
    tags, codes, projection, probes, probe_codes, totals,
    gone_keys, gone_values, gone_scales, gone_positions, deaths, gone,
    kv_heads, slots, every, dim, judges, tokens, length, most, window, sinks, recent, bits, words, width,
    RULE: tl.constexpr, FAR: tl.constexpr, PER_HEAD: tl.constexpr, LOG_DECAY: tl.constexpr, GROUP: tl.constexpr,
    DIM: tl.constexpr, MASK: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`length` tokens of a row through one KV head, as `reference.attend_` has it but for attention: whenever no slot
    is free those tokens are tagged that came since the last time, and victims chosen; then tokens are written up to
    the next time.  Where `gone` is given, what leaves is carried out, with the position that saw it no more.
    """
    line = tl.program_id(0)
    batch, head = (line // kv_heads).to(tl.int64), line % kv_heads
    first = tl.load(now + batch * tokens).to(tl.int32)
    if first < 0:
        return
    place = place_of(line, rows, kv_heads)
    begin = place * slots  # the first slot, among those of all heads and rows
    free += place * every
    left = 0
    at, end = first, first + length
    while at < end:
        since = at - slots
        until = slots - at
        if since >= 0:
            until = every - since % every
            if (RULE != NOBODY) & (since % every == 0):
                if RULE == HASH:
                    plane = projection + head * bits * dim if PER_HEAD else projection
                    hash_keys(keys, scales, codes, plane, free, begin, since, slots, every, dim, bits, width, DIM)
                    asking = judge + batch * judge_stride + (head * judges * tokens + at - first) * dim
                    hash_judges(
                        asking, probe_codes + line * judges * width, plane, judges, tokens, dim, bits, width, GROUP, DIM
                    )
                if RULE == NOVELTY:
                    note_novelty(
                        keys, scales, tags, totals + place * dim, free, begin, since, slots, every, dim, LOG_DECAY,
                        DIM,
                    )  # fmt: skip
                tl.debug_barrier()  # what one thread wrote another one reads
                victims = choose(
                    positions, flags, tags, probes + line * judges * words, begin, at, slots, window, sinks, recent,
                    judges, words, RULE, FAR, MASK, RUNS, RUN, K,
                )  # fmt: skip
                tl.store(free + tl.arange(0, K), victims, tl.arange(0, K) < every)
                tl.debug_barrier()
                if gone is not None:
                    carry_out(
                        keys, values, scales, positions, gone_keys, gone_values, gone_scales, gone_positions, deaths,
                        free, begin, line.to(tl.int64) * most + left, at, every, dim, DIM,
                    )  # fmt: skip
                    left += every
                    tl.debug_barrier()
                slot = begin + victims
                goes = tl.arange(0, K) < every
                tl.store(positions + slot, -1, goes)
                if RULE == HASH:
                    for word in range(words):
                        tl.store(tags + slot * words + word, 0, goes)
                if RULE == NOVELTY:
                    tl.store(tags + slot, 0.0, goes)
                tl.debug_barrier()
        stop = tl.minimum(end, at + until)
        for start in range(at, stop, TAGGED):
            position = start + tl.arange(0, TAGGED)
            new = position < stop
            slot = position.to(tl.int64)
            if at >= slots:
                slot = tl.load(free + (position - slots) % every, new, other=0)
            token = position - first
            here = (head * tokens + token)[:, None] * dim  # within a row
            put(
                k + batch * k_stride + here, v + batch * v_stride + here, new_flags, keys, values, scales, positions,
                flags, begin + slot, batch * tokens + token, position, new, dim, DIM,
            )  # fmt: skip
        tl.debug_barrier()
        at = stop
    if gone is not None:
        tl.store(gone + line, left)


@triton.jit
def put(k, v, new_flags, keys, values, scales, positions, flags, slot, of_row, position, new, dim, DIM: tl.constexpr):
    """Tokens, whose numbers begin at k and v [n, 1], into slots [n], as `LayerCache.write_` says."""
    d = tl.arange(0, DIM)
    real = new[:, None] & (d < dim)[None, :]
    flag = tl.zeros_like(position)
    if new_flags is not None:
        flag = tl.load(new_flags + of_row, new, other=0).to(tl.int32)
    tl.store(positions + slot, position, new)
    tl.store(flags + slot, flag.to(tl.uint8), new)
    key = tl.load(k + d[None, :], real, other=0)  # [n, D]
    value = tl.load(v + d[None, :], real, other=0)
    if scales is not None:
        key = eight_bits(key, scales + slot * 2, new)
        value = eight_bits(value, scales + slot * 2 + 1, new)
    tl.store(keys + slot[:, None] * dim + d[None, :], key, real)
    tl.store(values + slot[:, None] * dim + d[None, :], value, real)


@triton.jit
def eight_bits(x, scale_at, mask):
    """`slots.to_int8`: the int8 of vectors [n, D], whose scales are stored."""
    x = x.to(tl.float32)
    least = tl.max(tl.abs(x), 1)  # [n]
    scale = tl.math.div_rn(tl.maximum(least, 1.1754943508222875e-38 * 127), tl.full(least.shape, 127.0, tl.float32))
    tl.store(scale_at, scale, mask)
    return (tl.math.div_rn(x, scale[:, None] + tl.zeros_like(x)) + ROUND - ROUND).to(tl.int8)


@triton.jit
def carry_out(
    keys, values, scales, positions, gone_keys, gone_values, gone_scales, gone_positions, deaths, free, begin, out, at,
    every, dim, DIM: tl.constexpr,
):  # fmt: skip
    """Copy what leaves at position `at`, in the order of `free`, to `out` and what follows."""
    d = tl.arange(0, DIM)
    for start in range(0, every, TAGGED):
        n = start + tl.arange(0, TAGGED)
        goes = n < every
        slot, to = begin + tl.load(free + n, goes, other=0), out + n
        tl.store(gone_positions + to, tl.load(positions + slot, goes, other=-1), goes)
        tl.store(deaths + to, at + tl.zeros_like(n), goes)
        source, target = slot[:, None] * dim + d[None, :], to[:, None] * dim + d[None, :]  # [n, D]
        real = goes[:, None] & (d < dim)[None, :]
        tl.store(gone_keys + target, tl.load(keys + source, real, other=0), real)
        tl.store(gone_values + target, tl.load(values + source, real, other=0), real)
        if scales is not None:
            tl.store(gone_scales + to * 2, tl.load(scales + slot * 2, goes, other=0), goes)
            tl.store(gone_scales + to * 2 + 1, tl.load(scales + slot * 2 + 1, goes, other=0), goes)


@triton.jit
def choose(
    positions, flags, tags, probes, begin, at, slots, window, sinks, recent, judges, words,
    RULE: tl.constexpr, FAR: tl.constexpr, MASK: tl.constexpr, RUNS: tl.constexpr, RUN: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """`eviction.choose`: the K slots that go first, in order: [K].

    Sorting is what costs, so most slots are only compared: a run of RUN slots is as good as its best, and who goes is
    in one of the K best runs.
    """
    best = tl.full([K], -(2**63), tl.int64)
    in_run = tl.arange(0, RUN)[None, :]
    for start in range(0, slots, RUNS * RUN):
        n = start + tl.arange(0, RUNS)[:, None] * RUN + in_run  # [RUNS, RUN]
        place = place_in_line(
            positions, flags, tags, probes, n, begin, at, slots, window, sinks, recent, judges, words, RULE, FAR, MASK
        )
        best = tl.topk(tl.cat(best, tl.topk(~tl.min(place, 1), K), can_reorder=True), K)  # [K], the least first
    n = (~best & 0xFFFF).to(tl.int32)[:, None] // RUN * RUN + in_run  # [K, RUN]
    place = place_in_line(
        positions, flags, tags, probes, n, begin, at, slots, window, sinks, recent, judges, words, RULE, FAR, MASK
    )
    return ~tl.topk(~tl.reshape(place, [K * RUN]), K) & 0xFFFF


@triton.jit
def place_in_line(
    positions, flags, tags, probes, n, begin, at, slots, window, sinks, recent, judges, words,
    RULE: tl.constexpr, FAR: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One integer for each slot n, the least of whom goes first: 16 bits of score (codes and bfloat16 have no more), 32
    of age and, as no two ages are equal, the slot itself in the rest.
    """
    slot = begin + n
    position = tl.load(positions + slot, n < slots, other=-1)
    flag = tl.load(flags + slot, n < slots, other=0)
    order = tl.zeros_like(position)  # age alone
    if RULE == HASH:
        for word in range(words):
            code = tl.load(tags + slot * words + word, n < slots, other=0).to(tl.int64)
            for g in range(judges):
                probe = tl.load(probes + g * words + word).to(tl.int64)
                order -= ones_of((code ^ probe) & MASK)  # minus the Hamming distance
    if RULE == NOVELTY:
        score = tl.load(tags + slot, n < slots, other=0).to(tl.float32)
        number = tl.where(score == 0, 0.0, score).to(tl.int32, bitcast=True) >> 16  # no -0.0
        order = number ^ ((number >> 15) & 0x7FFF)
    protected = (position < sinks) | (position >= at - recent) | ((flag & 1) > 0)
    order = tl.where(protected, LAST, order)
    order = tl.where(visible(position, flag, at, window, sinks, FAR), order, FIRST)
    age = tl.where(position == -1, n, position.to(tl.int64) + slots)  # empty ones before all others
    return tl.where(n < slots, (order.to(tl.int64) << 48) + (age << 16) + n, 2**63 - 1)


@triton.jit
def ones_of(x):
    """Bits of int64 that are 1, see `lsh.popcount`."""
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((x * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def hash_keys(keys, scales, codes, plane, free, begin, since, slots, every, dim, bits, width, DIM: tl.constexpr):
    """Codes of the first S tokens, or of those since the last time."""
    d = tl.arange(0, DIM)
    new = tl.where(since == 0, slots, every)
    for start in range(0, new, TAGGED):
        n = start + tl.arange(0, TAGGED)
        slot = n.to(tl.int64)
        if since > 0:
            slot = tl.load(free + n, n < new, other=0)
        slot = begin + slot
        key = numbers(keys, scales, slot, d, n < new, dim)  # [n, D]
        put_codes(key, codes + slot * width, n < new, plane, dim, bits, width, TAGGED, DIM)


@triton.jit
def hash_judges(judge, codes, plane, judges, tokens, dim, bits, width, GROUP: tl.constexpr, DIM: tl.constexpr):
    """Codes of the incoming token's queries, or of its key."""
    g, d = tl.arange(0, GROUP), tl.arange(0, DIM)
    real = (g < judges)[:, None] & (d < dim)[None, :]
    x = tl.load(judge + g[:, None] * tokens * dim + d[None, :], real, other=0).to(tl.float32)  # [G, D]
    put_codes(x, codes + g * width, g < judges, plane, dim, bits, width, GROUP, DIM)


@triton.jit
def put_codes(x, to, mask, plane, dim, bits, width, N: tl.constexpr, DIM: tl.constexpr):
    """On which sides of hyperplanes vectors x [N, D] lie, as bytes at `to` [N]: bit p is bit p % 8 of byte p // 8."""
    d = tl.arange(0, DIM)
    for first in range(0, bits, 16):
        p, b = first + tl.arange(0, 16), first // 8 + tl.arange(0, 2)
        real = (d < dim)[:, None] & (p < bits)[None, :]
        planes = tl.load(plane + p[None, :] * dim + d[:, None], real, other=0)  # [D, 16]
        one = (tl.dot(x, planes, input_precision="ieee") >= 0) & (p < bits)[None, :]  # [N, 16]
        pair = tl.reshape(one.to(tl.int32), [N, 2, 8]) << tl.arange(0, 8)[None, None, :]
        tl.store(to[:, None] + b[None, :], tl.sum(pair, 2).to(tl.uint8), mask[:, None] & (b < width)[None, :])


@triton.jit
def note_novelty(
    keys, scales, tags, totals, free, begin, since, slots, every, dim,
    LOG_DECAY: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """What `hashevict-plus` keeps: see policies/hashevict_plus.py, `settle_` and `tag_`."""
    d = tl.arange(0, DIM)
    if since == 0:
        total, plain = tl.zeros([DIM], tl.float64), tl.zeros([DIM], tl.float64)
        for start in range(0, slots, TAGGED):
            n = start + tl.arange(0, TAGGED)
            direction = directions(numbers(keys, scales, begin + n, d, n < slots, dim))  # [n, D]
            share = tl.exp2((slots - 1 - n).to(tl.float64) * LOG_DECAY).to(tl.float32)  # [n]; masked rows are zero
            total += tl.sum(share[:, None] * direction, 0).to(tl.float64)
            plain += tl.sum(direction, 0).to(tl.float64)
        mean = (plain / tl.maximum(tl.sqrt(tl.sum(plain * plain, 0)), 1e-12)).to(tl.float32)  # [D]
        for start in range(0, slots, TAGGED):
            n = start + tl.arange(0, TAGGED)
            direction = directions(numbers(keys, scales, begin + n, d, n < slots, dim))  # [n, D]
            cosine = tl.sum(direction * mean[None, :], 1)  # [n]
            tl.store(tags + begin + n, nearest(-cosine).to(tl.bfloat16), n < slots)
        tl.store(totals + d, total, d < dim)
    else:
        total = tl.load(totals + d, d < dim, other=0)  # [D] float64
        for start in range(0, every, TAGGED):
            i = tl.arange(0, TAGGED)
            new = start + i < every
            slot = begin + tl.load(free + start + i, new, other=0)
            key = numbers(keys, scales, slot, d, new, dim).to(tl.float64)  # [n, D]
            power = tl.exp2((i + 1).to(tl.float64) * LOG_DECAY)  # [n]
            # Directions and sums before they fade, so that no matrix is divided: at position i they are times power[i].
            direction = key * (1 / (tl.maximum(tl.sqrt(tl.sum(key * key, 1)), 1e-12) * power))[:, None]  # [n, D]
            sums = tl.cumsum(direction, 0) + total[None, :]  # [n, D]
            length = power * tl.sqrt(tl.sum(sums * sums, 1))  # [n]
            cosine = power * power * tl.sum(direction * sums, 1) / tl.maximum(length, 1e-12)  # [n]
            tl.store(tags + slot, nearest((-cosine).to(tl.float32)).to(tl.bfloat16), new)
            count = tl.minimum(every - start, TAGGED).to(tl.float64)
            total = (total + tl.sum(direction, 0)) * tl.exp2(count * LOG_DECAY)
        tl.store(totals + d, total, d < dim)


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
def numbers(keys, scales, slot, d, mask, dim):
    """Keys as float32: [n, D]."""
    x = tl.load(keys + slot[:, None] * dim + d[None, :], mask[:, None] & (d < dim)[None, :], other=0).to(tl.float32)
    if scales is not None:
        x = x * tl.load(scales + slot * 2, mask, other=0)[:, None]
    return x
