"""The CPU backend beside the reference: the same logits, kept positions and effects, in every shape and however cut."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minillm import LLM, ConfigError
from minillm.backends import cpu, linear, native, reference
from minillm.cache import KVCache, PositionMode
from minillm.checkpoint import Checkpoint, choose_backend
from minillm.cli.main import main
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.fused import FusedLayer, Fusion
from minillm.generate import Pins, feed
from minillm.inventory import empty_model
from minillm.llm import encode_prompt
from minillm.loader import fill, save_checkpoint
from minillm.model import Attention, Layer, Transformer
from minillm.policies import make_policy
from minillm.quant import Scheme
from minillm.slots import PINNED, PUNCTUATION, SPECIAL

from .every_policy import EVERY_POLICY, Entry
from .helpers import kept_positions, run, tiny_config, tiny_model

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
MIXED = (64, 1, 7, 1000)  # a quarter of the tokens each
TRAINED = 48


def heads(query: int, kv: int, dim: int, **more: object) -> ModelConfig:
    fields = {"num_attention_heads": query, "num_key_value_heads": kv, "head_dim": dim}
    return tiny_config(**{"hidden_size": 64, "intermediate_size": 96, **fields, **more})


SHAPES: dict[str, ModelConfig] = {
    "8 over 2 of 64": heads(8, 2, 64),
    "4 over 4 of 32": heads(4, 4, 32),
    "6 over 2 of 64": heads(6, 2, 64),
    "16 over 1 of 128": heads(16, 1, 128),
    "24 over 2 of 32": heads(24, 2, 32),
    "3 over 1 of 256": heads(3, 1, 256),
    "4 over 2 of 8": heads(4, 2, 8),
    "4 over 2 of 80": heads(4, 2, 80),
    "odd widths": heads(4, 2, 12, hidden_size=36, intermediate_size=44, vocab_size=61),
    "biases": heads(4, 2, 32, qkv_bias=True, o_bias=True, mlp_bias=True),
    "biases of Qwen2": heads(4, 2, 32, qkv_bias=True),
    "normed heads": heads(4, 2, 32, qk_norm=True),
    "normed heads with biases": heads(4, 2, 8, qk_norm=True, qkv_bias=True, o_bias=True),
    "tied": heads(4, 2, 32, tie_word_embeddings=True),
    "sliding windows": heads(4, 2, 32, sliding_windows=(20, 20)),
    "a sliding window in one layer": heads(4, 2, 64, sliding_windows=(None, 13)),
    "three layers": heads(4, 2, 32, num_hidden_layers=3),
}
each_shape = pytest.mark.parametrize("config", SHAPES.values(), ids=SHAPES.keys())
each_policy = pytest.mark.parametrize("entry", EVERY_POLICY.values(), ids=EVERY_POLICY.keys())


def random_model(config: ModelConfig, dtype: torch.dtype, seed: int = 0) -> Transformer:
    """A tiny model in which norms and biases matter, too: every layer has its own."""
    model = tiny_model(config, torch.float64, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(std=0.3)
        elif "norm" in name:
            parameter.uniform_(0.5, 1.5)
    return model.to(dtype)


def fuse(model: Transformer, scheme: Scheme | None = None, *, backend: str = "cpu") -> Transformer:
    """The same weights in the layers of a backend."""
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def read(name: str, *, out: Tensor | None = None, keep: bool = False) -> Tensor:  # noqa: ARG001
        return weights[name].clone() if out is None else out.copy_(weights[name])

    like = model.model.norm.weight
    return fill(empty_model(model.config), read, dtype=like.dtype, scheme=scheme, backend=backend, device=like.device)


def tokens_of(length: int, rows: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(61, (rows, length), generator=torch.Generator().manual_seed(seed))


def cache_of(
    model: Transformer,
    entry: Entry | str,
    retention: Retention,
    *,
    rows: int = 1,
    int8: bool = False,
    mode: PositionMode = "absolute",
) -> KVCache:
    policy = make_policy(entry) if isinstance(entry, str) else entry.policy
    dtype = model.model.norm.weight.dtype
    cache = KVCache(model.config, policy, retention, rows=rows, dtype=dtype, int8=int8, position_mode=mode)
    if policy.needs_kinds:
        cache.kinds = torch.zeros(model.config.vocab_size, dtype=torch.uint8)
        cache.kinds[:5], cache.kinds[5:20] = SPECIAL, PUNCTUATION
    return cache


def run_mixed(model: Transformer, cache: KVCache, tokens: Tensor, chunks: Sequence[int] = MIXED) -> Tensor:
    """Logits [B, n, V]: the tokens in equal parts, each read in chunks of its own."""
    parts = tokens.chunk(len(chunks), 1)
    return torch.cat([run(model, cache, part, chunk) for part, chunk in zip(parts, chunks, strict=True)], 1)


@torch.inference_mode()
def run_pinned(model: Transformer, cache: KVCache, tokens: Tensor, chunk: int, pins: Pins) -> Tensor:
    return torch.cat([model.logits(hidden) for _, hidden in feed(model, cache, tokens, chunk, pins)], 1)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def distance(found: Tensor, right: Tensor) -> float:
    """|found - right| / |right| over all numbers."""
    return float((found.double() - right.double()).norm() / right.double().norm())


# --- the whole model --------------------------------------------------------------------------------------------------


@each_shape
def test_every_shape_in_float64(config: ModelConfig) -> None:
    """Two rows; one token at a time, by 7, by 64, and whole: always what the reference says of the whole."""
    model, tokens, policy = random_model(config, torch.float64), tokens_of(68, rows=2), "hashevict"
    fused, retention = fuse(model), Retention.of(32, evict_every=3)
    cache = cache_of(model, policy, retention, rows=2)
    expected = run(model, cache, tokens, 1000)
    assert expected.std() > 0.3, "flat logits would prove nothing"
    for chunk in (1, 7, 64, 1000):
        ours = cache_of(model, policy, retention, rows=2)
        close(run(fused, ours, tokens, chunk), expected)
        assert kept_positions(ours) == kept_positions(cache)


@each_shape
@pytest.mark.parametrize(("policy", "slots"), [("full", 128), ("window", 32)])
def test_every_shape_in_float32(policy: str, slots: int, config: ModelConfig) -> None:
    """Within 1e-5 of the largest logit, where no rounding can tip a choice."""
    model, tokens, retention = random_model(config, torch.float32), tokens_of(64, rows=2), Retention.of(slots)
    caches = [cache_of(model, policy, retention, rows=2) for _ in range(2)]
    expected, found = (run_mixed(m, cache, tokens) for m, cache in zip((model, fuse(model)), caches, strict=True))
    assert kept_positions(caches[0]) == kept_positions(caches[1])
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@each_shape
@pytest.mark.parametrize(("policy", "slots"), [("full", 128), ("window", 32)])
def test_every_shape_in_bfloat16(policy: str, slots: int, config: ModelConfig) -> None:
    """As near to the same weights in float64 as the reference is in bfloat16, or nearly, and that is near."""
    model, tokens, retention = random_model(config, torch.bfloat16), tokens_of(64, rows=2), Retention.of(slots)
    exact = random_model(config, torch.bfloat16).double()
    right = run(exact, cache_of(exact, policy, retention, rows=2), tokens, 1000)
    theirs, ours = (
        distance(run_mixed(m, cache_of(m, policy, retention, rows=2), tokens), right) for m in (model, fuse(model))
    )
    print(f"relative error in bfloat16: reference {theirs:.2%}, cpu {ours:.2%}")
    assert ours < 0.03
    assert ours < 1.5 * theirs


@each_policy
def test_every_policy(entry: Entry) -> None:
    """In float64, stretches of a few tokens and of more than the reference attends to at once."""
    model = random_model(tiny_config(), torch.float64)
    fused = fuse(model)
    for retention, tokens, chunks in (
        (Retention.of(40, evict_every=3), tokens_of(160), MIXED),
        (Retention.of(100, evict_every=70), tokens_of(260), (1000,)),
    ):
        theirs, ours = (cache_of(model, entry, retention) for _ in range(2))
        close(run_mixed(fused, ours, tokens, chunks), run(model, theirs, tokens, 1000))
        assert kept_positions(ours) == kept_positions(theirs)


@pytest.mark.parametrize("policy", ["window", "hashevict", "hashevict-plus", "snapkv", "h2o"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_policies_in_lower_precision(dtype: torch.dtype, policy: str) -> None:
    """A rounding may tip a choice, and all that follows: printed, and refused only where nothing was tipped."""
    agree, worst = 0, 0.0
    for seed in range(2):
        model, tokens = random_model(heads(4, 2, 64), dtype, seed), tokens_of(70, seed=seed)
        caches = [cache_of(model, policy, Retention.of(32)) for _ in range(2)]
        expected, found = (run_mixed(m, cache, tokens) for m, cache in zip((model, fuse(model)), caches, strict=True))
        assert bool(found.isfinite().all())
        assert caches[0].kept() == caches[1].kept()
        if kept_positions(caches[0]) == kept_positions(caches[1]):
            agree += 1
            worst = max(worst, distance(found, expected))
    print(f"{policy} {dtype}: kept positions agree in {agree} of 2 runs, largest relative difference {worst:.1e}")
    if dtype == torch.float32 or policy == "window":
        assert agree > 0
    assert worst < (1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("policy", ["hashevict", "snapkv", "h2o"])
@pytest.mark.parametrize("shape", ["8 over 2 of 64", "normed heads", "a sliding window in one layer"])
def test_the_result_does_not_depend_on_how_the_input_is_cut(shape: str, policy: str) -> None:
    fused = fuse(random_model(SHAPES[shape], torch.float64))
    tokens, retention, runs = tokens_of(100), Retention.of(40, evict_every=4), []
    for chunks in ((1,), (7,), (64,), (1000,), MIXED):
        cache = cache_of(fused, policy, retention)
        runs.append((run_mixed(fused, cache, tokens, chunks), kept_positions(cache)))
    for logits, kept in runs[1:]:
        assert kept == runs[0][1]
        close(logits, runs[0][0])


def test_a_long_stretch_is_attended_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few queries attend together: by count, or because their mask would be too large."""
    model, tokens = random_model(tiny_config(sliding_windows=(None, 20)), torch.float64), tokens_of(200, rows=2)
    fused, retention = fuse(model), Retention.of(90, evict_every=50)
    expected = run(model, cache_of(model, "hashevict", retention, rows=2), tokens, 1000)
    layer = cache_of(model, "hashevict", retention, rows=2).layers[0]
    for name, value, most in (("LONGEST", 5, 5), ("MASK_BYTES", 6000, 6000 // (2 * 8 * 90)), ("MASK_BYTES", 1, 1)):
        with monkeypatch.context() as patch:
            patch.setattr(cpu, name, value)
            cache = cache_of(model, "hashevict", retention, rows=2)
            assert cpu.query_block(layer, cache.append(10), torch.empty(0, dtype=torch.float64), None) == most
            cache.reset()
            close(run(fused, cache, tokens, 1000), expected)


def test_int8_cache() -> None:
    """Decoded by the reference, prefilled by torch's kernel; in bfloat16, too."""
    for dtype, policy in ((torch.float64, "hashevict"), (torch.float64, "window"), (torch.bfloat16, "window")):
        model, tokens, retention = random_model(heads(6, 2, 64), dtype), tokens_of(120, rows=2), Retention.of(48)
        caches = [cache_of(model, policy, retention, rows=2, int8=True) for _ in range(2)]
        expected, found = (run_mixed(m, cache, tokens) for m, cache in zip((model, fuse(model)), caches, strict=True))
        assert not cpu.serves_decode(caches[1].layers[0], dtype)
        assert distance(found, expected) < (1e-12 if dtype == torch.float64 else 0.03)
        assert kept_positions(caches[0]) == kept_positions(caches[1])


@pytest.mark.parametrize("mode", ["absolute", "window"])
@pytest.mark.parametrize("exact", [True, False])
def test_rows_in_different_phases(exact: bool, mode: PositionMode) -> None:
    """Three rows that are 0, 21 and 100 tokens in, and go on together: filling, and evicting at different times."""
    dtype = torch.float64 if exact else torch.bfloat16
    config = heads(6, 2, 64, max_position_embeddings=TRAINED, sliding_windows=(None, 25))
    model, leads, policy = random_model(config, dtype), (0, 21, 100), "hashevict" if exact else "window"
    fused, retention = fuse(model), Retention.of(40, sinks=3, evict_every=5)
    both = []
    for m in (model, fused):
        together = cache_of(m, policy, retention, rows=3, mode=mode)
        for row, lead in enumerate(leads[1:], 1):
            alone = cache_of(m, policy, retention, mode=mode)
            run(m, alone, tokens_of(lead, seed=row), 16)
            for mine, theirs in zip(together.layers, alone.layers, strict=True):
                for name in theirs.tensors().keys() - alone.fixed:
                    mine.tensors()[name][row] = theirs.tensors()[name][0]
            together.seen[row] = lead
        logits = run_mixed(m, together, tokens_of(90, rows=3, seed=9), (1, 16, 1, 7))
        both.append((logits, kept_positions(together)))
    assert both[0][1] == both[1][1]
    assert distance(both[1][0], both[0][0]) < (1e-13 if exact else 0.03)


# --- past the trained length: sinks and pins are asked from afar ------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "sinks", "chunk"),
    [
        *((32, 3, chunk) for chunk in (1, 7, 64, 1000)),
        *((64, 0, chunk) for chunk in (1, 64, 1000)),
        *((64, 3, chunk) for chunk in (1, 7, 40, 64, 1000)),
        *((60, 40, chunk) for chunk in (1, 7, 1000)),
    ],
)
def test_past_the_trained_length(slots: int, sinks: int, chunk: int) -> None:
    """With fewer slots than the window and with more; the second layer has a window of its own, and no far sinks."""
    config = heads(4, 2, 32, max_position_embeddings=TRAINED, sliding_windows=(None, 30))
    model, tokens, policy = random_model(config, torch.float64), tokens_of(130, rows=2), "hashevict"
    retention = Retention.of(slots, sinks=sinks, evict_every=2)
    theirs, ours = (cache_of(model, policy, retention, rows=2, mode="window") for _ in range(2))
    assert [layer.far for layer in ours.layers] == [True, False]
    expected = run(model, theirs, tokens, 1000)
    if sinks and chunk == 1:
        absolute = run(model, cache_of(model, policy, retention, rows=2), tokens, 1000)
        assert float((expected - absolute)[:, TRAINED + 5 :].abs().max()) > 0.1, "the mode would not matter"
    close(run(fuse(model), ours, tokens, chunk), expected)
    assert kept_positions(ours) == kept_positions(theirs)


@pytest.mark.parametrize("length", [46, 48, pytest.param(50, id="50: with far queries")])
def test_a_stretch_longer_than_the_window_shows_no_token_the_sinks_after_it(length: int) -> None:
    config = heads(4, 2, 32, max_position_embeddings=TRAINED)
    fused = fuse(random_model(config, torch.float64))
    retention, tokens = Retention.of(64, sinks=4), tokens_of(length)
    by_one, whole = (run(fused, cache_of(fused, "full", retention, mode="window"), tokens, n) for n in (1, length))
    close(whole, by_one)


@pytest.mark.parametrize("shape", ["8 over 2 of 64", "16 over 1 of 128", "4 over 2 of 80"])
def test_past_the_trained_length_in_bfloat16(shape: str) -> None:
    config = replace(SHAPES[shape], max_position_embeddings=TRAINED)
    model, tokens, retention = random_model(config, torch.bfloat16), tokens_of(150), Retention.of(40, sinks=3)
    expected, found = (
        run_mixed(m, cache_of(m, "window", retention, mode="window"), tokens, (30, 1, 7, 64))
        for m in (model, fuse(model))
    )
    print(f"relative difference past the trained length: {distance(found, expected):.2%}")
    assert distance(found, expected) < 0.03


@pytest.mark.parametrize("mode", ["absolute", "window"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@pytest.mark.parametrize("pins", [[(5, 9)], [(0, 2), (30, 33)], [(60, 64)]])
def test_pins(pins: Pins, chunk: int, mode: PositionMode) -> None:
    """Pinned before the cache is full and after; in the window mode some are then asked from afar."""
    for dtype, policy in ((torch.float64, "hashevict"), (torch.bfloat16, "window")):
        model = random_model(heads(4, 2, 32, max_position_embeddings=TRAINED), dtype)
        tokens, retention = tokens_of(90), Retention.of(32, sinks=2, evict_every=3)
        caches = [cache_of(model, policy, retention, mode=mode) for _ in range(2)]
        expected = run_pinned(model, caches[0], tokens, 1000, pins)
        found = run_pinned(fuse(model), caches[1], tokens, chunk, pins)
        assert distance(found, expected) < (1e-12 if dtype == torch.float64 else 0.03)
        assert kept_positions(caches[0]) == kept_positions(caches[1])
        kept = set(kept_positions(caches[1])[0][0][0])
        if mode == "absolute":
            assert {position for start, stop in pins for position in range(start, stop)} <= kept


# --- attention alone --------------------------------------------------------------------------------------------------


def random_heads(generator: torch.Generator, count: int, length: int, dtype: torch.dtype) -> Tensor:
    """Two rows [2, count, length, 64], laid out as the model's are: the heads of a token side by side."""
    return torch.randn(2, length, count, 64, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.parametrize("far", [False, True])
def test_attention_has_the_results_and_the_effects_of_the_reference(
    far: bool, flagged: bool, int8: bool, dtype: torch.dtype
) -> None:
    """One layer, span after span, some of them padded: the result, and every tensor of the layer."""
    config = heads(6, 2, 64, num_hidden_layers=1, max_position_embeddings=TRAINED)
    policy = make_policy("window" if dtype == torch.bfloat16 else "hashevict")
    retention, mode = Retention.of(36, sinks=3, evict_every=5), "window" if far else "absolute"
    caches = [
        KVCache(config, policy, retention, rows=2, dtype=dtype, int8=int8, position_mode=mode)  # type: ignore[arg-type]
        for _ in range(2)
    ]
    dice = torch.Generator().manual_seed(0)
    for length, padded in ((1, 1), (20, 32), (30, 30), (1, 1), (1, 1), (1, 8), (47, 64), (1, 1), (6, 6)):
        q, k, v = (random_heads(dice, count, padded, dtype) for count in (6, 2, 2))
        q_far = random_heads(dice, 6, padded, dtype) if far else None
        flags = PINNED * (torch.rand(2, padded, generator=dice) < 0.03).to(torch.uint8) if flagged else None
        results = []
        for attend_, cache in zip((reference.attend_, cpu.attend_), caches, strict=True):
            span = cache.append(length, padded=padded, flags=flags)
            results.append(attend_(cache.layers[0], q.clone(), k, v, span, None if q_far is None else q_far.clone()))
        expected, found = results
        assert found.shape == expected.shape == (2, 6, padded, 64)
        assert not found[:, :, length:].any(), "padding gives zeros"
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.03}[dtype]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
        theirs, ours = (cache.layers[0].tensors() for cache in caches)
        assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert caches[1].seen == [108, 108]


@pytest.mark.parametrize("layout", ["of the model", "contiguous"])
def test_a_stretch_of_one_token_in_a_longer_span(layout: str) -> None:
    """Every token evicts: the stretches of a chunk are single tokens, whose heads may lie apart."""
    config, dice = heads(6, 2, 64, num_hidden_layers=1), torch.Generator().manual_seed(0)
    q, k, v = (random_heads(dice, count, 80, torch.bfloat16) for count in (6, 2, 2))
    if layout == "contiguous":
        q = q.contiguous()
    results = []
    for attend_ in (reference.attend_, cpu.attend_):
        cache = KVCache(config, make_policy("window"), Retention(40, 2, 5, 1), rows=2, dtype=torch.bfloat16)
        results.append(attend_(cache.layers[0], q, k, v, cache.append(80)))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0.03)


@pytest.mark.skipif(native.missing() is not None, reason=f"native.c: {native.missing()}")
@pytest.mark.parametrize("sinks", [3, 256, 257, 300])
def test_many_sinks_are_all_asked_from_afar(sinks: int) -> None:
    """More than a thread of native.c takes at a time."""
    config = heads(4, 2, 64, num_hidden_layers=1, max_position_embeddings=400)
    retention, dice, results = Retention.of(420, sinks=sinks), torch.Generator().manual_seed(0), []
    q, k, v, q_far = (random_heads(dice, count, 450, torch.bfloat16) for count in (4, 2, 2, 4))
    for attend_ in (reference.attend_, cpu.attend_):
        cache = KVCache(config, make_policy("window"), retention, rows=2, dtype=torch.bfloat16, position_mode="window")
        layer, before, one = cache.layers[0], slice(0, 449), slice(449, 450)
        reference.attend_(layer, *(x[:, :, before] for x in (q, k, v)), cache.append(449), q_far[:, :, before])
        results.append(attend_(layer, *(x[:, :, one] for x in (q, k, v)), cache.append(1), q_far[:, :, one]))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=2e-3)


# --- the transform ----------------------------------------------------------------------------------------------------


@each_shape
def test_every_tensor_is_used_once_and_no_plain_layer_is_left(config: ModelConfig) -> None:
    model = random_model(config, torch.float32)
    names = [name for step in Fusion(torch.float32).steps(empty_model(config)) for name in step.names]
    assert len(names) == len(set(names))
    left = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(config.num_hidden_layers):
        norms = ["input_layernorm", "post_attention_layernorm"]
        norms += ["self_attn.q_norm", "self_attn.k_norm"] if config.qk_norm else []
        left |= {f"model.layers.{layer}.{norm}.weight" for norm in norms}
    assert {*names} | left == {name for name, _ in model.named_parameters()}
    assert not {*names} & left
    fused = fuse(model)
    assert all(isinstance(layer, FusedLayer) for layer in fused.model.layers)
    assert not any(isinstance(module, (nn.Linear, Attention)) for module in fused.modules())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in fused.parameters())


def test_where_torch_packs_nothing_it_multiplies_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "can_pack", lambda dtype: False)  # noqa: ARG005
    for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 0.03)):
        model, tokens = random_model(SHAPES["biases"], dtype), tokens_of(60)
        fused = fuse(model)
        kinds = {type(module) for module in fused.modules() if isinstance(module, linear.Linear)}
        assert kinds == {linear.PlainLinear}
        expected, found = (run_mixed(m, cache_of(m, "window", Retention.of(32)), tokens) for m in (model, fused))
        assert distance(found, expected) < most


# --- checkpoints and the command line ---------------------------------------------------------------------------------

FAMILIES: dict[str, ModelConfig] = {
    "llama": heads(4, 2, 32, qkv_bias=True, o_bias=True, mlp_bias=True),
    "llama, tied": heads(4, 2, 32, tie_word_embeddings=True),
    "mistral": heads(4, 2, 32, architecture="MistralForCausalLM", sliding_windows=(20, 20)),
    "qwen2": heads(4, 2, 32, architecture="Qwen2ForCausalLM", qkv_bias=True, sliding_windows=(None, 20)),
    "qwen3": heads(4, 2, 32, architecture="Qwen3ForCausalLM", qk_norm=True),
}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_alike(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    """From files in any dtype: the same logits on both backends, and progress that counts every byte."""
    config = FAMILIES[family]
    save_checkpoint(tmp_path, random_model(config, torch.float32), config, dtype=stored)
    for dtype, most in (("float32", 1e-5), ("bfloat16", 0.03)):
        logits = {}
        for backend in ("reference", "cpu"):
            checkpoint = Checkpoint.open(str(tmp_path), dtype=dtype, device="cpu", backend=backend, offline=True)
            seen: list[tuple[int, int]] = []
            model = checkpoint.load_model(lambda *step, seen=seen: seen.append(step))
            total = sum(parameter.numel() for parameter in empty_model(config).parameters()) * stored.itemsize
            assert seen == sorted(seen)
            assert seen[-1] == (total, total)
            assert {type(layer) for layer in model.model.layers} == {FusedLayer if backend == "cpu" else Layer}
            logits[backend] = run_mixed(model, cache_of(model, "window", Retention.of(16)), tokens_of(40))
        assert distance(logits["cpu"], logits["reference"]) < most


def llm_of(backend: str, dtype: str, **options: Any) -> LLM:
    checkpoint = Checkpoint.open(dtype=dtype, backend=backend, offline=True)
    assert checkpoint.backend == backend
    return LLM(checkpoint, checkpoint.load_model(), checkpoint.plan(**options))


@pytest.mark.parametrize("options", [{}, {"budget": 48, "policy": "hashevict"}], ids=["everything", "48 tokens"])
def test_the_demo_says_the_same_in_float32(options: dict[str, Any]) -> None:
    texts = []
    for backend in ("reference", "cpu"):
        llm = llm_of(backend, "float32", **options)
        texts.append(llm.generate("Once upon a time", max_tokens=70, temperature=0.0, ignore_eos=True).text)
    assert len(texts[0]) > 100
    assert texts[0] == texts[1]


def test_the_demo_in_bfloat16_predicts_as_well() -> None:
    story = "Once upon a time there was a little girl who lived in a house near the forest with her mother. " * 8
    scores = {}
    for backend, dtype in (("reference", "float32"), ("reference", "bfloat16"), ("cpu", "bfloat16")):
        llm = llm_of(backend, dtype)
        tokens = torch.cat(list(encode_prompt(llm.checkpoint, story, raw=True)))
        scores[backend, dtype] = llm.score(tokens).nats_per_token
    print(", ".join(f"{backend} {dtype} {nats:.4f} nats per token" for (backend, dtype), nats in scores.items()))
    assert max(scores.values()) - min(scores.values()) < 0.02


def test_who_computes() -> None:
    cpu_device, cuda = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_backend("auto", dtype, cpu_device) == choose_backend("cpu", dtype, cpu_device) == "cpu"
        assert choose_backend("reference", dtype, cpu_device) == "reference"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that Triton is there, if it is
            assert choose_backend("auto", dtype, cuda) == "reference"
    assert choose_backend("auto", torch.float16, cpu_device) == "reference"
    with pytest.raises(ConfigError, match=r"backend cpu computes .* not float16 on cpu; use --backend reference"):
        choose_backend("cpu", torch.float16, cpu_device)
    with pytest.raises(ConfigError, match=r"backend cpu computes .* not float32 on cuda; use --backend reference"):
        choose_backend("cpu", torch.float32, cuda)
    with pytest.raises(ConfigError, match="backend is 'gpu'; choose one of auto, reference, cpu"):
        choose_backend("gpu", torch.float32, cpu_device)
    with pytest.raises(ConfigError, match="not float16 on cpu"):
        Checkpoint.open(dtype="float16", device="cpu", backend="cpu", offline=True)


def test_what_computed_is_named() -> None:
    named = {
        (backend, dtype): Checkpoint.open(dtype=dtype, device="cpu", backend=backend, offline=True).computed_by
        for backend in ("reference", "cpu")
        for dtype in ("float32", "bfloat16")
    }
    assert named["reference", "float32"] == named["reference", "bfloat16"] == "reference"
    assert named["cpu", "float32"] == "cpu"
    assert named["cpu", "bfloat16"] == ("cpu" if native.missing() else "cpu with native.c")


def test_a_backend_that_cannot_serve_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "Hi", "--backend", "cpu", "--dtype", "float16", "--device", "cpu", "--offline"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("minillm: error: backend cpu computes float32 and bfloat16 on the CPU, not float16")
    assert captured.err.count("\n") == 1
    assert main(["generate", "Hi", "--backend", "gpu"]) == 2
    assert "--backend" in capsys.readouterr().err


def test_generate_takes_a_backend(capsys: pytest.CaptureFixture[str]) -> None:
    texts, words = [], ["--dtype", "float32", "--device", "cpu", "--threads", "1", "--offline", "--json"]
    for backend in ("reference", "cpu"):
        asked = ["generate", "Once upon a time", "--backend", backend, "--max-tokens", "12", "--temperature", "0"]
        assert main([*asked, *words]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1]
