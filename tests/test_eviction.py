"""Who is evicted: the policies against a naive oracle, protection, ties, and the retention defaults."""

from __future__ import annotations

import random

import pytest
import torch

from minillm import lsh
from minillm.backends.reference import attend_
from minillm.cache import KVCache, LayerCache
from minillm.errors import BudgetError, ConfigError
from minillm.eviction import PINNED, Retention, choose
from minillm.policies import POLICIES, make_policy

from .helpers import tiny_config
from .oracle import NaiveHead

EVICTING = [name for name, policy in POLICIES.items() if policy.evicts]


@pytest.mark.parametrize("case", range(200))
def test_kept_positions_and_outputs_agree_with_the_naive_oracle(case: int) -> None:
    """Random layers, layouts and chunkings, several wraps deep: every kept position and every output, in float64."""
    dice = random.Random(case)
    torch.manual_seed(case)
    policy_name = dice.choice(["window", "hashevict", "hashevict-key"])
    kv_heads, group, dim = dice.choice([1, 2]), dice.choice([1, 2, 3]), dice.choice([4, 8])
    slots = dice.randint(1, 16)
    every = dice.randint(1, max(1, slots // 2))
    sinks = dice.randint(0, (slots - every) // 2)
    recent = dice.randint(0, slots - every - sinks)
    window = dice.choice([None, None, slots + 7, max(1, slots // 2)])
    bits, seed = dice.choice([4, 16, 24, 64]), dice.randint(0, 9)
    config = tiny_config(
        num_hidden_layers=1,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=dim,
        sliding_windows=(window,),
    )
    options = {} if policy_name == "window" else {"hash_bits": bits, "policy_seed": seed}
    retention = Retention.of(slots, sinks=sinks, recent=recent, evict_every=every)
    cache = KVCache(config, make_policy(policy_name, **options), retention, dtype=torch.float64)

    length = dice.randint(1, 5 * slots + 3)
    q = torch.randn(1, kv_heads * group, length, dim, dtype=torch.float64)
    k, v = torch.randn(2, 1, kv_heads, length, dim, dtype=torch.float64)
    outputs, at = [], 0
    while at < length:
        n = min(length - at, dice.choice([1, 2, 7, 100]))
        piece = slice(at, at + n)
        outputs.append(attend_(cache.layers[0], q[:, :, piece], k[:, :, piece], v[:, :, piece], cache.append(n)))
        at += n
    output = torch.cat(outputs, 2)

    rows = lsh.projection(bits, dim, seed=seed, layer=0)[0]
    for head in range(kv_heads):
        oracle = NaiveHead(policy_name, slots, sinks, recent, every, window, rows)
        for t in range(length):
            queries = q[0, head * group : (head + 1) * group, t]
            expected = oracle.step(t, queries, k[0, head, t], v[0, head, t])
            torch.testing.assert_close(output[0, head * group : (head + 1) * group, t], expected, rtol=0, atol=1e-12)
        kept = sorted(p for p in cache.layers[0].positions[0, head].tolist() if p >= 0)
        assert kept == sorted(entry.position for entry in oracle.live)


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("slots", [1, 2, 8, 33])
def test_cap_sinks_and_recent_hold_at_every_token(policy: str, slots: int) -> None:
    config = tiny_config(num_hidden_layers=1)
    cache = KVCache(config, make_policy(policy), Retention.of(slots))
    layer, retention = cache.layers[0], cache.retentions[0]
    for now in range(6 * slots + 5):
        q, kv = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 1, 8)
        attend_(layer, q, kv, kv, cache.append(1))
        for head in layer.positions[0].tolist():
            live = {p for p in head if p >= 0}
            assert len(live) <= slots
            assert len([p for p in head if p >= 0]) == len(live), "a token sits in two slots"
            assert now in live
            assert set(range(min(retention.sinks, now + 1))) <= live
            assert set(range(max(0, now - retention.recent + 1), now + 1)) <= live
            assert len(live) == now + 1 or len(live) > slots - retention.evict_every


def _layer(positions: list[int], retention: Retention, window: int | None = None) -> LayerCache:
    """One KV head whose slots hold tokens at these positions."""
    config = tiny_config(
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, sliding_windows=(window,)
    )
    layer = KVCache(config, make_policy("window"), retention).layers[0]
    layer.positions.copy_(torch.tensor(positions))
    return layer


def test_choice_order_empty_then_unseen_then_lowest_score_then_oldest() -> None:
    positions = [0, 9, 3, -1, 7, 5, 6, 1]
    score = torch.tensor([[[-9.0, 5.0, -1.0, 99.0, -1.0, 2.0, -0.0, 0.0]]])
    retention = Retention(slots=8, sinks=1, recent=1, evict_every=5)
    now = torch.tensor([10])
    # empty slot 3; then -1.0 at positions 3 and 7; then +-0.0 at positions 1 and 6.  Position 0 is a sink, 9 is recent.
    assert choose(score, _layer(positions, retention), now).tolist() == [[[3, 2, 4, 7, 6]]]
    # with a window of 7, positions <= 3 are seen by nobody: they go next, oldest first, the sink included
    assert choose(score, _layer(positions, retention, window=7), now).tolist() == [[[3, 0, 7, 2, 4]]]
    # pinned tokens are protected like sinks: position 3 (slot 2) stays, and 5 (slot 5) goes in its place
    pinned = _layer(positions, retention)
    pinned.flags[0, 0, 2] = PINNED
    assert choose(score, pinned, now).tolist() == [[[3, 4, 7, 6, 5]]]


@pytest.mark.parametrize("scores", [[-3.5, -0.25, 0.0, 1e-30, 2.0, 3e30], [-3e30, -2.0, -1e-38, 0.0, 0.5, 4.0]])
def test_choice_sorts_floats_of_any_sign_and_size(scores: list[float]) -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    score = torch.tensor(scores)[order][None, None]
    picked = choose(score, _layer(list(range(6)), Retention(6, 0, 0, 6)), torch.tensor([6]))[0, 0]
    assert torch.equal(score[0, 0, picked], torch.tensor(scores))


def test_rows_in_different_phases_evict_as_if_alone() -> None:
    """Three rows, 3 tokens apart, decoded together: each keeps what it keeps alone."""
    config = tiny_config(num_hidden_layers=1)
    torch.manual_seed(0)
    q, kv = torch.randn(3, 4, 60, 8, dtype=torch.float64), torch.randn(2, 3, 2, 60, 8, dtype=torch.float64)
    retention = Retention.of(16, evict_every=4)
    lead = [0, 3, 6]

    together = KVCache(config, make_policy("hashevict"), retention, rows=3, dtype=torch.float64)
    alone = [KVCache(config, make_policy("hashevict"), retention, dtype=torch.float64) for _ in lead]
    outputs: list[list[torch.Tensor]] = [[], [], []]
    for row, ahead in enumerate(lead):  # row by row until they are `lead` tokens apart
        for t in range(ahead):
            span = alone[row].append(1)
            attend_(
                alone[row].layers[0],
                q[row, None, :, t, None],
                kv[0, row, None, :, t, None],
                kv[1, row, None, :, t, None],
                span,
            )
        for name, tensor in alone[row].layers[0].tensors().items():
            if name != "projection":
                together.layers[0].tensors()[name][row] = tensor[0]
        together.seen[row] = ahead
    for step in range(50):
        now = [ahead + step for ahead in lead]
        pick = torch.arange(3)
        at = torch.tensor(now)
        joint = attend_(
            together.layers[0],
            q[pick, :, at].unsqueeze(2),
            kv[0][pick, :, at].unsqueeze(2),
            kv[1][pick, :, at].unsqueeze(2),
            together.append(1),
        )
        for row, t in enumerate(now):
            single = attend_(
                alone[row].layers[0],
                q[row, None, :, t, None],
                kv[0, row, None, :, t, None],
                kv[1, row, None, :, t, None],
                alone[row].append(1),
            )
            outputs[row].append(joint[row] - single[0])
    assert max(float(torch.stack(difference).abs().max()) for difference in outputs) < 1e-12
    for row in range(3):
        assert torch.equal(together.layers[0].positions[row], alone[row].layers[0].positions[0])


def _evicted_by(policy: str, queries: torch.Tensor, keys: torch.Tensor, **options: int) -> list[int]:
    """Fill a cache with keys [n, D] (one KV head), then show one more token with queries [G, D]: who goes."""
    n, dim = keys.shape
    group = queries.shape[0]
    config = tiny_config(num_hidden_layers=1, num_attention_heads=group, num_key_value_heads=1, head_dim=dim)
    cache = KVCache(
        config, make_policy(policy, **options), Retention.of(n, sinks=0, recent=0, evict_every=1), dtype=keys.dtype
    )
    layer = cache.layers[0]
    q = torch.zeros(1, group, n, dim, dtype=keys.dtype)
    attend_(layer, q, keys[None, None], keys[None, None], cache.append(n))
    newest = torch.ones(1, 1, 1, dim, dtype=keys.dtype)
    attend_(layer, queries[None, :, None], newest, newest, cache.append(1))
    return sorted(set(range(n)) - set(layer.positions[0, 0].tolist()))


def test_hashevict_depends_on_the_query() -> None:
    """The authors' code compares keys with keys, so it would evict the same token whatever is asked."""
    torch.manual_seed(0)
    keys = torch.randn(32, 16)
    gone = {tuple(_evicted_by("hashevict", torch.randn(1, 16), keys, hash_bits=64)) for _ in range(20)}
    assert len(gone) > 5
    same = {tuple(_evicted_by("hashevict-key", torch.randn(1, 16), keys, hash_bits=64)) for _ in range(20)}
    assert len(same) == 1


def test_order_of_the_query_group_does_not_matter() -> None:
    torch.manual_seed(0)
    keys, queries = torch.randn(32, 16), torch.randn(4, 16)
    expected = _evicted_by("hashevict", queries, keys)
    for _ in range(5):
        assert _evicted_by("hashevict", queries[torch.randperm(4)], keys) == expected


def test_choices_converge_to_cosine_with_more_bits() -> None:
    """Mean percentile of the evicted key's true cosine: falls towards 0, the key that points away the most."""
    torch.manual_seed(0)
    percentile = {}
    for bits in (16, 128, 1024):
        ranks = []
        for trial in range(40):
            keys, query = torch.randn(64, 16), torch.randn(1, 16)
            cosine = torch.nn.functional.cosine_similarity(keys, query)
            (gone,) = _evicted_by("hashevict", query, keys, hash_bits=bits, policy_seed=trial)
            ranks.append(float((cosine < cosine[gone]).float().mean()))
        percentile[bits] = sum(ranks) / len(ranks)
    print({bits: f"{100 * share:.1f}" for bits, share in percentile.items()}, "(50 = random)")
    assert percentile[16] > percentile[128] > percentile[1024]
    assert percentile[1024] < 0.03


@pytest.mark.parametrize("slots", [*range(1, 70), 128, 500, 4096])
def test_default_retention_always_fits(slots: int) -> None:
    retention = Retention.of(slots)
    assert retention.sinks + retention.recent + retention.evict_every <= slots
    assert retention.sinks == min(4, slots // 16)
    assert retention.recent == slots // 4
    assert retention.evict_every == max(1, min(32, slots // 16))


def test_explicit_retention_is_kept_and_defaults_make_room() -> None:
    assert Retention.of(8, sinks=6) == Retention(8, sinks=6, recent=1, evict_every=1)
    assert Retention.of(64, recent=63) == Retention(64, sinks=0, recent=63, evict_every=1)
    assert Retention.of(64, evict_every=64) == Retention(64, sinks=0, recent=0, evict_every=64)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sinks": 5, "recent": 3, "evict_every": 1}, "do not fit into 8 slots"),
        ({"sinks": 8}, "do not fit into 8 slots"),
        ({"evict_every": 9}, "do not fit into 8 slots"),
        ({"evict_every": 0}, "--evict-every must be at least 1"),
        ({"sinks": -1}, "--sinks must be at least 0"),
    ],
)
def test_explicit_retention_that_does_not_fit(options: dict[str, int], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        Retention.of(8, **options)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("hashevikt", {}, "unknown policy 'hashevikt'; choose one of full, window, hashevict, hashevict-key"),
        ("window", {"hash_bits": 16}, "policy 'window' has no option hash_bits; it has none"),
        ("hashevict", {"hash_bits": 0}, "--hash-bits must lie in 1..1024, not 0"),
    ],
)
def test_policies_that_cannot_be(name: str, options: dict[str, int], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_policy(name, **options)
