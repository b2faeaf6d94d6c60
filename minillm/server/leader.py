"""A server in several processes: rank 0 leads, and the others follow.

Only rank 0 has clients, an engine and samplers.  Before it does what takes the heads of all ranks it says so, and the
others do the same over their own: the sums of their layers meet.  Engine, sessions and answers know nothing of it: the
leader hears of a model's calls by hooks, and counts and copies for whoever would have asked the cache.  What is said
are whole numbers; hidden states are sent for logits, for they are few, and what is sent needs not be kept.

A row that has seen no token begins, and whoever hears of it empties it: so nobody has to tell of a reset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor, nn

from ..cache import CacheRows, KVCache
from ..llm import LLM
from ..memory import trim
from ..model import Transformer
from ..shard import ALONE, Team
from ..slots import Span

BLOCK = 64  # numbers that are always sent together: a decode step of 19 rows fits


class Order(IntEnum):
    """What the others are to do, the first of the numbers; what follows it, see `Follower`."""

    FEED, LOGITS, COUNT, COPY, HERE, END = range(6)


@dataclass(frozen=True)
class Leader(Team):
    """The team as rank 0 sees it while it serves.  A process on its own leads nobody, and tells nobody.

    To be used by one thread, like the model.
    """

    team: Team = ALONE  # in which all have to say the same

    @classmethod
    def of(cls, llm: LLM) -> Leader:
        """Over an LLM, whose model tells the others of its calls from here on."""
        leader = cls(llm.team.rank, llm.team.ranks, llm.team)
        if leader.ranks > 1:
            llm.model.register_forward_pre_hook(leader._feed)
            head = llm.model.lm_head
            if head is not None and head.out_features < llm.model.config.vocab_size:  # each has rows of its own
                head.register_forward_pre_hook(leader._logits)
        return leader

    def agreed(self, facts: Tensor) -> Tensor:
        """Nobody else draws."""
        return facts

    def count(self, cache: KVCache) -> tuple[Tensor, int | None]:
        """As the team does, of a row of the cache."""
        self._tell(Order.COUNT, cache.number, *cache.seen)
        return self.team.count(cache)

    def copy_(self, row: KVCache, other: KVCache) -> None:
        """Make a row of the cache what another one is."""
        self._tell(Order.COPY, row.number, other.number)
        row.copy_(other)

    def here(self) -> None:
        """See that everybody is there; to be said more often than the team's timeout.  Raises RankError."""
        self._tell(Order.HERE)
        self.team.most(0)

    def end(self) -> None:
        """There is nothing more to do."""
        self._tell(Order.END)

    def _feed(self, model: Transformer, inputs: tuple[Tensor, Span, KVCache | CacheRows]) -> None:  # noqa: ARG002
        tokens, span, cache = inputs
        rows = cache.views if isinstance(cache, CacheRows) else (cache,)
        batch = len(tokens) if isinstance(cache, CacheRows) else 0
        flags = [] if span.flags is None else span.flags.flatten().tolist()
        row_numbers = [row.number for row in rows]
        facts = (batch, span.length, len(rows), *row_numbers, *span.first[: len(rows)], tokens.shape[1])
        self._tell(Order.FEED, *facts, *tokens.flatten().tolist(), *flags)

    def _logits(self, head: nn.Module, inputs: tuple[Tensor]) -> None:  # noqa: ARG002
        self._tell(Order.LOGITS, *inputs[0].shape)
        self.team.agreed(inputs[0].contiguous())

    def _tell(self, *numbers: int) -> None:
        """How many, and as many as fit beside that; then the rest, if there is one."""
        facts = torch.tensor([len(numbers), *numbers, *[0] * (BLOCK - 1 - len(numbers))])
        self.team.agreed(facts[:BLOCK])
        if len(facts) > BLOCK:
            self.team.agreed(facts[BLOCK:])


class Follower:
    """Every other rank, over a cache of as many rows."""

    def __init__(self, llm: LLM) -> None:
        self._llm, self._team = llm, llm.team
        self._rows = [llm.cache.row(number) for number in range(llm.cache.rows)]
        self._together: tuple[list[int], CacheRows] | None = None
        self._trimmed = True

    @torch.inference_mode()
    def run(self) -> None:
        """Do as the leader does, until it ends.  Raises RankError, MemoryPromiseError."""
        while True:
            order, *facts = self._hear()
            if order == Order.FEED:
                self._feed(*facts)
            elif order == Order.LOGITS:
                hidden = torch.empty(facts, dtype=self._llm.checkpoint.dtype, device=self._llm.cache.device)
                self._llm.model.logits(self._team.agreed(hidden))
            elif order == Order.COUNT:
                self._team.count(self._row(*facts))
            elif order == Order.COPY:
                row, other = facts
                self._rows[row].copy_(self._rows[other])
            elif order == Order.HERE:
                self._here()
            else:
                return

    def _hear(self) -> list[int]:
        count, *numbers = self._team.agreed(torch.zeros(BLOCK, dtype=torch.int64)).tolist()
        if count > len(numbers):
            numbers += self._team.agreed(torch.zeros(count - len(numbers), dtype=torch.int64)).tolist()
        return numbers[:count]

    def _row(self, number: int, seen: int) -> KVCache:
        """A row that has seen so many tokens."""
        row = self._rows[number]
        if seen == 0:
            row.reset()
        assert row.seen == [seen], f"row {number} has seen {row.seen} tokens, and {seen} on rank 0"
        return row

    def _feed(self, batch: int, length: int, count: int, *facts: int) -> None:
        """batch: of a step of several rows; 0: one row reads `length` tokens.

        facts: the `count` rows, what each has seen, the width T, then tokens [B, T], then flags [B, T] if there are.
        """
        numbers, seen, width = list(facts[:count]), facts[count : 2 * count], facts[2 * count]
        views = [self._row(*row) for row in zip(numbers, seen, strict=True)]
        tokens, *more = torch.tensor(facts[2 * count + 1 :]).view(-1, batch or 1, width)  # [B, T] each
        flags = more[0].to(torch.uint8) if more else None
        if batch:
            cache = self._step_of(numbers, views, batch)
            span = cache.append(flags)
            self._llm.model(tokens.to(cache.device), span, cache)
        else:
            (row,) = views
            span = row.append(length, padded=width, flags=flags)
            self._llm.model(tokens.to(row.device), span, row)
        self._trimmed = False
        self._llm.check_memory()

    def _step_of(self, numbers: list[int], views: Sequence[KVCache], batch: int) -> CacheRows:
        if self._together is None or self._together[0] != numbers:
            self._together = numbers, CacheRows(self._llm.cache, numbers, views, batch)
        return self._together[1]

    def _here(self) -> None:
        self._team.most(0)
        if not self._trimmed:  # nobody asks for anything just now
            trim()
            self._trimmed = True
