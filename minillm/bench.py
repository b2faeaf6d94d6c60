"""How fast this machine reads prompts and decodes, and where the time of a decode step goes.

A case is a number of rows and a context.  In each round every case gets an empty cache, reads `context` random tokens
in every row (prefill, up to the likeliest next token) and then decodes `tokens` greedy ones, a step for all rows at a
time, replayed where the backend records steps; then memory alone is read.  Rounds are interleaved, so that a busy
moment hits every case.  What is reported are medians over rounds, but the best of memory, which others can only slow
down.  A round before these warms up and is not counted; in it steps are taken apart (breakdown.py), and the peak of
memory is noted.

This module prints nothing, and must not know options (cli/bench.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .backends.linear import Linear
from .breakdown import shares, watched
from .budget import CachePlan
from .cache import KVCache
from .checkpoint import Checkpoint
from .eviction import evict_
from .generate import feed, flags_of
from .machine import Others, now, read_bandwidth
from .memory import held, trim
from .model import RMSNorm, Transformer

if TYPE_CHECKING:
    from .backends.graph import Steps

UNWATCHED = 2  # decode steps before the watched ones: the first of a kind is slow


@dataclass(frozen=True)
class Case:
    """`rows` sequences that each decode after `context` tokens, in a cache as planned."""

    rows: int
    context: int
    plan: CachePlan


@dataclass(frozen=True)
class Figures:
    """What came of a case.  token_s: seconds of a decode step, which gives every row a token; tokens are of all rows.

    read_bytes: what a step has to read (weights once, and the keys and values that are live); of_bandwidth: how fast
    that was, as a share of the fastest that this memory was seen to be read.  shares: of a step's time, by part, where
    no step is replayed.  graph_coverage: the share of the measured steps that were replayed recordings.  kernels: who
    evicts, writes and attends in every layer of them, "triton" or "torch"; kernel_coverage: the share of "triton" in
    it.  None, and nothing, where the backend has neither.
    """

    rows: int
    context: int
    slots: int
    cache_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    token_s: float
    token_p95_s: float
    read_bytes: int
    read_bytes_per_s: float
    of_bandwidth: float
    shares: dict[str, float]
    graph_coverage: float | None
    kernel_coverage: float | None
    kernels: dict[str, str]


@dataclass(frozen=True)
class RowsCost:
    """How much longer a step of `rows` takes than one of `than` rows, at one context: the median over rounds."""

    context: int
    rows: int
    than: int
    ratio: float


@dataclass(frozen=True)
class Report:
    """bandwidth: bytes per second, see read_bandwidth.  peak: bytes the process held at most, without its buffers.

    others: cores that other processes had meanwhile, on average; None where the system does not tell.
    """

    cases: list[Figures]
    rows_cost: list[RowsCost]
    weight_bytes: int
    bandwidth: float
    peak: int
    others: float | None


@dataclass(frozen=True)
class Round:
    """One case, once: seconds of the prompt and of every step, the bytes that a step had to read, replayed steps."""

    prefill: float
    steps: list[float]
    read: float
    replayed: int


@dataclass(frozen=True)
class Bench:
    """A model, and how it is measured.  checkpoint: what it was loaded from, for its backend's own ways."""

    model: Transformer
    checkpoint: Checkpoint | None = None
    tokens: int = 32
    rounds: int = 3
    chunk: int = 256
    seed: int = 0

    @torch.inference_mode()
    def run(self, cases: Sequence[Case], progress: Callable[[int, int], None] = lambda done, total: None) -> Report:  # noqa: ARG005
        """Measure every case; progress(tokens done, tokens in all) follows."""
        tokens = [case.rows * (case.context + self.tokens) for case in cases]
        done, total = 0, sum(tokens) * (self.rounds + 1)
        found, bandwidths, others = [list[Round]() for _ in cases], list[float](), Others()

        def follow(index: int) -> None:
            nonlocal done
            done += tokens[index]
            progress(done, total)

        parts = []
        for index, case in enumerate(cases):
            parts.append(self._take_apart(case))
            follow(index)
        peak = held(self.device).peak  # before anything is read that is not the model's
        for _ in range(self.rounds):
            for index, case in enumerate(cases):
                found[index].append(self._round(case))
                bandwidths.append(read_bandwidth(self.device))
                follow(index)
        served = [self._served_by(case) for case in cases]
        measured = zip(cases, found, parts, served, strict=True)
        figures = [_figures(*one, max(bandwidths)) for one in measured]
        costs, weights = _rows_cost(cases, found), weight_bytes(self.model)
        return Report(figures, costs, weights, max(bandwidths), peak, others.cores())

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.model.embed_tokens.weight.device

    def _round(self, case: Case) -> Round:
        cache, token, seconds = self._prefill(case)
        recorded, before = self._recorded(cache), live_bytes(cache)
        if recorded is None:
            steps = [layers + head for layers, head in self._decode(cache, token, self.tokens)]
        else:
            steps = self._replay(recorded, cache, token)
        embedded = case.rows * self.model.model.embed_tokens.weight[0].nbytes
        read = weight_bytes(self.model) + embedded + fmean((before, live_bytes(cache)))
        return Round(seconds, steps, read, 0 if recorded is None else len(steps))

    def _prefill(self, case: Case) -> tuple[KVCache, Tensor, float]:
        """A cache that has read a prompt, the likeliest next token of every row [B, 1], and seconds."""
        cache, vocabulary = case.plan.allocate(self.device), self.model.config.vocab_size
        if case.plan.policy.needs_kinds:
            cache.kinds = torch.zeros(vocabulary, dtype=torch.uint8)  # no token is special
        drawn = torch.Generator().manual_seed(self.seed)
        prompt = torch.randint(vocabulary, (case.rows, case.context), generator=drawn, dtype=torch.int32)  # [B, n]
        begin = now(self.device)
        for _, hidden in feed(self.model, cache, prompt, self.chunk):
            last = hidden[:, -1]  # [B, hidden]
        token = self.model.logits(last).argmax(-1, keepdim=True)  # [B, 1]
        return cache, token, now(self.device) - begin

    def _decode(self, cache: KVCache, token: Tensor, count: int) -> list[tuple[float, float]]:
        """`count` steps after `token` [B, 1]: seconds of the layers and of the output projection of each."""
        steps = []
        for _ in range(count):
            begin = now(self.device)
            span = cache.append(1, flags=flags_of(cache, token.cpu()))
            last = self.model(token, span, cache)[:, -1]  # [B, hidden]
            middle = now(self.device)
            token = self.model.logits(last).argmax(-1, keepdim=True)  # [B, 1]
            steps.append((middle - begin, now(self.device) - middle))
        return steps

    def _replay(self, recorded: Steps, cache: KVCache, token: Tensor) -> list[float]:
        """`tokens` recorded steps after `token` [B, 1]: seconds from when the host has read a token to the next.

        A step is launched before the host reads what it feeds, unless that pushes something out: as in ahead.py.
        """
        rows, drawn, times = range(cache.rows), token[:, 0].split(1), list[float]()
        for left in range(self.tokens, -1, -1):
            read = recorded.fetch(drawn)
            if cache.due:
                read()
            if left:
                logits = recorded.feed(rows, cache.feed_ahead(), drawn)  # [B, V]
                cache.keep()
            read()
            times.append(time.perf_counter())
            drawn = logits.argmax(-1).split(1)
        return [after - before for before, after in pairwise(times)]

    def _take_apart(self, case: Case) -> dict[str, float]:
        """Shares of the time of a decode step, see breakdown.py."""
        trim()  # what the case before has left
        torch.cuda.empty_cache()  # likewise; nothing without CUDA
        cache, token, _ = self._prefill(case)
        recorded = self._recorded(cache)  # for the peak of memory: Python cannot look into it
        unwatched = min(UNWATCHED, self.tokens - 1)
        self._decode(cache, token, unwatched)
        with watched(self.model) as spent:
            steps = self._decode(cache, token, self.tokens - unwatched)
        del recorded
        return shares(spent, steps, cache, evict_ if self.checkpoint is None else self.checkpoint.evict_)

    def _recorded(self, cache: KVCache) -> Steps | None:
        """The steps of all rows as recordings, where the backend makes them."""
        return None if self.checkpoint is None else self.checkpoint.recorded(self.model, cache)

    def _served_by(self, case: Case) -> dict[str, str]:
        """See Figures.kernels."""
        cache = case.plan.allocate(torch.device("meta"))
        return {} if self.checkpoint is None else self.checkpoint.served_by(cache)


def weight_bytes(model: Transformer) -> int:
    """Bytes of weights, as they are kept, that every step reads: all but the embedding, unless it is the output."""
    total = 0 if model.lm_head is not None else model.model.embed_tokens.weight.nbytes
    for module in model.modules():
        if isinstance(module, Linear):
            total += module.nbytes + (0 if module.bias is None else module.bias.nbytes)
        elif isinstance(module, (nn.Linear, RMSNorm)):
            total += sum(parameter.nbytes for parameter in module.parameters())
    return total


def live_bytes(cache: KVCache) -> int:
    """Bytes of the keys and values, as they are stored, that the last token of every row sees."""
    layer = cache.layers[0]
    slot = sum(part[0, 0, 0].nbytes for part in (layer.keys, layer.values, layer.scales) if part is not None)
    return slot * sum(int(cache.live(row).sum()) for row in range(cache.rows))


def _figures(
    case: Case, rounds: list[Round], parts: dict[str, float], served: dict[str, str], bandwidth: float
) -> Figures:
    steps = sorted(step for measured in rounds for step in measured.steps)
    speed = median(measured.read / fmean(measured.steps) for measured in rounds)  # bytes per second
    return Figures(
        case.rows,
        case.context,
        case.plan.slots,
        case.plan.nbytes,
        prefill_tokens_per_s=median(case.rows * case.context / measured.prefill for measured in rounds),
        decode_tokens_per_s=median(case.rows / fmean(measured.steps) for measured in rounds),
        token_s=median(steps),
        token_p95_s=steps[math.ceil(0.95 * len(steps)) - 1],
        read_bytes=round(rounds[0].read),
        read_bytes_per_s=speed,
        of_bandwidth=speed / bandwidth,
        shares=parts,
        graph_coverage=sum(measured.replayed for measured in rounds) / len(steps) if served else None,
        kernel_coverage=fmean(who == "triton" for who in served.values()) if served else None,
        kernels=served,
    )


def _rows_cost(cases: Sequence[Case], found: list[list[Round]]) -> list[RowsCost]:
    """Every case beside the one of the same context with the fewest rows, round by round."""
    costs, measured = [], {(case.context, case.rows): rounds for case, rounds in zip(cases, found, strict=True)}
    for (context, rows), rounds in measured.items():
        fewest = min(other for at, other in measured if at == context)
        if rows > fewest:
            pairs = zip(rounds, measured[context, fewest], strict=True)
            ratio = median(median(many.steps) / median(few.steps) for many, few in pairs)
            costs.append(RowsCost(context, rows, fewest, ratio))
    return costs
