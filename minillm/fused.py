"""A transform for backends: the layers of a model built on the meta device, replaced by layers of fewer operations.

A layer here computes what `model.Layer` does, with queries, keys and values in one product, gate and up in another,
what stands between products by the backend's own means, and weights packed for the CPU, or quantised.  `steps` says
which tensors of a checkpoint make which part, so that the loader can read, convert and drop them one part at a time.
model.py knows nothing of this, and this knows no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .backends import cpu, linear_cuda, native
from .backends.linear import Linear, PlainLinear, make_linear, quantise
from .model import Attend, Attention, Layer, Rotation, Transformer
from .quant import Quantised, Scheme
from .slots import LayerSlots, Span

CPU = torch.device("cpu")


class Read(Protocol):
    """Reads a tensor of a checkpoint by name: numbers in the model's dtype, or what is stored quantised.

    out: where numbers are to be put.  keep: the tensor will be used as it is, so it may stay mapped.
    """

    def __call__(self, name: str, *, out: Tensor | None = None, keep: bool = False) -> Tensor | Quantised:
        """The tensor; `out` itself where that was given and is what is stored."""


class Step(NamedTuple):
    """One part of a model: the tensors that it is made of, and what makes it of them."""

    names: tuple[str, ...]
    install: Callable[[Read], None]


class Operations(NamedTuple):
    """What stands between linear layers, see backends/cpu.py."""

    attend: Attend
    rms_norm: Callable[..., Tensor]  # x [M, size], weight [size], eps, delta [M, size]
    gated: Callable[[Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]

    @classmethod
    def of(cls, backend: str) -> Operations:
        """Those of "cpu" or "triton"."""
        if backend == "cpu":
            return cls(cpu.attend_, cpu.rms_norm, cpu.gated, cpu.rotate)
        from .backends import triton

        return cls(triton.attend_, triton.rms_norm, triton.gated, triton.rotate)


class FusedLayer(nn.Module):
    """`model.Layer`, with its arguments, effects and result (in another rounding)."""

    qkv: Linear
    o: Linear
    gate_up: Linear
    down: Linear

    def __init__(self, layer: Layer, by: Operations) -> None:
        super().__init__()
        attention = layer.self_attn
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        # By the names of a checkpoint, which the loader follows.
        self.self_attn = nn.ModuleDict({"q_norm": attention.q_norm, "k_norm": attention.k_norm})
        self.by, self.attend = by, by.attend
        self.normalises = not isinstance(attention.q_norm, nn.Identity)
        self.head_dim = attention.head_dim
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim

    def forward(
        self, x: Tensor, rotation: Rotation, far_rotation: Rotation | None, span: Span, cache: LayerSlots
    ) -> Tensor:
        norm, post = self.input_layernorm, self.post_attention_layernorm
        rows = x.flatten(0, 1)  # [B * T, hidden], a view: what is added to it is added to x
        plain = self.attend is cpu.attend_ and not self.normalises  # nobody listens, and keys are as they are
        parts = self._whole(len(rows)) if plain else None
        if parts is not None and cpu.layer_(cache, rows, parts, self.heads, rotation, far_rotation, span):
            return x
        qkv = self.qkv(self.by.rms_norm(rows, norm.weight, norm.eps))  # [B * T, (H + 2 Hkv) * D]
        y = None
        if plain:
            y = cpu.step_(cache, qkv, self.heads, rotation, far_rotation, span)  # [B, H * D]
        if y is None:
            y = self._attend(qkv.unflatten(0, x.shape[:2]), rotation, far_rotation, span, cache)  # [B * T, H * D]
        y = self.gate_up(self.by.rms_norm(rows, post.weight, post.eps, delta=self.o(y)))  # x has grown by what o gave
        rows.add_(self.down(self.by.gated(y)))
        return x

    def _whole(self, rows: int) -> native.Layer | None:
        """This layer as native.c wants it, if that multiplies all of it for so many rows of activations, and
        nobody has to see what a part of it gives.
        """
        parts = (self.qkv, self.o, self.gate_up, self.down)
        forms = [part.form for part in parts if rows <= part.few and not part._forward_hooks]
        if len(forms) < 4 or None in forms:
            return None
        norm, post = self.input_layernorm, self.post_attention_layernorm
        return native.Layer(*forms, norm.weight.data_ptr(), post.weight.data_ptr(), norm.eps, post.eps)

    def _attend(
        self, qkv: Tensor, rotation: Rotation, far_rotation: Rotation | None, span: Span, cache: LayerSlots
    ) -> Tensor:
        """qkv [B, T, (H + 2 Hkv) * D] -> [B * T, H * D]."""
        joined = qkv.unflatten(2, (-1, self.head_dim))  # [B, T, H + 2 Hkv, D]
        turning, kv = self.heads + self.kv_heads, self.kv_heads
        turning_heads = joined[:, :, :turning]  # [B, T, H + Hkv, D]
        if self.normalises:
            q, k = joined[:, :, : self.heads], joined[:, :, self.heads : turning]
            turning_heads = torch.cat((self.self_attn["q_norm"](q), self.self_attn["k_norm"](k)), 2)
        turned = self.by.rotate(turning_heads, *rotation)  # [B, H + Hkv, T, D]
        q_far = None if far_rotation is None else self.by.rotate(turning_heads[:, :, : self.heads], *far_rotation)
        v = joined[:, :, turning:].transpose(1, 2)  # [B, Hkv, T, D]
        y = self.attend(cache, turned[:, :-kv], turned[:, -kv:], v, span, q_far)  # [B, H, T, D]
        return y.transpose(1, 2).flatten(2).flatten(0, 1)


@contextmanager
def listening(model: Transformer, wrap: Callable[[Attend], Attend]) -> Iterator[None]:
    """While this is open, every layer attends by `wrap` of what it attends by."""
    layers = [module for module in model.modules() if isinstance(module, (Attention, FusedLayer))]
    before = [layer.attend for layer in layers]
    try:
        for layer in layers:
            layer.attend = wrap(layer.attend)
        yield
    finally:
        for layer, attend in zip(layers, before, strict=True):
            layer.attend = attend


@dataclass(frozen=True)
class Fusion:
    """How a model is to be computed, and where.  scheme: of its weights; None = in the model's dtype."""

    dtype: torch.dtype
    scheme: Scheme | None = None
    backend: str = "cpu"
    device: torch.device = CPU

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded to 8 bits."""
        return self.scheme is not None and self.scheme.rounds_activations

    def steps(self, model: Transformer) -> Iterator[Step]:
        """Replace the layers of an empty model by empty fused ones, and say what fills them."""
        by = Operations.of(self.backend)
        for index, layer in enumerate(model.model.layers):
            assert isinstance(layer, Layer)
            fused, at = FusedLayer(layer, by), f"model.layers.{index}"
            linears = {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
            for part, names in {
                "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                "o": ("self_attn.o_proj",),
                "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
                "down": ("mlp.down_proj",),
            }.items():
                yield self._step(fused, part, {f"{at}.{name}": linears[name] for name in names})
            model.model.layers[index] = fused
        if model.lm_head is not None:
            yield self._step(model, "lm_head", {"lm_head": model.lm_head})
        elif self.scheme is not None:  # the shared matrix once more, smaller, for the output alone
            yield self._step(model, "lm_head", {"model.embed_tokens": model.model.embed_tokens})

    def single_step(self, owner: nn.Module, part: str, module: str, biased: bool) -> Step:
        """One linear layer, kept quantised; runs on every device."""

        def install(read: Read) -> None:
            weight = self._quantised(part, read, module)
            bias = read(f"{module}.bias") if biased else None
            setattr(owner, part, self._linear(weight, bias))  # type: ignore[arg-type]

        return Step(tuple(f"{module}.{kind}" for kind in ("weight", "bias")[: 1 + biased]), install)

    def _step(self, owner: nn.Module, part: str, layers: Mapping[str, nn.Linear | nn.Embedding]) -> Step:
        """Several linear layers of one input, by name, as one: the attribute `part` of `owner`."""
        modules, first = list(layers), next(iter(layers.values()))
        heights, width = [layer.weight.shape[0] for layer in layers.values()], first.weight.shape[1]
        biased = isinstance(first, nn.Linear) and first.bias is not None

        def install(read: Read) -> None:
            biases = [read(f"{name}.bias") for name in modules] if biased else []
            bias = torch.cat(biases) if biased else None  # type: ignore[arg-type]
            setattr(owner, part, self._linear(self._joined(part, read, modules, heights, width), bias))

        kinds = ("weight", "bias") if biased else ("weight",)
        return Step(tuple(f"{name}.{kind}" for name in modules for kind in kinds), install)

    def _linear(self, weight: Tensor | Quantised, bias: Tensor | None) -> Linear:
        options = {"dtype": self.dtype, "rounds_activations": self.rounds}
        if self.backend == "cpu":
            return make_linear(weight, bias, **options)  # type: ignore[arg-type]
        if isinstance(weight, Tensor):
            return PlainLinear(weight, bias)
        return linear_cuda.make_linear(weight, bias, **options)  # type: ignore[arg-type]

    def _joined(self, part: str, read: Read, modules: list[str], heights: list[int], width: int) -> Tensor | Quantised:
        """The weights [height, width] of several layers, one below the other."""
        if self.scheme is not None:
            found = [self._quantised(part, read, module) for module in modules]
            return Quantised.join(found)
        joined, at = torch.empty(sum(heights), width, dtype=self.dtype, device=self.device), 0
        for module, height in zip(modules, heights, strict=True):
            read(f"{module}.weight", out=joined[at : at + height])
            at += height
        return joined

    def _quantised(self, part: str, read: Read, module: str) -> Quantised:
        assert self.scheme is not None
        weight = read(f"{module}.weight")
        if isinstance(weight, Quantised):
            return weight
        return quantise(weight, self.scheme.bits("lm_head" if part == "lm_head" else module, weight.shape[1]))


def unfused_steps(model: Transformer, dtype: torch.dtype, scheme: Scheme | None) -> Iterator[Step]:
    """For the reference: the linear layers of a quantised model one by one.

    PyTorch's kernels for CUDA multiply them as they are; elsewhere they are dense for the moment of their use.
    """
    if scheme is None:
        return
    quantised = Fusion(dtype, scheme, "reference")
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in found.items():
        owner, _, leaf = name.rpartition(".")
        yield quantised.single_step(model.get_submodule(owner), leaf, name, module.bias is not None)
    if model.lm_head is None:
        yield quantised.single_step(model, "lm_head", "model.embed_tokens", biased=False)
