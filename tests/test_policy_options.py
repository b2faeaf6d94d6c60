"""What single policies and their options promise, each shown by construction."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from minillm import lsh
from minillm.backends.reference import attend_
from minillm.cache import KVCache
from minillm.errors import ConfigError
from minillm.eviction import Retention
from minillm.policies import Option, make_policy
from minillm.policies.random import Random
from minillm.slots import PUNCTUATION, SPECIAL, LayerCache

from .helpers import tiny_config


def _cache(policy: str, slots: int, *, group: int = 1, dim: int = 8, rows: int = 1, **options: Option) -> KVCache:
    """One layer of two KV heads in float64; no sinks, nothing recent, one eviction at a time."""
    config = tiny_config(num_hidden_layers=1, num_attention_heads=2 * group, head_dim=dim)
    retention = Retention(slots, sinks=0, recent=0, evict_every=1)
    return KVCache(config, make_policy(policy, **options), retention, rows=rows, dtype=torch.float64)


def _show(cache: KVCache, q: Tensor, k: Tensor) -> LayerCache:
    """Queries [H, n, D] and keys [Hkv, n, D] of the next n tokens; what they attend to does not matter here."""
    layer = cache.layers[0]
    attend_(layer, q[None], k[None], torch.zeros_like(k)[None], cache.append(k.shape[1]))
    return layer


def _random(heads: int, n: int, dim: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(heads, n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _signs(rows: Tensor, x: Tensor) -> list[int]:
    """+1 and -1 for every row of [P, D], by the definition."""
    return [1 if float(row.double() @ x.double()) >= 0 else -1 for row in rows]


@pytest.mark.parametrize(
    ("slots", "sinks", "first"),
    [(12, 2, range(2, 12)), (80, 4, range(4, 64)), (300, 70, range(300))],  # the last: in two pieces
)
@pytest.mark.parametrize("policy", ["hashevict", "hashevict-key"])
def test_centre_is_the_mean_of_the_first_keys_and_every_code_refers_to_it(
    policy: str, slots: int, sinks: int, first: range
) -> None:
    config = tiny_config(num_hidden_layers=1)
    cache = KVCache(config, make_policy(policy, centred=True), Retention(slots, sinks, 3, 2), dtype=torch.float64)
    layer = cache.layers[0]
    keys = _random(2, slots + 30) + 5  # a large mean direction
    attend_(layer, _random(4, slots + 30, seed=1)[None], keys[None], keys[None], cache.append(slots + 30))
    mean = keys[:, list(first)].mean(1)  # [Hkv, D]
    torch.testing.assert_close(layer.state["centre"][0].double(), mean, rtol=0, atol=1e-6)
    codes = lsh.unpack(layer.state["codes"], 16)[0] * 2 - 1  # [Hkv, S, P]
    rows = layer.state["projection"][0]  # [P, D]
    for head in range(2):
        for slot, position in enumerate(layer.positions[0, head].tolist()):
            if 0 <= position < slots + 28:  # the last two are coded at the next eviction
                assert codes[head, slot].tolist() == _signs(rows, keys[head, position] - mean[head])


def test_novelty_compares_a_key_with_those_before_it() -> None:
    """By the definition, in blocks that are tagged in two pieces, fed by 64: the first S with their own mean."""
    slots, every, length = 520, 260, 1100
    config = tiny_config(num_hidden_layers=1)
    cache = KVCache(config, make_policy("hashevict-plus"), Retention(slots, 4, 9, every), dtype=torch.float64)
    keys = _random(2, length) + 1
    for piece in keys.split(64, 1):
        layer = _show(cache, torch.zeros(4, piece.shape[1], 8, dtype=torch.float64), piece)
    directions = keys / keys.norm(dim=-1, keepdim=True)  # [Hkv, n, D]
    fading, checked = torch.zeros(2, 8, dtype=torch.float64), 0
    tagged = length - 1 - (length - 1 - slots) % every
    for position in range(tagged):
        fading = 0.995 * fading + directions[:, position]
        reference = directions[:, :slots].sum(1) if position < slots else fading
        cosine = (directions[:, position] * reference).sum(1) / reference.norm(dim=1)  # [Hkv]
        for head in range(2):
            for slot in (layer.positions[0, head] == position).nonzero()[:, 0].tolist():
                assert layer.state["novelty"][0, head, slot] == -cosine[head].to(torch.bfloat16)
                checked += position >= slots
    torch.testing.assert_close(layer.state["total"][0], fading, rtol=0, atol=1e-12)
    assert checked > 100


def test_centring_helps_where_keys_share_a_direction() -> None:
    """hashevict.md section 4: bits of uncentred keys are spent on the common direction."""
    percentile = {}
    for centred in (False, True):
        ranks = []
        for trial in range(40):
            keys, query = _random(2, 64, 16, seed=trial), _random(2, 1, 16, seed=trial + 1000)
            keys = keys + 4 * _random(2, 1, 16, seed=trial + 2000)  # 94% of the energy is the mean
            cache = _cache("hashevict", 64, dim=16, hash_bits=64, centred=centred, policy_seed=trial)
            _show(cache, torch.zeros_like(keys), keys)
            layer = _show(cache, query, _random(2, 1, 16))
            for head in range(2):
                (gone,) = set(range(64)) - set(layer.positions[0, head].tolist())
                liking = keys[head] @ query[head, 0]
                ranks.append(float((liking < liking[gone]).double().mean()))
        percentile[centred] = sum(ranks) / len(ranks)
    print(f"evicted key's percentile of q . k: uncentred {percentile[False]:.3f}, centred {percentile[True]:.3f}")
    assert percentile[True] < percentile[False] / 2


def test_profile_is_the_decayed_sum_of_query_codes() -> None:
    cache = _cache("hashevict", 64, group=3, decay=0.9)
    queries = _random(6, 50)
    layer = _show(cache, queries, _random(2, 50))
    rows = layer.state["projection"][0]
    for head in range(2):
        expected = [0.0] * 16
        for t in range(50):
            for query in queries[3 * head : 3 * head + 3, t]:
                expected = [e + 0.9 ** (49 - t) * s for e, s in zip(expected, _signs(rows, query), strict=True)]
        assert layer.state["profile"][0, head].tolist() == pytest.approx(expected, abs=1e-9)


def test_next_to_no_decay_is_the_paper() -> None:
    """15 bits and one query: the distance is never half of them, so a trace of the past cannot break a tie of zeros."""
    kept = []
    for decay in (0.0, 1e-12):
        cache = _cache("hashevict", 16, hash_bits=15, decay=decay)
        layer = _show(cache, _random(2, 200), _random(2, 200, seed=1))
        kept.append(layer.positions.tolist())
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("options", "gone"), [({}, 0), ({"recent_queries": 2}, 1), ({"decay": 0.9}, 1)])
def test_what_a_recent_query_liked_stays(options: dict[str, Option], gone: int) -> None:
    """Token 0 is what the query before asked for; token 1 is what the current one likes a little better."""
    keys = torch.tensor([[1, -0.2], [-0.5, 0.3], [0.1, 1]], dtype=torch.float64)  # [n, D]
    asked = torch.tensor([[0, 1], [0, 1], [1, 0], [0, 1]], dtype=torch.float64)
    cache = _cache("hashevict", 3, dim=2, hash_bits=512, **options)
    _show(cache, asked[None, :3].expand(2, -1, -1), keys[None].expand(2, -1, -1))
    layer = _show(cache, asked[None, 3:].expand(2, -1, -1), keys[None, 2:].expand(2, -1, -1))
    assert [sorted({0, 1, 2} - set(head)) for head in layer.positions[0].tolist()] == [[gone], [gone]]


def test_a_long_key_is_liked_more_or_disliked_more() -> None:
    """`norm_weighted`: of two keys at one angle the longer goes first if it points away, the shorter if it does not."""
    for sign, gone in ((1, 0), (-1, 1)):
        keys = torch.tensor([[sign, 0.1], [3 * sign, 0.3]], dtype=torch.float64).expand(2, -1, -1)  # [Hkv, n, D]
        query = torch.tensor([[1, 0]], dtype=torch.float64).expand(2, -1, -1)
        cache = _cache("hashevict", 2, dim=2, hash_bits=64, norm_weighted=True)
        _show(cache, torch.zeros_like(keys), keys)
        layer = _show(cache, query, query)
        assert all(gone not in head for head in layer.positions[0].tolist())


def test_weighted_scores_are_exact_products() -> None:
    """A whole number of bits times a norm of three digits has more than three: rounded to three, many would tie."""
    cache = _cache("hashevict", 64, group=3, hash_bits=64, norm_weighted=True)
    keys, query = _random(2, 64), _random(6, 1, seed=1)
    layer = _show(cache, torch.zeros(6, 64, 8, dtype=torch.float64), keys)
    layer.policy.settle_(layer, torch.tensor([True]))
    score = layer.policy.score(layer, query[None, :, 0], keys[None, :, 0], torch.tensor([64]))[0].double()
    rows = layer.state["projection"][0]
    for head in range(2):
        for slot, key in enumerate(keys[head]):
            liking = sum(
                a * b
                for probe in query[3 * head : 3 * head + 3, 0]
                for a, b in zip(_signs(rows, key), _signs(rows, probe), strict=True)
            )
            assert float(score[head, slot]) == liking * float(key.norm().to(torch.bfloat16))


@pytest.mark.parametrize("policy", ["exact", "keydiff"])
def test_bfloat16_keys_are_scored_in_float32(policy: str) -> None:
    """Keys that share a direction: in bfloat16 most scores would be equal, and the oldest would go instead."""
    config = tiny_config(num_hidden_layers=1, head_dim=64)
    cache = KVCache(config, make_policy(policy), Retention.of(256), dtype=torch.bfloat16)
    layer = cache.layers[0]
    keys = (_random(2, 256, 64) + 20).to(torch.bfloat16)[None]
    query = (_random(4, 256, 64, seed=1)[None] / 8 + 1).to(torch.bfloat16)
    attend_(layer, query, keys, keys, cache.append(256))
    score = layer.policy.score(layer, query[:, :, -1], keys[:, :, -1], torch.tensor([256]))[0]
    assert min(len(set(head.tolist())) for head in score) > 200


def test_flat_attention_reaches_the_average() -> None:
    """`scissorhands`: equal weights are all "at least average", whatever the rounding of 1 / n."""
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        cache = KVCache(tiny_config(num_hidden_layers=1), make_policy("scissorhands"), Retention.of(64), dtype=dtype)
        zeros = torch.zeros(1, 4, 64, 8, dtype=dtype)
        attend_(cache.layers[0], zeros, zeros[:, :2], zeros[:, :2], cache.append(64))
        steps = cache.layers[0].policy.score(cache.layers[0], zeros, zeros, torch.tensor([64]))[0, 0]
        assert steps.tolist() == list(range(64, 0, -1))


def test_authors_setting_is_reproduced() -> None:
    """Their code: 16 bits, 4 sinks, 10 recent, one at a time; the newest key against the cached ones, the largest
    Hamming distance goes, the oldest of several; keys alone decide.
    """
    slots, length, dim = 32, 300, 16
    config = tiny_config(num_hidden_layers=1, num_attention_heads=2, head_dim=dim)
    policy = make_policy("hashevict-key", hash_bits=16)
    cache = KVCache(config, policy, Retention.of(slots, sinks=4, recent=10, evict_every=1), dtype=torch.float64)
    keys = _random(2, length, dim)
    layer = _show(cache, _random(2, length, dim, seed=1), keys)
    rows = layer.state["projection"][0]
    for head in range(2):
        kept: dict[int, list[int]] = {}  # position -> code, oldest first
        for t, key in enumerate(keys[head]):
            code = _signs(rows, key)
            if len(kept) == slots:
                distances = {
                    p: sum(a != b for a, b in zip(code, other, strict=True))
                    for p, other in kept.items()
                    if 4 <= p < t - 10
                }
                del kept[max(distances, key=lambda p: (distances[p], -p))]
            kept[t] = code
        assert sorted(layer.positions[0, head].tolist()) == list(kept)


@pytest.mark.parametrize(("bits", "dim"), [(16, 16), (16, 32), (64, 32)])
def test_orthogonal_rows_are_orthogonal_and_heads_have_their_own(bits: int, dim: int) -> None:
    rows = lsh.projection(bits, dim, seed=0, layer=0, heads=3, orthogonal=True).double()
    for block in rows.split(dim, dim=1):  # at most D at a time can be
        identity = torch.eye(block.shape[1], dtype=torch.float64).expand(3, -1, -1)
        torch.testing.assert_close(block @ block.transpose(1, 2), identity, rtol=0, atol=1e-6)
    assert len({tuple(head.flatten().tolist()) for head in rows}) == 3
    free = lsh.projection(bits, dim, seed=0, layer=0, heads=3)
    assert len({tuple(head.flatten().tolist()) for head in free}) == 3


def test_per_head_projections_are_used() -> None:
    """The same key in both heads: one code where the projection is shared, two where it is not."""
    for per_head in (False, True):
        layer = _show(_cache("hashevict", 4, per_head=per_head), _random(2, 1), _random(1, 1).expand(2, -1, -1))
        layer.policy.settle_(layer, torch.tensor([True]))
        first, second = layer.state["codes"][0, :, 0].tolist()
        assert (first != second) == per_head


@pytest.mark.parametrize("bits", [1, 7, 8, 16, 24, 64, 96, 130])
def test_unpack_and_dot_agree_with_lists(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    plain = torch.rand(2, 5, bits, generator=generator) < 0.5
    numbers = torch.randn(2, bits, generator=generator, dtype=torch.float64)
    codes = lsh.pack(plain)
    assert torch.equal(lsh.unpack(codes, bits), plain)
    expected = [
        [sum(x if bit else -x for bit, x in zip(code, row, strict=True)) for code in block]
        for block, row in zip(plain.tolist(), numbers.tolist(), strict=True)
    ]
    torch.testing.assert_close(lsh.dot(codes, numbers), torch.tensor(expected, dtype=torch.float64))


def _priorities(seed: int = 0, layer: int = 0, start: int = 0, n: int = 4096) -> Tensor:
    """`random`'s scores [Hkv, n] of the positions from `start` on, in slots that hold something else besides."""
    config = tiny_config(num_hidden_layers=3)
    policy = Random(policy_seed=seed)
    cache = KVCache(config, policy, Retention.of(n)).layers[layer]
    cache.positions.copy_(torch.arange(start, start + n))
    cache.keys.normal_()
    return policy.score(cache, torch.randn(1, 4, 8), torch.randn(1, 2, 8), torch.tensor([10_000]))[0].double() / 2**24


def test_random_priorities_look_uniform_and_independent() -> None:
    both = _priorities()
    for priorities in (*both, *_priorities(seed=1), *_priorities(layer=1), *_priorities(start=1_000_000)):
        expected = len(priorities) / 64
        chi_squared = float(((torch.histc(priorities, 64, 0, 1) - expected) ** 2 / expected).sum())
        assert 63 - 45 < chi_squared < 63 + 45  # four standard deviations of 64 cells
    pairs = [(both[0], both[1]), (both[0], _priorities(seed=1)[0]), (both[0], _priorities(layer=1)[0])]
    pairs += [(both[0][lag:], both[0][:-lag]) for lag in (1, 2, 3, 16, 64)]
    for one, other in pairs:
        assert abs(float(torch.corrcoef(torch.stack((one, other)))[0, 1])) < 4 / 4096**0.5


def test_random_priorities_depend_on_seed_layer_head_and_position_only() -> None:
    assert torch.equal(_priorities(), _priorities())  # other keys, queries, and time
    assert torch.equal(_priorities(start=500, n=100), _priorities()[:, 500:600])  # other slots
    streams = [*_priorities(), *_priorities(seed=1), *_priorities(layer=1), *_priorities(layer=2)]
    assert len({tuple(stream.tolist()) for stream in streams}) == len(streams)


def test_random_keeps_a_uniform_sample_of_the_whole_history() -> None:
    cache = _cache("random", 128)
    zeros = torch.zeros(2, 64, 8, dtype=torch.float64)
    for _ in range(50):
        layer = _show(cache, zeros, zeros)
    kept = layer.positions[0, :, :].flatten().double() / 3200  # 256 of them
    for quarter in torch.histc(kept, 4, 0, 1).tolist():
        assert abs(quarter - 64) < 4 * (256 * 0.25 * 0.75) ** 0.5


def test_tova_drops_the_same_tokens_in_all_heads() -> None:
    layer = _show(_cache("tova", 16, group=2), _random(4, 200), _random(2, 200, seed=1))
    first, second = layer.positions[0].tolist()
    assert first == second
    assert sorted(first) != list(range(184, 200)), "that is the window"


FLAGS = [SPECIAL, PUNCTUATION, 0, 0, 0, 0, 0, 0, 0, 0]
RECEIVED = {  # attention over ten tokens, by what it takes to recover 95% of it: at most 3 tokens can be heavy
    0: [0.96, 0, 0, 0.04, 0, 0, 0, 0, 0, 0],
    1: [0.5, 0.46, 0, 0.04, 0, 0, 0, 0, 0, 0],
    2: [0.1, 0.1, 0, 0, 0.3, 0.25, 0.22, 0.03, 0, 0],
    3: [0.09, 0.09, 0.09, 0.09, 0.13, 0.12, 0.12, 0.09, 0.09, 0.09],
}
NAMED = {0: {0}, 1: {0, 1}, 2: {0, 1, 4, 5, 6}, 3: {0, 1, 4, 5, 6}}


@pytest.mark.parametrize("choice", RECEIVED)
def test_fastgen_takes_the_first_strategy_that_holds_enough(choice: int) -> None:
    """And evicts what it does not name first, oldest first.  The other row is not due, so it chooses nothing."""
    cache = _cache("fastgen", 10, rows=2)
    layer = cache.layers[0]
    layer.positions.copy_(torch.arange(10))
    layer.flags.copy_(torch.tensor(FLAGS))
    weights = torch.tensor(RECEIVED[choice], dtype=torch.float64).expand(2, 2, 1, 1, 10)
    layer.policy.observe_attention_(layer, weights, torch.tensor([[9], [9]]))
    layer.policy.settle_(layer, torch.tensor([False, True]))
    assert layer.state["choice"].tolist() == [[0, 0], [choice, choice]]
    score = layer.policy.score(layer, torch.zeros(2, 2, 8), torch.zeros(2, 2, 8), torch.tensor([10, 10]))[1, 0]
    assert score.argsort().tolist() == sorted(range(10), key=lambda p: (p in NAMED[choice], p))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("hashevict", {"decay": 1.0}, "decay must lie in \\[0, 1\\), not 1.0"),
        ("hashevict", {"decay": "fast"}, "policy option decay must be a number, not 'fast'"),
        ("hashevict", {"centred": "maybe"}, "policy option centred must be true or false, not 'maybe'"),
        ("hashevict", {"hash_bits": 16.5}, "policy option hash_bits must be a whole number, not 16.5"),
        ("hashevict", {"recent_queries": 0}, "recent_queries must be at least 1, not 0"),
        ("hashevict", {"recent_queries": 2, "decay": 0.5}, "leave one of them out"),
        ("hashevict-key", {"decay": 0.5}, "'hashevict-key' never sees a query"),
        ("scissorhands", {"history": 100}, "history must be a multiple of 64 steps, not 100"),
        ("snapkv", {"observed": 0}, "observed must be at least 1 query, not 0"),
        ("snapkv", {"pooling": 4}, "pooling must be an odd number of tokens, not 4"),
        ("fastgen", {"recovered": 0}, "recovered must lie in \\(0, 1\\], not 0"),
        ("fastgen", {"heavy": 1.1}, "heavy must lie in \\(0, 1\\], not 1.1"),
    ],
)
def test_options_that_cannot_be(name: str, options: dict[str, Option], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_policy(name, **options)


def test_options_are_read_from_text() -> None:
    policy = make_policy("hashevict", hash_bits="24", decay="0.5", centred="on", per_head="false")
    assert policy == make_policy("hashevict", hash_bits=24, decay=0.5, centred=True)
