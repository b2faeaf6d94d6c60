"""Honest forgetting: what is counted as kept, what happens when the slots are full, and texts without an end."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from minillm import LLM, BudgetError, ContextFullError
from minillm.cli.main import main
from minillm.generate import feed, in_chunks

from .helpers import kept_positions, make_cache, run, tiny_config, tiny_model
from .tiny_checkpoint import write_checkpoint

WORDS = "once upon a time there was a little cat who liked to sleep in the sun and a big dog said hello to her. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("options", [{}, {"layer_budget": "3,1"}, {"policy": "window", "sinks": 0}])
def test_usage_counts_what_the_cache_holds(folder: Path, options: dict[str, object]) -> None:
    llm = LLM.load(str(folder), budget=48, **options)
    usage = llm.generate(WORDS * 3, max_tokens=20, ignore_eos=True).usage
    heads = [[[p for p in head if p >= 0] for head in layer.positions[0].tolist()] for layer in llm.cache.layers]
    counts = [[len(head) for head in layer] for layer in heads]
    everything = [count for layer in counts for count in layer]
    assert usage.kept_by_layer == [(min(layer), sum(layer) / len(layer), max(layer)) for layer in counts]
    assert usage.kept_range == (min(everything), max(everything))
    assert usage.kept_tokens == sum(everything) / len(everything)
    assert usage.kept_tokens + usage.evicted_tokens == usage.seen_tokens > 48
    sinks = [retention.sinks for retention in llm.plan.retentions]
    oldest = min(p for layer, first in zip(heads, sinks, strict=True) for head in layer for p in head if p >= first)
    assert usage.oldest_kept == oldest


def test_nothing_is_evicted_nothing_is_old() -> None:
    cache = make_cache(tiny_model(), slots=32)
    assert cache.oldest() is None
    run(tiny_model(), cache, torch.ones(1, 3, dtype=torch.int64), 8)
    assert cache.oldest() == cache.retentions[0].sinks
    assert cache.live().tolist() == [[3, 3], [3, 3]]


def test_what_a_sliding_window_hides_does_not_count_as_kept() -> None:
    model = tiny_model(tiny_config(sliding_windows=(None, 10)))
    cache = make_cache(model, "full", 40)
    run(model, cache, torch.ones(1, 30, dtype=torch.int64), 8)
    assert cache.live().tolist() == [[30, 30], [10, 10]]


def test_overflow_is_silent_or_said_once_or_refused(folder: Path) -> None:
    def answer(on_overflow: str, prompt: str) -> LLM:
        llm = LLM.load(str(folder), budget=48, policy="window", on_overflow=on_overflow)
        llm.generate(prompt, max_tokens=30, ignore_eos=True)
        return llm

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quiet = answer("evict", WORDS * 2)
    with pytest.warns(UserWarning, match="48 slots is full: from here on tokens are evicted") as said:
        loud = answer("warn", WORDS * 2)
    assert len(said) == 1
    assert kept_positions(loud.cache) == kept_positions(quiet.cache)
    with pytest.raises(ContextFullError, match=r"do not fit: 48 of 48 slots are free and --on-overflow is error"):
        answer("error", WORDS * 2)


def test_refusing_to_overflow_ends_the_answer_where_the_slots_end(folder: Path) -> None:
    llm = LLM.load(str(folder), budget=48, on_overflow="error")
    result = llm.generate("once upon a time", max_tokens=200, ignore_eos=True)
    assert result.finish_reason == "length"
    assert result.usage.seen_tokens == 48
    assert result.usage.evicted_tokens == 0
    with pytest.raises(ContextFullError, match="needs 49 tokens but the cache holds 48 and --on-overflow is error"):
        llm.cache.append(1)
    assert llm.cache.seen == [48]


def test_pinned_tokens_stay_and_too_many_are_refused_before_anything_runs() -> None:
    model = tiny_model()
    tokens = torch.randint(97, (1, 300), generator=torch.Generator().manual_seed(0))
    cache = make_cache(model, "hashevict", 40)
    for _ in feed(model, cache, tokens.split(33, 1), 16, pins=[(5, 12), (30, 35)]):
        pass
    for layer in kept_positions(cache):
        for head in layer[0]:
            assert set(head) >= {*range(5, 12), *range(30, 35)}
            assert len(head) <= 40


def test_more_pins_than_slots(folder: Path) -> None:
    plan = LLM.load(str(folder), budget=48, layer_budget="2,1").plan
    smallest = min(plan.retentions, key=lambda retention: retention.slots)
    plan.require_pins(smallest.room_for_pins, 500)
    with pytest.raises(BudgetError, match=f"{smallest.room_for_pins + 1} pinned tokens do not fit: of 32 slots"):
        plan.require_pins(smallest.room_for_pins + 1, 500)


def test_pins_that_would_get_out_of_sight_are_refused(folder: Path) -> None:
    session = LLM.load(str(folder), budget=48).session()
    session.append([5] * 505)
    session.append([6] * 7, pin=True)  # positions 505 to 511 of the 512 that the model was trained for
    with pytest.raises(BudgetError, match=r"can be pinned up to position 512, .* not 513: .* --positions absolute"):
        session.append([6], pin=True)
    assert session.seen == 511
    session.append([5] * 1000)
    for layer in kept_positions(session.llm.cache):
        assert all(set(head) >= set(range(505, 512)) for head in layer[0])
    assert session.usage().kept_range[0] > 7


# --- prompts in pieces -----------------------------------------------------------------------------------------------


def test_pieces_are_cut_into_whole_chunks() -> None:
    tokens = torch.arange(100)[None]
    for sizes in ([100], [1] * 100, [7, 50, 43], [64, 36], [99, 1]):
        chunks = list(in_chunks(tokens.split(sizes, 1), 16))
        assert [chunk.shape[1] for chunk in chunks] == [16] * 6 + [4]
        assert torch.equal(torch.cat(chunks, 1), tokens)
    assert list(in_chunks([], 16)) == []


def test_a_prompt_in_pieces_of_text_or_tokens_is_the_same_prompt(folder: Path) -> None:
    llm = LLM.load(str(folder), budget=48)
    whole = llm.generate(WORDS * 8, max_tokens=12, ignore_eos=True, prompt_logprobs=1, repetition_penalty=1.3)
    ids = llm.encode(WORDS * 8)
    for pieces in (iter([WORDS] * 8), iter(ids.split(37)), iter(WORDS * 8)):
        result = llm.generate(pieces, max_tokens=12, ignore_eos=True, prompt_logprobs=1, repetition_penalty=1.3)
        assert result.token_ids == whole.token_ids
        assert result.prompt_logprobs == whole.prompt_logprobs
        assert result.usage == whole.usage


def test_an_endless_prompt_is_read_as_it_comes(folder: Path) -> None:
    """Nothing is asked of the iterator before it is needed, and a stop ends the reading."""
    asked = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal asked
        while True:
            asked += 1
            yield torch.full((64,), 5, dtype=torch.int32)

    llm = LLM.load(str(folder), budget=48, chunk=64)
    stream = llm.stream(endless(), max_tokens=4, progress=lambda done, _: done < 640 or stream.stop())  # type: ignore[func-returns-value]
    assert asked <= 1
    with pytest.warns(UserWarning, match="longer than the 512"):
        assert stream.finish().finish_reason == ("abort" if asked else "never reached")
    assert asked in (10, 11, 12)


def test_a_cache_that_never_evicts_asks_an_endless_prompt_for_no_more_than_it_holds(folder: Path) -> None:
    pieces = (torch.full((64,), 5, dtype=torch.int32) for _ in iter(int, 1))
    with pytest.raises(ContextFullError, match=r"do not fit: 100 of 100 slots are free and policy 'full' never evicts"):
        LLM.load(str(folder), context=100).stream(pieces)


def test_stdin_of_unknown_length_is_fed_as_it_comes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["generate", "--model", str(folder), "--budget", "48", "--max-tokens", "5", "--ignore-eos", "--json"]
    assert main([*options, WORDS * 4]) == 0
    known = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((WORDS * 4).encode())))
    assert main(options) == 0
    unknown = json.loads(capsys.readouterr().out)
    assert unknown["token_ids"] == known["token_ids"]
    assert unknown["usage"] == known["usage"]


def test_full_ends_where_the_training_did_unless_told_otherwise(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["generate", "the dog", "--model", str(folder), "--ignore-eos", "--max-tokens", "600", "--json"]
    assert main(options) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["finish_reason"], result["usage"]["seen_tokens"]) == ("length", 512)
    assert result["usage"]["evicted_tokens"] == 0
    assert main(["generate", WORDS * 40, "--model", str(folder)]) == 2
    assert "512 of 512 slots are free and policy 'full' never evicts" in capsys.readouterr().err


def test_the_meter_shows_speed_and_what_is_kept(folder: Path, tmp_path: Path) -> None:
    """In a real process, on a text that takes longer than two seconds."""
    text = tmp_path / "long.txt"
    text.write_text(WORDS * 100)
    argv = ["generate", "--model", str(folder), "--file", str(text), "--budget", "48", "--chunk", "16"]
    code = "import sys; from minillm.cli import report, main; report.QUIET_S = 0.0; report.SECONDS_BETWEEN = 0.0, 0.1"
    code += f"; sys.exit(main.main({[*argv, '--max-tokens', '1', '--threads', '1']!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    meters = [line for line in done.stderr.splitlines() if "reading the prompt" in line]
    assert meters
    for word in (" tokens/s", "s left", "kept 4", " of "):
        assert word in meters[-1], meters[-1]
