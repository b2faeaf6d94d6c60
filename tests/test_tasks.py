"""The task generator: seeded, no longer than asked, every fact in the text and every question after it."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from minillm.errors import ConfigError
from minillm.lab.tasks import EVERY_TASK, NUMBERS, STRESS, Prose, codes, make_item
from minillm.tokenizer import Tokenizer

SENTENCES = ["The old man went down to the sea.", "Nobody knew what he was looking for.", "It was a cold, grey day."]


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def prose() -> Prose:
    return Prose("\n".join(SENTENCES * 100))


@pytest.mark.parametrize("name", EVERY_TASK)
@pytest.mark.parametrize("tokens", [200, 1000])
def test_an_item_follows_from_its_arguments_and_keeps_to_its_length(prose: Prose, name: str, tokens: int) -> None:
    one = make_item(name, prose, words, tokens=tokens, seed=7)
    assert one == make_item(name, prose, words, tokens=tokens, seed=7)
    assert one != make_item(name, prose, words, tokens=tokens, seed=8)
    # Less than a sentence may be missing.
    assert tokens - max(map(words, SENTENCES)) <= words(one.context) <= tokens


@pytest.mark.parametrize("name", EVERY_TASK)
def test_what_is_wanted_is_in_the_context_and_not_in_the_question(prose: Prose, name: str) -> None:
    for seed in range(20):
        item = make_item(name, prose, words, tokens=300, seed=seed)
        for question in item.questions:
            assert question.answer.startswith(" ")
            assert all(want in question.answer for want in question.wanted)
            if question.choices:
                assert question.choices.count(question.answer) == 1
                assert all(choice in item.context for choice in question.choices)
            if item.family != "arithmetic":
                assert question.answer.split()[-1] in item.context
                assert question.answer.split()[-1] not in question.prompt


@pytest.mark.parametrize("name", ["needle", "keys", "choice"])
def test_one_sentence_answers_a_question(prose: Prose, name: str) -> None:
    item = make_item(name, prose, words, tokens=300, seed=1)
    for question in item.questions:
        assert item.context.count(f"{question.prompt}{question.answer}.") == 1
        assert item.context.count(f"{question.prompt} ") == 1


def test_answers_of_the_harder_tasks_are_right(prose: Prose) -> None:
    """Worked out again from the text alone."""
    for seed in range(10):
        hops = make_item("hops", prose, words, tokens=300, seed=seed)
        for question in hops.questions:
            start, (middle, end) = question.prompt.split()[1], question.answer.split()
            assert f"Code {start} {middle}." in hops.context
            assert f"Code {middle} {end}." in hops.context

        sums = make_item("arithmetic", prose, words, tokens=300, seed=seed)
        numbers = {word: number for number, word in enumerate(NUMBERS)}
        for question in sums.questions:
            asked = question.prompt.removeprefix("Add ").removesuffix(":").split()
            held = [sums.context.split(f"Box {box} ")[1].split(".")[0] for box in asked]
            assert question.answer.split()[-1] == NUMBERS[sum(numbers[word] for word in held)]

        common = make_item("common", prose, words, tokens=300, seed=seed)
        strewn = [part.split(".")[0] for part in common.context.split("Word ")[1:]]
        assert max(set(strewn), key=strewn.count) == common.questions[0].answer.strip()
        assert sorted(strewn.count(word) for word in set(strewn))[-2] <= 2

        summary = make_item("summary", prose, words, tokens=300, seed=seed)
        places = [summary.context.index(fact) for fact in summary.questions[0].wanted]
        assert places == sorted(places)


def test_only_the_question_first_task_says_what_will_be_asked(prose: Prose) -> None:
    for name, task in EVERY_TASK.items():
        item = make_item(name, prose, words, tokens=300, seed=2)
        opening = f"Question: {item.questions[0].prompt}?"
        assert item.context.startswith(opening) is task.question_first


def test_each_pathology_is_what_it_says(prose: Prose) -> None:
    """Read off the text alone, for several seeds."""
    for seed in range(10):
        items = {name: make_item(name, prose, words, tokens=400, seed=seed) for name in STRESS}
        filler = items["repetition"].context
        for question in items["repetition"].questions:
            filler = filler.replace(f"{question.prompt}{question.answer}.", "")
        assert len({sentence.strip() for sentence in filler.split(".") if sentence.strip()}) == 1

        far = items["long-range"]
        assert all(far.context.index(question.prompt) < 0.25 * len(far.context) for question in far.questions)

        both = items["overlap"]
        for question in both.questions:
            key, value = question.prompt.split()[1], question.answer.strip()
            assert both.context.count(f" {key} ") == 2
            assert both.context.count(f" {value}.") == 3
            assert f"The {key} was made of {value}." not in both.context
            assert both.context.count(f"Code {key}") == 1

        insisted = items["adversarial"].context.split(". ")[-20:]
        assert len({sentence.rstrip(".") for sentence in insisted}) == 1
        assert not any(question.prompt in insisted[0] for question in items["adversarial"].questions)


def test_facts_lie_anywhere_in_the_text(prose: Prose) -> None:
    """Over many seeds a needle is as often in the first third as in the last."""
    places = []
    for seed in range(300):
        item = make_item("needle", prose, words, tokens=300, seed=seed)
        places.append(item.context.index(f"{item.questions[0].prompt}{item.questions[0].answer}") / len(item.context))
    assert all(60 < sum(low / 3 <= place < (low + 1) / 3 for place in places) < 140 for low in range(3))


def test_lengths_are_the_tokens_of_a_real_tokenizer() -> None:
    tokenizer = Tokenizer.from_folder(Path(__file__).parents[1] / "weights" / "minillm-demo")
    story = Prose(Path(__file__).with_name("test_tasks.py").read_text("utf-8") + "\n".join(SENTENCES * 20))

    def length(text: str) -> int:
        return len(tokenizer.encode(text, bos=False))

    item = make_item("keys", story, length, tokens=512, seed=0)
    assert 512 - 200 < length(item.context) <= 512


def test_what_cannot_be_made_is_refused(prose: Prose, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown task 'sudoku'; there are needle"):
        make_item("sudoku", prose, words, tokens=300, seed=0)
    with pytest.raises(ConfigError, match="26 tokens longer than a context of 10"):
        make_item("keys", prose, words, tokens=10, seed=0)
    with pytest.raises(ConfigError, match="0 usable sentences"):
        Prose("Too short.")
    with pytest.raises(ConfigError, match="no haystack at"):
        Prose.of(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(SENTENCES * 10), "utf-8")
    assert len(Prose.of(tmp_path).sentences) == 30


def test_codes_ask_for_some_of_their_keys() -> None:
    facts = codes(random.Random(0), 6, 2)
    assert len(facts.sentences) == 6
    assert len(facts.questions) == 2
    assert len({question.prompt for question in facts.questions}) == 2
