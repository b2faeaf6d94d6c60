"""What every eviction policy costs: bytes a slot, microseconds an eviction, microseconds a token.

    python tools/policy_table.py [--slots 512 2048 8192] [--dtype bfloat16] [--rounds 15] [--threads 1] [--json]

One layer of TinyLlama's shape (32 query heads, 4 KV heads of 64) with random keys and queries, one row, slots full.

    bytes a slot    for one KV head: key and value, position, flags, and what the policy keeps with them
    bytes a head    what it keeps for one KV head whatever the slots: means, profiles, rings, its share of a projection
    evict           tag the keys since the last eviction, score all slots and free `evict_every` of them, in all KV
                    heads, once in `evict_every` tokens; what is done a single time, before the first eviction, is left
                    out.  In brackets: times `window`
    token           what every token costs besides: observe its query or its attention weights

Everything takes its turn in every round, so that a busy machine slows all of it alike; times are medians of the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from math import prod
from typing import Any

import torch

from minillm.backends.reference import attend_
from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.eviction import EvictionPolicy, Retention, TensorSpec, evict_
from minillm.policies import POLICIES, make_policy

Options = dict[str, int | float]

VARIANTS: list[tuple[str, Options]] = [
    ("hashevict", {"hash_bits": 64}),
    ("hashevict", {"hash_bits": 64, "decay": 0.9}),
    ("hashevict", {"hash_bits": 64, "decay": 0.9, "centred": True, "norm_weighted": True}),
    ("hashevict", {"hash_bits": 64, "recent_queries": 4}),
]


def shape(args: argparse.Namespace) -> ModelConfig:
    """One layer; what attention does not see is as small as may be."""
    return ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 64,
            "hidden_size": args.heads * args.head_dim,
            "intermediate_size": 64,
            "num_hidden_layers": 1,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "head_dim": args.head_dim,
            "max_position_embeddings": 2**20,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
        }
    )


def label(name: str, options: Options) -> str:
    """`hashevict`, hash_bits=64 -> "hashevict hash_bits=64"; a switch is named alone."""
    return " ".join([name, *(key if value is True else f"{key}={value}" for key, value in options.items())])


def size(specs: dict[str, TensorSpec]) -> int:
    return sum(prod(dims) * kind.itemsize for dims, kind in specs.values())


class Bench:
    """One policy at one number of slots: a layer that has just filled up again, and what it has to do next."""

    def __init__(self, config: ModelConfig, policy: EvictionPolicy, slots: int, dtype: torch.dtype) -> None:
        retention = Retention.of(slots, recent_share=policy.recent_share)
        cache = KVCache(config, policy, retention, dtype=dtype)
        self.policy, self.layer = policy, cache.layers[0]
        kv_heads, dim = config.num_key_value_heads, config.head_dim
        group = config.num_attention_heads // kv_heads
        while cache.seen[0] < slots + retention.evict_every:  # the first eviction, with all that it settles, is over
            n = min(256, slots + retention.evict_every - cache.seen[0])
            q = torch.randn(1, kv_heads * group, n, dim).to(dtype)
            k, v = torch.randn(2, 1, kv_heads, n, dim).to(dtype)
            attend_(self.layer, q, k, v, cache.append(n))
        self.now = torch.tensor(cache.seen)  # [1]: due
        self.positions = self.layer.positions.clone()
        self.query, self.key = q[:, :, -1:], k[:, :, -1:]  # [1, H, 1, D], [1, Hkv, 1, D]
        self.weights = torch.rand(1, kv_heads, group, 1, slots).to(dtype)
        self.evictions: list[float] = []  # microseconds, one median of a few calls a round
        self.tokens: list[float] = []

    def evict(self) -> None:
        evict_(self.layer, self.query[:, :, 0], self.key[:, :, 0], self.now, settle=False)

    def observe(self) -> None:
        """What attention asks of the policy for one token."""
        if self.policy.needs_attention:
            self.policy.observe_attention_(self.layer, self.weights, self.now[:, None])
        if self.policy.needs_queries:
            self.policy.observe_queries_(self.layer, self.query, self.now[:, None])

    def round(self, calls: int) -> None:
        self.evictions.append(self._time(self.evict, calls))
        self.tokens.append(self._time(self.observe, calls))

    def _time(self, job: Callable[[], None], calls: int) -> float:
        times = []
        for _ in range(calls):
            begin = time.perf_counter()
            job()
            times.append((time.perf_counter() - begin) * 1e6)
            self.layer.positions.copy_(self.positions)  # full again
        return statistics.median(times)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as one object."""
    config, dtype = shape(args), getattr(torch, args.dtype)
    chosen: list[tuple[str, Options]] = [(name, {}) for name, policy in POLICIES.items() if policy.evicts] + VARIANTS
    policies = {label(name, options): make_policy(name, **options) for name, options in chosen}
    plain = 2 * config.head_dim * dtype.itemsize + torch.int32.itemsize + torch.uint8.itemsize
    rows: dict[str, dict[str, Any]] = {
        name: {
            "slot_bytes": plain + size(policy.slot_state(config)),
            "head_bytes": size(policy.head_state(config))
            + size(policy.constants_spec(config)) // config.num_key_value_heads,
            "evict_us": {},
            "token_us": {},
        }
        for name, policy in policies.items()
    }
    benches = {
        (name, slots): Bench(config, policy, slots, dtype) for slots in args.slots for name, policy in policies.items()
    }
    for done in range(args.rounds):
        print(f"\rround {done + 1} of {args.rounds} ", end="", file=sys.stderr, flush=True)
        for bench in benches.values():
            bench.round(args.calls)
    for (name, slots), bench in benches.items():
        rows[name]["evict_us"][slots] = statistics.median(bench.evictions)
        rows[name]["token_us"][slots] = statistics.median(bench.tokens)
    print("\r" + " " * 20 + "\r", end="", file=sys.stderr)
    return {
        "torch": torch.__version__,
        **{name: getattr(args, name) for name in ("head_dim", "heads", "kv_heads", "dtype", "threads", "rounds")},
        "evict_every": {slots: Retention.of(slots).evict_every for slots in args.slots},
        "policies": rows,
    }


def table(found: dict[str, Any]) -> str:
    """The same in Markdown."""
    slots, first = list(found["evict_every"]), found["policies"]["window"]["evict_us"]
    lines = [
        " | ".join(
            ["| policy", "bytes a slot", "bytes a head"]
            + [f"evict at {count:,}" for count in slots]
            + [f"token at {count:,}" for count in slots]
        )
        + " |",
        "|---" + "|--:" * (2 + 2 * len(slots)) + "|",
    ]
    for name, row in found["policies"].items():
        cells = [f"{row['slot_bytes']:,}", f"{row['head_bytes']:,}"]
        cells += [f"{row['evict_us'][count]:,.0f} ({row['evict_us'][count] / first[count]:.1f})" for count in slots]
        cells += [f"{row['token_us'][count]:,.0f}" for count in slots]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    every = ", ".join(f"{slots:,}: {every}" for slots, every in found["evict_every"].items())
    lines += [
        "",
        f"Microseconds for one row and layer, {found['heads']} query and {found['kv_heads']} KV heads of "
        f"{found['head_dim']}, {found['dtype']}, {found['threads']} thread(s), torch {found['torch']}; tokens freed at "
        f"once, by slots: {every}.",
    ]
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=5, help="calls a round, of which the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of the table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    found = measure(args)
    print(json.dumps(found) if args.json else table(found))


if __name__ == "__main__":
    main()
