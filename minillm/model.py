"""The whole network, top to bottom: Llama and its close relatives (Mistral, Qwen2, Qwen3).

Modules carry Hugging Face's names, so the mapping of checkpoint tensors is the identity.  The model holds no sequence
state: the cache is an argument, and each layer receives its own part of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backends.reference import attend_
from .cache import CacheRows, KVCache
from .config import ModelConfig, RopeScaling
from .shard import output_rows
from .slots import LayerSlots, Span

Attend = Callable[[LayerSlots, Tensor, Tensor, Tensor, Span, Tensor | None], Tensor]
Rotation = tuple[Tensor, Tensor]


class Transformer(nn.Module):
    """Tokens in, hidden states out; `logits` turns the hidden states one asks for into scores over the vocabulary."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = (
            None if config.tie_word_embeddings else nn.Linear(config.hidden_size, output_rows(config), bias=False)
        )

    def forward(self, tokens: Tensor, span: Span, cache: KVCache | CacheRows) -> Tensor:
        """tokens [B, T] at the positions of `span` -> hidden states [B, T, hidden]; the tokens enter the cache."""
        return self.model(tokens, span, cache)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [..., hidden] -> float32 (or float64) logits [..., V]."""
        head = self.lm_head
        logits: Tensor = F.linear(hidden, self.model.embed_tokens.weight) if head is None else head(hidden)  # [..., V]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        # No buffer: those follow the model's dtype, and angles are computed in float64 whatever the model runs in.
        self.inverse_frequencies = inverse_frequencies(config)  # [D/2]
        self._frequencies = {self.inverse_frequencies.device: self.inverse_frequencies}
        self.rope_scale = config.rope_scaling.attention_factor if config.rope_scaling else 1.0

    def forward(self, tokens: Tensor, span: Span, cache: KVCache | CacheRows) -> Tensor:
        x = self.embed_tokens(tokens)  # [B, T, hidden]
        rotation, far_rotation = self._rotation(span.host, x), None
        if cache.trained is not None and span.may_pass(cache.trained):
            # Attention knows distances only.  A query that asks sinks and pins as if it stood at the last trained
            # position sees the sinks just behind its window: nothing in the cache has to be turned again.
            far_rotation = self._rotation(span.host.clamp(max=cache.trained - 1), x)
        for layer, layer_cache in zip(self.layers, cache.layers, strict=True):
            x = layer(x, rotation, far_rotation, span, layer_cache)
        return self.norm(x)  # type: ignore[no-any-return]

    def _rotation(self, positions: Tensor, like: Tensor) -> Rotation:
        """cos and sin [B, 1, T, D] for positions [B, T], in the dtype and on the device of `like`.

        Worked out on the CPU, or where the positions lie that it does not know (a recorded step).
        """
        if positions.device not in self._frequencies:
            self._frequencies[positions.device] = self.inverse_frequencies.to(positions.device)
        cos, sin = rope(positions, self._frequencies[positions.device])
        return (cos * self.rope_scale).to(like), (sin * self.rope_scale).to(like)


class Layer(nn.Module):
    """Attention, then the gated feed-forward, each on a normalised copy and added back to the stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, rotation: Rotation, far_rotation: Rotation | None, span: Span, cache: LayerSlots
    ) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotation, far_rotation, span, cache)
        return x + self.mlp(self.post_attention_layernorm(x))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions.  `attend` is chosen once, when the model is loaded."""

    attend: Attend

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=config.o_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else nn.Identity()
        self.attend = attend_

    def forward(
        self, x: Tensor, rotation: Rotation, far_rotation: Rotation | None, span: Span, cache: LayerSlots
    ) -> Tensor:
        q = self.q_proj(x).unflatten(2, (-1, self.head_dim))  # [B, T, H, D]
        k = self.k_proj(x).unflatten(2, (-1, self.head_dim))  # [B, T, Hkv, D]
        v = self.v_proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)  # [B, Hkv, T, D]
        q, k = self.q_norm(q).transpose(1, 2), self.k_norm(k).transpose(1, 2)  # [B, H, T, D], [B, Hkv, T, D]
        q_far = None if far_rotation is None else rotate(q, far_rotation)  # [B, H, T, D]
        y = self.attend(cache, rotate(q, rotation), rotate(k, rotation), v, span, q_far)  # [B, H, T, D]
        return self.o_proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]  # [B, T, hidden]


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]


class RMSNorm(nn.Module):
    """Scale to unit root mean square in at least float32, then by a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope(positions: Tensor, inverse_frequencies: Tensor) -> Rotation:
    """cos and sin [B, 1, T, D] in float64, for positions [B, T] and frequencies [D/2] in radians per position.

    Computed from positions: no table grows with the context, and a million tokens in, the angle is as exact as at the
    start (in float32 it would be off by 0.03 rad).  The first half of sin is negated, which lets `rotate` be one roll.
    """
    angles = positions.to(torch.float64)[:, None, :, None] * inverse_frequencies  # [B, 1, T, D/2]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # [B, 1, T, D]


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the pairs (x[i], x[i + D/2]) of x [B, heads, T, D] by the angles of `rotation` (Hugging Face's half-split
    order).
    """
    cos, sin = rotation
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position of each pair of dimensions: float64 [D/2] on the CPU."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device="cpu") / config.head_dim
    plain = config.rope_theta**-exponents  # [D/2]
    scaling = config.rope_scaling
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    keep = _keep_llama3(plain, scaling) if scaling.kind == "llama3" else _keep_yarn(config, scaling)
    return plain * keep + plain / scaling.factor * (1 - keep)


def _keep_llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's blend, by turns in the old length: short wavelengths kept (1), long stretched (0), linear between."""
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)  # [D/2]
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def _keep_yarn(config: ModelConfig, scaling: RopeScaling) -> Tensor:
    """YaRN's blend (Peng et al., arXiv 2309.00071): linear over dimensions between beta_fast and beta_slow turns."""
    half = config.head_dim // 2

    def dimension(turns: float) -> float:
        length = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return half * math.log(length) / math.log(config.rope_theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    ramp = (torch.arange(half, dtype=torch.float64, device="cpu") - low) / max(high - low, 0.001)  # [D/2]
    return 1 - ramp.clamp(0, 1)
