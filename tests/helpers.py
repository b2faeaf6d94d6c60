"""Small random models and the shortest way to run tokens through them."""

from __future__ import annotations

import torch
from torch import Tensor

from minillm.cache import KVCache, PositionMode
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.generate import feed
from minillm.model import Transformer
from minillm.policies import make_policy


def tiny_config(**changes: object) -> ModelConfig:
    """Two layers, four heads over two KV heads."""
    layers = changes.get("num_hidden_layers", 2)
    fields: dict[str, object] = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_windows": (None,) * layers,  # type: ignore[operator]
        "tie_word_embeddings": False,
        "qkv_bias": False,
        "o_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "dtype": "float32",
    }
    return ModelConfig(**{**fields, **changes})  # type: ignore[arg-type]


def tiny_model(config: ModelConfig | None = None, dtype: torch.dtype = torch.float32, seed: int = 0) -> Transformer:
    """Random weights of the usual scale (unit gain), so that logits are of order one and attention is not uniform."""
    torch.manual_seed(seed)
    model = Transformer(config or tiny_config()).to(dtype)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return model.requires_grad_(False)


def make_cache(
    model: Transformer,
    policy: str = "hashevict",
    slots: int = 64,
    rows: int = 1,
    position_mode: PositionMode = "absolute",
    **options: int | None,
) -> KVCache:
    """A cache for `model` in the model's dtype; retention options and policy options alike by name."""
    retention = {name: options.pop(name, None) for name in ("sinks", "recent", "evict_every")}
    rule = make_policy(policy, **options)
    return KVCache(
        model.config,
        rule,
        Retention.of(slots, recent_share=rule.recent_share, **retention),
        rows=rows,
        position_mode=position_mode,
        dtype=model.model.embed_tokens.weight.dtype,
    )


@torch.inference_mode()
def run(model: Transformer, cache: KVCache, tokens: Tensor, chunk: int) -> Tensor:
    """Logits [B, n, V] of tokens [B, n], fed `chunk` at a time."""
    return torch.cat([model.logits(hidden) for _, hidden in feed(model, cache, tokens, chunk)], 1)


def kept_positions(cache: KVCache) -> list[list[list[list[int]]]]:
    """Sorted positions of the live slots: [layer][row][head]."""
    return [
        [[sorted(p for p in head if p >= 0) for head in row] for row in layer.positions.tolist()]
        for layer in cache.layers
    ]
