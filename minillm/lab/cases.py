"""Questions in tokens: what the lab feeds a model, from its own tasks, from running text, or from a user's JSON lines.

A case is one context and what is asked after it.  Cases of one task have exactly the same number of context tokens, so
that rows of a batch stay in step and a fraction of the context means the same for all of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, PromptError
from ..tokenizer import Tokenizer
from .tasks import EVERY_TASK, Prose, Question, make_item

TEXT = "text"  # the task, and the family, without questions: nats per token of prose
LENGTHS = {"retrieval": 1024, "question-first": 1024}  # tokens of a context by family ...
LENGTH = 512  # ... and of all others


@dataclass(frozen=True)
class Asked:
    """One question: its tokens, the tokens of each answer on offer, and which of them is right.

    wanted: texts of which the share counts that the model's own answer holds; empty: the answer itself is compared.
    ordered: with ROUGE-L against the right answer, too.
    """

    prompt: list[int]
    answers: list[list[int]]
    right: int = 0
    wanted: tuple[str, ...] = ()
    ordered: bool = False


@dataclass(frozen=True)
class Case:
    """A context and the questions about it; no questions: the text itself is scored."""

    context: list[int]
    questions: list[Asked]


def family(task: str) -> str:
    """The family that a task belongs to; a user's own file is one of its own."""
    return EVERY_TASK[task].family if task in EVERY_TASK else task


def make_cases(task: str, tokenizer: Tokenizer, prose: Prose, *, tokens: int, seeds: Sequence[int]) -> Iterator[Case]:
    """A case of exactly `tokens` context tokens for every seed.  Raises ConfigError as `make_item` does."""

    def length(text: str) -> int:
        return len(tokenizer.encode(text, bos=False, continuation=True))

    begin = tokenizer.encode("", bos=True)
    questions: tuple[Question, ...]
    for seed in seeds:
        draw = random.Random(f"lead/{task}/{seed}")
        if task == TEXT:
            text, questions = " " + " ".join(prose.take(draw, length, tokens)), ()
        else:
            item = make_item(task, prose, length, tokens=tokens - len(begin), seed=seed)
            text, questions = f" {item.context}", item.questions
        ids = tokenizer.encode(text, bos=False, continuation=True)
        ids = ids[max(0, len(begin) + len(ids) - tokens) :]  # joined, sentences may take a token more than apart
        lead: list[int] = []  # the end of other prose, up to the exact length
        while len(lead) < (missing := tokens - len(begin) - len(ids)):
            more = prose.take(draw, length, missing + 400)
            lead = tokenizer.encode(" ".join(more), bos=False, continuation=True) + lead
        asked = [_asked(tokenizer, text, question) for question in questions]
        yield Case(begin + lead[len(lead) - missing :] + ids, asked)


def _asked(tokenizer: Tokenizer, context: str, question: Question) -> Asked:
    """The question as it follows the end of its context: tokens may not be the same alone."""
    tail = context[-200:]
    texts = question.choices or (question.answer,)
    prompt, *answers = _continued(tokenizer, tail, [f" {question.prompt}", *texts])
    return Asked(prompt, answers, texts.index(question.answer), question.wanted, question.ordered)


def _continued(tokenizer: Tokenizer, context: str, texts: Sequence[str]) -> list[list[int]]:
    """The tokens of a prompt behind a context, and of each answer behind both."""
    prompt, *answers = texts
    before = tokenizer.encode(context, bos=False, continuation=True)
    asked = tokenizer.encode(context + prompt, bos=False, continuation=True)
    ends = [tokenizer.encode(context + prompt + answer, bos=False, continuation=True) for answer in answers]
    return [asked[len(before) :], *[end[len(asked) :] for end in ends]]


def read_cases(path: Path, tokenizer: Tokenizer) -> list[Case]:
    """A user's own cases, one JSON object a line:

        {"context": "...", "prompt": "...", "answer": "..."}                       the answer must be continued exactly
        {"context": "...", "prompt": "...", "choices": ["...", "..."], "answer": 0}  the likeliest must be that one

    context may be left out (what must be remembered then stands in the prompt); lines that share a context should
    follow one another, for it is read once.  A space is put before an answer that has none.  Raises PromptError, which
    names the line.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"cannot read the task file {path}: {error}") from None
    cases: list[Case] = []
    last: str | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        context, prompt, texts, right = _fields(path, number, line)
        if context:
            read = tokenizer.encode(context, bos=True)
            asked, *answers = _continued(tokenizer, context, [prompt, *texts])
        else:  # the end of the prompt is what asks
            read = tokenizer.encode(prompt, bos=True)
            (_, *answers), asked = _continued(tokenizer, prompt, ["", *texts]), [read.pop()]
        if not read or not asked:
            raise PromptError(f"{path}, line {number}: the prompt has no tokens of its own")
        if not all(answers):
            raise PromptError(f"{path}, line {number}: an answer has no tokens of its own")
        question = Asked(asked, answers, right)
        if context and context == last:
            cases[-1].questions.append(question)
        else:
            cases.append(Case(read, [question]))
        last = context
    if not cases:
        raise PromptError(f"the task file {path} is empty: give one JSON object a line, with prompt and answer")
    return cases


def _fields(path: Path, number: int, line: str) -> tuple[str, str, list[str], int]:
    """context, prompt, the answers on offer, and which is right."""

    def wrong(what: str) -> PromptError:
        return PromptError(f"{path}, line {number}: {what}")

    try:
        item: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise wrong(f"not JSON ({error})") from None
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str) or not item["prompt"]:
        raise wrong("must be an object with a text 'prompt'")
    context, choices, answer = item.get("context", ""), item.get("choices"), item.get("answer")
    if not isinstance(context, str):
        raise wrong("'context' must be text")
    if choices is None:
        if not isinstance(answer, str) or not answer.strip():
            raise wrong("'answer' must be text")
        return context, item["prompt"], [_spaced(answer)], 0
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise wrong("'choices' must be a list of at least two texts")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise wrong(f"'answer' must be one of the {len(choices)} choices, or its number from 0")
    return context, item["prompt"], [_spaced(choice) for choice in choices], answer


def _spaced(answer: str) -> str:
    return answer if answer[0].isspace() else f" {answer}"


def default_length(task: str) -> int:
    """Tokens of a context: 1,024 for retrieval, 512 for all else."""
    return LENGTHS.get(family(task), LENGTH)


def check_tasks(names: Sequence[str]) -> list[str]:
    """The tasks called so, a family's name standing for all of its tasks, in order; ConfigError for others."""
    known = [*EVERY_TASK, TEXT]
    found: list[str] = []
    for name in names:
        named = [task for task in known if name in (task, family(task))]
        if not named:
            families = sorted({family(task) for task in known})
            raise ConfigError(
                f"unknown task '{name}'; there are {', '.join(known)}, and families {', '.join(families)}"
            )
        found += [task for task in named if task not in found]
    return found
