"""What budgets cost by policy: the same questions asked of every cache, and the difference to the full one.

A cell is one policy with its options and seed, one budget, and one block of contexts of one task.  Cells are kept as
they are done (store.py).  Intervals are of paired differences, clustered by context: questions about one context, and
seeds of one policy, are averaged first, for they are not independent.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from hashlib import sha256
from statistics import fmean, stdev
from typing import Any

from ..budget import CachePlan
from ..cache import cache_bytes
from ..errors import BudgetError, ConfigError
from ..eviction import Retention
from ..fingerprint import model_digest
from ..llm import LLM
from ..policies import POLICIES, make_policy
from ..version import __version__
from .ask import ask, reader
from .cases import Case, default_length, family, make_cases
from .store import Store
from .tasks import Prose

POLICY_LIST: tuple[str, ...] = (
    "window",
    "random",
    "l2",
    "keydiff",
    "exact",
    "hashevict",
    "hashevict-key",
    "hashevict-plus",
)
POLICY_LIST += ("h2o", "scissorhands", "tova", "snapkv", "fastgen")
FAMILIES = ("retrieval", "choice", "arithmetic", "summary")  # of the paper: their mean is a policy's score
CACHE_OPTIONS = ("sinks", "recent", "evict_every", "layer_budget", "kv_dtype")


def _options(policy: str) -> set[str]:
    return {option.name for option in fields(POLICIES[policy])}  # type: ignore[arg-type]  # all are dataclasses


@dataclass(frozen=True)
class Contender:
    """A policy with options, written as `hashevict,hash_bits=64,recent=20`: the policy's own, or the cache's."""

    label: str

    @property
    def policy(self) -> str:
        """The policy's name."""
        return self.label.split(",")[0]

    @property
    def options(self) -> dict[str, str | int]:
        """What was said of it; raises ConfigError for what is not NAME=VALUE."""
        pairs = [part.partition("=") for part in self.label.split(",")[1:]]
        if wrong := [name for name, equals, _ in pairs if not equals]:
            raise ConfigError(f"policy option '{wrong[0]}' of '{self.label}' is not NAME=VALUE")
        counts = ("sinks", "recent", "evict_every")
        return {name: int(value) if name in counts and value.isdigit() else value for name, _, value in pairs}

    def seeds(self, count: int) -> Sequence[int]:
        """The seeds to run it with: one where nothing is drawn."""
        make_policy(self.policy, **{k: v for k, v in self.options.items() if k not in CACHE_OPTIONS})
        drawn = "policy_seed" in _options(self.policy) and "policy_seed" not in self.options
        return range(count if drawn else 1)


@dataclass(frozen=True)
class Grid:
    """All that is to be run.

    contexts: of each task, `rows` of them side by side.  first_seed: of the contexts; others are other texts.
    equal: "bytes" gives every policy the bytes that `window` needs for the budget, codes and state counted; "slots"
    the same slots.  own: a user's cases by name, in place of made tasks.
    """

    tasks: Sequence[str]
    policies: Sequence[Contender]
    budgets: Sequence[float]
    contexts: int = 32
    rows: int = 16
    seeds: int = 3
    first_seed: int = 0
    tokens: int | None = None
    equal: str = "bytes"
    own: Mapping[str, Sequence[Case]] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the result: scores are shares of 1, or minus nats per token for the text family.

    difference: to the full cache, on the same questions; interval: half the width of its 95% confidence interval.
    """

    family: str
    budget: float
    policy: str
    score: float
    full: float
    difference: float
    interval: float
    contexts: int
    questions: int


def identity(llm: LLM, text: str) -> str:
    """What results depend on beside the grid: weights, their dtype, the prose or the user's cases, and this version."""
    dtype = str(llm.plan.dtype).removeprefix("torch.")
    digest = model_digest(llm.checkpoint.folder, llm.checkpoint.config)
    return "/".join((digest, dtype, sha256(text.encode()).hexdigest()[:8], __version__))


@dataclass(frozen=True)
class _Block:
    """Contexts that are read side by side."""

    task: str
    tokens: int
    first: int
    rows: int
    cases: Callable[[], Sequence[Case]]


def run(llm: LLM, grid: Grid, prose: Prose | None, store: Store, progress: Callable[[int, int], None]) -> list[Row]:
    """Everything that is not in the store yet, then the table.

    Raises BudgetError, before anything is computed, where a budget is too small for one of the policies.
    """
    of = identity(llm, repr(grid.own) if prose is None else "\n".join(prose.sentences))
    blocks = list(_blocks(llm, grid, prose))
    kept: dict[tuple[str, int, str, float], list[list[list[float]]]] = {}
    pairs = [(Contender("full"), 1.0)] + [(policy, budget) for policy in grid.policies for budget in grid.budgets]
    for shortest in {block.rows: block for block in sorted(blocks, key=lambda block: -block.tokens)}.values():
        for who, budget in pairs[1:]:
            try:
                _plan(llm, grid, shortest, (), who, budget, 0)
            except BudgetError as error:
                raise BudgetError(
                    f"policy '{who.label}' cannot be held to {budget:g} of {shortest.tokens:,} tokens ({error}); "
                    "leave it out, or raise the budget"
                ) from None
    total, done = sum(len(who.seeds(grid.seeds)) for who, _ in pairs) * len(blocks), 0
    for block in blocks:
        cases: Sequence[Case] = ()
        for who, budget in pairs:
            for seed in who.seeds(grid.seeds):
                key = json.dumps([of, block.task, block.tokens, block.first, block.rows, who.label, seed, budget])
                key = key if who.label == "full" else f"{key} {grid.equal}"
                if key not in store.found:
                    cases = cases or block.cases()
                    store.add(key, ask(reader(llm, _plan(llm, grid, block, cases, who, budget, seed)), cases))
                at = (block.task, block.first, who.label, budget)
                kept.setdefault(at, []).append(store.found[key])
                done += 1
                progress(done, total)
    return list(_table(grid, blocks, kept))


def _blocks(llm: LLM, grid: Grid, prose: Prose | None) -> Iterator[_Block]:
    for name, cases in grid.own.items():
        for index, case in enumerate(cases):
            yield _Block(name, len(case.context), index, 1, lambda case=case: [case])  # type: ignore[misc]
    for task in grid.tasks:
        tokens = grid.tokens or default_length(task)
        for start in range(0, grid.contexts, grid.rows):
            count, first = min(grid.rows, grid.contexts - start), grid.first_seed + start

            def make(
                task: str = task, tokens: int = tokens, seeds: Sequence[int] = range(first, first + count)
            ) -> Sequence[Case]:
                if prose is None:
                    raise ConfigError("the tasks need a haystack: name a text or a folder")
                return list(make_cases(task, llm.checkpoint.tokenizer, prose, tokens=tokens, seeds=seeds))

            yield _Block(task, tokens, first, count, make)


def _plan(
    llm: LLM, grid: Grid, block: _Block, cases: Sequence[Case], who: Contender, budget: float, seed: int
) -> CachePlan:
    """The cache of a cell."""
    asked = [len(q.prompt) + max(map(len, q.answers)) for case in cases for q in case.questions]
    if who.label == "full":
        return llm.checkpoint.plan(policy="full", context=block.tokens + max(asked, default=0), rows=block.rows)
    options: dict[str, Any] = dict(who.options)
    if "policy_seed" in _options(who.policy):
        options.setdefault("policy_seed", seed)
    slots = max(1, math.floor(budget * block.tokens))
    amount: int | str = slots
    if grid.equal == "bytes":
        layout = Retention.of(slots, sinks=0, recent=0, evict_every=min(slots, 32))
        config, dtype = llm.plan.config, llm.plan.dtype
        layouts = [layout] * config.num_hidden_layers
        amount = f"{sum(cache_bytes(config, make_policy('window'), layouts, rows=block.rows, dtype=dtype).values())}B"
    return llm.checkpoint.plan(budget=amount, policy=who.policy, context=block.tokens, rows=block.rows, **options)


def _table(
    grid: Grid, blocks: Sequence[_Block], kept: Mapping[tuple[str, int, str, float], list[list[list[float]]]]
) -> Iterator[Row]:
    """Rows by family, budget and policy, and the mean of the paper's four families, where there are several."""
    families = list(dict.fromkeys(family(block.task) for block in blocks))
    for budget in grid.budgets:
        for who in grid.policies:
            found = [_row(one, budget, who.label, blocks, kept) for one in families]
            yield from found
            if len(scored := [row for row in found if row.family in FAMILIES]) > 1:
                yield Row(
                    "mean",
                    budget,
                    who.label,
                    fmean(row.score for row in scored),
                    fmean(row.full for row in scored),
                    fmean(row.difference for row in scored),
                    math.sqrt(sum(row.interval**2 for row in scored)) / len(scored),
                    sum(row.contexts for row in scored),
                    sum(row.questions for row in scored),
                )


def _row(
    name: str,
    budget: float,
    label: str,
    blocks: Sequence[_Block],
    kept: Mapping[tuple[str, int, str, float], list[list[list[float]]]],
) -> Row:
    full: list[float] = []
    ours: list[float] = []
    questions = 0
    for block in blocks:
        if family(block.task) == name:
            reference = kept[block.task, block.first, "full", 1.0][0]
            runs = kept[block.task, block.first, label, budget]
            full += [fmean(scores) for scores in reference]
            ours += [fmean(fmean(run[i]) for run in runs) for i in range(len(reference))]
            questions += sum(map(len, reference))
    differences = [a - b for a, b in zip(ours, full, strict=True)]
    mean = fmean(differences)
    return Row(name, budget, label, fmean(ours), fmean(full), mean, interval(differences), len(full), questions)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95% confidence interval of the mean (Student's t); 0 for a single value.

    The quantile by Hill's expansion of the normal one (1.96), good to 1% from 4 degrees of freedom on.
    """
    if len(values) < 2:
        return 0.0
    z, df = 1.959964, len(values) - 1
    t = z + (z**3 + z) / (4 * df) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * df**2)
    t += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * df**3)
    return t * stdev(values) / math.sqrt(len(values))
