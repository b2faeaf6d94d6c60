"""Compile the Triton kernels for GPUs that need not be there, and print what each takes.

Runs wherever triton is installed: it brings its own assembler.  Says that the kernels are valid, and how much shared
memory they want of a multiprocessor; nothing about how fast they are.

    python tools/compile_kernels.py [--capability 80 90] [--all]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from minillm.backends import kernels, kernels_attend, kernels_between, triton
from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.policies import make_policy
from minillm.shapes import shape_config
from minillm.slots import Span

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
POINTERS |= {torch.int8: "*i8", torch.uint8: "*u8", torch.int16: "*i16", torch.int32: "*i32", torch.int64: "*i64"}
NAMES = {"enter": kernels, "attend": kernels_attend, "join": kernels_attend}
NAMES |= dict.fromkeys(("rms_norm", "gated", "rotate"), kernels_between)
CASES: list[tuple[str, str, dict[str, Any]]] = [  # shape of a model, policy, more
    ("llama-3.1-8b", "hashevict-plus", {}),
    ("llama-3.1-8b", "hashevict", {}),
]
MORE: list[tuple[str, str, dict[str, Any]]] = [
    ("llama-3.1-8b", "hashevict", {"hash_bits": 64, "int8": True, "position_mode": "window"}),
    ("llama-3.1-8b", "hashevict-plus", {"int8": True, "dtype": torch.float32, "position_mode": "window"}),
    ("qwen2.5-0.5b", "hashevict-key", {"hash_bits": 128, "dtype": torch.float16}),
    ("qwen2.5-0.5b", "window", {"dtype": torch.float32}),
    ("llama-2-7b", "hashevict-plus", {"evict_every": 1}),
]


class Compiled:
    """Stands in for a kernel: what would launch it compiles it."""

    def __init__(self, kernel: Any, capabilities: list[int]) -> None:
        self.kernel, self.capabilities = kernel, capabilities

    def __getitem__(self, grid: tuple[int, ...]) -> Compiled:
        return self

    def __call__(self, *positional: Any, **named: Any) -> None:
        options = {"num_warps": named.pop("num_warps", 4)}
        arguments = dict(zip(self.kernel.arg_names, positional, strict=False)) | named
        kinds, fixed, aligned = {}, {}, {}
        for at, parameter in enumerate(self.kernel.params):
            value = arguments[parameter.name]
            special = type(value) is int and not parameter.do_not_specialize  # what a launch knows of it
            if parameter.is_constexpr or value is None or (special and value == 1):
                kinds[parameter.name], fixed[at,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                kinds[parameter.name], aligned[at,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
            else:
                kinds[parameter.name] = "fp32" if isinstance(value, float) else "i32"
                if special and value % 16 == 0:
                    aligned[at,] = [["tt.divisibility", 16]]
        for capability in self.capabilities:
            source = ASTSource(self.kernel, kinds, fixed, aligned)
            made = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            size, shared = len(made.asm["cubin"]), made.metadata.shared
            print(f"  {self.kernel.__name__:10} sm_{capability}  {size:9,} bytes of code  {shared:7,} of shared memory")


def step(config: ModelConfig, policy: str, tokens: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> None:
    """Tokens of two rows through a layer on the CPU: everything of it but the kernels."""
    cache_options = {name: options.pop(name) for name in ("int8", "position_mode") if name in options}
    retention = Retention.of(512, evict_every=options.pop("evict_every", None))
    cache = KVCache(config, make_policy(policy, **options), retention, rows=2, dtype=dtype, **cache_options)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k = (torch.zeros(2, count, tokens, dim, dtype=dtype) for count in (heads, kv_heads))
    at = torch.tensor([[600], [3]]) + torch.arange(tokens)  # [2, T]
    triton.attend_(cache.layers[0], q, k, k, Span(at, at, (600, 3), tokens), q)
    x, wide = (
        torch.zeros(2 * tokens, size, dtype=dtype) for size in (config.hidden_size, 2 * config.intermediate_size)
    )
    triton.rms_norm(x, x[0], 1e-5, x)
    triton.gated(wide)
    triton.rotate(q.transpose(1, 2), q[:, :1].transpose(1, 2), q[:, :1].transpose(1, 2))


def main() -> None:
    """A line for every kernel, case and capability."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="80 = A100, 90 = H100")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 256], help="of a row at once (default: 1 256)")
    parser.add_argument("--all", action="store_true", help="more dtypes and options; takes a minute or two")
    args = parser.parse_args()
    for name, module in NAMES.items():
        setattr(module, name, Compiled(vars(module)[name], args.capability))
    for shape, policy, options in CASES + (MORE if args.all else []):
        print(shape, policy, *(f"{name}={value}" for name, value in options.items()))
        for tokens in args.tokens:
            print(f" {tokens} token{'s' * (tokens > 1)}")
            step(shape_config(shape, 1), policy, tokens, **dict(options))


if __name__ == "__main__":
    main()
