"""A transform for the CPU: the layers of a model built on the meta device, replaced by layers of fewer operations.

A layer here computes what `model.Layer` does, with queries, keys and values in one product, gate and up in another,
and the weights packed or quantised.  `steps` says which tensors of a checkpoint make which part, so that the loader can
read, convert and drop them one part at a time.  model.py knows nothing of this, and this knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backends import cpu
from .backends.linear import DenseLinear, Linear, make_linear, quantise
from .model import Attend, Layer, Rotation, Transformer
from .quant import Quantised, Scheme
from .slots import LayerCache, Span

Read = Callable[[str], Tensor | Quantised]  # a tensor of the checkpoint by name, in the model's dtype if it is one


class Step(NamedTuple):
    """One part of a model: the tensors that it is made of, and what makes it of them."""

    names: tuple[str, ...]
    install: Callable[[Read], None]


class FusedLayer(nn.Module):
    """`model.Layer`, with its arguments, effects and result (in another rounding)."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        attention = layer.self_attn
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.attend: Attend = cpu.attend_
        self.normalises = not isinstance(attention.q_norm, nn.Identity)
        self.head_dim = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim

    def forward(
        self, x: Tensor, rotation: Rotation, far_rotation: Rotation | None, span: Span, cache: LayerCache
    ) -> Tensor:
        norm, post = self.input_layernorm, self.post_attention_layernorm
        joined = self.qkv(cpu.rms_norm(x, norm.weight, norm.eps)).unflatten(2, (-1, self.head_dim))
        turning, kv = self.heads + self.kv_heads, self.kv_heads
        turning_heads = joined[:, :, :turning]  # [B, T, H + Hkv, D]
        if self.normalises:
            q, k = self.q_norm(joined[:, :, : self.heads]), self.k_norm(joined[:, :, self.heads : turning])
            turning_heads = torch.cat((q, k), 2)
        turned = cpu.rotate(turning_heads, *rotation)  # [B, H + Hkv, T, D]
        q_far = None if far_rotation is None else cpu.rotate(turning_heads[:, :, : self.heads], *far_rotation)
        v = joined[:, :, turning:].transpose(1, 2)  # [B, Hkv, T, D]
        y = self.attend(cache, turned[:, :-kv], turned[:, -kv:], v, span, q_far)  # [B, H, T, D]
        y = self.o(y.transpose(1, 2).flatten(2))  # [B, T, hidden]
        y = self.gate_up(cpu.rms_norm(x, post.weight, post.eps, delta=y))  # x has grown by y
        return x.add_(self.down(cpu.gated(y)))


@dataclass(frozen=True)
class Fusion:
    """How a model is to be computed on the CPU.  scheme: of its weights; None = in the model's dtype."""

    dtype: torch.dtype
    scheme: Scheme | None = None

    def steps(self, model: Transformer) -> Iterator[Step]:
        """Replace the layers of an empty model by empty fused ones, and say what fills them."""
        for index, layer in enumerate(model.model.layers):
            assert isinstance(layer, Layer)
            fused, at = FusedLayer(layer), f"model.layers.{index}"
            for part, names in {
                "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "o": ("self_attn.o_proj",),
                "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
                "down": ("mlp.down_proj",),
            }.items():
                owner, _, leaf = names[0].partition(".")
                biased = getattr(getattr(layer, owner), leaf).bias is not None
                yield self._step(fused, part, [f"{at}.{name}" for name in names], biased)
            model.model.layers[index] = fused
        if model.lm_head is not None:
            yield self._step(model, "lm_head", ["lm_head"], biased=False)
        elif self.scheme is not None:  # the shared matrix once more, smaller, for the output alone
            yield self._step(model, "lm_head", ["model.embed_tokens"], biased=False)

    def dense_step(self, owner: nn.Module, part: str, module: str, biased: bool) -> Step:
        """One linear layer, kept quantised and multiplied dense; runs on every device."""

        def install(read: Read) -> None:
            weight = self._stored(part, module, read(f"{module}.weight"))
            assert isinstance(weight, Quantised), module
            setattr(owner, part, DenseLinear(weight, read(f"{module}.bias") if biased else None))  # type: ignore[arg-type]

        return Step(tuple(f"{module}.{kind}" for kind in ("weight", "bias")[: 1 + biased]), install)

    def _step(self, owner: nn.Module, part: str, modules: list[str], biased: bool) -> Step:
        """Several linear layers of one input as one: the attribute `part` of `owner`."""

        def install(read: Read) -> None:
            weights = [self._stored(part, name, read(f"{name}.weight")) for name in modules]
            biases = [read(f"{name}.bias") for name in modules] if biased else []
            bias = torch.cat(biases) if biased else None  # type: ignore[arg-type]
            weight = _join(weights)
            del weights
            rounds = self.scheme is not None and self.scheme.rounds_activations
            setattr(owner, part, make_linear(weight, bias, dtype=self.dtype, rounds_activations=rounds))

        kinds = ("weight", "bias") if biased else ("weight",)
        return Step(tuple(f"{name}.{kind}" for name in modules for kind in kinds), install)

    def _stored(self, part: str, name: str, weight: Tensor | Quantised) -> Tensor | Quantised:
        if self.scheme is None or isinstance(weight, Quantised):
            return weight
        return quantise(weight, self.scheme.bits(part if part == "lm_head" else name, weight.shape[1]))


def _join(weights: list[Tensor | Quantised]) -> Tensor | Quantised:
    if isinstance(weights[0], Quantised):
        return Quantised.join(weights)  # type: ignore[arg-type]
    return torch.cat(weights) if len(weights) > 1 else weights[0]  # type: ignore[arg-type]


def unfused_steps(model: Transformer, dtype: torch.dtype, scheme: Scheme | None) -> Iterator[Step]:
    """For every other backend: the linear layers of a quantised model one by one, dense for the moment of their use."""
    if scheme is None:
        return
    quantised = Fusion(dtype, scheme)
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in found.items():
        owner, _, leaf = name.rpartition(".")
        yield quantised.dense_step(model.get_submodule(owner), leaf, name, module.bias is not None)
    if model.lm_head is None:
        yield quantised.dense_step(model, "lm_head", "model.embed_tokens", biased=False)
