"""The library's front: one prompt or many, streaming, stopping, log-probabilities, conversations, shared weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minillm import LLM, ContextFullError, PromptError, SamplingParams
from minillm.conversation import Conversation

from .helpers import make_cache, run
from .tiny_checkpoint import write_checkpoint

WORDS = "once upon a time there was a little cat who liked to sleep in the sun and a big dog said hello to her. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("chat"), template=True)


@pytest.fixture(scope="module")
def llm(folder: Path) -> LLM:
    return LLM.load(str(folder), budget=40)


def test_a_result_says_what_happened(llm: LLM) -> None:
    result = llm.generate(WORDS, max_tokens=30, ignore_eos=True)
    prompt = len(llm.encode(WORDS))
    assert result.text == llm.checkpoint.tokenizer.decode(result.token_ids, continuation=True)
    assert len(result.token_ids) == result.usage.completion_tokens == 30
    assert result.finish_reason == "length"
    assert result.usage.prompt_tokens == prompt
    assert result.usage.seen_tokens == prompt + 29, "the last token drawn is never fed"
    assert result.usage.kept_tokens <= 40
    assert result.usage.evicted_tokens == result.usage.seen_tokens - result.usage.kept_tokens
    assert result.cache["slots"] == 40
    assert result.cache["bytes"] == llm.cache.nbytes
    assert result.timings.first_token_s > 0


def test_greedy_generation_is_the_argmax_of_a_plain_forward_pass(llm: LLM) -> None:
    """Against feeding prompt and answer again in one go: the same tokens, under eviction."""
    result = llm.generate(WORDS, max_tokens=60, ignore_eos=True, temperature=0.0)
    tokens = torch.cat([llm.encode(WORDS), torch.tensor(result.token_ids[:-1])])[None]  # [1, n]
    logits = run(llm.model, make_cache(llm.model, "hashevict-plus", 40), tokens, 7)[0]  # [n, V]
    start = tokens.shape[1] - len(result.token_ids)
    assert logits[start:, : llm.real_vocab].argmax(-1).tolist() == result.token_ids


def test_logprobs_agree_with_scoring_the_same_tokens(llm: LLM) -> None:
    """Generate with log-probabilities, then re-score in one prefill and in chunks."""
    result = llm.generate(WORDS, max_tokens=40, ignore_eos=True, logprobs=3, temperature=1.0, seed=5)
    assert result.logprobs is not None
    whole = [*llm.encode(WORDS).tolist(), *result.token_ids]
    for chunk in (256, 5):
        other = LLM(llm.checkpoint, llm.model, llm.plan, chunk=chunk)
        scored = other.generate(torch.tensor(whole), max_tokens=0, prompt_logprobs=3).prompt_logprobs
        assert scored is not None
        assert scored[0] is None
        for mine, again in zip(result.logprobs, scored[-40:], strict=True):
            assert again is not None
            assert mine.token_id == again.token_id
            assert mine.logprob == pytest.approx(again.logprob, abs=1e-4)
            assert [i for i, _ in mine.top] == [i for i, _ in again.top]
        nats = other.score(whole).nats_per_token
        assert nats == pytest.approx(-sum(entry.logprob for entry in scored[1:] if entry) / (len(whole) - 1), abs=1e-5)


def test_score_cuts_rows_and_starts_each_from_an_empty_cache(llm: LLM) -> None:
    ids = llm.encode(WORDS * 6)
    rows = ids.split(51)[:3]
    expected = [llm.score(row) for row in rows]
    score = llm.score(ids, context=50, rows=3)
    assert score.tokens == 150
    assert score.nats_per_token == pytest.approx(sum(one.nats_per_token for one in expected) / 3, abs=1e-9)


def test_stream_gives_the_same_as_generate_and_can_be_left(llm: LLM) -> None:
    whole = llm.generate(WORDS, max_tokens=30, ignore_eos=True)
    stream = llm.stream(WORDS, max_tokens=30, ignore_eos=True)
    assert "".join(stream) == whole.text
    assert stream.result.token_ids == whole.token_ids
    stream = llm.stream(WORDS, max_tokens=30, ignore_eos=True)
    next(stream)
    assert stream.result.finish_reason == "abort"
    stream.stop()
    assert len("".join(stream)) < len(whole.text)
    assert stream.result.finish_reason == "abort"


def test_a_list_of_prompts_is_answered_as_if_alone(llm: LLM) -> None:
    prompts = ["once upon", "a big dog", "once upon"]
    results = llm.generate(prompts, max_tokens=10)
    assert [result.text for result in results] == [llm.generate(prompt, max_tokens=10).text for prompt in prompts]
    assert results[0].token_ids == results[2].token_ids


def test_stop_strings_end_the_answer_and_are_not_part_of_it(llm: LLM) -> None:
    text = llm.generate(WORDS, max_tokens=60, ignore_eos=True).text
    stop = text[20:24]
    result = llm.generate(WORDS, max_tokens=60, ignore_eos=True, stop=(stop,))
    assert result.text == text[: text.index(stop)]
    assert result.finish_reason == "stop"


def test_stop_ids_and_eos(llm: LLM) -> None:
    ids = llm.generate(WORDS, max_tokens=20, ignore_eos=True).token_ids
    stop_id = ids[7]
    result = llm.generate(WORDS, max_tokens=20, ignore_eos=True, stop_token_ids=(stop_id,))
    assert result.token_ids == ids[: ids.index(stop_id) + 1]
    assert result.finish_reason == "stop"


def test_same_seed_same_answer(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    first = llm.generate(WORDS, params=params)
    llm.generate("something else", temperature=1.0, max_tokens=5)
    assert llm.generate(WORDS, params=params).token_ids == first.token_ids
    drawn = llm.generate(WORDS, temperature=1.0, max_tokens=20, ignore_eos=True)
    assert llm.generate(WORDS, temperature=1.0, seed=drawn.seed, max_tokens=20, ignore_eos=True).text == drawn.text


def test_ids_beyond_the_tokenizer_are_never_drawn(llm: LLM) -> None:
    assert llm.real_vocab < llm.checkpoint.config.vocab_size
    result = llm.generate(WORDS, temperature=100.0, seed=0, max_tokens=300, ignore_eos=True)
    assert max(result.token_ids) < llm.real_vocab


def test_two_llms_over_the_same_weights_do_not_disturb_each_other(llm: LLM) -> None:
    other = LLM(llm.checkpoint, llm.model, llm.checkpoint.plan(budget=24, policy="window"))
    alone = [one.generate(WORDS, max_tokens=20, ignore_eos=True).text for one in (llm, other)]
    streams = [one.stream(WORDS, max_tokens=20, ignore_eos=True) for one in (llm, other)]
    texts = ["", ""]
    while True:
        pieces = [next(stream, None) for stream in streams]
        if pieces == [None, None]:
            break
        texts = [text + (piece or "") for text, piece in zip(texts, pieces, strict=True)]
    assert texts == alone


def test_a_newer_request_takes_the_cache_over(llm: LLM) -> None:
    older = llm.stream(WORDS, max_tokens=20, ignore_eos=True)
    next(older)
    assert llm.generate(WORDS, max_tokens=3).usage.completion_tokens == 3
    with pytest.raises(PromptError, match="newer request has taken over"):
        list(older)


def test_full_refuses_a_prompt_that_does_not_fit_and_ends_an_answer_that_does_not(folder: Path) -> None:
    llm = LLM.load(str(folder), context=32)
    assert llm.plan.policy.name == "full"
    result = llm.generate("once upon a time", max_tokens=500, ignore_eos=True)
    assert result.finish_reason == "length"
    assert result.usage.seen_tokens == 32
    assert len(result.token_ids) == 32 - result.usage.prompt_tokens + 1
    with pytest.raises(ContextFullError, match="32 of 32 slots are free"):
        llm.generate(WORDS * 3)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "the prompt is empty"),
        ([5, 999], "token id 999 is out of range: the model has ids 0 to"),
        ([-1], "token id -1 is out of range"),
        (torch.tensor([0.5]), "whole numbers"),
        (torch.zeros(2, 2, dtype=torch.int64), "one row"),
    ],
)
def test_prompts_that_cannot_be(llm: LLM, prompt: list[int], says: str) -> None:
    with pytest.raises(PromptError, match=says):
        llm.generate(prompt)


@pytest.mark.parametrize(("positions", "says"), [("window", "looks back no further"), ("absolute", "extrapolates")])
def test_passing_the_trained_length_is_said_once(folder: Path, positions: str, says: str) -> None:
    llm = LLM.load(str(folder), budget=8, positions=positions)
    with pytest.warns(UserWarning, match=f"longer than the 512 .*{says}") as said:
        llm.generate([5] * 1200, max_tokens=1)
    assert len(said) == 1


def test_a_budget_beyond_what_the_model_looks_back_is_told_what_is_enough(folder: Path) -> None:
    prompt = torch.randint(3, 90, (1300,), generator=torch.Generator().manual_seed(0))
    found = []
    for budget, says in ((900, r"no further than that, for which --budget 544 is enough$"), (544, "than that$")):
        llm = LLM.load(str(folder), budget=budget, policy="window")
        with pytest.warns(UserWarning, match=says):
            result = llm.generate(prompt, max_tokens=20, ignore_eos=True)
        found.append((result.token_ids, result.usage))
    assert found[0] == found[1]
    assert found[0][1].kept_tokens == 512
    for policy, overflow in (("full", "evict"), ("window", "error")):  # where fewer slots would hold less
        llm = LLM.load(str(folder), budget=900, policy=policy, positions="window", on_overflow=overflow)
        with pytest.warns(UserWarning, match="no further than that$"):
            llm.generate(prompt[:600], max_tokens=1)
    llm = LLM.load(str(folder), budget=2000, layer_budget="pyramid")
    with pytest.warns(UserWarning, match="no further than that$"):
        llm.generate(prompt[:600], max_tokens=1)
    session = LLM.load(str(folder), budget=900).session()
    session.append(prompt[:3], pin=True)
    with pytest.warns(UserWarning, match="no further than that$"):
        session.generate(prompt[3:600], max_tokens=1).finish()


def test_chat_renders_the_template(chat_folder: Path) -> None:
    llm = LLM.load(str(chat_folder), budget=64)
    tokenizer, template = llm.checkpoint.tokenizer, llm.checkpoint.template
    assert template is not None
    rendered = template.render([{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}])
    by_hand = llm.generate(tokenizer.encode(rendered, bos=False), max_tokens=8)
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert llm.chat(messages, max_tokens=8).token_ids == by_hand.token_ids
    assert llm.generate("hello", system="be kind", max_tokens=8).token_ids == by_hand.token_ids
    assert llm.encode("hello", raw=True).tolist() == tokenizer.encode("hello", bos=True)
    around = llm.encode(iter(["hel", "lo"]), system="be kind")
    assert around.tolist() == tokenizer.encode(rendered, bos=False)


def test_a_conversation_feeds_only_what_is_new(chat_folder: Path) -> None:
    """Turn by turn in the cache equals the whole conversation given at once, token for token, under eviction."""
    llm = LLM.load(str(chat_folder), budget=48, dtype="float32")
    tokenizer, template = llm.checkpoint.tokenizer, llm.checkpoint.template
    assert template is not None
    conversation = Conversation(llm, system="be kind")
    fed = tokenizer.encode(
        template.render([{"role": "system", "content": "be kind"}], add_generation_prompt=False), bos=False
    )
    other = LLM(llm.checkpoint, llm.model, llm.plan)
    for question in ("hello", "who sleeps?", "and the dog?"):
        answer = conversation.send(question, max_tokens=12, ignore_eos=True).finish()
        turn = template.render([{"role": "user", "content": question}])
        fed += tokenizer.encode(turn, bos=False)
        assert other.generate(fed, max_tokens=12, ignore_eos=True).token_ids == answer.token_ids
        assert answer.usage.seen_tokens == len(fed) + 11
        fed += answer.token_ids + tokenizer.encode("<|im_end|>\n", bos=False)
    assert conversation.usage().kept_tokens <= 48
    conversation.reset()
    assert conversation.send("hello", max_tokens=4).finish().usage.prompt_tokens < 40


def test_a_conversation_knows_when_its_cache_was_taken(chat_folder: Path) -> None:
    llm = LLM.load(str(chat_folder), budget=48)
    conversation = Conversation(llm)
    conversation.send("hello", max_tokens=4).finish()
    llm.generate("something else", max_tokens=2)
    with pytest.raises(PromptError, match="conversation in it is gone"):
        conversation.send("and?", max_tokens=4)


def test_a_refused_request_leaves_the_conversation_as_it_was(folder: Path) -> None:
    llm = LLM.load(str(folder), context=40)
    conversation = Conversation(llm)
    conversation.send("once upon a time", max_tokens=4).finish()
    before = conversation.usage()
    with pytest.raises(ContextFullError):
        llm.generate(WORDS * 3)
    with pytest.raises(ContextFullError):
        conversation.send(WORDS * 3)
    assert conversation.usage() == before
    assert conversation.send("a", max_tokens=2).finish().usage.seen_tokens > before.seen_tokens


def test_stopping_while_the_prompt_is_read_leaves_a_usable_conversation(folder: Path) -> None:
    llm = LLM.load(str(folder), budget=48)
    llm.chunk = 16
    conversation = Conversation(llm)
    stream = conversation.send(WORDS * 4, max_tokens=4, progress=lambda done, _: done < 40 or stream.stop())
    assert "".join(stream) == ""
    assert stream.result.finish_reason == "abort"
    assert 40 <= stream.result.usage.seen_tokens < len(stream.answer.prompt)
    assert conversation.send("once upon", max_tokens=4, ignore_eos=True).finish().usage.completion_tokens == 4


def test_an_interrupted_forward_pass_ends_the_conversation(folder: Path) -> None:
    llm = LLM.load(str(folder), budget=48)
    conversation = Conversation(llm)

    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.send("once upon", max_tokens=4, progress=interrupt).finish()
    with pytest.raises(PromptError, match="gone"):
        conversation.send("a time", max_tokens=4)
    assert llm.generate("once upon", max_tokens=4, ignore_eos=True).usage.completion_tokens == 4
