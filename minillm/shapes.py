"""Models without files, to be measured: the shape of a known one, its weights drawn.

Speed does not depend on what weights are.  This module must not know what is measured (bench.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .checkpoint import Checkpoint, choose_backend, choose_device, choose_scheme
from .config import ModelConfig
from .errors import ConfigError
from .fused import Fusion
from .inventory import Weights, weights_of
from .loader import choose_dtype, random_model
from .memory import held, trim
from .model import Transformer
from .shard import ALONE, Team

FIELDS: tuple[str, ...] = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
FIELDS += ("num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings")
# Scalings of rotary positions are left out: they change no shape.
SHAPES: Mapping[str, tuple[str, tuple[int, ...]]] = MappingProxyType(
    {
        "smollm2-135m": ("Llama", (576, 1536, 30, 9, 3, 64, 49_152, 8192, True)),
        "smollm2-360m": ("Llama", (960, 2560, 32, 15, 5, 64, 49_152, 8192, True)),
        "tinyllama": ("Llama", (2048, 5632, 22, 32, 4, 64, 32_000, 2048, False)),
        "llama-2-7b": ("Llama", (4096, 11_008, 32, 32, 32, 128, 32_000, 4096, False)),
        "llama-3.1-8b": ("Llama", (4096, 14_336, 32, 32, 8, 128, 128_256, 131_072, False)),
        "llama-3.2-1b": ("Llama", (2048, 8192, 16, 32, 8, 64, 128_256, 131_072, True)),
        "llama-3.2-3b": ("Llama", (3072, 8192, 28, 24, 8, 128, 128_256, 131_072, True)),
        "mistral-7b": ("Mistral", (4096, 14_336, 32, 32, 8, 128, 32_768, 32_768, False)),
        "mistral-nemo": ("Mistral", (5120, 14_336, 40, 32, 8, 128, 131_072, 131_072, False)),
        "qwen2.5-0.5b": ("Qwen2", (896, 4864, 24, 14, 2, 64, 151_936, 32_768, True)),
        "qwen2.5-7b": ("Qwen2", (3584, 18_944, 28, 28, 4, 128, 152_064, 32_768, False)),
        "qwen3-0.6b": ("Qwen3", (1024, 3072, 28, 16, 8, 128, 151_936, 40_960, True)),
        "qwen3-8b": ("Qwen3", (4096, 12_288, 36, 32, 8, 128, 151_936, 40_960, False)),
    }
)


class Shape(Checkpoint):
    """A checkpoint without files: of a known model's shape, with weights that are drawn."""

    @classmethod
    def of(
        cls,
        name: str,
        layers: int | None = None,
        *,
        dtype: str,
        device: str,
        weights: str,
        backend: str,
        team: Team = ALONE,
    ) -> Shape:
        """layers: fewer than the model has.  The rest as in Checkpoint.open.  Raises ConfigError."""
        config = team.part_of(shape_config(name, layers))
        place = choose_device(device)
        kind = choose_dtype(dtype, config, place)
        chosen = choose_backend(backend, kind, place)
        scheme = choose_scheme(weights, config, chosen, place)
        part = "" if layers is None else f", {layers} of {shape_config(name).num_hidden_layers} layers"
        return cls(f"{name} (random weights{part})", Path(), config, kind, place, True, scheme, chosen, team)

    @cached_property
    def base(self) -> int:
        """As in Checkpoint, but that there is no tokenizer."""
        trim()
        return self.team.most(held(self.device).now)

    @cached_property
    def weights(self) -> Weights:
        """Their sizes."""
        fusion = Fusion(self.dtype, self.scheme) if self.backend == "cpu" else None
        return weights_of(None, self.config, None, fusion, self.scheme, dtype=self.dtype, device=self.device)

    def load_model(self, progress: Callable[[int, int], None] | None = None) -> Transformer:  # noqa: ARG002
        """Draw the weights."""
        where = {"dtype": self.dtype, "device": self.device, "scheme": self.scheme, "backend": self.backend}
        model = random_model(self.config, **where)  # type: ignore[arg-type]
        trim()  # the numbers that it was drawn from are gone
        return self.team.join_(model)


def shape_config(name: str, layers: int | None = None) -> ModelConfig:
    """The configuration of a known model, with its first `layers` layers alone.  Raises ConfigError."""
    if name not in SHAPES:
        raise ConfigError(f"--shape is {name!r}; choose one of {', '.join(SHAPES)}")
    family, numbers = SHAPES[name]
    raw: dict[str, Any] = dict(zip(FIELDS, numbers, strict=True))
    if layers is not None and layers > raw["num_hidden_layers"]:
        raise ConfigError(f"--layers {layers} is more than the {raw['num_hidden_layers']} of {name}")
    raw |= {"num_hidden_layers": layers or raw["num_hidden_layers"], "dtype": "bfloat16"}
    return ModelConfig.from_hf({"architectures": [f"{family}ForCausalLM"], **raw})
