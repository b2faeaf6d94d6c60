"""What the commands say on stderr: a line of facts before, a line after, and a meter while something takes long."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..units import size as size

if TYPE_CHECKING:
    from ..budget import CachePlan
    from ..checkpoint import Checkpoint
    from ..planner import MemoryPlan
    from ..results import Timings, Usage

QUIET_S = 2.0  # what is over sooner needs no meter
SECONDS_BETWEEN = 0.2, 10.0  # updates: on a terminal, in a log


def say(text: str) -> None:
    """One line on stderr."""
    print(f"minillm: {text}", file=sys.stderr, flush=True)


def facts_before(checkpoint: Checkpoint, plan: CachePlan) -> str:
    """Which model runs where, and what the budget became; raises CheckpointError for weights that do not fit."""
    retention = plan.retention
    slots = [layer.slots for layer in plan.retentions]
    uneven = f" ({min(slots):,} to {max(slots):,} by layer)" if min(slots) < max(slots) else ""
    kept = f"{plan.slots:,} slots{uneven}, {size(plan.nbytes)}"
    if plan.budget.kind == "fraction" and not plan.budget.keeps_everything:
        kept = f"budget {plan.budget} of {plan.whole:,} tokens = {kept}"
    elif plan.budget.keeps_everything:
        kept = f"no budget: everything is kept, {kept}"
    else:
        kept = f"budget {plan.budget} = {kept}"
    rule = f"policy {plan.policy.name}"
    if plan.policy.evicts:
        rule += f" (sinks {retention.sinks}, recent {retention.recent}, evict-every {retention.evict_every})"
    precision = str(checkpoint.dtype).removeprefix("torch.")
    if checkpoint.scheme is not None:
        precision = f"{checkpoint.scheme.name} and {precision}"
    weights = size(checkpoint.weight_bytes())
    where = f"{checkpoint.device}{on_ranks(checkpoint.team.ranks)}"
    return f"{checkpoint.name}, {weights} in {precision} on {where}; {kept}; {rule}"


def on_ranks(ranks: int) -> str:
    """What bytes are of, where several processes compute a model together."""
    return "" if ranks == 1 else f" on each of {ranks} ranks"


def facts_after(usage: Usage, timings: Timings, memory: MemoryPlan | None) -> str:
    """What was remembered, how fast it went, and the memory that was planned and that the process held at most."""
    return (
        f"{usage.prompt_tokens:,} prompt + {usage.completion_tokens:,} new tokens; {remembered(usage)}; "
        f"prompt {timings.prompt_tokens_per_s:,.0f} tok/s, generation {timings.generation_tokens_per_s:,.1f} tok/s, "
        f"first token {timings.first_token_s:.3f} s{memory_after(memory)}"
    )


def memory_after(memory: MemoryPlan | None) -> str:
    """The end of the line after: planned, and held at most."""
    return "" if memory is None else f"; memory planned {size(memory.total)}, peak {size(memory.peak)}"


def with_memory(facts: dict[str, Any], memory: MemoryPlan | None) -> str:
    """One JSON object on one line: a result, and the memory that was planned, held and promised."""
    return json.dumps(facts if memory is None else facts | {"memory": memory.to_dict()}, ensure_ascii=False)


def remembered(usage: Usage) -> str:
    """Seen, kept, evicted, and how far back memory reaches."""
    counts = (usage.kept_tokens, usage.evicted_tokens)
    kept, evicted = (f"{count:,}" if isinstance(count, int) else f"{count:,.1f}" for count in counts)
    line = f"seen {usage.seen_tokens:,}, kept {kept}, evicted {evicted}"
    if usage.evicted_tokens and usage.oldest_kept is not None:
        line += f", oldest kept {usage.oldest_kept:,}"
    return line


class Meter:
    """Progress on stderr for whatever takes longer than two seconds; silent otherwise, and gone at the end."""

    def __init__(self, what: str, unit: str, detail: Callable[[], str] | None = None) -> None:
        """detail: asked for more whenever a line is shown."""
        self._what, self._unit, self._detail = what, unit, detail
        self._terminal = sys.stderr.isatty()
        self._begin = time.perf_counter()
        self._next = self._begin + QUIET_S
        self._shown = False

    def update(self, done: int, total: int | None) -> None:
        """So much is done of so much, if that is known; at the end the line is taken back."""
        now = time.perf_counter()
        if total is not None and done >= total:
            self.close()
        elif now >= self._next:
            self._next = now + SECONDS_BETWEEN[not self._terminal]
            self._shown = True
            line = f"minillm: {self._what} {self._progress(done, total, done / (now - self._begin))}"
            line += "" if self._detail is None else f", {self._detail()}"
            print(
                f"\r{line}\x1b[K" if self._terminal else line,
                end="" if self._terminal else "\n",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        """Take the line back."""
        if self._shown and self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._shown = False

    def _progress(self, done: int, total: int | None, rate: float) -> str:
        """So much of so much, how fast, and how long it will take."""
        if self._unit == "bytes":
            amount, whole, speed = size(done), "" if total is None else f" of {size(total)}", f"{size(rate)}/s"
        else:
            whole = "" if total is None else f" of {total:,}"
            amount, whole, speed = f"{done:,}", f"{whole} {self._unit}", f"{rate:,.0f} {self._unit}/s"
        left = "" if total is None else f", {(total - done) / rate if rate > 0 else 0:.0f} s left"
        return f"{amount}{whole}, {speed}{left}"
