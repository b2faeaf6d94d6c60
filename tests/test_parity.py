"""The same logits and the same greedy tokens as transformers, one tiny random checkpoint per family.

The checkpoint is written by transformers, read by our loader, and fed through our one bounded path: a cache of slots,
prefill in chunks, then token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minillm.loader import load_model, read_config, save_checkpoint
from minillm.model import Transformer

from .helpers import make_cache, run

transformers = pytest.importorskip("transformers", reason="parity needs the extra 'test'")

PROMPT, GREEDY = 150, 20
SHAPE: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama-2": {"model_type": "llama", "num_key_value_heads": 4},
    "llama-1": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "max_position_embeddings": 128},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-3": {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    "llama-3.1": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-3.2": {"model_type": "llama", "rope_parameters": LLAMA3 | {"factor": 32.0}, "tie_word_embeddings": True},
    "tinyllama": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 1},
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "yarn": {"model_type": "llama", "rope_parameters": YARN},
    "yarn-exact": {
        "model_type": "llama",
        "rope_parameters": YARN | {"truncate": False, "beta_fast": 4, "beta_slow": 0.5},
    },
    "yarn-mscale": {"model_type": "llama", "rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}},
    "yarn-attention": {"model_type": "llama", "rope_parameters": YARN | {"factor": 16.0, "attention_factor": 0.8}},
    "mistral-v0.1": {"model_type": "mistral", "sliding_window": 32},
    "mistral-v0.3": {
        "model_type": "mistral",
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "mistral-nemo": {"model_type": "mistral", "sliding_window": None, "head_dim": 24},
    "qwen2": {"model_type": "qwen2", "rms_norm_eps": 1e-6},
    "qwen2-window": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 16,
        "max_window_layers": 1,
        "tie_word_embeddings": True,
    },
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "rms_norm_eps": 1e-6},
    "qwen3-yarn": {"model_type": "qwen3", "head_dim": 8, "attention_bias": True, "rope_parameters": YARN},
}


def _reference(name: str) -> Any:
    """A random transformers model in which biases and norm weights matter, too."""
    settings = SHAPE | {"attn_implementation": "eager"} | FAMILIES[name]
    config = transformers.AutoConfig.for_model(**settings)
    torch.manual_seed(sum(map(ord, name)))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "norm" in key:
                parameter.uniform_(0.5, 1.5)
    return model


def _load(folder: Path) -> Transformer:
    return load_model(folder, read_config(folder), dtype=torch.float32, device=torch.device("cpu"))


@torch.inference_mode()
def _greedy(model: Any, tokens: Tensor) -> Tensor:
    """A prompt [1, n] and its greedy continuation, computing everything anew for each token: no cache to be wrong."""
    for _ in range(GREEDY):
        best = model(tokens).logits[:, -1:].argmax(-1)  # [1, 1]
        tokens = torch.cat((tokens, best), 1)  # [1, n + i]
    return tokens  # [1, n + GREEDY]


@pytest.fixture(autouse=True)
def _quiet_and_single_threaded() -> Iterator[None]:
    """Matrices this small gain nothing from threads, and lose much where the machine is busy."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    reference = _reference(name)
    sharded = name in ("llama-2", "qwen3", "smollm2")
    reference.save_pretrained(tmp_path, **({"max_shard_size": "60KB"} if sharded else {}))
    assert sharded == (len(list(tmp_path.glob("*.safetensors"))) > 1)
    model = _load(tmp_path)

    tokens = torch.randint(0, SHAPE["vocab_size"], (1, PROMPT), generator=torch.Generator().manual_seed(0))  # [1, n]
    tokens = _greedy(reference, tokens)  # [1, n + GREEDY]
    with torch.inference_mode():
        expected = reference(tokens).logits  # [1, n + GREEDY, V]
    cache = make_cache(model, "full", slots=256)
    prefill = run(model, cache, tokens[:, :PROMPT], chunk=48)  # [1, n, V]
    decode = run(model, cache, tokens[:, PROMPT:], chunk=1)  # [1, GREEDY, V]
    ours = torch.cat((prefill, decode), 1)  # [1, n + GREEDY, V]
    assert expected.std() > 0.3, "flat logits would prove nothing"
    assert (ours - expected).abs().max() < 1e-4
    assert torch.equal(ours[:, PROMPT - 1 : -1].argmax(-1), tokens[:, PROMPT:])


@pytest.mark.parametrize("name", ["llama-3.2", "mistral-v0.1", "qwen3-yarn"])
def test_transformers_reads_what_we_save(name: str, tmp_path: Path) -> None:
    reference = _reference(name)
    reference.save_pretrained(tmp_path / "theirs")
    model = _load(tmp_path / "theirs")
    save_checkpoint(tmp_path / "ours", model, model.config)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", dtype=torch.float32
    )
    tokens = torch.arange(64)[None]  # [1, 64]
    with torch.inference_mode():
        assert torch.equal(again(tokens).logits, reference(tokens).logits)
