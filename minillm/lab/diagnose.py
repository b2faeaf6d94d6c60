"""Where a budget hurts: attention lost, output error and next tokens of several policies at the same number of slots.

The full cache reads a text, and in step with it one bounded cache per contender.  The least that any choice of as many
tokens could lose, and what `random` loses, stand beside each result: where those two are close, the measure is blind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, count
from math import gcd
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ..answer import Progress
from ..budget import CachePlan
from ..cache import KVCache
from ..errors import ConfigError
from ..generate import feed
from ..llm import LLM
from .ask import reader
from .attention import Query, last_queries, lost_mass, output_error
from .compare import Contender
from .verify import Comparison, Steps, full_plan, next_tokens, require_comparable, summarise

QUERIES = 64  # that are looked at, at most: no matrix of all queries by all tokens ever exists
RANDOM = Contender("random")

Heads = list[list[float]]  # a number for each layer and KV head


@dataclass(frozen=True)
class Finding:
    """What one contender loses: means over the sampled queries, for each layer and KV head.

    lost: share of the full cache's attention that falls on tokens it has evicted, 0 to 1.  least: what the best choice
    of as many tokens would lose, below which nobody gets.  error: ||o' - o|| / ||o|| of the attention output, where o'
    attends only to the tokens held.  error_of_best: that of the best choice for `lost`, which need not be the best
    here.  next_tokens: against the full cache at every position from the diagnosis's `start` on.
    """

    label: str
    lost: Heads
    least: Heads
    error: Heads
    error_of_best: Heads
    next_tokens: Comparison


@dataclass(frozen=True)
class Diagnosis:
    """Contenders with the same number of slots, `random` among them, on one text.

    start: the position from which on everything was measured, where the first eviction is; 0 where nothing has to go.
    """

    model: str
    tokens: int
    slots: int
    start: int
    queries: int
    findings: list[Finding]

    @property
    def random(self) -> Finding:
        """The control."""
        return next(found for found in self.findings if found.label == RANDOM.label)

    def won(self, found: Finding) -> float | None:
        """How far from random (0) to the least possible (1) the lost attention is; negative: worse than random.

        None where even random loses no more than the least possible: then there is nothing to tell.
        """
        lost, least, chance = average(found.lost), average(found.least), average(self.random.lost)
        return (chance - lost) / (chance - least) if chance > least else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.inference_mode()
def diagnose(
    llm: LLM, tokens: Tensor, contenders: Sequence[Contender], slots: int, *, progress: Progress | None = None
) -> Diagnosis:
    """Hold contenders (and `random`) with `slots` slots a layer against the full cache on token ids [n].

    All but the last token are fed.  `llm` lends its model; its own cache is left alone.  Memory: the full cache, a
    bounded one per contender, and their predictions at every position, five numbers each.  Raises ConfigError for a
    contender that cannot be, BudgetError for slots that its options do not fit into, PromptError for a text of less
    than two tokens, and ContextFullError for one that does not fit a contender that never evicts.
    """
    if not contenders:
        raise ConfigError("there is nothing to diagnose: name at least one policy, such as hashevict")
    chosen = list(dict.fromkeys((*contenders, RANDOM)))
    plans = [plan_of(llm, who, slots, len(tokens)) for who in chosen]
    full = full_plan(plans[0], len(tokens)).allocate(llm.checkpoint.device)
    caches = [reader(llm, plan).cache for plan in plans]
    start = slots if slots < len(tokens) - 1 else 0
    steps: list[list[Steps]] = [[] for _ in chosen]
    losses: list[Tensor] = []
    with last_queries(llm.model, full) as queries:
        for at, blocks in _side_by_side(llm, tokens, full, caches, _chunk(len(tokens) - 1 - start, plans)):
            for old, new in zip(steps, blocks, strict=True):
                old += new
            if at > start:
                losses.append(torch.stack([_losses(full, cache, queries, at - 1) for cache in caches]))
            llm.check_memory()
            if progress is not None:
                progress(at, len(tokens) - 1)
    findings = []
    for who, mine, seen in zip(chosen, steps, torch.stack(losses, 1), strict=True):  # seen [queries, L, 4, Hkv]
        merged = Steps(*map(torch.cat, zip(*mine, strict=True)))
        after = summarise(merged, seen[:, :, :2], start, tokens, llm.checkpoint.tokenizer)
        lost, least, error, of_best = seen.mean(0).transpose(0, 1).tolist()  # [L, Hkv] each
        findings.append(Finding(who.label, lost, least, error, of_best, after))
    return Diagnosis(llm.checkpoint.name, len(tokens), slots, start, len(losses), findings)


def plan_of(llm: LLM, who: Contender, slots: int, tokens: int) -> CachePlan:
    """A contender's cache; raises what `diagnose` does."""
    who.seeds(1)  # refuses what is an option neither of the policy nor of a cache
    options: dict[str, Any] = dict(who.options)
    plan = llm.checkpoint.plan(budget=slots, policy=who.policy, context=tokens, **options)
    require_comparable(plan, tokens)
    return plan


def _chunk(count_after: int, plans: Sequence[CachePlan]) -> int:
    """Tokens between two queries that are looked at: as few as QUERIES of them allow.

    In step with no contender's evictions, so that queries stand at all distances from one.  Example: 921 tokens ask for
    15; if every 6 tokens some are evicted, 15 would always meet the same two distances, so it is 17.
    """
    cycles = {retention.evict_every for plan in plans for retention in plan.retentions}
    return next(n for n in count(-(-count_after // QUERIES)) if all(gcd(n, cycle) == 1 for cycle in cycles))


def _side_by_side(
    llm: LLM, tokens: Tensor, full: KVCache, caches: Sequence[KVCache], chunk: int
) -> Iterator[tuple[int, list[list[Steps]]]]:
    """Feed all caches in step: tokens read so far, and for each bounded cache how its predictions compare."""
    sides = [feed(llm.model, cache, tokens[None, :-1], chunk) for cache in (full, *caches)]
    for (_, wanted), *others in zip(*sides, strict=True):  # [1, T, hidden] each
        at = full.seen[0]
        targets = tokens[at - wanted.shape[1] + 1 : at + 1].to(wanted.device, torch.int64)  # [T]
        yield at, [list(next_tokens(llm.model, wanted[0], one[0], targets, llm.real_vocab)) for _, one in others]


def _losses(full: KVCache, bounded: KVCache, queries: dict[int, Query], position: int) -> Tensor:
    """What the query at `position` loses in every layer: lost, least, error, error_of_best, as [L, 4, Hkv]."""
    found = []
    for pair in zip(full.layers, bounded.layers, strict=True):
        query = queries[pair[0].index]
        found.append(torch.cat((lost_mass(*pair, query, position), output_error(*pair, query, position))))  # [4, Hkv]
    return torch.stack(found).to("cpu", torch.float64)


def average(heads: Heads) -> float:
    """The mean over layers and KV heads."""
    return fmean(chain.from_iterable(heads))


def table(found: Diagnosis) -> Iterator[str]:
    """The lines that people read: one for each contender, the best first, then one for each layer and KV head."""
    order = sorted(found.findings, key=lambda one: average(one.lost))
    width = max(len(one.label) for one in order) + 2
    yield f"{found.model}: {found.tokens:,} tokens, {found.slots:,} slots; {found.queries} queries from {found.start:,}"
    yield ""
    heads = ("lost", "least", "won", "error", "of best", "KL", "agree", "nats")
    yield f"    {'':<{width}}" + "".join(f"{head:>9}" for head in heads)
    for number, one in enumerate(order, 1):
        won, after = found.won(one), one.next_tokens
        cells = [f"{average(one.lost):.2%}", f"{average(one.least):.2%}", "-" if won is None else f"{won:.2f}"]
        cells += [f"{average(one.error):.4f}", f"{average(one.error_of_best):.4f}", f"{after.kl:.4f}"]
        cells += [f"{after.agreement:.2%}", f"{after.budget_nats_per_token:.4f}"]
        yield f"{number:>2}  {one.label:<{width}}" + "".join(f"{cell:>9}" for cell in cells)
    yield ""
    yield "lost: attention on evicted tokens; least: by the best choice of as many; won: 0 as random, 1 as the best"
    full = order[0].next_tokens.full_nats_per_token
    yield f"error: ||o' - o|| / ||o|| of the output; next tokens: KL, agree, nats (full: {full:.4f})"
    for title, values, best in (
        ("attention lost", [one.lost for one in order], order[0].least),
        ("output error", [one.error for one in order], order[0].error_of_best),
    ):
        yield ""
        yield f"{title + ' by':<18}{'best':>8}" + "".join(f"{f'({number})':>8}" for number in range(1, len(order) + 1))
        for layer, row in enumerate(best):
            for head, value in enumerate(row):
                cells = [f"{value:.3f}", *(f"{heads_of[layer][head]:.3f}" for heads_of in values)]
                yield f"{f'layer {layer} KV head {head}':<18}" + "".join(f"{cell:>8}" for cell in cells)
