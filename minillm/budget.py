"""What a budget means, and the bytes it becomes: closed-form arithmetic, done before a byte of weights is read.

One definition for every command: a fraction of the whole context that is kept (0.3), a number of tokens (2048), or
bytes (512MiB).  Fractions and tokens are per row; bytes are for all rows and count keys, values, positions, codes and
policy state.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from .cache import MAX_POSITION, KVCache, Overflow, PositionMode, cache_bytes
from .config import ModelConfig
from .errors import BudgetError, ConfigError, ContextFullError
from .eviction import EvictionPolicy, Retention
from .layer_budget import layer_slots
from .policies import Option, make_policy

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}
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
        return bisect_right(range(1, max(1, whole) + 1), self.amount, key=bytes_of)  # bytes_of only grows

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
    retentions: tuple[Retention, ...]  # one per layer
    rows: int
    dtype: torch.dtype
    int8: bool = False
    position_mode: PositionMode = "absolute"
    on_overflow: Overflow = "evict"
    request: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # what it was made from

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
        layer_budget: str | Sequence[float] = "uniform",
        kv_dtype: str = "auto",
        positions: PositionMode | None = None,
        on_overflow: Overflow = "evict",
        **policy_options: Option | None,
    ) -> CachePlan:
        """Turn a budget over a context of `whole` tokens into slots.

        policy: by name; the default is `full` where everything is kept and `hashevict-plus` where not.
        layer_budget: how the slots are shared out among the layers, see `layer_slots`.
        kv_dtype: "auto" stores keys and values in the model's dtype, "int8" in 8 bits.
        positions: "window" makes the trained length a sliding window, "absolute" extrapolates beyond it, see KVCache;
        the default is "window" for policies that evict, and "absolute" for `full`, which sees all that it keeps.
        on_overflow: what a token that does not fit means: "evict" another, "warn" the first time, or "error".

        Raises BudgetError, ConfigError.
        """
        request = {
            "budget": budget,
            "whole": whole,
            "dtype": dtype,
            "policy": policy,
            "rows": rows,
            "sinks": sinks,
            "recent": recent,
            "evict_every": evict_every,
            "layer_budget": layer_budget,
            "kv_dtype": kv_dtype,
            "positions": positions,
            "on_overflow": on_overflow,
            **policy_options,
        }
        if whole < 1:
            raise BudgetError(f"--context must be at least 1 token, not {whole}")
        for option, value, known in (
            ("kv-dtype", kv_dtype, ("auto", "int8")),
            ("positions", positions, ("absolute", "window", None)),
            ("on-overflow", on_overflow, ("evict", "warn", "error")),
        ):
            if value not in known:
                raise ConfigError(f"--{option} is {value!r}; choose one of {', '.join(filter(None, known))}")
        budget = Budget.of(budget)
        rule = make_policy(policy or ("full" if budget.keeps_everything else "hashevict-plus"), **policy_options)
        positions = positions or ("window" if rule.evicts else "absolute")
        int8, layers = kv_dtype == "int8", config.num_hidden_layers

        def bytes_of(slots: int) -> int:
            try:
                shares = layer_slots(layer_budget, slots, layers, whole)
            except BudgetError:  # too few for this shape: said below, of the slots that the budget comes to
                return 0
            # the most that the free lists can take
            layouts = [Retention.of(share, evict_every=min(share, evict_every or 32)) for share in shares]
            return sum(cache_bytes(config, rule, layouts, rows=rows, dtype=dtype, int8=int8).values())

        retentions = tuple(
            Retention.of(slots, sinks=sinks, recent=recent, evict_every=evict_every, recent_share=rule.recent_share)
            for slots in layer_slots(layer_budget, budget.slots(whole, bytes_of), layers, whole)
        )
        trained, most_sinks = config.max_position_embeddings, max(retention.sinks for retention in retentions)
        if positions == "window" and most_sinks >= trained:
            raise BudgetError(
                f"--sinks {most_sinks} leave nothing of a window of {trained:,} tokens, which the model was trained "
                "for: lower --sinks, or use --positions absolute"
            )
        return cls(config, budget, whole, rule, retentions, rows, dtype, int8, positions, on_overflow, request)

    def changed(self, **changes: Any) -> CachePlan:
        """The same request with other options of `of`."""
        return CachePlan.of(self.config, **{**self.request, **changes})

    @property
    def retention(self) -> Retention:
        """That of the layer with the fewest slots: what fits there fits everywhere."""
        return min(self.retentions, key=lambda retention: retention.slots)

    @property
    def slots(self) -> int:
        """Slots per layer, KV head and row; the mean, rounded down, where layers differ."""
        return sum(retention.slots for retention in self.retentions) // len(self.retentions)

    @property
    def evicts(self) -> bool:
        """Whether a token that finds no free slot may push out another."""
        return self.policy.evicts and self.on_overflow != "error"

    def require_room(self, tokens: int, seen: int = 0) -> int:
        """Tokens that may still enter a cache that has seen `seen`; ContextFullError if that is less than `tokens`."""
        if self.evicts:
            return MAX_POSITION - seen
        slots = self.retention.slots
        room = slots - seen
        if tokens > room:
            why = "--on-overflow is error" if self.policy.evicts else f"policy '{self.policy.name}' never evicts"
            raise ContextFullError(
                f"{tokens:,} tokens do not fit: {room:,} of {slots:,} slots are free and {why}; raise --context or "
                "--budget, or choose a policy that evicts"
            )
        return room

    def require_pins(self, tokens: int, end: int) -> None:
        """Raise BudgetError if `tokens` pinned tokens, in all, the last of them before position `end`, cannot all stay:

        because they would leave nothing to evict, or would fall out of the window that the model can look back.
        """
        retention, trained = self.retention, self.config.max_position_embeddings
        if self.position_mode == "window" and end > trained:
            raise BudgetError(
                f"tokens can be pinned up to position {trained:,}, the length that the model was trained for, not "
                f"{end:,}: later ones would get out of sight; pin earlier, or use --positions absolute"
            )
        if self.policy.evicts and tokens > retention.room_for_pins:
            raise BudgetError(
                f"{tokens:,} pinned tokens do not fit: of {retention.slots:,} slots {retention.sinks} are sinks, "
                f"{retention.recent} recent and {retention.evict_every} evicted at once, which leaves "
                f"{max(0, retention.room_for_pins):,}; raise --budget, lower --recent, or pin less"
            )

    def bytes_by_part(self) -> dict[str, int]:
        """Bytes of the cache by part, over all layers and rows."""
        return cache_bytes(self.config, self.policy, self.retentions, rows=self.rows, dtype=self.dtype, int8=self.int8)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole cache, codes and state included."""
        return sum(self.bytes_by_part().values())

    def allocate(self, device: torch.device) -> KVCache:
        """The cache itself."""
        return KVCache(
            self.config,
            self.policy,
            self.retentions,
            rows=self.rows,
            dtype=self.dtype,
            device=device,
            int8=self.int8,
            position_mode=self.position_mode,
            on_overflow=self.on_overflow,
        )

    def summary(self) -> dict[str, object]:
        """The `cache` object of every command's --json."""
        retention = self.retention
        return {
            "slots": self.slots,
            "layer_slots": [layer.slots for layer in self.retentions],
            "bytes": self.nbytes,
            "policy": self.policy.name,
            "policy_options": asdict(self.policy),  # type: ignore[call-overload]  # all are dataclasses
            "budget": str(self.budget),
            "context": self.whole,
            "sinks": retention.sinks,
            "recent": retention.recent,
            "evict_every": retention.evict_every,
            "kv_dtype": "int8" if self.int8 else str(self.dtype).removeprefix("torch."),
            "positions": self.position_mode,
            "on_overflow": self.on_overflow,
        }
