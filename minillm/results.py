"""What a request gives back: the answer, what was remembered and forgotten on the way, and how long it took."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from .cache import KVCache
from .shard import ALONE, Team

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True)
class Usage:
    """Tokens.  seen: entered the cache since it was last empty; kept: still there, a mean over layers and KV heads.

    kept_range: the fewest and the most that a KV head keeps; kept_by_layer: the same, with the mean between, for every
    layer.  oldest_kept: the oldest position kept anywhere outside the sinks; None where there is none.
    """

    prompt_tokens: int
    completion_tokens: int
    seen_tokens: int
    kept_tokens: float
    evicted_tokens: float
    kept_range: tuple[int, int]
    kept_by_layer: list[tuple[int, float, int]]
    oldest_kept: int | None

    @classmethod
    def of(cls, cache: KVCache, team: Team = ALONE, *, prompt: int, completion: int) -> Usage:
        """Count what a cache has seen and keeps, in the heads of a whole team (reads the device)."""
        seen, (live, oldest) = cache.seen[0], team.count(cache)
        by_layer = [(min(heads), _whole(sum(heads) / len(heads)), max(heads)) for heads in live.tolist()]
        kept = sum(mean for _, mean, _ in by_layer) / len(by_layer)
        span = min(low for low, _, _ in by_layer), max(high for _, _, high in by_layer)
        return cls(
            prompt,
            completion,
            seen,
            _whole(kept),
            _whole(seen - kept),
            span,
            by_layer,
            oldest,
        )


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class Timings:
    """Seconds.  first_token: from the request to the first token; generation: from the first token to the last."""

    first_token_s: float
    generation_s: float
    prompt_tokens_per_s: float
    generation_tokens_per_s: float


@dataclass(frozen=True)
class TokenLogprob:
    """What the model itself thought of a token (natural logarithms), and of the most likely ones in its place."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(frozen=True)
class Result:
    """One answer.  finish_reason: stop (an end token or stop string), length (max_tokens, or the cache of `full` is
    full), abort (interrupted).  token_ids hold a final end token; text does not."""

    text: str
    token_ids: list[int]
    finish_reason: FinishReason
    usage: Usage
    cache: dict[str, object]
    timings: Timings
    seed: int
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without the fields that were not asked for."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Score:
    """How well a text was predicted: `tokens` were scored; nats are natural-logarithm units."""

    tokens: int
    nats_per_token: float
    perplexity: float
    usage: Usage
    cache: dict[str, object]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
