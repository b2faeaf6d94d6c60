"""What one decoded token costs outside the linear layers: attention, eviction, hashing, norms, rotary, dispatch.

    python tools/bench_eager.py [--layers 22] [--slots 64 512 2048] [--dtype float32] [--threads 2]

Every linear layer is replaced by one that returns a tensor made beforehand, so that what is timed is all the rest.  The
shape is TinyLlama's (32 query heads, 4 KV heads of 64, hidden 2048); weights are random.  Medians over tokens past the
first eviction; the share of hashing and eviction is the difference to the same cache under `window`.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor, nn

from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.generate import feed
from minillm.model import Transformer
from minillm.policies import make_policy

TINYLLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}


class Given(nn.Module):
    """A linear layer whose answer is known: it costs one slice."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.answer = torch.randn(1, 256, width).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.answer[:, : x.shape[1]]


def build(layers: int, dtype: torch.dtype) -> Transformer:
    """The model without its linear layers."""
    config = ModelConfig.from_hf(TINYLLAMA | {"num_hidden_layers": layers})
    with torch.device("meta"):
        model = Transformer(config)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Given(child.out_features, dtype))
    model.to_empty(device="cpu").to(dtype).requires_grad_(False)
    for parameter in model.parameters():  # what memory happens to hold may be denormal, which is slow
        parameter.fill_(1.0)
    return model


@torch.inference_mode()
def milliseconds(model: Transformer, policy: str, slots: int, dtype: torch.dtype, tokens: int) -> float:
    """Median milliseconds of a block of `evict_every` tokens, per token, once evictions have begun."""
    cache = KVCache(model.config, make_policy(policy), Retention.of(slots), dtype=dtype)
    for _ in feed(model, cache, torch.zeros(1, slots + 64, dtype=torch.int32), 256):
        pass
    token, every, times = torch.zeros(1, 1, dtype=torch.int64), cache.retentions[0].evict_every, []
    for _ in range(max(8, tokens // every)):
        begin = time.perf_counter()
        for _ in range(every):
            model(token, cache.append(1), cache)
        times.append((time.perf_counter() - begin) / every * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--slots", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    model = build(args.layers, dtype)
    print(f"{args.layers} layers, {args.dtype}, {args.threads} threads: milliseconds a token outside the linear layers")
    for slots in args.slots:
        plain, hashed = (milliseconds(model, policy, slots, dtype, args.tokens) for policy in ("window", "hashevict"))
        print(
            f"  {slots:>5} slots: window {plain:6.2f}   hashevict {hashed:6.2f}   (+{hashed - plain:.2f} for hashing)"
        )


if __name__ == "__main__":
    main()
