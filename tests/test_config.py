"""config.json in all its dialects: what is read, what is refused by name, and the real files."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from minillm.config import FAMILIES, ModelConfig, RopeScaling
from minillm.errors import ConfigError
from minillm.inventory import weights_of
from minillm.loader import read_config
from minillm.model import Transformer

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"]}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
NOTHING = (None, None, None, None)


def parse(base: dict[str, Any], **changes: object) -> ModelConfig:
    return ModelConfig.from_hf(base | changes)


def test_absent_keys_have_the_documented_defaults() -> None:
    config = parse(LLAMA)
    assert config == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=8,
        max_position_embeddings=128,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        rope_scaling=None,
        sliding_windows=NOTHING,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        bos_token_id=1,
        eos_token_ids=(2,),
        dtype=None,
    )
    every_null = dict.fromkeys(["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "rope_scaling"])
    every_null |= dict.fromkeys(["rope_parameters", "sliding_window", "hidden_act", "torch_dtype", "attention_bias"])
    assert parse(LLAMA, **every_null) == config


def test_the_four_families_differ_as_their_table_says() -> None:
    facts = {
        name: (config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm, config.eos_token_ids)
        for name in FAMILIES
        for config in [parse(LLAMA, architectures=[name], attention_bias=True, mlp_bias=True)]
    }
    assert facts == {
        "LlamaForCausalLM": (True, True, True, False, (2,)),
        "MistralForCausalLM": (False, False, False, False, (2,)),
        "Qwen2ForCausalLM": (True, False, False, False, ()),
        "Qwen3ForCausalLM": (True, True, False, True, ()),
    }
    assert not parse(QWEN3).qkv_bias
    assert parse(QWEN2).qkv_bias


def test_model_type_stands_in_for_absent_architectures() -> None:
    absent: tuple[object, ...] = (None, [])
    for architectures in absent:
        assert parse(LLAMA, architectures=architectures, model_type="qwen3").architecture == "Qwen3ForCausalLM"


def test_head_dim_is_read_or_derived() -> None:
    assert parse(LLAMA, head_dim=16).head_dim == 16
    assert parse(LLAMA, head_dim=16, hidden_size=63).hidden_size == 63
    assert parse(LLAMA, num_key_value_heads=2).num_key_value_heads == 2


@pytest.mark.parametrize(("written", "read"), [("bfloat16", "bfloat16"), ("torch.float16", "float16")])
def test_dtype_has_two_names(written: str, read: str) -> None:
    assert parse(LLAMA, torch_dtype=written).dtype == parse(LLAMA, dtype=written).dtype == read


def test_token_ids_are_numbers_lists_or_null() -> None:
    assert parse(LLAMA, eos_token_id=[5, 7, 5]).eos_token_ids == (5, 7)
    assert parse(LLAMA, eos_token_id=0).eos_token_ids == (0,)
    config = parse(LLAMA, eos_token_id=None, bos_token_id=None)
    assert (config.eos_token_ids, config.bos_token_id) == ((), None)


@pytest.mark.parametrize(
    ("base", "keys", "windows"),
    [
        (MISTRAL, {}, NOTHING),
        (MISTRAL, {"sliding_window": 0}, NOTHING),
        (MISTRAL, {"sliding_window": 16}, (16,) * 4),
        (MISTRAL, {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2}, (None, 16) * 2),
        (LLAMA, {"sliding_window": 16, "use_sliding_window": False}, NOTHING),
        (QWEN2, {"sliding_window": 16}, NOTHING),
        (QWEN2, {"sliding_window": 16, "use_sliding_window": True}, NOTHING),  # max_window_layers is 28
        (QWEN2, {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 3}, (None, None, None, 16)),
        (QWEN3, {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, (16,) * 4),
        (QWEN3, {"sliding_window": 16, "use_sliding_window": False, "max_window_layers": 0}, NOTHING),
        (QWEN3, {"sliding_window": None, "use_sliding_window": True, "max_window_layers": 0}, NOTHING),
    ],
)
def test_sliding_windows(base: dict[str, Any], keys: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    assert parse(base, **keys).sliding_windows == windows


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("type_key", ["type", "rope_type"])
def test_rope_is_read_from_both_keys_and_both_names(key: str, type_key: str) -> None:
    linear = parse(LLAMA, **{key: {type_key: "linear", "factor": 2, "rope_theta": 500.0}})
    assert (linear.rope_theta, linear.rope_scaling) == (500.0, RopeScaling("linear", 2.0))
    plain = parse(LLAMA, rope_theta=300.0, **{key: {type_key: "default"}})
    assert (plain.rope_theta, plain.rope_scaling) == (300.0, None)


def test_llama3_scaling() -> None:
    scaling = RopeScaling("llama3", 8.0, 32, 1.0, 4.0)
    assert parse(LLAMA, rope_scaling=LLAMA3_SCALING).rope_scaling == scaling
    without = {key: value for key, value in LLAMA3_SCALING.items() if key != "original_max_position_embeddings"}
    assert parse(LLAMA, rope_scaling=without).rope_scaling == replace(scaling, original_max_position_embeddings=128)


@pytest.mark.parametrize(
    ("keys", "attention_factor"),
    [
        ({}, 0.1 * math.log(4) + 1),
        ({"attention_factor": 1.5}, 1.5),
        ({"mscale": 0.5}, 0.1 * math.log(4) + 1),  # counts only together with mscale_all_dim
        ({"mscale": 0.5, "mscale_all_dim": 0.8}, (0.05 * math.log(4) + 1) / (0.08 * math.log(4) + 1)),
        ({"factor": 1.0}, 1.0),
    ],
)
def test_yarn_magnitude(keys: dict[str, float], attention_factor: float) -> None:
    raw = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32} | keys
    scaling = parse(LLAMA, rope_scaling=raw | {"truncate": False, "beta_fast": 16}).rope_scaling
    assert scaling is not None
    assert scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
    assert (scaling.beta_fast, scaling.beta_slow, scaling.truncate) == (16.0, 1.0, False)


def test_yarn_factor_defaults_to_the_ratio_of_lengths() -> None:
    raw = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 32}
    scaling = parse(LLAMA, rope_scaling=raw).rope_scaling
    assert scaling is not None
    assert scaling.factor == 4.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM.*supported, one of: LlamaForCausalLM, Mistral"),
        ({"architectures": ["LlamaForCausalLM", "Other"]}, "architectures is .*'Other'"),
        ({"architectures": "LlamaForCausalLM"}, "architectures is 'LlamaForCausalLM'"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures is"),
        ({"architectures": None}, "names no architecture and model_type is None; supported: LlamaForCausalLM"),
        ({"architectures": None, "model_type": ["x"]}, r"model_type is \['x'\]"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config .* quantised with gptq"),
        ({"quantization_config": {"bits": 4}}, "an unnamed method"),
        ({"num_local_experts": 8}, "num_local_experts is 8: a mixture of experts is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ({"attention_sinks": True}, "attention_sinks is True"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; expected 1"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'; supported: default, linear"),
        ({"rope_scaling": {"type": "su"}}, "rope type 'su'"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_scaling": {"rope_type": 3}}, "rope type 3"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling of type 'default' has unknown keys: factor"),
        ({"rope_parameters": {"rope_type": "yarn", "llama_4_scaling_beta": 0.1}}, "unknown keys: llama_4_scaling_beta"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs by layer type .full_attention"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object or null"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "rope_scaling.factor is -2; expected a positive number"),
        ({"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}}, "high_freq_factor is 1.0; expected .* above"),
        ({"rope_theta": math.nan}, "rope_theta is nan; expected a positive number"),
        ({"rope_theta": 0.5}, "rope_theta is 0.5; expected a number above 1"),
        ({"hidden_size": -64}, "hidden_size is -64; expected a positive integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; expected a positive integer"),
        ({"hidden_size": True}, "hidden_size is True; expected a positive integer"),
        ({"hidden_size": "64"}, "hidden_size is '64'; expected a positive integer"),
        ({"hidden_size": None}, "hidden_size is missing; expected a positive integer"),
        ({"hidden_size": 65}, "hidden_size is 65; expected a multiple of num_attention_heads = 8"),
        ({"hidden_size": 40}, "head_dim is 5; expected an even number"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3; expected a divisor of num_attention_heads = 8"),
        ({"num_key_value_heads": 16}, "num_key_value_heads is 16; expected a divisor"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'; expected a positive number"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected true or false"),
        ({"sliding_window": 16}, "sliding_window is 16; expected null"),
        ({"sliding_window": [16, None]}, r"sliding_window is \[16, None\]; expected a positive integer"),
        ({"layer_types": ["full_attention"]}, "layer_types is .*; expected a list of 4 names"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types is .*chunked_attention"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types names sliding_attention, but no sliding_window"),
        ({"bos_token_id": 100}, "bos_token_id is 100; expected a token id below vocab_size = 100"),
        ({"eos_token_id": ["</s>"]}, r"eos_token_id is \['</s>'\]"),
        ({"torch_dtype": "float8_e4m3fn"}, "dtype is 'float8_e4m3fn'; supported: float16, bfloat16"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse(LLAMA, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "raw",
    [
        LLAMA | {"eos_token_id": [5, 7], "bos_token_id": None, "torch_dtype": "bfloat16", "attention_bias": True},
        LLAMA | {"rope_scaling": LLAMA3_SCALING, "tie_word_embeddings": True, "mlp_bias": True, "eos_token_id": None},
        LLAMA | {"rope_scaling": {"type": "linear", "factor": 2.0}, "head_dim": 16, "num_key_value_heads": 2},
        LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.5, "mscale_all_dim": 0.7}},
        MISTRAL,
        MISTRAL | {"sliding_window": 16},
        MISTRAL | {"sliding_window": 16, "layer_types": ["full_attention", "sliding_attention"] * 2},
        QWEN2 | {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2},
        QWEN2 | {"sliding_window": 16},
        QWEN3 | {"attention_bias": True, "head_dim": 16},
    ],
)
def test_to_hf_comes_back_and_means_the_same_to_transformers(raw: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = ModelConfig.from_hf(raw)
    written = json.loads(json.dumps(config.to_hf()))
    assert ModelConfig.from_hf(written) == config
    theirs = transformers.AutoConfig.for_model(**written)
    again = json.loads(theirs.to_json_string())
    assert ModelConfig.from_hf(again | {"architectures": [config.architecture]}) == config


@pytest.mark.parametrize("name", ["Mistral-7B-Instruct-v0.3", "Llama-3.2-3B-Instruct", "Llama-2-7b-chat-hf"])
def test_real_files_parse_and_their_index_has_exactly_our_names(name: str, shared_data: Path) -> None:
    folder = shared_data / "hf-metadata" / name
    config = read_config(folder)
    with torch.device("meta"):
        model = Transformer(config)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    extra = {key for key in index["weight_map"] if key.endswith("rotary_emb.inv_freq")}  # of old transformers, float32
    assert index["weight_map"].keys() - extra == dict(model.named_parameters()).keys()
    weights = weights_of(None, config).nbytes(getattr(torch, str(config.dtype)))
    assert index["metadata"]["total_size"] == weights + len(extra) * config.head_dim // 2 * 4


def test_real_facts(shared_data: Path) -> None:
    llama = read_config(shared_data / "hf-metadata" / "Llama-3.2-3B-Instruct")
    assert llama.eos_token_ids == (128001, 128008, 128009)
    assert llama.rope_scaling == RopeScaling("llama3", 32.0, 8192, 1.0, 4.0)
    assert llama.tie_word_embeddings


def test_a_real_quantised_copy_is_refused_by_name(shared_data: Path) -> None:
    with pytest.raises(ConfigError, match="bitsandbytes"):
        read_config(shared_data / "hf-metadata" / "Llama-3.1-8B-Instruct")
