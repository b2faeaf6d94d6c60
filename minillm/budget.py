"""What a budget means, and the bytes it becomes: closed-form arithmetic, done before a byte of weights is read.

One definition for every command: a fraction of the whole context that is kept (0.3), a number of tokens (2048), or
bytes (512MiB).  Fractions and tokens are per row; bytes are for all rows and count keys, values, positions, codes and
policy state.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from .cache import QUERY_BLOCK, KVCache, cache_bytes
from .config import ModelConfig
from .errors import BudgetError, ContextFullError
from .eviction import EvictionPolicy, Retention
from .policies import make_policy

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
MAX_POSITION = 2**31 - 1  # positions are 32-bit
ACCEPTED = "a fraction in (0, 1] such as 0.3, a whole number of tokens such as 2048, or bytes such as 512MiB"


@dataclass(frozen=True)
class Budget:
    """How much of a sequence is kept."""

    kind: Literal["all", "fraction", "tokens", "bytes"]
    amount: float = 1.0

    @classmethod
    def of(cls, value: Budget | str | float | None) -> Budget:
        """0.3 -> a fraction, 2048 -> tokens, "512MiB" -> bytes, None -> everything; strings as on the command line.

        1 is one token and 1.0 is everything.  Raises BudgetError for anything else.
        """
        if isinstance(value, Budget):
            return value
        if value is None:
            return cls("all")
        text = str(value).strip()
        if re.fullmatch(r"[+-]?\d+", text):
            return cls("tokens", _positive(int(text), text))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?I?)B", text.upper()):
            size = _positive(math.floor(float(match[1]) * UNITS[match[2]]), text) if match[2] in UNITS else 0
            return cls("bytes", _positive(size, text))
        try:
            fraction = float(text)
        except ValueError:
            raise BudgetError(f"budget '{text}' is not {ACCEPTED}") from None
        if not 0 < fraction <= 1:
            raise BudgetError(f"budget {text} is out of range: it must be {ACCEPTED}")
        return cls("fraction", fraction)

    @property
    def keeps_everything(self) -> bool:
        """Whether nothing ever has to go."""
        return self.kind == "all" or (self.kind == "fraction" and self.amount == 1.0)

    def slots(self, whole: int, bytes_of: Callable[[int], int]) -> int:
        """Slots per layer and row, for a context of `whole` tokens; `bytes_of(slots)` is the size of such a cache.

        Worked example: 0.3 of 1,000 tokens -> 300 slots.  Raises BudgetError for bytes that hold not even one slot.
        """
        if self.kind == "tokens":
            return int(self.amount)
        if self.kind != "bytes":
            return max(1, math.floor(self.amount * whole))
        if bytes_of(1) > self.amount:
            raise BudgetError(f"a budget of {self.amount:,} bytes holds no token: one takes {bytes_of(1):,} bytes")
        low, high = 1, max(1, whole)  # the largest number of slots that fits, by bisection: bytes_of only grows
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if bytes_of(middle) <= self.amount else (low, middle - 1)
        return low

    def __str__(self) -> str:
        if self.kind == "all":
            return "everything"
        return f"{self.amount:,} {self.kind}" if self.kind in ("tokens", "bytes") else f"{self.amount:g}"


def _positive(amount: int, text: str) -> int:
    if amount < 1:
        raise BudgetError(f"budget {text} is out of range: it must be {ACCEPTED}")
    return amount


@dataclass(frozen=True)
class CachePlan:
    """A cache that is decided on but not allocated: one set of numbers for `plan`, `generate` and the allocation."""

    config: ModelConfig
    budget: Budget
    whole: int
    policy: EvictionPolicy
    retention: Retention
    rows: int
    dtype: torch.dtype

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        budget: Budget | str | float | None,
        whole: int,
        dtype: torch.dtype,
        policy: str | None = None,
        rows: int = 1,
        sinks: int | None = None,
        recent: int | None = None,
        evict_every: int | None = None,
        **policy_options: int | None,
    ) -> CachePlan:
        """Turn a budget over a context of `whole` tokens into slots.

        policy: by name; the default is `full` where everything is kept and `hashevict` where not.
        Raises BudgetError, ConfigError.
        """
        if whole < 1:
            raise BudgetError(f"--context must be at least 1 token, not {whole}")
        budget = Budget.of(budget)
        rule = make_policy(policy or ("full" if budget.keeps_everything else "hashevict"), **policy_options)

        def bytes_of(slots: int) -> int:
            layout = Retention.of(slots, evict_every=min(slots, evict_every or 32))  # the most the free list can take
            return sum(cache_bytes(config, rule, layout, rows=rows, dtype=dtype).values())

        retention = Retention.of(budget.slots(whole, bytes_of), sinks=sinks, recent=recent, evict_every=evict_every)
        return cls(config, budget, whole, rule, retention, rows, dtype)

    @property
    def slots(self) -> int:
        """Slots per layer, KV head and row."""
        return self.retention.slots

    def require_room(self, tokens: int, seen: int = 0) -> int:
        """Tokens that may still enter a cache that has seen `seen`; ContextFullError if that is less than `tokens`."""
        if self.policy.evicts:
            return MAX_POSITION - seen
        room = self.slots - seen
        if tokens > room:
            raise ContextFullError(
                f"{tokens:,} tokens do not fit: {room:,} of {self.slots:,} slots are free and policy "
                f"'{self.policy.name}' never evicts; raise --context, or name a --budget"
            )
        return room

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of the cache by part, over all layers and rows."""
        return cache_bytes(self.config, self.policy, self.retention, rows=self.rows, dtype=self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache, codes and state included."""
        return sum(self.bytes_by_part().values())

    def allocate(self, device: torch.device) -> KVCache:
        """The cache itself."""
        return KVCache(self.config, self.policy, self.retention, rows=self.rows, dtype=self.dtype, device=device)

    def summary(self) -> dict[str, object]:
        """The `cache` object of every command's --json."""
        retention = self.retention
        return {
            "slots": retention.slots,
            "bytes": self.nbytes,
            "policy": self.policy.name,
            "budget": str(self.budget),
            "context": self.whole,
            "sinks": retention.sinks,
            "recent": retention.recent,
            "evict_every": retention.evict_every,
        }


def workspace_bytes(plan: CachePlan, chunk: int) -> dict[str, int]:
    """Bytes of what one forward pass of `chunk` tokens holds at its widest moment, beside weights and cache.

    activations: the stream, its normalised copy, and the three feed-forward products (or queries, keys, values and
    their rotated copies, whichever is more).  attention: scores, their softmax and the mask of one block of queries.
    logits: one position in the model's dtype, in float32, and as probabilities.
    """
    config, size, width = plan.config, plan.dtype.itemsize, plan.rows * chunk
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    widest = max(3 * config.intermediate_size, 2 * heads * config.head_dim)
    block = plan.rows * min(chunk, QUERY_BLOCK) * plan.slots
    return {
        "activations": width * (3 * config.hidden_size + widest) * size,
        "attention": block * (config.num_attention_heads * (2 * size + 1) + config.num_key_value_heads * 3),
        "logits": plan.rows * config.vocab_size * (size + 3 * 4),
    }
