"""Every policy that evicts, and every option that changes what it does: the list that all shared tests run over."""

from __future__ import annotations

from dataclasses import dataclass, field

from minillm.eviction import EvictionPolicy
from minillm.policies import Option, make_policy


@dataclass(frozen=True)
class Entry:
    """A policy with its options, and the bytes that it declares for a slot of a KV head."""

    name: str
    slot_bytes: int
    options: dict[str, Option] = field(default_factory=dict)

    @property
    def policy(self) -> EvictionPolicy:
        return make_policy(self.name, **self.options)


CODE, NUMBER, NORM = 2, 4, 2  # 16 packed bits; float32; bfloat16

EVERY_POLICY: dict[str, Entry] = {
    "window": Entry("window", 0),
    "random": Entry("random", 0, {"policy_seed": 3}),
    "exact": Entry("exact", 0),
    "keydiff": Entry("keydiff", 0),
    "l2": Entry("l2", NORM),
    "l2 but one layer": Entry("l2", NORM, {"skip_layers": 1}),
    "h2o": Entry("h2o", NUMBER),
    "h2o mean": Entry("h2o", NUMBER, {"mean": True}),
    "tova": Entry("tova", NUMBER),
    "scissorhands": Entry("scissorhands", 256 // 8),
    "scissorhands of 64": Entry("scissorhands", 64 // 8, {"history": 64}),
    "snapkv": Entry("snapkv", 0),
    "snapkv of 3, unpooled": Entry("snapkv", 0, {"observed": 3, "pooling": 1}),
    "snapkv of 1, pooled": Entry("snapkv", 0, {"observed": 1, "pooling": 3}),
    "fastgen": Entry("fastgen", NUMBER),
    "fastgen of half": Entry("fastgen", NUMBER, {"recovered": 0.5, "heavy": 0.2}),
    "hashevict": Entry("hashevict", CODE),
    "hashevict of 24 bits": Entry("hashevict", 3, {"hash_bits": 24, "policy_seed": 5}),
    "hashevict centred": Entry("hashevict", CODE, {"centred": True}),
    "hashevict centred and weighted": Entry(
        "hashevict", 8 + NORM, {"hash_bits": 64, "centred": True, "norm_weighted": True}
    ),
    "hashevict weighted": Entry("hashevict", CODE + NORM, {"norm_weighted": True}),
    "hashevict with a profile": Entry("hashevict", CODE, {"decay": 0.9}),
    "hashevict of 4 queries": Entry("hashevict", CODE, {"recent_queries": 4}),
    "hashevict of 20 queries": Entry("hashevict", CODE, {"recent_queries": 20}),
    "hashevict per head": Entry("hashevict", CODE, {"per_head": True}),
    "hashevict orthogonal": Entry("hashevict", CODE, {"orthogonal": True}),
    "hashevict with everything": Entry(
        "hashevict",
        16 + NORM,
        {"hash_bits": 128, "decay": 0.9, "centred": True, "norm_weighted": True, "per_head": True, "orthogonal": True},
    ),
    "hashevict-plus": Entry("hashevict-plus", NORM),
    "hashevict-plus, quick to forget": Entry("hashevict-plus", NORM, {"decay": 0.8}),
    "hashevict-key": Entry("hashevict-key", CODE),
    "hashevict-key centred": Entry("hashevict-key", CODE, {"centred": True}),
    "hashevict-key weighted": Entry("hashevict-key", CODE + NORM, {"norm_weighted": True}),
}
