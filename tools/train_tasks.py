"""Rows that mix prose with questions about a text, for tools/train.py.

Looking back is learned from the short to the long (found by trial: a model that starts with long contexts stays at
chance): rows begin at 64 tokens with few facts and many questions, and double every `GROW` steps up to the context.  A
step always has the same number of tokens, in fewer rows as rows get longer; from then on, lengths are mixed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import suppress

import torch
from tokenizers import Tokenizer
from torch import Tensor
from train_core import Recipe
from train_text import BOS, EOS, PackedText

from minillm.errors import ConfigError
from minillm.lab import tasks
from minillm.lab.tasks import Prose, Question, codes, make_item

SHORTEST = 64  # tokens of the first rows
GROW = 400  # steps between doublings
BARE = 96  # tokens below which a row has codes only
SHARES = {"keys": 3, "arithmetic": 3, "choice": 3, "values": 4, "hops": 3, "summary": 1, "common": 5}  # of the tasks
_POOLS = (tasks.KEYS, tasks.VALUES, tasks.WORDS, tasks.NAMES, *tasks.NUMBERS, *tasks.ORDINALS, *tasks.VERBS)
# Read often enough that the words of the tasks become tokens of their own.
WITH_TASKS = [
    f" {word}" for word in " ".join((*_POOLS, "Code Box Word Trace Add All Most common makes Summary")).split()
]
WITH_TASKS = [word for word in WITH_TASKS for _ in range(20_000)]


class TaskRows:
    """Rows of `context + 1` tokens or shorter, a `tasks` share of them with questions: a function of the step alone."""

    def __init__(self, documents: list[Tensor], tokenizer: Tokenizer, prose: Prose, recipe: Recipe) -> None:
        self.recipe, self.tokenizer, self.prose = recipe, tokenizer, prose
        self.text = PackedText(documents, recipe.context, recipe.seed)
        self.tokens = self.text.tokens
        self.bos, self.eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)

    def batch(self, step: int, rows: int) -> Tensor:
        """int64 [rows * k, context / k + 1]."""
        draw = random.Random(f"{self.recipe.seed}/tasks/{step}")
        context = self.recipe.context
        longest = min(context, SHORTEST << (step // GROW))
        length = (
            longest
            if draw.random() < 0.5
            else draw.choice([SHORTEST << n for n in range(12) if SHORTEST << n <= longest])
        )
        cuts = context // length
        prose = round(rows * (1 - self.recipe.tasks))
        text = self.text.batch(step, prose) if prose else torch.empty(0, context + 1, dtype=torch.int64)
        plain = torch.cat(
            [text[:, at : at + length + 1] for at in range(0, cuts * length, length)]
        )  # [prose * cuts, n]
        asked = torch.stack([self._row(draw, length) for _ in range((rows - prose) * cuts)])  # [.., length + 1]
        return torch.cat((plain, asked))

    def _row(self, draw: random.Random, length: int) -> Tensor:
        """One context and as many questions with answers as fit."""
        ids = [self.bos]
        while len(ids) < length + 1:
            ids += self._item(draw, length + 1 - len(ids))
        return torch.tensor(ids[: length + 1])

    def _item(self, draw: random.Random, room: int) -> list[int]:
        context, asked = self._texts(draw, room)
        ids = self._ids(f" {context}")
        for _ in range(2):  # twice in other orders: questions teach more than prose
            for question in draw.sample(asked, len(asked)):
                ids += self._ids(f" {question.prompt}{question.answer}.")
        return [*ids, self.eos, self.bos]

    def _texts(self, draw: random.Random, room: int) -> tuple[str, Sequence[Question]]:
        """A context that leaves room for its questions; a few bare codes where that is too short for a task."""
        if room >= BARE and draw.random() < 0.85:
            (name,) = draw.choices(list(SHARES), list(SHARES.values()))
            tokens = int(room * draw.uniform(0.5, 0.9))
            with suppress(ConfigError):
                item = make_item(name, self.prose, self._length, tokens=tokens, seed=draw.getrandbits(48))
                return item.context, item.questions
        count = draw.randint(2, 6)
        facts = codes(draw, count, count)
        return " ".join(facts.sentences), facts.questions

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _length(self, text: str) -> int:
        return len(self._ids(text))
