"""The memory plan: every byte that a process will hold, summed up before a byte of weights is read.

Base, weights and cache are exact; but rows of an embedding that no token has asked for stay on the disk where weights
are memory-mapped, so that less may be held than was planned.  The workspace of a forward pass is arithmetic over
shapes, to which a policy adds what it declares, and measured constants cover what no shape tells.
"""

from __future__ import annotations

import warnings
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch

from .backends.linear import can_pack, has_int8
from .backends.linear_cuda import product_bytes
from .budget import Budget, CachePlan
from .cache import query_block
from .errors import BudgetError
from .inventory import DTYPES, Weights
from .memory import Guard, held, room
from .units import size

# Code of the libraries that is paged in, their buffers, and the tokenizer's cache of words: 5 to 12 MiB were measured
# with torch 2.13 on 1 and 2 threads of an AMD EPYC.  Where oneDNN multiplies (packed float32; bfloat16 with AVX512
# alone), it compiles kernels for the shapes it meets: 17 to 31 MiB in all, 12 to 21 where all is float32.
RUNTIME_BYTES, COMPILED_BYTES, COMPILED_FLOAT32_BYTES = 16 << 20, 18 << 20, 9 << 20
# Freed blocks between live ones, which the heap cannot give back: up to 0.6 of the workspace was measured with glibc.
# Mapping every large block (mallopt) takes that away, but makes prefill at 8,192 slots 30% slower: page faults.
HEAP_WASTE = 0.6
CONVERSION_BYTES = 8 << 20  # what loading needs beside tensors: 1 MiB more than nothing was measured
# For each of two streams on CUDA, that of recordings being the second: what cuBLAS keeps (as torch has it on compute
# capability 9.0), and the last segments, of 2 and 20 MiB, that torch has begun to hand out.  Read, not measured.
STREAM_BYTES = (32 + 2 + 20) << 20
CUT, CUT_MANY = 256, 1 << 16  # slots of a program of attention for one token and for many, as backends/triton.py cuts
SAMPLER_BYTES = 48  # per id of the vocabulary, of float32 logits, penalties, and the sorting that top-p needs


def size_of(text: str | int) -> int:
    """Bytes that a user names: "6GiB", or a number of them.  Raises BudgetError."""
    try:
        budget = Budget.of(f"{text}B" if isinstance(text, int) else text)
    except BudgetError:
        budget = None
    if budget is None or budget.kind != "bytes":
        raise BudgetError(f"memory '{text}' is not a size such as 6GiB or 512MiB")
    return int(budget.amount)


class Way(NamedTuple):
    """One way to need less: what it is, the options that do it (of `Checkpoint.plan`, dtype and chunk), the plan."""

    what: str
    options: dict[str, Any]
    plan: MemoryPlan

    @property
    def flags(self) -> str:
        """The options as on the command line."""
        return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in self.options.items())


@dataclass(frozen=True)
class MemoryPlan:
    """What a process will hold.

    base: bytes it holds already.  chunk: tokens of a prompt that are read at once.  logit_rows: positions whose logits
    are computed together (1, or more where texts are scored).  promise: bytes that were promised not to be exceeded.
    reading: rows that read a chunk together; None: all.  requests: bytes that a server holds for its clients.
    recorded: whether decode steps are recorded (backends/graph.py).
    """

    cache: CachePlan
    weights: Weights
    base: int
    device: torch.device
    chunk: int = 256
    logit_rows: int = 1
    promise: int | None = None
    reading: int | None = None
    requests: int = 0
    recorded: bool = False

    @cached_property
    def parts(self) -> dict[str, int]:
        """Bytes by part; what a name has in common with others comes first."""
        parts = {"base": self.base, "weights": self.weights.nbytes(self.cache.dtype)}
        parts |= {f"cache {name}": count for name, count in self.cache.bytes_by_part().items()}
        parts |= {f"workspace {name}": count for name, count in self._workspace().items()}
        parts |= {"requests": self.requests} if self.requests else {}
        # A tensor that is converted is there twice for a moment, when cache and workspace are not there yet.
        converted = self.weights.converted(self.cache.dtype) if self.device.type == "cpu" else 0
        loading = converted and converted + CONVERSION_BYTES
        later = sum(count for name, count in parts.items() if name.startswith(("cache", "workspace")))
        return parts | {"conversion": loading - later} if loading > later else parts

    @property
    def total(self) -> int:
        """The most bytes at once."""
        return sum(self.parts.values())

    def changed(self, *, chunk: int | None = None, **options: Any) -> MemoryPlan:
        """The plan with other options, see CachePlan.of; raises BudgetError where they cannot be."""
        return replace(self, cache=self.cache.changed(**options), chunk=chunk or self.chunk)

    def largest(self, limit: int) -> MemoryPlan | None:
        """The same with the largest budget that fits; None if not even one token does.

        No more than the whole context, or than the model looks back, and with a policy that evicts, so that it can go
        on for ever.
        """
        cache, trained = self.cache, self.cache.config.max_position_embeddings
        most = cache.whole if cache.request.get("positions") == "absolute" else min(cache.whole, trained)
        rule = {} if self.cache.policy.evicts else {"policy": None}
        return self._most(limit, most, lambda slots: self.changed(budget=slots, **rule))

    def _most(self, limit: int, most: int, plan_of: Callable[[int], MemoryPlan]) -> MemoryPlan | None:
        """plan_of(n) with the largest n in 1..most whose total fits, by bisection."""

        def total(number: int) -> int:
            try:
                return plan_of(number).total
            except BudgetError:  # too few slots for the options: that is for the plan itself to say
                return 0

        found = bisect_right(range(1, most + 1), limit, key=total)
        return plan_of(found) if found else None

    def three_ways(self, limit: int) -> list[Way]:
        """A smaller budget, a smaller dtype, and a shorter context, each as large as `limit` bytes allow.

        A context means nothing to a budget in tokens or bytes: then a smaller chunk.  What cannot help is left out.
        """
        ways = [self._smaller_budget(limit), self._smaller_dtype(limit), self._shorter(limit)]
        return [way for way in ways if way is not None and way.plan.total <= limit]

    def _smaller_budget(self, limit: int) -> Way | None:
        try:
            plan = self.largest(limit)
        except BudgetError:
            return None
        if plan is None:
            return None
        options: dict[str, Any] = {"budget": plan.cache.slots}
        if not self.cache.policy.evicts and self.cache.request.get("policy"):
            options["policy"] = plan.cache.policy.name
        return Way("a smaller budget", options, plan)

    def _smaller_dtype(self, limit: int) -> Way | None:
        wide = self.cache.dtype.itemsize > 2
        for options in ({"kv_dtype": "int8"}, {"dtype": "bfloat16"}, {"dtype": "bfloat16", "kv_dtype": "int8"}):
            if ("dtype" in options and not wide) or ("kv_dtype" in options and self.cache.int8):
                continue
            plan = self.changed(**{name: DTYPES.get(value, value) for name, value in options.items()})  # type: ignore[arg-type]
            if plan.total <= limit:
                return Way("a smaller dtype", dict(options), plan)
        return None

    def _shorter(self, limit: int) -> Way | None:
        if self.cache.budget.kind in ("all", "fraction"):
            try:
                plan = self._most(limit, self.cache.whole, lambda whole: self.changed(whole=whole))
            except BudgetError:
                return None
            return None if plan is None else Way("a shorter context", {"context": plan.cache.whole}, plan)
        plan = self._most(limit, self.chunk, lambda chunk: self.changed(chunk=chunk))
        return None if plan is None else Way("a smaller chunk", {"chunk": plan.chunk}, plan)

    def require(self) -> None:
        """Raise BudgetError if the plan needs more than the promise, or than could ever be had; warn if more than now.

        To be called before a byte of weights is read.
        """
        (ever, now), promise = room(self.device), self.promise
        if promise is not None and self.total > promise:
            raise BudgetError(self._refusal(promise, "--memory is"))
        if self.total > ever:
            raise BudgetError(self._refusal(ever, "all that this process could ever have is"))
        if max(self.total, promise or 0) > now:
            warnings.warn(
                f"{size(max(self.total, promise or 0))} are planned and {size(now)} are free now: other processes "
                "hold the rest, and this one may be stopped by the system",
                stacklevel=3,
            )

    def _refusal(self, limit: int, what: str) -> str:
        ways = [f"{way.flags} ({size(way.plan.total)})" for way in self.three_ways(limit)]
        remedy = f"it would fit with {' or with '.join(ways)}" if ways else "no budget, dtype or context makes it fit"
        return f"{size(self.total)} are needed and {what} {size(limit)}: {remedy}"

    def check(self) -> None:
        """Raise MemoryPromiseError if this process has broken the promise; called after every chunk and token."""
        if self._guard is not None:
            self._guard.check()

    @cached_property
    def _guard(self) -> Guard | None:
        if self.promise is None:
            return None
        slots = self.cache.slots
        remedy = f"{self.total:,} were planned: lower --budget (now {slots:,} slots) or --chunk (now {self.chunk})"
        return Guard(self.promise, self.device, f"{remedy}, or raise --memory")

    @property
    def peak(self) -> int:
        """The most bytes that this process has held so far."""
        return held(self.device).peak

    def to_dict(self) -> dict[str, int | None]:
        """The `memory` object of --json: bytes planned, held at most so far, and promised."""
        return {"planned": self.total, "peak": self.peak, "promise": self.promise}

    @property
    def recording(self) -> int:
        """Bytes that recorded decode steps hold, see `recording_bytes`; 0 where none are recorded."""
        if not self.recorded:
            return 0
        found, rows = sum(recording_bytes(self.cache).values()), self.cache.rows
        found += STREAM_BYTES if self.device.type == "cuda" else 0
        return found + (self._products(rows, rows) if self._dense else 0)

    def _workspace(self) -> dict[str, int]:
        """Bytes of one forward pass at its widest moment, and of what the libraries keep for themselves.

        activations: the stream, its normalised copy and the chunk before, and the three feed-forward products or the
        queries, keys, values, their rotated copies and the result, whichever is more.  attention: see
        `attention_bytes`; beyond what is counted already, as the feed-forward has its turn later.  logits: those of one
        token and what is computed to draw the next one, or, three times in float32, those of the positions that are
        scored together.  products: of weights in 8 or 4 bits, where they become numbers when they are multiplied.
        recording: of decode steps, which nothing else can use.
        """
        plan, config = self.cache, self.cache.config
        item, heads = plan.dtype.itemsize, config.num_attention_heads + config.num_key_value_heads
        rows = self.reading or plan.rows
        width = rows * self.chunk * item
        attending, feeding = 4 * heads * config.head_dim, 3 * config.intermediate_size  # numbers per token
        attention = attention_bytes(plan, self.chunk, rows)
        if self.recorded:  # where one token a row goes through kernels, many do
            attention = max(attention, rows * kernel_bytes(plan, self.chunk))
        parts = {
            "activations": width * (3 * config.hidden_size + max(attending, feeding)),
            "attention": max(0, attention - width * max(0, feeding - attending)),
            "logits": plan.rows * config.vocab_size * max(item + SAMPLER_BYTES, 12 * self.logit_rows),
        }
        if config.shard is not None:  # sums of the stream, and logits; torch's threads hold as much again, twice
            parts["exchange"] = 3 * max(
                width * config.hidden_size, item * plan.rows * self.logit_rows * config.vocab_size
            )
        if self._dense:
            parts["products"] = self._products(rows * self.chunk, plan.rows * self.logit_rows)
        if self.recorded:
            parts["recording"] = self.recording
        parts["heap"] = int(HEAP_WASTE * sum(parts.values()))
        return parts | {"runtime": RUNTIME_BYTES + self._libraries()}

    @property
    def _dense(self) -> bool:
        """Whether weights in 8 or 4 bits become numbers when they are multiplied, a block at a time."""
        return self.weights.quantised > 0 and not (self.weights.packed and has_int8())

    def _products(self, tokens: int, logits: int) -> int:
        """Bytes that a product with weights in 8 or 4 bits holds, of so many tokens or positions whose logits it is."""
        config, hidden = self.cache.config, self.cache.config.hidden_size
        heads, feeding = config.num_attention_heads, config.intermediate_size
        if self.recorded or self.device.type == "cuda":  # gate and up may be one product, see fused.py
            heads, feeding = heads + 2 * config.num_key_value_heads, 2 * feeding
        wide = max(feeding, heads * config.head_dim)
        return max(
            product_bytes(tokens, (wide, hidden), self.device),
            product_bytes(tokens, (hidden, wide), self.device),
            product_bytes(logits, (config.vocab_size, hidden), self.device),
        )

    def _libraries(self) -> int:
        """Bytes of the kernels that oneDNN compiles, or of what CUDA's libraries keep."""
        if self.device.type == "cuda":
            return STREAM_BYTES
        packed, half = self.weights.packed, self.cache.dtype.itemsize < 4
        if self.device.type != "cpu":
            return 0
        if half or self.weights.quantised:
            return COMPILED_BYTES if can_pack(torch.bfloat16) or (packed and not half and has_int8()) else 0
        return COMPILED_FLOAT32_BYTES if packed else 0


def recording_bytes(plan: CachePlan) -> dict[str, int]:
    """What recorded decode steps of all rows hold, see backends/graph.py; those of fewer rows lie in the same memory.

    buffers: a token, a position and a row for each, and logits in float32.  step: the workspace of the widest step at
    its widest moment, which graphs keep: numbers of a layer (see `MemoryPlan._workspace`) with angles in float64, and
    what is allocated for kernels; or else the logits before they are copied.
    How torch rounds what graphs allocate is in STREAM_BYTES.
    """
    config, item, dim = plan.config, plan.dtype.itemsize, plan.config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    stream, angles = item * 3 * config.hidden_size, 64 * dim
    layer = item * max(4 * heads * dim, 3 * config.intermediate_size) + kernel_bytes(plan)
    logits = config.vocab_size * (item if item >= 4 else item + 4)
    return {
        "buffers": plan.rows * (3 * 8 + 4 * config.vocab_size),
        "step": plan.rows * (stream + angles + max(layer, logits)),
    }


def kernel_bytes(plan: CachePlan, tokens: int = 1) -> int:
    """What backends/triton.py allocates for the kernels of a layer and row that takes so many tokens, at most: parts of
    the attention, with their sums, or the codes of its queries; and what has left between the tokens.
    """
    config, item = plan.config, plan.dtype.itemsize
    retention = max(plan.retentions, key=lambda retention: retention.slots)
    cuts = -(-retention.slots // (CUT if tokens == 1 else CUT_MANY))
    codes = sum(kind.itemsize * sum(shape) for shape, kind in plan.policy.slot_state(config).values())
    most = (-(-tokens // retention.evict_every)) * retention.evict_every if tokens > 1 and plan.evicts else 0
    stored = 2 * config.head_dim + 8 if plan.int8 else 2 * config.head_dim * item  # keys and values, and their scales
    gone = config.num_key_value_heads * (most * (stored + 2 * 4) + (4 if most else 0))
    parts = tokens * cuts * (config.head_dim + 2) * 4 if cuts > 1 else 0
    return config.num_attention_heads * max(parts, codes) + gone


def attention_bytes(plan: CachePlan, chunk: int, rows: int) -> int:
    """The most bytes that live at once while a block of queries evicts, attends and is observed, per slot and KV head.

    attend: scores, their softmax and the mask of one block; keys and values as numbers to compute with, where they are
    stored in 8 bits.  evict: the order of the slots, 48 bytes, and what the policy declares for them together.
    """
    config, item = plan.config, plan.dtype.itemsize
    retention = max(plan.retentions, key=lambda retention: retention.slots)
    kv_heads, queries = config.num_key_value_heads, min(chunk, query_block(config, retention, rows))
    dense = 2 * item * config.head_dim if plan.int8 else 0
    attend = queries * (config.num_attention_heads // kv_heads * (2 * item + 1) + 3 + plan.policy.watching)
    if plan.policy.needs_attention and config.query_group > config.num_attention_heads // kv_heads:
        attend += queries * 4 * item * config.query_group  # weights of a group that is split over ranks, gathered
    evict = 48 * retention.slots + plan.policy.scratch(config, retention, plan.int8 or item < 4) if plan.evicts else 0
    return rows * kv_heads * max(retention.slots * (dense + attend), evict)
