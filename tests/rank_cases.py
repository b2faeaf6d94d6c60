"""What test_parallel.py computes in one process and in several: models, caches and tokens that are drawn alike."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minillm.cache import KVCache
from minillm.config import ModelConfig
from minillm.eviction import Retention
from minillm.loader import load_model
from minillm.parallel import connected
from minillm.shard import Team

from .every_policy import EVERY_POLICY
from .helpers import kept_positions, run, tiny_config

TOKENS, SLOTS = 90, 24


def shape(kv_heads: int, **changes: object) -> ModelConfig:
    """Four or eight query heads over 4, 2 or 1 KV heads, biases everywhere, one layer with a window."""
    fields: dict[str, object] = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "qkv_bias": True}
    fields |= {"o_bias": True, "mlp_bias": True, "vocab_size": 100, "dtype": "float64"}
    fields |= {"sliding_windows": (None, 20), "max_position_embeddings": 64}
    return tiny_config(**(fields | changes))


def tokens() -> Tensor:
    return torch.randint(100, (1, TOKENS), generator=torch.Generator().manual_seed(5))  # [1, n]


def computed(folder: Path, config: ModelConfig, team: Team) -> Iterator[tuple[str, Tensor, list[object]]]:
    """For every policy: its name, logits [1, n, V], and the kept positions of the heads that are here."""
    part = team.part_of(config)
    model = team.join_(load_model(folder, part, dtype=torch.float64, device=torch.device("cpu")))
    kinds = (torch.arange(config.vocab_size) % 7 == 0).to(torch.uint8) * 2  # some tokens are special
    for name, entry in EVERY_POLICY.items():
        rule = entry.policy
        retention = Retention.of(SLOTS, sinks=2, evict_every=3, recent_share=rule.recent_share)
        cache = KVCache(part, rule, retention, dtype=torch.float64, position_mode="window")
        cache.kinds = kinds if rule.needs_kinds else None
        yield name, run(model, cache, tokens(), 32), kept_positions(cache)


def main(folder: str, kv_heads: str) -> None:
    """On one rank: compute everything, and write it beside the checkpoint."""
    torch.set_num_threads(1)
    with connected() as team:
        found = {name: (logits, kept) for name, logits, kept in computed(Path(folder), shape(int(kv_heads)), team)}
        torch.save(found, Path(folder) / f"rank{team.rank}of{team.ranks}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
