"""What every policy owes, for each entry of one list: the cap, protection, ties, the rule itself, and its state."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from minillm.backends.reference import attend_
from minillm.cache import KVCache, cache_bytes
from minillm.eviction import TAGGED_TOGETHER, Retention
from minillm.model import Transformer
from minillm.policies import POLICIES
from minillm.policies.l2 import L2
from minillm.slots import PINNED, PUNCTUATION, SPECIAL, LayerCache

from .every_policy import EVERY_POLICY, Entry
from .helpers import kept_positions, run, tiny_config, tiny_model
from .oracle import NaiveLayer

each_policy = pytest.mark.parametrize("entry", EVERY_POLICY.values(), ids=EVERY_POLICY)
AT_PLACE = {"window", "random", "snapkv", "fastgen"}  # their scores depend on where a token stands: no two are equal


def test_every_policy_is_on_the_list() -> None:
    assert {entry.name for entry in EVERY_POLICY.values()} == {p.name for p in POLICIES.values() if p.evicts}


def _kept(layer: LayerCache) -> list[list[int]]:
    return [sorted(p for p in head if p >= 0) for head in layer.positions[0].tolist()]


def _random_flags(dice: random.Random, length: int, pins: int) -> Tensor:
    """[1, length] uint8: some tokens are special or punctuation, at most `pins` are pinned."""
    flags = [dice.choice([0, 0, 0, SPECIAL, PUNCTUATION]) for _ in range(length)]
    for position in dice.sample(range(length), min(length, pins)):
        flags[position] |= PINNED
    return torch.tensor([flags], dtype=torch.uint8)


@each_policy
@pytest.mark.parametrize("case", range(10))
def test_kept_positions_and_outputs_agree_with_the_naive_oracle(entry: Entry, case: int) -> None:
    """Random layers, layouts, flags and chunkings, several wraps deep: kept positions and outputs, in float64."""
    dice = random.Random(f"{entry.name} {entry.options} {case}")
    torch.manual_seed(dice.getrandbits(32))
    kv_heads, group, dim, index = dice.choice([1, 2]), dice.choice([1, 2, 3]), dice.choice([4, 8]), dice.choice([0, 1])
    slots = dice.randint(1, 16)
    every = dice.randint(1, max(1, slots // 2))
    sinks = dice.randint(0, (slots - every) // 2)
    recent = dice.randint(0, slots - every - sinks)
    window = dice.choice([None, None, slots + 7, max(1, slots // 2)])
    retention = Retention.of(slots, sinks=sinks, recent=recent, evict_every=every)
    oracle = NaiveLayer(entry.policy, retention, kv_heads, group, window, index)
    _agree(oracle, dice, dim, length=dice.randint(slots, 5 * slots + 3), pins=dice.randint(0, retention.room_for_pins))


def test_scissorhands_forgets_what_is_longer_ago_than_its_history() -> None:
    """More steps than the history has bits, so that bits are written over."""
    oracle = NaiveLayer(EVERY_POLICY["scissorhands of 64"].policy, Retention.of(24, recent=2), kv_heads=1, group=1)
    torch.manual_seed(0)
    _agree(oracle, random.Random(0), 4, length=220, pins=0)


def _agree(oracle: NaiveLayer, dice: random.Random, dim: int, *, length: int, pins: int) -> None:
    """Run `length` random tokens through a layer, in random pieces, and through its oracle."""
    kv_heads, group = oracle.kv_heads, oracle.group
    config = tiny_config(
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        sliding_windows=(oracle.window,) * 2,
    )
    cache = KVCache(config, oracle.policy, oracle.retention, dtype=torch.float64)
    layer = cache.layers[oracle.index]
    q = torch.randn(1, kv_heads * group, length, dim, dtype=torch.float64)
    q[..., 0] += 2 * (torch.arange(length) / 20).sin()  # what is asked for changes slowly
    k, v = torch.randn(2, 1, kv_heads, length, dim, dtype=torch.float64)
    flags = _random_flags(dice, length, pins)
    sizes, at = dice.choice([[1], [1, 2, 7, 100]]), 0
    while at < length:
        n = min(length - at, dice.choice(sizes))
        piece = slice(at, at + n)
        span = cache.append(n, flags=flags[:, piece])
        output = attend_(layer, q[:, :, piece], k[:, :, piece], v[:, :, piece], span)  # [1, H, n, D]
        for t in range(at, at + n):
            tensors = (tensor[0, :, t].tolist() for tensor in (q, k, v))
            expected = torch.tensor(oracle.step(*tensors, int(flags[0, t])), dtype=torch.float64)  # [H, D]
            torch.testing.assert_close(output[0, :, t - at], expected, rtol=0, atol=1e-12)
        assert _kept(layer) == oracle.live
        at += n


@each_policy
@pytest.mark.parametrize("slots", [1, 2, 8, 33])
def test_cap_sinks_recent_and_pins_hold_at_every_token(entry: Entry, slots: int) -> None:
    cache = KVCache(tiny_config(num_hidden_layers=1), entry.policy, Retention.of(slots))
    layer, retention = cache.layers[0], cache.retentions[0]
    torch.manual_seed(slots)
    length = 6 * slots + 5
    flags = _random_flags(random.Random(slots), length, retention.room_for_pins)
    pinned = {t for t in range(length) if flags[0, t] & PINNED}
    for now in range(length):
        q, kv = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
        attend_(layer, q, kv, kv, cache.append(1, flags=flags[:, now : now + 1]))
        for head in layer.positions[0].tolist():
            live = {p for p in head if p >= 0}
            assert len([p for p in head if p >= 0]) == len(live), "a token sits in two slots"
            assert set(range(min(retention.sinks, now + 1))) <= live
            assert set(range(max(0, now - retention.recent + 1), now + 1)) <= live
            assert {p for p in pinned if p <= now} <= live
            assert now + 1 == len(live) or slots >= len(live) > slots - retention.evict_every


def _due(entry: Entry, retention: Retention) -> tuple[KVCache, Tensor]:
    """A cache three wraps deep whose slots are full, in no order of age; and what to show it next: [1, Hkv, 1, D]."""
    config = tiny_config(num_hidden_layers=1, num_attention_heads=2)
    cache = KVCache(config, entry.policy, retention, dtype=torch.float64)
    torch.manual_seed(1)
    for _ in range(3 * retention.slots):
        x = torch.randn(1, 2, 1, 8, dtype=torch.float64)
        attend_(cache.layers[0], x, x, x, cache.append(1))
    return cache, x


@pytest.mark.parametrize(
    "entry", [pytest.param(e, id=name) for name, e in EVERY_POLICY.items() if e.name not in AT_PLACE]
)
def test_ties_go_to_the_oldest(entry: Entry) -> None:
    """All tokens have the same key and the same past; those that are still to be tagged are protected."""
    cache, x = _due(entry, Retention(slots=12, sinks=1, recent=3, evict_every=3))
    layer = cache.layers[0]
    for name in ("keys", *layer.slot_state):
        layer.tensors()[name].copy_(layer.tensors()[name][:, :, :1].clone())
    before = _kept(layer)
    attend_(layer, x, x, x, cache.append(1))
    for head, kept in zip(before, _kept(layer), strict=True):
        assert kept == [0, *head[4:], 36]


def test_what_is_pooled_over_the_same_neighbours_is_a_tie() -> None:
    """`snapkv` with few slots: every token's neighbourhood is all of them, so it becomes the window."""
    retention = Retention(slots=3, sinks=0, recent=0, evict_every=1)
    cache, x = _due(EVERY_POLICY["snapkv"], retention)
    for now in range(9, 30):
        assert _kept(cache.layers[0]) == [[now - 3, now - 2, now - 1]] * 2
        x = torch.randn_like(x)
        attend_(cache.layers[0], x, x, x, cache.append(1))


@each_policy
def test_empty_slots_are_filled_first(entry: Entry) -> None:
    """Two slots fall empty: they are used next, whatever the score of their remains, before anything is evicted."""
    cache, x = _due(entry, Retention(slots=12, sinks=1, recent=2, evict_every=3))
    layer = cache.layers[0]
    layer.positions[:, :, [7, 4]] = -1
    before = [set(head) for head in _kept(layer)]
    attend_(layer, x, x, x, cache.append(1))
    for head, kept in zip(before, _kept(layer), strict=True):
        assert len(head - set(kept)) == 1
    assert layer.free[0, :, :2].tolist() == [[4, 7]] * 2


@dataclass(frozen=True)
class Recorder(L2):
    """Notes the first number of every key that it tags, row by row, and from which eviction on it knows it."""

    rows: list[list[float]] = field(default_factory=lambda: [[], []])

    def tag_(self, layer: LayerCache, keys: Tensor, due: Tensor) -> dict[str, Tensor]:
        assert keys.shape[2] <= TAGGED_TOGETHER
        for row in due.nonzero()[:, 0].tolist():
            self.rows[row] += keys[row, 0, :, 0].tolist()
        return super().tag_(layer, keys, due)


@pytest.mark.parametrize("retention", [Retention(16, 1, 0, 1), Retention(16, 1, 0, 5), Retention(600, 1, 9, 300)])
def test_tokens_are_tagged_in_order_at_the_next_eviction_and_not_before(retention: Retention) -> None:
    """Two rows, two tokens apart.  What is kept for a slot that is empty, or whose token is not tagged yet, is 0."""
    policy, slots, every = Recorder(), retention.slots, retention.evict_every
    cache = KVCache(tiny_config(num_hidden_layers=1), policy, retention, rows=2, dtype=torch.float64)
    layer, lead = cache.layers[0], 2
    cache.seen = [0, lead]
    layer.positions[1, :, :lead], layer.keys[1, :, :lead, 0] = torch.arange(lead, dtype=torch.int32), 7
    dice = random.Random(0)
    while cache.seen[0] < 3 * slots:
        span = cache.append(dice.choice([1, 2, 7, 64]))
        k = 1 + torch.rand(2, 2, span.length, 8, dtype=torch.float64)
        k[..., 0] = span.positions[:, None]  # [B, 1, n]
        attend_(layer, torch.ones(2, 4, span.length, 8, dtype=torch.float64), k, k, span)
        for row, seen in enumerate(cache.seen):
            last = seen - 1  # no token after it has asked for a slot
            tagged = 0 if last < slots else last - (last - slots) % every
            first = [7.0] * lead if row else [0.0, 1.0]
            assert policy.rows[row] == [*first, *range(lead, tagged)][:tagged]
            known = (layer.positions[row] >= 0) & (layer.positions[row] < tagged)  # [Hkv, S]
            assert torch.equal(layer.state["norms"][row] > 0, known)


SLOTS, EVERY = 40, 3


def _model_cache(model: Transformer, entry: Entry) -> KVCache:
    return KVCache(
        model.config,
        entry.policy,
        Retention.of(SLOTS, evict_every=EVERY),
        dtype=model.model.embed_tokens.weight.dtype,
    )


@each_policy
def test_result_does_not_depend_on_how_the_input_is_cut(entry: Entry) -> None:
    model = tiny_model(dtype=torch.float64)
    tokens = torch.randint(97, (1, 260), generator=torch.Generator().manual_seed(0))
    runs = []
    for chunk in (1, 7, 260):
        cache = _model_cache(model, entry)
        runs.append((run(model, cache, tokens, chunk), kept_positions(cache)))
    for logits, kept in runs[1:]:
        assert kept == runs[0][1]
        torch.testing.assert_close(logits, runs[0][0], rtol=0, atol=1e-12)


@each_policy
def test_bytes_are_as_declared_and_tensors_never_move(entry: Entry) -> None:
    model = tiny_model()
    cache = _model_cache(model, entry)
    parts = cache_bytes(model.config, cache.policy, cache.retentions, dtype=torch.float32)
    assert cache.nbytes == sum(parts.values())
    layers, heads = 2, 2
    assert sum(parts[name] for name in cache.layers[0].slot_state) == entry.slot_bytes * SLOTS * layers * heads

    def addresses() -> list[tuple[str, int, int]]:
        return [(name, t.data_ptr(), t.nbytes) for layer in cache.layers for name, t in layer.tensors().items()]

    before = addresses()
    run(model, cache, torch.randint(97, (1, 3 * SLOTS)), 7)
    cache.reset()
    run(model, cache, torch.randint(97, (1, 2 * SLOTS)), 64)
    assert addresses() == before


@each_policy
@pytest.mark.parametrize("kept_until", [SLOTS - 9, 2 * SLOTS + 6])
def test_a_copy_of_the_tensors_continues_bit_for_bit(entry: Entry, kept_until: int) -> None:
    """Before anything was evicted, and in the middle of an eviction period; what is fixed need not be copied."""
    model = tiny_model()
    tokens = torch.randint(97, (1, 4 * SLOTS), generator=torch.Generator().manual_seed(1))
    first, second = _model_cache(model, entry), _model_cache(model, entry)
    assert not first.layers[0].is_due(kept_until)
    run(model, first, tokens[:, :kept_until], 16)
    for old, new in zip(first.layers, second.layers, strict=True):
        for name in old.tensors().keys() - first.fixed:
            new.tensors()[name].copy_(old.tensors()[name])
    second.seen = list(first.seen)
    expected, got = (run(model, cache, tokens[:, kept_until:], 16) for cache in (first, second))
    assert torch.equal(got, expected)
    assert kept_positions(first) == kept_positions(second)


@each_policy
def test_rows_in_different_phases_keep_what_they_keep_alone(entry: Entry) -> None:
    """Three rows, 3 tokens apart, decoded together, each with its own flags, in 8 bits."""
    config = tiny_config(num_hidden_layers=1)
    torch.manual_seed(0)
    q = torch.randn(3, 4, 60, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, 2, 60, 8, dtype=torch.float64)
    retention, lead = Retention.of(16, evict_every=4), [0, 3, 6]
    flags = torch.cat([_random_flags(random.Random(row), 60, 2) for row in range(3)])  # [3, 60]

    def show(cache: KVCache, rows: list[int], at: list[int]) -> Tensor:
        """The tokens at `at` of the rows `rows`."""
        span = cache.append(1, flags=flags[rows, at][:, None])
        return attend_(cache.layers[0], *(x[rows, :, at].unsqueeze(2) for x in (q, k, v)), span)

    together = KVCache(config, entry.policy, retention, rows=3, dtype=torch.float64, int8=True)
    alone = [KVCache(config, entry.policy, retention, dtype=torch.float64, int8=True) for _ in lead]
    for row, ahead in enumerate(lead):  # row by row until they are `lead` tokens apart
        for t in range(ahead):
            show(alone[row], [row], [t])
        for name in alone[row].layers[0].tensors().keys() - together.fixed:
            together.layers[0].tensors()[name][row] = alone[row].layers[0].tensors()[name][0]
        together.seen[row] = ahead
    for step in range(50):
        now = [ahead + step for ahead in lead]
        joint = show(together, [0, 1, 2], now)
        single = torch.cat([show(alone[row], [row], [t]) for row, t in enumerate(now)])
        torch.testing.assert_close(joint, single, rtol=0, atol=1e-12)
        for row in range(3) if step % 16 == 1 else ():
            for name in alone[row].layers[0].tensors().keys() - together.fixed:
                mine, theirs = alone[row].layers[0].tensors()[name][0], together.layers[0].tensors()[name][row]
                torch.testing.assert_close(
                    theirs, mine, rtol=0, atol=1e-5, msg=f"{name} of row {row} after {step} steps"
                )
