"""What a budget costs on one text: the full cache and the bounded one read it side by side (teacher forced).

Both are fed the same tokens in the same chunks, so their predictions can be compared at every position; and after every
chunk the full cache tells how much of its attention falls on tokens that the bounded one no longer sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..answer import LOGIT_ROWS, Progress, log_probabilities
from ..budget import Budget, CachePlan
from ..errors import BudgetError, PromptError
from ..eviction import Retention
from ..generate import feed
from ..llm import LLM
from ..model import Transformer
from ..policies import make_policy
from ..results import Usage
from ..tokenizer import Tokenizer
from .attention import last_queries, lost_mass

SAMPLES = 32  # queries, at least, whose attention is looked at: chunks are that short


@dataclass(frozen=True)
class Divergence:
    """After the token at `position` the full cache expects `full`, the bounded one `budget`; `text` is what came."""

    position: int
    full: str
    budget: str
    text: str


@dataclass(frozen=True)
class LostMass:
    """The share of a layer's attention that falls on tokens the bounded cache no longer sees, 0 to 1, over queries.

    mean, lowest, highest: over its KV heads.  ideal: the mean that no choice of as many tokens could get below.
    """

    mean: float
    lowest: float
    highest: float
    ideal: float


@dataclass(frozen=True)
class Comparison:
    """The two caches over the positions from `start` on.  Everything is in nats (natural logarithms) or shares of 1.

    agreement: how often both expect the same next token.  kl: of the bounded prediction from the full one, the mean and
    the worst.  full, budget: of the token that came.  lost_mass: per layer, over `queries` sampled queries.
    """

    start: int
    positions: int
    agreement: float
    kl: float
    kl_worst: float
    kl_worst_position: int
    full_nats_per_token: float
    budget_nats_per_token: float
    full_perplexity: float
    budget_perplexity: float
    first_divergence: Divergence | None
    queries: int
    lost_mass: list[LostMass]


@dataclass(frozen=True)
class Verification:
    """What a budget costs and saves on a text of `tokens` tokens.

    after_eviction: the same from the first eviction on; None where nothing had to go.  saved: of the full cache's
    bytes, 0 to 1.  usage, cache: of the bounded cache.
    """

    tokens: int
    overall: Comparison
    after_eviction: Comparison | None
    full_bytes: int
    budget_bytes: int
    saved: float
    usage: Usage
    cache: dict[str, object]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Steps(NamedTuple):
    """One number for each of n positions, on the CPU."""

    kl: Tensor  # [n] float64
    full_nats: Tensor  # [n] float64
    budget_nats: Tensor  # [n] float64
    full_top: Tensor  # [n] int64: the token that the full cache expects
    budget_top: Tensor  # [n] int64


def require_comparable(plan: CachePlan, tokens: int) -> None:
    """Raise where a text of so many tokens cannot be compared: PromptError, ContextFullError, or BudgetError."""
    if tokens < 2:
        raise PromptError(f"a text of {tokens} tokens has nothing to compare: the first one is given, not predicted")
    plan.require_room(tokens - 1)
    if plan.budget.keeps_everything and not plan.int8 and tokens <= plan.retention.slots:
        raise BudgetError(
            "there is nothing to compare: both caches would keep everything; give --budget 0.3, or --kv-dtype int8"
        )


def full_plan(plan: CachePlan, tokens: int) -> CachePlan:
    """The yardstick: a cache in the model's own precision that keeps all of a text.

    For a text longer than the model was trained for its positions are the plan's: a sliding window, or extrapolated.
    """
    return replace(
        plan,
        budget=Budget("all"),
        whole=tokens,
        policy=make_policy("full"),
        retentions=tuple(Retention(tokens, min(one.sinks, tokens), 0, 1) for one in plan.retentions),
        int8=False,
        position_mode=plan.position_mode if tokens > plan.config.max_position_embeddings else "absolute",
        on_overflow="evict",
    )


@torch.inference_mode()
def verify(llm: LLM, tokens: Tensor, *, progress: Progress | None = None) -> Verification:
    """Compare an LLM's cache with a full one over token ids [n], all but the last of which are fed.

    Memory: the full cache beside the bounded one, and LOGIT_ROWS positions' logits of each.  `llm.chunk` is an upper
    bound: a short text is read in shorter chunks.  Raises as `require_comparable` does.
    """
    require_comparable(llm.plan, len(tokens))
    model, bounded, count = llm.model, llm.cache, len(tokens) - 1
    plan = full_plan(llm.plan, len(tokens))
    full = plan.allocate(llm.checkpoint.device)
    # Odd, so that the queries that are looked at do not all stand at the same distance from an eviction.
    chunk = (max(1, min(llm.chunk, count // SAMPLES)) - 1) | 1
    llm.owner = None
    bounded.reset()
    blocks: list[Steps] = []
    lost: list[Tensor] = []
    ends: list[int] = []
    with last_queries(model, full) as queries:
        sides = (feed(model, cache, tokens[None, :-1], chunk) for cache in (full, bounded))
        for (_, wanted), (_, found) in zip(*sides, strict=True):  # [1, T, hidden] each
            at = full.seen[0]
            targets = tokens[at - wanted.shape[1] + 1 : at + 1].to(wanted.device, torch.int64)  # [T]
            blocks += next_tokens(model, wanted[0], found[0], targets, llm.real_vocab)
            pairs = zip(full.layers, bounded.layers, strict=True)
            lost.append(torch.stack([lost_mass(*pair, queries[pair[0].index], at - 1).cpu() for pair in pairs]))
            ends.append(at - 1)
            llm.check_memory()
            if progress is not None:
                progress(at, count)
    steps = Steps(*map(torch.cat, zip(*blocks, strict=True)))
    masses, sampled = torch.stack(lost), torch.tensor(ends)  # [samples, L, 2, Hkv], [samples]
    parts = [
        summarise(steps, masses[sampled >= start], start, tokens, llm.checkpoint.tokenizer)
        for start in (0, llm.plan.retention.slots)  # before its slots are full, no layer evicts
        if start < count
    ]
    return Verification(
        tokens=len(tokens),
        overall=parts[0],
        after_eviction=parts[1] if len(parts) > 1 else None,
        full_bytes=plan.nbytes,
        budget_bytes=llm.plan.nbytes,
        saved=1 - llm.plan.nbytes / plan.nbytes,
        usage=Usage.of(bounded, prompt=count, completion=0),
        cache=llm.plan.summary(),
    )


def next_tokens(model: Transformer, wanted: Tensor, found: Tensor, targets: Tensor, real_vocab: int) -> Iterator[Steps]:
    """Hidden states [T, hidden] of the full cache and of the bounded one, and the T tokens that came."""
    pairs = zip(log_probabilities(model, wanted, real_vocab), log_probabilities(model, found, real_vocab), strict=True)
    for (p, q), came in zip(pairs, targets.split(LOGIT_ROWS), strict=True):  # [n, V'] each, [n]
        numbers = (
            (p.exp() * (p - q)).sum(1).clamp(min=0),  # where they agree, rounding may make it negative
            -p.gather(1, came[:, None])[:, 0],
            -q.gather(1, came[:, None])[:, 0],
        )
        kl, full, budget = (one.cpu().to(torch.float64) for one in numbers)
        yield Steps(kl, full, budget, p.argmax(1).cpu(), q.argmax(1).cpu())


def summarise(steps: Steps, masses: Tensor, start: int, tokens: Tensor, tokenizer: Tokenizer) -> Comparison:
    """Everything from position `start` on.  masses [samples, L, 2, Hkv] are those of the queries there."""
    kl, full_nats, budget_nats, full_top, budget_top = (one[start:] for one in steps)
    full, budget = float(full_nats.mean()), float(budget_nats.mean())
    worst, differ = int(kl.argmax()), (full_top != budget_top).nonzero()[:, 0]  # [differences]

    def text(token: Tensor) -> str:
        return tokenizer.decode([int(token)], continuation=True) or tokenizer.piece(int(token))

    divergence = None
    if len(differ):
        first = int(differ[0])
        at = start + first
        divergence = Divergence(at, text(full_top[first]), text(budget_top[first]), text(tokens[at + 1]))
    return Comparison(
        start=start,
        positions=len(kl),
        agreement=1 - len(differ) / len(kl),
        kl=float(kl.mean()),
        kl_worst=float(kl[worst]),
        kl_worst_position=start + worst,
        full_nats_per_token=full,
        budget_nats_per_token=budget,
        full_perplexity=math.exp(full),
        budget_perplexity=math.exp(budget),
        first_divergence=divergence,
        queries=len(masses),
        lost_mass=[
            LostMass(float(lost.mean()), float(lost.min()), float(lost.max()), float(ideal.mean()))
            for lost, ideal in masses.to(torch.float64).mean(0)  # [L, 2, Hkv]
        ],
    )
