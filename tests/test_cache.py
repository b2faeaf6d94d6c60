"""The cache: static tensors, append-only positions, one result however the input is cut, and full equals a large
budget.
"""

from __future__ import annotations

import pytest
import torch

from minillm.cache import cache_bytes
from minillm.errors import ContextFullError
from minillm.eviction import Retention
from minillm.policies import POLICIES, make_policy

from .helpers import kept_positions, make_cache, run, tiny_config, tiny_model

EVICTING = [name for name, policy in POLICIES.items() if policy.evicts]
SLOTS = 40


def _tokens(length: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(97, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("every", [1, 4, 32])
@pytest.mark.parametrize("policy", ["window", "hashevict", "hashevict-key"])  # the others: test_policies.py
@pytest.mark.parametrize("times", [0.5, 1, 3.3, 20])
def test_result_does_not_depend_on_how_the_input_is_cut(policy: str, every: int, times: float) -> None:
    """In float64: the same kept positions and logits, one token at a time, by 7, by 64, and whole."""
    model = tiny_model(dtype=torch.float64)
    length = int(times * SLOTS)
    tokens = _tokens(length)
    runs = []
    for chunk in (1, 7, 64, length):
        cache = make_cache(model, policy, SLOTS, evict_every=every)
        runs.append((run(model, cache, tokens, chunk), kept_positions(cache)))
    for logits, kept in runs[1:]:
        assert kept == runs[0][1]
        torch.testing.assert_close(logits, runs[0][0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("policy", EVICTING)
def test_cutting_in_lower_precision(policy: str) -> None:
    """float32: logits within 1e-5 of their size as long as kept positions agree; the share is printed."""
    agree, worst, total = 0, 0.0, 4
    for seed in range(total):
        model = tiny_model(dtype=torch.float32, seed=seed)
        caches = [make_cache(model, policy, SLOTS, evict_every=4) for _ in range(2)]
        for piece in _tokens(5 * SLOTS, seed=seed).split(SLOTS, 1):
            one, many = (run(model, cache, piece, chunk) for cache, chunk in zip(caches, (1, 64), strict=True))
            if kept_positions(caches[0]) != kept_positions(caches[1]):
                break
            worst = max(worst, float((one - many).abs().max() / many.abs().max()))
        else:
            agree += 1
    print(f"{policy}: kept positions agree in {agree} of {total} runs, largest difference {worst:.1e}")
    assert agree > 1
    assert worst < 1e-5


def test_rows_of_a_batch_do_not_disturb_each_other() -> None:
    model = tiny_model(dtype=torch.float64)
    tokens = _tokens(150, rows=3)
    together = run(model, make_cache(model, rows=3, slots=32), tokens, 64)
    for row in range(3):
        alone = run(model, make_cache(model, slots=32), tokens[row : row + 1], 64)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-11)


@pytest.mark.parametrize("policy", EVICTING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_budget_as_long_as_the_sequence_equals_full_bit_for_bit(policy: str, dtype: torch.dtype) -> None:
    model = tiny_model(dtype=dtype)
    tokens = _tokens(SLOTS)
    full, bounded = make_cache(model, "full", SLOTS), make_cache(model, policy, SLOTS)
    for chunk in (1, 16, SLOTS):
        assert torch.equal(run(model, full, tokens, chunk), run(model, bounded, tokens, chunk))
        assert full.kept() == bounded.kept() == SLOTS
        full.reset()
        bounded.reset()


@pytest.mark.parametrize("policy", list(POLICIES))
def test_tensors_never_move_and_their_bytes_are_as_planned(policy: str) -> None:
    model = tiny_model()
    cache = make_cache(model, policy, 200, rows=2)
    assert cache.nbytes == sum(
        cache_bytes(model.config, cache.policy, cache.retentions, rows=2, dtype=torch.float32).values()
    )

    def addresses() -> list[tuple[str, int, int]]:
        return [(name, t.data_ptr(), t.nbytes) for layer in cache.layers for name, t in layer.tensors().items()]

    before = addresses()
    for length in (1, 100, 3, 96):
        run(model, cache, _tokens(length, rows=2), 64)
    cache.reset()
    run(model, cache, _tokens(200, rows=2), 256)
    assert addresses() == before


def test_bytes_of_the_hash_table() -> None:
    """D = 128 in bfloat16: K and V 512 bytes a slot and head, 16 packed bits 2, 64 bits 8."""
    config = tiny_config(head_dim=128, num_hidden_layers=1, num_key_value_heads=1)
    for bits, size in ((16, 2), (24, 3), (64, 8)):
        parts = cache_bytes(
            config, make_policy("hashevict", hash_bits=bits), [Retention.of(1000)], dtype=torch.bfloat16
        )
        assert parts["keys"] + parts["values"] == 512 * 1000
        assert parts["codes"] == size * 1000
        assert parts["positions"] == 4 * 1000


def test_full_refuses_what_does_not_fit_before_writing() -> None:
    model = tiny_model()
    cache = make_cache(model, "full", 20)
    run(model, cache, _tokens(20), 8)
    kept = kept_positions(cache)
    with pytest.raises(ContextFullError, match="needs 21 tokens but the cache holds 20"):
        cache.append(1)
    assert kept_positions(cache) == kept
    assert cache.seen == [20]


def test_reset_forgets_everything() -> None:
    model = tiny_model(dtype=torch.float64)
    cache = make_cache(model, slots=24)
    fresh = run(model, cache, _tokens(100), 16)
    cache.reset()
    run(model, cache, _tokens(70, seed=1), 16)
    cache.reset()
    assert cache.kept() == 0
    assert torch.equal(run(model, cache, _tokens(100), 16), fresh)


def test_sliding_window_equals_a_full_cache_with_the_same_window() -> None:
    """A window of 24 needs 24 + evict_every slots: what was evicted could be seen by nobody, so nothing is lost."""
    config = tiny_config(sliding_windows=(24, 24))
    model = tiny_model(config, dtype=torch.float64)
    tokens = _tokens(200)
    full = run(model, make_cache(model, "full", 200), tokens, 64)
    for policy in EVICTING:
        bounded = run(model, make_cache(model, policy, 28, evict_every=4, sinks=0, recent=0), tokens, 7)
        torch.testing.assert_close(bounded, full, rtol=0, atol=1e-11)


def test_a_window_that_is_not_full_hides_nothing() -> None:
    """`can_see` with the newest query known to the host says the same as without, before and after the window fills."""
    model = tiny_model(tiny_config(sliding_windows=(24, 24)))
    cache = make_cache(model, "random", 40)
    for length in (10, 13, 1, 1, 30):
        run(model, cache, _tokens(length), 64)
        newest = cache.seen[0] - 1
        queries = torch.arange(newest - 4, newest + 1)[None]  # [1, n]
        assert torch.equal(cache.layers[0].can_see(queries, 33, newest), cache.layers[0].can_see(queries, 33))


@pytest.mark.parametrize("block", [None, 7, 1000])
def test_stretches_end_at_evictions_and_after_a_block(block: int | None) -> None:
    layer, longest = make_cache(tiny_model(), slots=100, evict_every=30).layers[0], block or 64
    span = make_cache(tiny_model(), slots=100, evict_every=30).append(300)
    found = list(layer.stretches(span, block))
    assert [stretch.start for stretch in found] == [0, *(stretch.stop for stretch in found[:-1])]
    assert found[-1].stop == 300
    for start, stop, evict, settle in found:
        assert 0 < stop - start <= longest
        assert evict == layer.is_due(start)
        assert settle == (start == 100)
        assert stop == start + longest or stop == 300 or layer.is_due(stop)


def test_padding_of_a_chunk_changes_nothing() -> None:
    """A span wider than its tokens: the padding is neither written nor seen."""
    model = tiny_model(dtype=torch.float64)
    tokens = _tokens(30)
    plain, padded = make_cache(model, slots=16), make_cache(model, slots=16)
    with torch.inference_mode():
        expected = model(tokens, plain.append(30), plain)
        wide = torch.nn.functional.pad(tokens, (0, 34))
        got = model(wide, padded.append(30, padded=64), padded)[:, :30]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)
    assert kept_positions(padded) == kept_positions(plain)


def test_angles_stay_exact_a_million_tokens_in() -> None:
    from minillm.model import inverse_frequencies, rope

    frequencies = inverse_frequencies(tiny_config(head_dim=64))
    position = 1_000_003
    cos, sin = rope(torch.tensor([[position]]), frequencies)
    angle = torch.tensor([position * float(f) for f in frequencies], dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0, 0, :32], angle.cos(), rtol=0, atol=1e-9)
    torch.testing.assert_close(sin[0, 0, 0, 32:], angle.sin(), rtol=0, atol=1e-9)
    in_float32 = torch.tensor(float(position)) * frequencies.float()
    assert float((in_float32.double() - angle).abs().max()) > 0.01, "float32 would have done; float64 is for nothing"


def test_seen_and_kept_are_reported() -> None:
    model = tiny_model()
    cache = make_cache(model, slots=32, evict_every=8)
    run(model, cache, _tokens(41), 64)
    assert cache.seen == [41]
    assert cache.kept() == 32 - 8 + 1  # tokens 32 and 40 each freed eight slots; one of the last eight is used
