"""Who is evicted: protection and ties where the choice is made, HashEvict's rule, and the retention defaults."""

from __future__ import annotations

import pytest
import torch

from minillm.backends.reference import attend_
from minillm.cache import KVCache
from minillm.errors import BudgetError, ConfigError
from minillm.eviction import Retention, choose
from minillm.policies import make_policy
from minillm.slots import PINNED, LayerCache

from .helpers import tiny_config


def _layer(positions: list[int], retention: Retention, window: int | None = None) -> LayerCache:
    """One KV head whose slots hold tokens at these positions."""
    config = tiny_config(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, sliding_windows=(window,))
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
    pinned.flags[0, 0, 2], pinned.flagged = PINNED, True
    assert choose(score, pinned, now).tolist() == [[[3, 4, 7, 6, 5]]]


@pytest.mark.parametrize("scores", [[-3.5, -0.25, 0.0, 1e-30, 2.0, 3e30], [-3e30, -2.0, -1e-38, 0.0, 0.5, 4.0]])
def test_choice_sorts_floats_of_any_sign_and_size(scores: list[float]) -> None:
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    score = torch.tensor(scores)[order][None, None]
    picked = choose(score, _layer(list(range(6)), Retention(6, 0, 0, 6)), torch.tensor([6]))[0, 0]
    assert torch.equal(score[0, 0, picked], torch.tensor(scores))


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
