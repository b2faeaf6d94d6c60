"""The shape of a model, parsed once from Hugging Face's config.json and never guessed again.

Only this file knows the dialects of config.json; everything else reads the fields of `ModelConfig`.  What would change
the arithmetic and is not known here is refused by name: a wrong model that runs is worse than none.  It must not know
files, tensors or torch.

Keys that may be absent, and what they then are (semantics checked against transformers 5.23, `configuration_llama.py`,
`_mistral.py`, `_qwen2.py`, `_qwen3.py` and `modeling_rope_utils.py`; * = deliberately not what transformers does):

    num_key_value_heads  num_attention_heads *     (transformers: 8 for Mistral, 32 for Qwen)
    head_dim             hidden_size / heads *     (transformers: 128 for Qwen3)
    sliding_window       none *                    (transformers: 4096 for Mistral)
    layer_types          by family; a list wins *  (transformers ignores one in a Mistral config)
    rms_norm_eps         1e-6                      rope_theta, rope_scaling, rope_parameters   10000, none
    hidden_act           silu                      tie_word_embeddings, attention_bias, mlp_bias   false
    bos, eos_token_id    1 and 2 for Llama and Mistral, none for Qwen
    max_window_layers    28                        use_sliding_window   false (Qwen only)
    torch_dtype, dtype   None: the file does not say
    quantization_config  none; `minillm quantize` writes {"quant_method": "minillm", "scheme": "int8" or "int4"}

The remaining sizes have no default: transformers would fall back to those of Llama-2-7B, which fit no other checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .errors import ConfigError
from .lookup import Reader
from .shard import Shard


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched past the length a model was first trained on.

    `attention_factor` multiplies cos and sin (yarn; 1 for the others). Fields a kind does not use keep their defaults.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Family:
    """What an architecture's name implies and its config.json does not say."""

    model_type: str
    qkv_bias: bool | None  # None: `attention_bias` decides, for q, k, v and o alike
    may_bias_mlp: bool
    qk_norm: bool
    windows: Literal["never", "always", "late"]  # late: layers from max_window_layers on, if use_sliding_window
    bos_token_id: int | None
    eos_token_id: int | None


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family("llama", None, True, False, "never", 1, 2),
    "MistralForCausalLM": Family("mistral", False, False, False, "always", 1, 2),
    "Qwen2ForCausalLM": Family("qwen2", True, False, False, "late", None, None),
    "Qwen3ForCausalLM": Family("qwen3", None, False, True, "late", None, None),
}

# Fields that config.json spells in another way.
DERIVED = frozenset(
    {
        "architecture",
        "sliding_windows",
        "qkv_bias",
        "o_bias",
        "qk_norm",
        "eos_token_ids",
        "dtype",
        "stored_scheme",
        "shard",
    }
)

DTYPES = ("float16", "bfloat16", "float32", "float64")
QUANT_METHOD, STORED_SCHEMES = "minillm", ("int8", "int4")  # of config.json's quantization_config
SCHEMES = ("int8", "int8-a16", "int4")  # of linear layers in memory, see quant.py

# Keys that change the arithmetic of a model we otherwise know: a value other than null, false, 0 or empty is refused.
REFUSED: Mapping[str, str] = {
    "compression_config": "compressed weights",
    "num_local_experts": "a mixture of experts",
    "num_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attn_logit_softcapping": "capped attention scores",
    "final_logit_softcapping": "capped logits",
    "attention_sinks": "learned attention sinks",
    "attention_chunk_size": "chunked attention",
    "clip_qkv": "clipped queries and keys",
    "no_rope_layers": "layers without rotary positions",
    "vision_config": "images",
}

# Rope type -> keys beside the type, rope_theta and partial_rotary_factor.  `finetuned` is a remark without effect.
ROPE_KEYS: Mapping[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale"}
        | {"mscale_all_dim", "truncate", "finetuned"}
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """Names are Hugging Face's. `sliding_windows` has one entry per layer; None = the layer sees everything."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    sliding_windows: tuple[int | None, ...]
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    dtype: str | None
    stored_scheme: str | None = None  # "int8" or "int4": how `minillm quantize` stored the linear layers
    shard: Shard | None = None  # heads and the intermediate size are those of one rank; None = of the whole model

    @property
    def whole(self) -> ModelConfig:
        """The configuration of the whole model, where this is that of a part."""
        return self if self.shard is None else self.shard.whole

    @property
    def query_group(self) -> int:
        """Query heads that share a KV head, on all ranks together."""
        return self.whole.num_attention_heads // self.whole.num_key_value_heads

    @property
    def first_kv_head(self) -> int:
        """Which of the whole model's KV heads is the first one here."""
        return 0 if self.shard is None else self.shard.rank * self.whole.num_key_value_heads // self.shard.ranks

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Parse the content of a config.json, whichever transformers wrote it.

        Raises ConfigError, naming key and value, for everything unknown, missing or impossible.
        """
        read = Reader(raw)
        architecture = _architecture(raw)
        family = FAMILIES[architecture]
        _refuse(raw)
        hidden, heads, kv_heads, head_dim = _heads(read)
        theta, scaling = _rope(read)
        attention_bias = read.flag("attention_bias")
        return cls(
            architecture=architecture,
            vocab_size=read.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=read.size("intermediate_size"),
            num_hidden_layers=read.size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=read.size("max_position_embeddings"),
            rms_norm_eps=read.number("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            sliding_windows=_windows(read, family),
            tie_word_embeddings=read.flag("tie_word_embeddings"),
            qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
            o_bias=attention_bias if family.qkv_bias is None else False,
            mlp_bias=family.may_bias_mlp and read.flag("mlp_bias"),
            qk_norm=family.qk_norm,
            bos_token_id=_bos(read, family),
            eos_token_ids=token_ids(raw.get("eos_token_id", family.eos_token_id)),
            dtype=_dtype(raw),
            stored_scheme=_stored_scheme(raw),
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a config.json that transformers 4 and 5 read; `from_hf` turns it back into an equal config."""
        family = FAMILIES[self.architecture]
        raw = {key: value for key, value in asdict(self).items() if key not in DERIVED}
        raw |= {"architectures": [self.architecture], "model_type": family.model_type, "hidden_act": "silu"}
        raw |= {"rope_scaling": _rope_to_hf(self.rope_scaling), "torch_dtype": self.dtype}
        raw["eos_token_id"] = (
            self.eos_token_ids[0] if len(self.eos_token_ids) == 1 else list(self.eos_token_ids) or None
        )
        if family.qkv_bias is None:
            raw["attention_bias"] = self.qkv_bias
        if self.stored_scheme is not None:
            raw["quantization_config"] = {"quant_method": QUANT_METHOD, "scheme": self.stored_scheme}
        window = next((window for window in self.sliding_windows if window), None)
        if family.windows != "never":
            raw |= {"sliding_window": window, "use_sliding_window": window is not None}
        if window and (family.windows == "late" or None in self.sliding_windows):
            raw["layer_types"] = ["sliding_attention" if width else "full_attention" for width in self.sliding_windows]
        return raw


def token_ids(value: object) -> tuple[int, ...]:
    """`eos_token_id` as both config files write it (a number, a list or null) -> distinct ids in their order."""
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not all(type(token) is int and token >= 0 for token in ids):
        raise ConfigError(f"eos_token_id is {value!r}; expected a token id, a list of them, or null")
    return tuple(dict.fromkeys(ids))


def _architecture(raw: Mapping[str, Any]) -> str:
    """The class named by `architectures`, else (hand-written files) the one of `model_type`."""
    known = ", ".join(FAMILIES)
    named = raw.get("architectures")
    if not named:
        by_type = {family.model_type: name for name, family in FAMILIES.items()}
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in by_type:
            raise ConfigError(f"config.json names no architecture and model_type is {model_type!r}; supported: {known}")
        return by_type[model_type]
    if named not in [[name] for name in FAMILIES]:
        raise ConfigError(f"config.json: architectures is {named!r}; supported, one of: {known}")
    return str(named[0])


def _stored_scheme(raw: Mapping[str, Any]) -> str | None:
    """The scheme of a checkpoint that `minillm quantize` wrote; anybody else's is refused by name."""
    quantization = raw.get("quantization_config")
    if not quantization:
        return None
    ours = isinstance(quantization, dict) and quantization.get("quant_method") == QUANT_METHOD
    if ours and quantization.get("scheme") in STORED_SCHEMES:
        return str(quantization["scheme"])
    method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else quantization
    if ours:
        method = f"scheme {quantization.get('scheme')!r} of a newer minillm"
    raise ConfigError(
        f"config.json: quantization_config says the weights are quantised with {method}, which is not supported; "
        "use a checkpoint in bfloat16, float16 or float32, and --weights int8 or int4"
    )


def _refuse(raw: Mapping[str, Any]) -> None:
    for key, meaning in REFUSED.items():
        if raw.get(key):
            raise ConfigError(f"config.json: {key} is {raw[key]!r}: {meaning} is not supported")
    if raw.get("hidden_act") not in (None, "silu"):
        raise ConfigError(f"config.json: hidden_act is {raw['hidden_act']!r}; supported: 'silu'")


def _heads(read: Reader) -> tuple[int, int, int, int]:
    """hidden_size, query heads, KV heads, head_dim."""
    hidden, heads = read.size("hidden_size"), read.size("num_attention_heads")
    kv_heads = read.size("num_key_value_heads", heads)
    if heads % kv_heads:
        raise read.error("num_key_value_heads", f"a divisor of num_attention_heads = {heads}")
    if read.raw.get("head_dim") is None and hidden % heads:
        raise read.error("hidden_size", f"a multiple of num_attention_heads = {heads}, or a head_dim beside it")
    head_dim = read.size("head_dim", hidden // heads)
    if head_dim % 2:
        raise ConfigError(f"config.json: head_dim is {head_dim}; expected an even number, for rotary positions")
    return hidden, heads, kv_heads, head_dim


def _rope(read: Reader) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from `rope_scaling` (transformers 4) or `rope_parameters` (5).

    As in transformers a non-empty `rope_scaling` wins, `rope_type` wins over the older `type`, and rope_theta inside
    wins over the one outside.
    """
    name = "rope_scaling" if read.raw.get("rope_scaling") else "rope_parameters"
    raw = read.raw.get(name) or {}
    if not isinstance(raw, dict):
        raise read.error(name, "an object or null")
    nested = [key for key, value in raw.items() if isinstance(value, dict)]
    if nested:
        raise ConfigError(f"config.json: {name} differs by layer type ({', '.join(nested)}), which is not supported")
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in ROPE_KEYS:
        raise ConfigError(f"config.json: {name} has rope type {kind!r}; supported: {', '.join(ROPE_KEYS)}")
    unknown = raw.keys() - ROPE_KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    if unknown:
        raise ConfigError(f"config.json: {name} of type {kind!r} has unknown keys: {', '.join(sorted(unknown))}")
    inner = Reader(raw, f"{name}.")
    for reader in (read, inner):
        if reader.number("partial_rotary_factor", 1.0) != 1:
            raise reader.error("partial_rotary_factor", "1: rotating only a part of each head is not supported")
    theta = inner.number("rope_theta", read.number("rope_theta", 10_000.0))
    if theta <= 1:
        raise ConfigError(f"config.json: rope_theta is {theta}; expected a number above 1")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", inner.number("factor"))
    max_positions = read.size("max_position_embeddings")
    # transformers: the outer key (Phi-3 style) wins, and the trained length is the last resort
    original = read.size(
        "original_max_position_embeddings", inner.size("original_max_position_embeddings", max_positions)
    )
    if kind == "llama3":
        low, high = inner.number("low_freq_factor"), inner.number("high_freq_factor")
        if high <= low:
            raise inner.error("high_freq_factor", f"a number above low_freq_factor = {low}")
        return theta, RopeScaling("llama3", inner.number("factor"), original, low, high)
    return theta, _yarn(inner, original, max_positions)


def _yarn(read: Reader, original: int, max_positions: int) -> RopeScaling:
    """YaRN (arXiv 2309.00071) with the defaults of transformers' `_compute_yarn_parameters`."""
    factor = read.number("factor", max_positions / original)

    def magnitude(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    attention = magnitude(1.0)
    if read.raw.get("mscale") and read.raw.get("mscale_all_dim"):
        attention = magnitude(read.number("mscale")) / magnitude(read.number("mscale_all_dim"))
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=read.number("beta_fast", 32.0),
        beta_slow=read.number("beta_slow", 1.0),
        attention_factor=read.number("attention_factor", attention),
        truncate=read.flag("truncate", True),
    )


def _rope_to_hf(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    return {"rope_type": scaling.kind} | {
        key: value for key, value in asdict(scaling).items() if key in ROPE_KEYS[scaling.kind]
    }


def _windows(read: Reader, family: Family) -> tuple[int | None, ...]:
    """The sliding window of each layer: a query at position p sees positions > p - window."""
    layers = read.size("num_hidden_layers")
    window = read.size("sliding_window") if read.raw.get("sliding_window") else None  # null, 0 and absent: none
    if not read.flag("use_sliding_window", family.windows != "late"):
        window = None
    if window and family.windows == "never":
        raise read.error("sliding_window", "null: this architecture has no sliding window")
    first = read.raw.get("max_window_layers", 28) if family.windows == "late" else 0
    if type(first) is not int:
        raise read.error("max_window_layers", "an integer")
    types = read.raw.get("layer_types")
    if types is None:
        return tuple(window if layer >= first else None for layer in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or any(kind not in known for kind in types):
        raise read.error("layer_types", f"a list of {layers} names out of {' and '.join(known)}")
    if window is None and "sliding_attention" in types:
        raise ConfigError("config.json: layer_types names sliding_attention, but no sliding_window is set and in use")
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _bos(read: Reader, family: Family) -> int | None:
    bos = read.raw.get("bos_token_id", family.bos_token_id)
    if bos is None:
        return None
    if type(bos) is not int or not 0 <= bos < read.size("vocab_size"):
        raise read.error("bos_token_id", f"a token id below vocab_size = {read.size('vocab_size')}, or null")
    return bos


def _dtype(raw: Mapping[str, Any]) -> str | None:
    value = raw.get("dtype") or raw.get("torch_dtype")
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in DTYPES:
        raise ConfigError(f"config.json: dtype is {value!r}; supported: {', '.join(DTYPES)}")
    return name
