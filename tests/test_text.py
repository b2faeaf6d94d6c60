"""Stop strings, characters and windows, each fuzzed against the obvious way to do it on the whole text."""

from __future__ import annotations

import random
import re
import zlib
from itertools import chain

import pytest

from minillm.errors import SamplingError
from minillm.text import IncrementalDecoder, StopMatcher, encode_in_windows


def feed(matcher: StopMatcher, pieces: list[str]) -> tuple[str, bool]:
    shown = ""
    for piece in pieces:
        emit, stopped = matcher.push(piece)
        shown += emit
        if stopped:
            return shown, True
    return shown + matcher.flush(), matcher.stopped


def cut(text: str, rng: random.Random) -> list[str]:
    borders = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    return [text[a:b] for a, b in zip([0, *borders], [*borders, len(text)], strict=True)]


def test_stop_place_is_that_of_the_whole_text_for_any_split() -> None:
    rng = random.Random(0)
    stopped_often = 0
    for _ in range(5000):
        text = "".join(rng.choices("ab<\n", k=rng.randrange(30)))
        stops = ["".join(rng.choices("ab<\n", k=rng.randrange(1, 5))) for _ in range(rng.randrange(4))]
        places = [text.find(stop) for stop in stops if stop in text]
        expected = text[: min(places, default=len(text))], bool(places)
        assert feed(StopMatcher(stops), cut(text, rng)) == expected, (text, stops)
        assert feed(StopMatcher(stops), list(text)) == expected, (text, stops)
        stopped_often += bool(places)
    assert 1000 < stopped_often < 4500


def test_only_what_could_become_a_stop_is_held_back() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        stops = ["".join(rng.choices("ab", k=rng.randrange(1, 6))) for _ in range(2)]
        matcher, text, shown = StopMatcher(stops), "", ""
        for char in rng.choices("abc", k=20):
            text += char
            emit, stopped = matcher.push(char)
            shown += emit
            if stopped:
                break
            suffixes = [text[i:] for i in range(len(text))]
            longest = max((len(s) for s in suffixes if any(stop.startswith(s) for stop in stops)), default=0)
            assert shown == text[: len(text) - longest]


def test_nothing_is_shown_after_a_stop() -> None:
    matcher = StopMatcher(["<end>"])
    assert matcher.push("a <") == ("a ", False)
    assert matcher.push("b") == ("<b", False)
    assert matcher.push("<end>x") == ("", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_a_stop_inside_a_longer_one_waits_for_it() -> None:
    """The stop that begins first counts, so "b" has to wait until "abc" cannot come any more."""
    matcher = StopMatcher(["abc", "b"])
    assert matcher.push("xab") == ("x", False)
    assert matcher.push("d") == ("a", True)
    matcher = StopMatcher(["abc", "b"])
    assert matcher.push("xab") == ("x", False)
    assert (matcher.flush(), matcher.stopped) == ("a", True)


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(SamplingError, match="stop string is empty"):
        StopMatcher(["a", ""])


def test_bytes_become_characters_as_python_decodes_them_whole() -> None:
    rng = random.Random(2)
    for _ in range(2000):
        data = b"".join(rng.choice([b" ", b"a", "é".encode(), "🦙".encode(), rng.randbytes(1)]) for _ in range(12))
        tokens: list[bytes] = []
        while sum(map(len, tokens)) < len(data):
            at = sum(map(len, tokens))
            tokens.append(data[at : at + rng.randrange(4)])
        decoder = IncrementalDecoder(tokens.__getitem__, strip_space=False)
        text = "".join(map(decoder.push, range(len(tokens)))) + decoder.flush()
        assert text == data.decode(errors="replace")


def test_one_leading_space_is_dropped_even_behind_hidden_tokens() -> None:
    tokens = [b"", b" ", b" a", b" b"]
    decoder = IncrementalDecoder(tokens.__getitem__, strip_space=True)
    assert [decoder.push(i) for i in range(4)] == ["", "", " a", " b"]


def words(text: str, _beginning: bool) -> tuple[list[int], list[int]]:
    found = list(re.finditer(r"\s*\S+|\s+", text))
    return [zlib.crc32(match[0].encode()) % 1000 for match in found], [match.start() for match in found]


def test_windows_agree_with_the_whole_and_stay_small() -> None:
    rng = random.Random(3)
    text = "".join(rng.choices("ab  c", k=50_000))
    longest = 0

    def encode(window: str, beginning: bool) -> tuple[list[int], list[int]]:
        nonlocal longest
        longest = max(longest, len(window))
        return words(window, beginning)

    ids = [*chain.from_iterable(encode_in_windows(encode, cut(text, rng), window=5000))]
    assert ids == words(text, True)[0]
    assert longest < 5500


def test_a_text_that_never_agrees_is_encoded_as_one() -> None:
    """A toy tokenizer whose tokens depend on the whole text: no border can be trusted, and none is."""
    text = "abcdefghij" * 100

    def encode(window: str, _beginning: bool) -> tuple[list[int], list[int]]:
        return [len(window)] * len(window), list(range(len(window)))

    assert [*chain.from_iterable(encode_in_windows(encode, [text], window=100))] == encode(text, True)[0]
