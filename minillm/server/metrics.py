"""What the server counts, for Prometheus: one registry for each server, nothing global."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ..results import Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 180, 600)


class Metrics:
    """Counters that others increase, and gauges that are asked for when somebody looks."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "minillm_requests", "Requests by path and status", ("path", "status"), registry=registry
        )
        self.answers = Counter("minillm_answers", "Answers that were completed", ("finish_reason",), registry=registry)
        self.prompt_tokens = Counter("minillm_prompt_tokens", "Tokens of prompts that were read", registry=registry)
        self.restored = Counter(
            "minillm_restored_tokens", "Tokens of prompts that were restored instead of read", registry=registry
        )
        self.completion_tokens = Counter("minillm_completion_tokens", "Tokens that were drawn", registry=registry)
        self.evicted = Counter(
            "minillm_evicted_tokens", "Tokens evicted in completed answers, a mean over heads", registry=registry
        )
        self.left = Counter("minillm_abandoned", "Requests that ended early", ("why",), registry=registry)
        self.queued = self._histogram("queue_seconds", "From a request to its row")
        self.first = self._histogram("first_token_seconds", "From a request to its first token")
        self.between = self._histogram("between_tokens_seconds", "From a token to the next one of the same answer")
        self.step = self._histogram("step_seconds", "A step of the engine")

    def gauge(self, name: str, meaning: str, ask: Callable[[], float]) -> None:
        """A number that is asked for when somebody looks."""
        Gauge(f"minillm_{name}", meaning, registry=self.registry).set_function(ask)

    def ended(self, reason: str, usage: Usage) -> None:
        """An answer is complete."""
        self.answers.labels(reason).inc()
        self.evicted.inc(usage.evicted_tokens)

    def text(self) -> bytes:
        """In Prometheus's own format."""
        return generate_latest(self.registry)

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"minillm_{name}", meaning, buckets=SECONDS, registry=self.registry)
