"""Ways to lay out a cache: 8-bit keys and values, layers with slots of their own, the trained length as a window."""

from __future__ import annotations

import cmath
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from minillm import lsh
from minillm.backends.reference import attend_
from minillm.budget import CachePlan
from minillm.cache import KVCache, PositionMode, cache_bytes
from minillm.errors import BudgetError
from minillm.eviction import Retention
from minillm.generate import feed
from minillm.layer_budget import SHAPES, layer_slots
from minillm.model import Transformer, inverse_frequencies
from minillm.policies import make_policy
from minillm.slots import PINNED, to_int8

from .every_policy import EVERY_POLICY, Entry
from .helpers import kept_positions, make_cache, run, tiny_config, tiny_model

SOME_POLICIES = ["window", "keydiff", "snapkv", "h2o", "hashevict", "hashevict centred and weighted"]
some_policies = pytest.mark.parametrize("entry", [EVERY_POLICY[name] for name in SOME_POLICIES], ids=SOME_POLICIES)


def _tokens(length: int) -> Tensor:
    return torch.randint(97, (1, length), generator=torch.Generator().manual_seed(0))


def _check_cuts(model: Transformer, caches: Sequence[KVCache], tokens: Tensor) -> None:
    """Three equal caches, fed by 1, by 7 and whole, end with the same logits and the same kept positions."""
    runs = [run(model, cache, tokens, n) for cache, n in zip(caches, (1, 7, tokens.shape[1]), strict=True)]
    for logits, cache in zip(runs[1:], caches[1:], strict=True):
        torch.testing.assert_close(logits, runs[0], rtol=0, atol=1e-12)
        assert kept_positions(cache) == kept_positions(caches[0])


# --- keys and values in 8 bits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [0, 1e-30, 1e-3, 1, 1e4])
def test_int8_is_off_by_half_a_step_at_most(size: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(50, 64, dtype=torch.float64) * size).to(dtype)
    codes, scale = to_int8(x)
    assert codes.dtype == torch.int8
    assert scale.dtype == torch.float32
    error = (codes.double() * scale.double() - x.double()).abs()
    assert bool((error <= scale.double() * 0.50001).all())
    assert size == 0 or codes.abs().amax(-1).tolist() == [127] * 50, "the largest element uses the whole range"


def test_int8_of_the_docstring() -> None:
    codes, scale = to_int8(torch.tensor([0.5, -1.0]))
    assert codes.tolist() == [64, -127]
    assert scale.item() == pytest.approx(1 / 127)


@pytest.mark.parametrize("policy", ["hashevict", "hashevict-key"])
def test_codes_come_from_the_key_as_it_is_stored(policy: str) -> None:
    """Before anything goes, when all tokens are tagged at once, and later, block by block; in 8 bits a code is that of
    the 8-bit key, of which few bits differ from the exact key's though nearly every stored number does.
    """
    config, slots = tiny_config(num_hidden_layers=1), 40
    torch.manual_seed(0)
    q, kv = torch.randn(1, 4, 3 * slots, 8), torch.randn(2, 1, 2, 3 * slots, 8)
    codes, stored, outputs = [], [], []
    for int8 in (False, True):
        cache = KVCache(config, make_policy(policy, hash_bits=64), Retention.of(slots, evict_every=1), int8=int8)
        layer = cache.layers[0]
        outputs.append(attend_(layer, q[:, :, :slots], *kv[:, :, :, :slots], cache.append(slots)))
        layer.policy.settle_(layer, torch.tensor([True]))
        codes.append(layer.state["codes"].clone())
        stored.append(layer.dense(None, torch.float32))
        attend_(layer, q[:, :, slots:], *kv[:, :, :, slots:], cache.append(2 * slots))
        tagged = layer.positions < cache.seen[0] - 1  # the newest is tagged when the next one comes
        fresh = lsh.encode(layer.dense_keys(None, torch.float32), layer.state["projection"])  # [1, Hkv, S, W]
        assert torch.equal(layer.state["codes"][tagged], fresh[tagged])
        assert not layer.state["codes"][~tagged].any()
    for exact, quantised in zip(*stored, strict=True):
        assert float((exact == quantised).float().mean()) < 0.2
    flipped = float(lsh.hamming(*codes).double().mean()) / 64
    worst = float((outputs[0] - outputs[1]).abs().max())
    print(f"{flipped:.2%} of the bits differ; largest error of the output of attention {worst:.4f}")
    assert 0 < flipped < 0.01
    assert 0 < worst < 0.05


@some_policies
def test_int8_does_not_depend_on_how_the_input_is_cut(entry: Entry) -> None:
    model = tiny_model(dtype=torch.float64)
    retention = Retention.of(40, evict_every=3)
    caches = [KVCache(model.config, entry.policy, retention, dtype=torch.float64, int8=True) for _ in range(3)]
    _check_cuts(model, caches, _tokens(200))
    assert [len(head) for layer in kept_positions(caches[0]) for head in layer[0]] == [38] * 4


@pytest.mark.parametrize("policy", ["window", "hashevict", "snapkv"])
def test_int8_bytes_are_as_planned(policy: str) -> None:
    config, retention = tiny_config(), Retention.of(100)
    cache = KVCache(config, make_policy(policy), retention, rows=3, int8=True)
    parts = cache_bytes(config, cache.policy, cache.retentions, rows=3, dtype=torch.float32, int8=True)
    assert cache.nbytes == sum(parts.values())
    entries = 3 * 2 * 2 * 100  # rows, layers, KV heads, slots
    assert parts["keys"] == parts["values"] == 8 * entries  # one byte for each of 8 dimensions
    assert parts["scales"] == 2 * 4 * entries


# --- layers with different numbers of slots ---------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 3, 7, 22, 32])
@pytest.mark.parametrize("slots", [1, 2, 10, 100, 777])
@pytest.mark.parametrize("shape", ["uniform", "pyramid", "first-layers-full", "weights"])
def test_layers_share_exactly_the_budget(shape: str, slots: int, layers: int) -> None:
    whole = 1000
    given: str | list[float] = [1 / (layer + 1) ** 2 for layer in range(layers)] if shape == "weights" else shape
    full = min(2, layers - 1)
    if shape == "first-layers-full" and layers * slots - full * whole < layers - full:
        with pytest.raises(BudgetError, match=f"first-layers-full needs {full} x 1,000 slots"):
            layer_slots(given, slots, layers, whole)
        return
    found = layer_slots(given, slots, layers, whole)
    assert len(found) == layers
    assert sum(found) == layers * slots
    assert min(found) >= 1
    if shape == "uniform":
        assert found == [slots] * layers
    elif shape == "first-layers-full":
        assert found[:full] == [whole] * full
        assert max(found[full:]) - min(found[full:]) <= 1
    else:
        assert found == sorted(found, reverse=True)


def test_shapes_of_the_docstring() -> None:
    assert layer_slots([3, 2, 1], 100, 3, 1000) == layer_slots("3,2,1", 100, 3, 1000) == [150, 100, 50]
    assert layer_slots("pyramid", 100, 3, 1000) == [150, 100, 50]
    assert layer_slots("pyramid", 100, 5, 1000) == [150, 125, 100, 75, 50]
    assert layer_slots("first-layers-full", 60, 5, 100) == [100, 100, 34, 33, 33]
    assert layer_slots("first-layers-full", 150, 3, 100) == [150, 150, 150], "everything is kept as it is"


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ("cone", f"unknown layer budget 'cone': choose one of {', '.join(SHAPES)}, or one weight per layer"),
        ("1,2", "one positive weight for each of 3 layers, not \\[1.0, 2.0\\]"),
        ([1, 0, 1], "one positive weight for each of 3 layers"),
        ([1, -1, 1], "one positive weight for each of 3 layers"),
        ([1, float("inf"), 1], "one positive weight for each of 3 layers"),
        ([1, float("nan"), 1], "one positive weight for each of 3 layers"),
        ("1,two,3", "layer budget '1,two,3' is not a list of numbers such as 3,2,1"),
        ("first-layers-full", "first-layers-full needs 2 x 1,000 slots for the first layers, and a budget of 100"),
    ],
)
def test_layer_budgets_that_cannot_be(shape: str | list[float], says: str) -> None:
    with pytest.raises(BudgetError, match=says):
        layer_slots(shape, 100, 3, 1000)


@some_policies
def test_layers_of_different_sizes_do_not_depend_on_how_the_input_is_cut(entry: Entry) -> None:
    model = tiny_model(tiny_config(num_hidden_layers=3), dtype=torch.float64)
    retentions = [Retention.of(slots) for slots in layer_slots("3,2,1", 32, 3, 200)]
    caches = [KVCache(model.config, entry.policy, retentions, dtype=torch.float64) for _ in range(3)]
    _check_cuts(model, caches, _tokens(200))
    for layer, retention in zip(kept_positions(caches[0]), retentions, strict=True):
        for head in layer[0]:
            assert retention.slots - retention.evict_every < len(head) <= retention.slots
    assert caches[0].kept() == sum(len(head) for layer in kept_positions(caches[0]) for head in layer[0]) / 6


def test_a_plan_counts_what_its_layers_take() -> None:
    config = tiny_config(num_hidden_layers=3)
    plan = CachePlan.of(config, budget=100, whole=1000, dtype=torch.float32, layer_budget="pyramid", policy="hashevict")
    assert [retention.slots for retention in plan.retentions] == [150, 100, 50]
    assert plan.slots == 100
    cache = plan.allocate(torch.device("cpu"))
    assert [layer.keys.shape[2] for layer in cache.layers] == [150, 100, 50]
    assert cache.nbytes == plan.nbytes


# --- the trained length as a sliding window ---------------------------------------------------------------------------

TRAINED, SINKS = 48, 3


def _windowed(
    model: Transformer, entry: Entry, slots: int, mode: PositionMode = "window", sinks: int = SINKS
) -> KVCache:
    retention = Retention.of(slots, sinks=sinks, evict_every=2)
    return KVCache(model.config, entry.policy, retention, dtype=torch.float64, position_mode=mode)


@some_policies
@pytest.mark.parametrize("slots", [32, 64])
def test_window_does_not_depend_on_how_the_input_is_cut(entry: Entry, slots: int) -> None:
    """With fewer slots than the window, and with more: what lies outside it is not seen."""
    model = tiny_model(tiny_config(max_position_embeddings=TRAINED), dtype=torch.float64)
    _check_cuts(model, [_windowed(model, entry, slots) for _ in range(3)], _tokens(200))


@some_policies
def test_up_to_the_trained_length_the_window_changes_nothing(entry: Entry) -> None:
    model = tiny_model(tiny_config(max_position_embeddings=TRAINED), dtype=torch.float64)
    tokens = _tokens(TRAINED + 2)
    absolute, window = (run(model, _windowed(model, entry, 64, mode), tokens, 7) for mode in ("absolute", "window"))
    torch.testing.assert_close(window[:, :TRAINED], absolute[:, :TRAINED], rtol=0, atol=1e-12)
    assert float((window - absolute)[:, TRAINED:].abs().amax(-1).min()) > 1e-6


@pytest.mark.parametrize(
    ("slots", "sinks", "pins"),
    [(24, 0, range(0)), (24, 1, range(0)), (64, SINKS, range(0)), (30, 3, range(5, 9)), (24, 0, range(40, TRAINED))],
)
def test_sinks_and_pins_lie_right_behind_the_window(slots: int, sinks: int, pins: range) -> None:
    """Every output of attention, from unrotated queries and keys and the distances that they should seem to have."""
    config = tiny_config(max_position_embeddings=TRAINED, num_hidden_layers=1)
    model = tiny_model(config, dtype=torch.float64)
    cache = _windowed(model, EVERY_POLICY["hashevict"], slots, sinks=sinks)
    attention = model.model.layers[0].self_attn
    heard: list[tuple[Tensor, Tensor]] = []
    attention.register_forward_hook(lambda _, given, said: heard.append((given[0][0, 0], said[0, 0])))  # [hidden] each
    frequencies, group, dim = inverse_frequencies(config).tolist(), 2, config.head_dim

    def pairs(x: Tensor) -> list[complex]:
        """[D] -> D / 2 complex numbers; a rotation is a product."""
        return [complex(*pair) for pair in zip(x[: dim // 2].tolist(), x[dim // 2 :].tolist(), strict=True)]

    qs, ks, vs = [], [], []
    far = 0
    for t, token in enumerate(_tokens(150)[0]):
        with torch.inference_mode():
            list(feed(model, cache, token.view(1, 1), 1, pins=[(0, 1)] if t in pins else []))
        x, output = heard[-1]
        qs, ks, vs = (
            [*past, projected(x).unflatten(0, (-1, dim))]
            for past, projected in ((qs, attention.q_proj), (ks, attention.k_proj), (vs, attention.v_proj))
        )
        attended = []
        for head in range(4):
            query, scores, seen = pairs(qs[t][head]), [], []
            for position in kept_positions(cache)[0][0][head // group]:
                distance = t - position
                if t >= TRAINED and distance >= TRAINED - sinks:  # the window takes 0 .. TRAINED - sinks - 1
                    if position >= sinks and position not in pins:
                        continue
                    distance = TRAINED - 1 - position  # sink 0 is the last
                    far += 1
                key = pairs(ks[position][head // group])
                turned = [k * cmath.exp(-1j * distance * f) for k, f in zip(key, frequencies, strict=True)]
                scores.append(sum((q * k.conjugate()).real for q, k in zip(query, turned, strict=True)) * dim**-0.5)
                seen.append(vs[position][head // group])
            attended.append(torch.tensor(scores, dtype=torch.float64).softmax(0) @ torch.stack(seen))
        torch.testing.assert_close(output, attention.o_proj(torch.cat(attended)), rtol=0, atol=1e-11)
        assert {*pins} <= {*range(t + 1, 150), *kept_positions(cache)[0][0][0]}
    assert far >= (150 - TRAINED) * 4 * sinks
    assert not pins or far > (150 - TRAINED) * 4 * (sinks + 1)


def test_what_nobody_sees_any_more_goes_first_but_not_the_sinks() -> None:
    """Of 64 slots the window of 45 fills the rest with tokens that are out of sight: they are the ones that go."""
    model = tiny_model(tiny_config(max_position_embeddings=TRAINED), dtype=torch.float64)
    cache = _windowed(model, EVERY_POLICY["random"], 64)
    run(model, cache, _tokens(150), 16)
    for layer in kept_positions(cache):
        for head in layer[0]:
            assert set(range(SINKS)) | set(range(150 - (TRAINED - SINKS), 150)) <= set(head)


@pytest.mark.parametrize(("own", "inside"), [(16, range(84, 100)), (TRAINED, [0, 1, 2, *range(55, 100)])])
def test_a_window_of_the_model_itself_stays(own: int, inside: Sequence[int]) -> None:
    """Mistral's window is narrower than what it was trained on: its sinks are out of sight as they were in training."""
    config = tiny_config(max_position_embeddings=TRAINED, sliding_windows=(own, own))
    cache = _windowed(tiny_model(config, dtype=torch.float64), EVERY_POLICY["window"], 64)
    cache.layers[0].positions[:, :, :60] = torch.tensor([*range(SINKS), *range(43, 100)], dtype=torch.int32)
    visible = cache.layers[0].can_see(torch.tensor([[99]]))[0, 0, 0]
    assert cache.layers[0].positions[0, 0, visible].tolist() == list(inside)


def test_pins_are_written_with_their_tokens_and_only_there() -> None:
    model = tiny_model(dtype=torch.float64)
    cache = make_cache(model, "random", 16)
    flags = torch.zeros(1, 100, dtype=torch.uint8)
    flags[0, [20, 33]] = PINNED
    with torch.inference_mode():
        model(_tokens(100), cache.append(100, flags=flags), cache)
    for layer in cache.layers:
        for positions, written in zip(layer.positions[0].tolist(), layer.flags[0].tolist(), strict=True):
            assert {p for p, flag in zip(positions, written, strict=True) if flag} == {20, 33}
