"""Seeded questions about a long text: does the cache still hold what nobody had asked about yet?

A context is prose with small facts strewn into it; the questions come after it, so that no policy can know what will
be asked (unless `question_first`, which is a task of its own).  Four families, after the experiments of HashEvict
(arXiv 2412.16187), in a language so small that a model of a few million parameters speaks it:

    retrieval   needle "Code river gold."  asked "Code river" -> "gold"; several keys; several values of a key; a chain
                of two codes followed hop by hop; the most common of strewn words     (after RULER, arXiv 2404.06654)
    choice      "Anna keeps lamp." asked "Anna keeps" with four answers, all of them in the text, scored by likelihood
    arithmetic  "Box river three." asked for the sum of three boxes, step by step
    summary     "first river gold." "second ..." strewn in order; asked for all of them, scored by recall and ROUGE-L

Beside them stand pathological inputs (STRESS), each a family of its own: filler that repeats one sentence, facts that
all lie at the beginning, facts whose every word also stands elsewhere in another sense, and queries that keep asking
for one fact before another is asked for.

Everything follows from (task, seed, length): no files but the prose, no network, no state.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import ConfigError

KEYS = (
    "river lake forest garden castle bridge tower village island valley mountain field farm barn kitchen bedroom "
    "school church shop market station hotel palace prison cave beach pond road street tunnel"
)
VALUES = (
    "gold silver iron glass paper wood stone coal milk honey bread butter sugar salt tea coffee apple banana carrot "
    "cherry lemon orange onion potato ball doll drum flag kite lamp mirror needle pencil ribbon rope candle basket"
)
WORDS = "lion tiger bear wolf fox rabbit mouse horse cow sheep pig goat duck eagle owl frog snake spider bee ant"
NAMES = "Anna Ben Clara Emma George Jack Lily Lucy Martha Mia Peter Sara Tim Tom"
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBERS += ["thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"]
ORDINALS = ["first", "second", "third", "fourth", "fifth"]
VERBS = ("keeps", "wants", "sells")
SENTENCE = re.compile(r"(?<=[.!?])\s+")

Score = Literal["exact", "recall", "choice", "recall and ROUGE-L"]


@dataclass(frozen=True)
class Question:
    """What follows the context, and what a model that remembers says next.

    answer: the words wanted, each with its leading space, joined.  choices: the texts to choose from by likelihood.
    wanted: words of which the share that is said counts ("recall").  ordered: so does their order, and what is said
    besides: the mean of that share and of ROUGE-L.
    """

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()
    ordered: bool = False


@dataclass(frozen=True)
class Item:
    """One context and the questions about it."""

    task: str
    family: str
    score: Score
    context: str
    questions: tuple[Question, ...]


@dataclass(frozen=True)
class Facts:
    """Sentences to be strewn into prose, and the questions they answer.  closing: what ends the context."""

    sentences: list[str]
    questions: list[Question]
    ordered: bool = False
    closing: tuple[str, ...] = ()


def _words(draw: random.Random, pool: str, count: int) -> list[str]:
    return draw.sample(pool.split(), count)


def codes(draw: random.Random, count: int, asked: int) -> Facts:
    """So many keys with a value each, of which so many are asked for."""
    keys, values = _words(draw, KEYS, count), _words(draw, VALUES, count)
    pairs = list(zip(keys, values, strict=True))
    questions = [Question(f"Code {key}", f" {value}") for key, value in draw.sample(pairs, asked)]
    return Facts([f"Code {key} {value}." for key, value in pairs], questions)


def _needle(draw: random.Random) -> Facts:
    return codes(draw, 1, 1)


def _keys(draw: random.Random) -> Facts:
    return codes(draw, 12, 12)


def _values(draw: random.Random) -> Facts:
    """Every key has two values, far apart; the answer names both in their order."""
    keys, values = _words(draw, KEYS, 4), _words(draw, VALUES, 8)
    pairs = list(zip(keys * 2, values, strict=True))
    draw.shuffle(pairs)
    questions = []
    for key in keys:
        wanted = tuple(value for owner, value in pairs if owner == key)
        questions.append(Question(f"All {key}", "".join(f" {value}" for value in wanted), wanted=wanted))
    draw.shuffle(questions)
    return Facts([f"Code {key} {value}." for key, value in pairs], questions, ordered=True)


def _hops(draw: random.Random) -> Facts:
    """A code that leads to a key that leads on: both steps are said."""
    keys, ends = _words(draw, KEYS, 12), _words(draw, VALUES, 6)
    sentences, questions = [], []
    for start, middle, end in zip(keys[:6], keys[6:], ends, strict=True):
        sentences += [f"Code {start} {middle}.", f"Code {middle} {end}."]
        questions.append(Question(f"Trace {start}", f" {middle} {end}"))
    draw.shuffle(questions)
    return Facts(sentences, questions)


def _common(draw: random.Random) -> Facts:
    """One word is strewn six times, five others once."""
    often, *others = _words(draw, WORDS, 6)
    sentences = [f"Word {word}." for word in [often] * 6 + others]
    return Facts(sentences, [Question("Most common", f" {often}")])


def _choice(draw: random.Random) -> Facts:
    """Who does what with what: the wrong answers are true of somebody else, or of another verb."""
    facts = [(name, verb) for name in _words(draw, NAMES, 4) for verb in VERBS]
    values = _words(draw, VALUES, len(facts))
    questions = []
    for (name, verb), value in zip(facts, values, strict=True):
        choices = [value, *draw.sample([other for other in values if other != value], 3)]
        draw.shuffle(choices)
        questions.append(Question(f"{name} {verb}", f" {value}", choices=tuple(f" {choice}" for choice in choices)))
    draw.shuffle(questions)
    return Facts([f"{who} {verb} {what}." for (who, verb), what in zip(facts, values, strict=True)], questions)


def _arithmetic(draw: random.Random) -> Facts:
    """Three boxes hold one to six each: look the first two up, add, look the third up, add."""
    boxes = {key: draw.randint(1, 6) for key in _words(draw, KEYS, 6)}
    questions = []
    for _ in range(8):
        asked = draw.sample(sorted(boxes), 3)
        a, b, c = (boxes[box] for box in asked)
        steps = f" {asked[0]} {NUMBERS[a]} {asked[1]} {NUMBERS[b]} makes {NUMBERS[a + b]}"
        steps += f" {asked[2]} {NUMBERS[c]} makes {NUMBERS[a + b + c]}"
        questions.append(Question(f"Add {' '.join(asked)}:", steps))
    return Facts([f"Box {box} {NUMBERS[number]}." for box, number in boxes.items()], questions)


def _summary(draw: random.Random) -> Facts:
    """The key facts, in their order."""
    keys, values = _words(draw, KEYS, 5), _words(draw, VALUES, 5)
    points = [f"{order} {key} {value}" for order, key, value in zip(ORDINALS, keys, values, strict=False)]
    wanted = tuple(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return Facts(
        [f"{point}." for point in points],
        [Question("Summary:", f" {' '.join(points)}", wanted=wanted, ordered=True)],
        True,
    )


def _overlap(draw: random.Random) -> Facts:
    """Every key is also said to be made of another's value, and every value is somebody's: neither is a code."""
    plain = codes(draw, 6, 6)
    keys, values = zip(*(sentence.rstrip(".").split()[1:] for sentence in plain.sentences), strict=True)
    made = [f"The {key} was made of {value}." for key, value in zip(keys, values[1:] + values[:1], strict=True)]
    owners = draw.sample([(name, verb) for name in NAMES.split() for verb in VERBS], len(values))
    owned = [f"{name} {verb} {value}." for (name, verb), value in zip(owners, values, strict=True)]
    return Facts(plain.sentences + made + owned, plain.questions)


def _adversarial(draw: random.Random) -> Facts:
    """One code is asked for and answered twenty times; then the others are asked for."""
    plain = codes(draw, 8, 8)
    insisted, *later = plain.questions
    return Facts(plain.sentences, later, closing=(f"{insisted.prompt}{insisted.answer}.",) * 20)


@dataclass(frozen=True)
class Task:
    """A kind of item: its family, how answers are scored, and where its facts come from.

    repeated: the filler is one sentence over and over.  within: the facts lie in the first such share of the filler.
    """

    family: str
    score: Score
    facts: Callable[[random.Random], Facts]
    question_first: bool = False
    repeated: bool = False
    within: float = 1.0


TASKS: dict[str, Task] = {
    "needle": Task("retrieval", "exact", _needle),
    "keys": Task("retrieval", "exact", _keys),
    "values": Task("retrieval", "recall", _values),
    "hops": Task("retrieval", "exact", _hops),
    "common": Task("retrieval", "exact", _common),
    "choice": Task("choice", "choice", _choice),
    "arithmetic": Task("arithmetic", "exact", _arithmetic),
    "summary": Task("summary", "recall and ROUGE-L", _summary),
    "keys-first": Task("question-first", "exact", _keys, question_first=True),
}
STRESS: dict[str, Task] = {
    "repetition": Task("repetition", "exact", _keys, repeated=True),
    "long-range": Task("long-range", "exact", _keys, within=0.1),
    "overlap": Task("overlap", "exact", _overlap),
    "adversarial": Task("adversarial", "exact", _adversarial),
}
EVERY_TASK = TASKS | STRESS


class Prose:
    """Sentences of real text, to be cut from at any place.  Raises ConfigError where there is too little of it."""

    def __init__(self, text: str) -> None:
        sentences = (" ".join(sentence.split()) for sentence in SENTENCE.split(text))
        self.sentences = [sentence for sentence in sentences if 20 <= len(sentence) <= 400]
        if len(self.sentences) < 20:
            raise ConfigError(
                f"the haystack has {len(self.sentences)} usable sentences; give a text or folder with at least 20"
            )

    @classmethod
    def of(cls, path: Path) -> Prose:
        """The prose of a UTF-8 text file, or of all .txt and .md files below a folder."""
        files = sorted(file for file in path.rglob("*") if file.suffix in {".txt", ".md"}) if path.is_dir() else [path]
        if not files or not files[0].is_file():
            raise ConfigError(f"no haystack at {path}: give a text file or a folder with .txt or .md files")
        return cls("\n".join(file.read_text("utf-8", "replace") for file in files))

    def take(
        self, draw: random.Random, length: Callable[[str], int], room: int, *, repeated: bool = False
    ) -> list[str]:
        """Sentences that follow one another - or one, again and again - of at most `room` by `length` together."""
        at = draw.randrange(len(self.sentences))
        taken: list[str] = []
        while True:
            sentence = self.sentences[at % len(self.sentences)]
            room -= length(f" {sentence}")
            if room < 0:
                return taken
            taken.append(sentence)
            at += not repeated


def make_item(name: str, prose: Prose, length: Callable[[str], int], *, tokens: int, seed: int) -> Item:
    """The item of a task with a context of at most `tokens` tokens, counted by `length`; same arguments, same item.

    Raises ConfigError for an unknown task, or where the facts alone are longer than the context.
    """
    if name not in EVERY_TASK:
        raise ConfigError(f"unknown task '{name}'; there are {', '.join(EVERY_TASK)}")
    task, draw = EVERY_TASK[name], random.Random(f"{name}/{seed}")
    facts = task.facts(draw)
    questions = facts.questions[:1] if task.question_first else facts.questions
    opening = [f"Question: {questions[0].prompt}?"] if task.question_first else []
    room = tokens - sum(length(f" {sentence}") for sentence in (*opening, *facts.sentences, *facts.closing))
    if room < 0:
        raise ConfigError(f"the facts of task '{name}' are {-room} tokens longer than a context of {tokens}")
    filler = prose.take(draw, length, room, repeated=task.repeated)
    sentences = list(facts.sentences)
    if not facts.ordered:
        draw.shuffle(sentences)
    places = sorted(draw.randint(0, int(task.within * len(filler))) for _ in sentences)
    context = " ".join([*opening, *_strew(filler, sentences, places), *facts.closing])
    return Item(name, task.family, task.score, context, tuple(questions))


def _strew(filler: Sequence[str], sentences: Sequence[str], places: Sequence[int]) -> list[str]:
    """Put each sentence before the filler sentence at its place (ascending)."""
    text: list[str] = []
    last = 0
    for sentence, place in zip(sentences, places, strict=True):
        text += [*filler[last:place], sentence]
        last = place
    return [*text, *filler[last:]]
