"""The server's words: what requests may say, what is said back.  No engine, no network."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillm.chat import Message
from minillm.results import TokenLogprob, Usage
from minillm.sampling import SamplingParams
from minillm.server.fields import ApiError
from minillm.server.protocol import Ask, Finished, Limits, Piece, chat_ask, completion_ask
from minillm.server.replies import Replies, TextOffsets, token_string

LIMITS = Limits(model="tiny", real_vocab=100, choices=8, max_tokens=600, timeout=60)
HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
TEXT = {"prompt": "Once"}
Endpoint = Callable[..., Ask]


def chat(limits: Limits = LIMITS, defaults: dict[str, Any] | None = None, **body: Any) -> Ask:
    return chat_ask({**HELLO, **body}, limits, defaults or {})


def complete(limits: Limits = LIMITS, defaults: dict[str, Any] | None = None, **body: Any) -> Ask:
    return completion_ask({**TEXT, **body}, limits, defaults or {})


def refusal(ask: Endpoint, **body: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        ask(**body)
    return caught.value


# --- what is understood --------------------------------------------------------------------------------------------


def test_a_plain_chat() -> None:
    assert chat() == Ask(
        kind="chat",
        prompts=((Message(role="user", content="Hello"),),),
        params=SamplingParams(),
        n=1,
        stream=False,
        include_usage=False,
        echo=False,
        session=None,
        resume=False,
        timeout=None,
    )


def test_a_plain_completion() -> None:
    ask = complete()
    assert (ask.kind, ask.prompts, ask.params) == ("completion", ("Once",), SamplingParams(max_tokens=16))


@pytest.mark.parametrize("ask", [chat, complete])
def test_unknown_fields_are_ignored(ask: Endpoint) -> None:
    assert ask(user="me", metadata={"a": 1}, store=False, no_such_field=[[]]) == ask()


@pytest.mark.parametrize("ask", [chat, complete])
def test_what_asks_for_nothing_special_is_accepted(ask: Endpoint) -> None:
    nothing = {
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "tools": [],
        "functions": [],
        "tool_choice": "auto",
        "function_call": "none",
        "suffix": "",
        "model": "",
        "stop": [],
        "logit_bias": {},
    }
    assert ask(**nothing) == ask(model="tiny") == ask()
    assert ask(tools=[{"type": "function"}], tool_choice="none") == ask()


def test_every_sampling_field_arrives() -> None:
    values: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": -1,
        "frequency_penalty": 1,
        "seed": -3,
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 30,
    }
    params = SamplingParams(**values, logit_bias={7: -100, 99: 5}, stop=("a", "b"), stop_token_ids=(1, 2))
    body = {**values, "logit_bias": {"7": -100, "99": 5.0}, "stop": ["a", "b"], "stop_token_ids": [1, 2]}
    assert chat(**body).params == complete(**body).params == params
    assert complete(stop="\n").params.stop == ("\n",)


def test_the_request_wins_over_the_checkpoint_and_the_checkpoint_over_greedy() -> None:
    defaults = {"temperature": 0.7, "top_k": 40}
    params = chat(defaults=defaults, top_k=3, temperature=None).params
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 3, 1.0)
    assert chat(defaults=defaults, temperature=0).params.temperature == 0
    assert chat().params.temperature == 0


def test_whole_numbers_may_be_written_with_a_point() -> None:
    ask = complete(n=2.0, max_tokens=5.0, seed=1e3, prompt=[1.0, 2])
    assert (ask.n, ask.params.max_tokens, ask.params.seed, ask.prompts) == (2, 5, 1000, ((1, 2),))
    assert all(type(value) is int for value in (ask.n, ask.params.max_tokens, ask.params.seed, *ask.prompts[0]))


def test_max_tokens() -> None:
    assert chat(max_tokens=7).params.max_tokens == 7
    assert chat(max_tokens=7, max_completion_tokens=8).params.max_tokens == 8
    assert chat(max_tokens=7, max_completion_tokens=None).params.max_tokens == 7
    short = Limits(model="tiny", real_vocab=100, choices=8, max_tokens=10)
    assert chat(short).params.max_tokens == complete(short).params.max_tokens == 10
    endless = Limits(model="tiny", real_vocab=100, choices=8, max_tokens=None)
    assert chat(endless, max_tokens=10**9).params.max_tokens == 10**9
    assert refusal(chat, limits=endless, max_tokens=2**63).param == "max_tokens"
    assert complete(max_tokens=0, echo=True).params.max_tokens == 0


@pytest.mark.parametrize(
    ("messages", "understood"),
    [
        ([{"role": "developer", "content": "Be brief"}], [("system", "Be brief")]),
        ([{"role": "system", "content": ""}, {"role": "user", "content": []}], [("system", ""), ("user", "")]),
        ([{"role": "assistant", "content": None}, {"role": "assistant"}], [("assistant", "")] * 2),
        ([{"role": "user", "content": [{"type": "text", "text": t} for t in "ab"]}], [("user", "a\nb")]),
        (
            [{"role": "assistant", "content": "x", "tool_calls": None, "name": "Bo", "refusal": None}],
            [("assistant", "x")],
        ),
        ([{"role": "assistant", "content": "x", "tool_calls": []}], [("assistant", "x")]),
    ],
)
def test_messages(messages: list[Any], understood: list[tuple[str, str]]) -> None:
    (prompt,) = chat(messages=messages).prompts
    assert prompt == tuple({"role": role, "content": content} for role, content in understood)


@pytest.mark.parametrize(
    ("prompt", "understood"),
    [
        ("", ("",)),
        ("😀 é", ("😀 é",)),
        (["a", "b"], ("a", "b")),
        ([1, 99], ((1, 99),)),
        ([[1], [2, 3]], ((1,), (2, 3))),
        (["a", [0]], ("a", (0,))),
    ],
)
def test_prompts(prompt: Any, understood: tuple[Any, ...]) -> None:
    assert complete(prompt=prompt).prompts == understood


def test_log_probabilities() -> None:
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).params.logprobs == 20
    assert chat(logprobs=False).params.logprobs is None
    assert complete(logprobs=0).params == SamplingParams(max_tokens=16, logprobs=0)
    scored = complete(logprobs=1, echo=True, stream=True, max_tokens=1)  # as lm-eval asks, and streamed
    assert scored.params == SamplingParams(max_tokens=1, logprobs=1, prompt_logprobs=1)
    assert scored.echo
    assert scored.stream
    assert complete(echo=True).params.prompt_logprobs is None


def test_streams_sessions_and_timeouts() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={"include_usage": None, "include_obfuscation": False}).include_usage
    assert chat(session="a_B-9.x").session == "a_B-9.x"
    assert chat(session="a", resume=True).resume
    assert chat(timeout=60).timeout == 60
    assert complete(n=4, prompt=["a", "b"], best_of=4).n == 4


# --- what is refused -----------------------------------------------------------------------------------------------

Case = tuple[dict[str, Any], str, str]  # what is asked, the field to blame, words of the reason

BOTH: list[Case] = [
    ({"n": 0}, "n", "0"),
    ({"n": 9}, "n", "from 1 to 8"),
    ({"n": True}, "n", "true"),
    ({"n": 1.5}, "n", "1.5"),
    ({"best_of": 3}, "best_of", "3|n, 1"),
    ({"n": 2, "best_of": 1}, "best_of", "n, 2"),
    ({"stream": 1}, "stream", "true or false"),
    ({"stream_options": {}}, "stream_options", "stream"),
    ({"stream_options": {"include_usage": True}, "stream": False}, "stream_options", "stream"),
    ({"stream_options": [], "stream": True}, "stream_options", "a list.*object"),
    ({"stream_options": {"include_usage": "yes"}, "stream": True}, "stream_options.include_usage", '"yes"'),
    ({"temperature": "hot"}, "temperature", '"hot"'),
    ({"temperature": True}, "temperature", "true"),
    ({"temperature": math.nan}, "temperature", "NaN"),
    ({"temperature": 200}, "temperature", "200.*from 0 to 100"),
    ({"temperature": 10**400}, "temperature", r"1000.*\.\.\..*finite"),
    ({"top_p": -math.inf}, "top_p", "Infinity"),
    ({"top_p": 0}, "top_p", "temperature 0"),
    ({"top_k": -1}, "top_k", "0 turns it off"),
    ({"min_p": 1.1}, "min_p", "from 0 to 1"),
    ({"presence_penalty": 2.1}, "presence_penalty", "from -2 to 2"),
    ({"frequency_penalty": [1]}, "frequency_penalty", "a list"),
    ({"repetition_penalty": 0}, "repetition_penalty", "from 0.01 to 100"),
    ({"seed": 2**64}, "seed", "64 bits"),
    ({"min_tokens": 30, "max_tokens": 20}, "min_tokens", "above max_tokens 20"),
    ({"min_tokens": -1}, "min_tokens", "-1"),
    ({"max_tokens": 601}, "max_tokens", "601.* 600"),
    ({"max_tokens": -1}, "max_tokens", "-1"),
    ({"max_tokens": 0}, "max_tokens", "0"),
    ({"max_tokens": math.inf}, "max_tokens", "Infinity"),
    ({"max_completion_tokens": 10**30}, "max_completion_tokens", "600"),
    ({"stop": ["a"] * 17}, "stop", "17 entries.* 16"),
    ({"stop": ""}, "stop", "0 characters"),
    ({"stop": ["a", ""]}, "stop[1]", "0 characters"),
    ({"stop": "a" * 257}, "stop", "257 characters.* 256"),
    ({"stop": [["a"]]}, "stop[0]", "a list"),
    ({"stop": {}}, "stop", "an object"),
    ({"stop": "\ud800"}, "stop", "half a character"),
    ({"stop_token_ids": [100]}, "stop_token_ids[0]", "from 0 to 99"),
    ({"stop_token_ids": [0] * 17}, "stop_token_ids", "17.* 16"),
    ({"logit_bias": {"100": 1}}, "logit_bias", '"100".*from 0 to 99'),
    ({"logit_bias": {"-1": 1}}, "logit_bias", '"-1"'),
    ({"logit_bias": {"\u0661": 1}}, "logit_bias", "u0661"),
    ({"logit_bias": {"9" * 5000: 1}}, "logit_bias", r"999\.\.\."),
    ({"logit_bias": {"5": 101}}, "logit_bias", "token 5 101"),
    ({"logit_bias": {"5": None}}, "logit_bias.5", "null"),
    ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1025.* 1024"),
    ({"logit_bias": [1]}, "logit_bias", "a list"),
    ({"ignore_eos": "no"}, "ignore_eos", '"no"'),
    ({"session": ".hidden"}, "session", "hidden"),
    ({"session": "a/b"}, "session", "a/b"),
    ({"session": "a" * 65}, "session", "64"),
    ({"session": "a\n"}, "session", "64"),
    ({"session": "a", "n": 2}, "session", "n = 1"),
    ({"resume": True}, "resume", "needs the session"),
    ({"resume": 1, "session": "a"}, "resume", "true or false"),
    ({"timeout": 0}, "timeout", "more than 0"),
    ({"timeout": 61}, "timeout", "at most 60"),
    ({"model": 5}, "model", "text"),
    ({"tools": [{"type": "function"}]}, "tools", "calls no tools"),
    ({"tools": [{}], "tool_choice": "auto"}, "tools", "leave it out"),
    ({"functions": [{}]}, "functions", "not supported"),
    ({"tool_choice": "required"}, "tool_choice", "not supported"),
    ({"function_call": {"name": "f"}}, "function_call", "not supported"),
    ({"response_format": {"type": "json_object"}}, "response_format", "free text"),
    ({"modalities": ["text", "audio"]}, "modalities", "text"),
    ({"suffix": "the end"}, "suffix", "not supported"),
]
CHAT: list[Case] = [
    ({"messages": None}, "messages", "missing"),
    ({"messages": []}, "messages", "0 entries.* 1"),
    ({"messages": "Hello"}, "messages", "a list"),
    ({"messages": [{"role": "user", "content": ""}] * 10_001}, "messages", "10001.* 10000"),
    ({"messages": ["Hello"]}, "messages[0]", "a JSON object"),
    ({"messages": [{"content": "Hello"}]}, "messages[0].role", "missing"),
    ({"messages": [{"role": "tool", "content": "4"}]}, "messages[0].role", '"tool".*tools are not supported'),
    ({"messages": [{"role": "function", "content": "4"}]}, "messages[0].role", "tools are not supported"),
    ({"messages": [{"role": "bot", "content": "4"}]}, "messages[0].role", '"bot".*system, developer, user, assistant'),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "null"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "5.*text"),
    ({"messages": [{"role": "user", "content": "\ud83d"}]}, "messages[0].content", "ud83d"),
    ({"messages": [{"role": "user", "content": ["a"]}]}, "messages[0].content[0]", "a JSON object"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type", "image_url"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text", "missing"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls", "not supported"),
    ({"logprobs": 5}, "logprobs", "true or false"),
    ({"top_logprobs": 5}, "top_logprobs", "needs logprobs"),
    ({"top_logprobs": 5, "logprobs": False}, "top_logprobs", "needs logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs", "from 0 to 20"),
]
COMPLETION: list[Case] = [
    ({"prompt": None}, "prompt", "missing"),
    ({"prompt": 5}, "prompt", "text or a list of token ids"),
    ({"prompt": []}, "prompt", "0 entries"),
    ({"prompt": [[]]}, "prompt[0]", "0 entries"),
    ({"prompt": [100]}, "prompt[0]", "100.*from 0 to 99"),
    ({"prompt": [1, -1]}, "prompt[1]", "-1"),
    ({"prompt": [[1], [1, "a"]]}, "prompt[1][1]", '"a"'),
    ({"prompt": [True]}, "prompt[0]", "true"),
    ({"prompt": [None]}, "prompt[0]", "null"),
    ({"prompt": ["a", {}]}, "prompt[1]", "an object"),
    ({"prompt": ["a", "b\udfff"]}, "prompt[1]", "udfff"),
    ({"prompt": ["a"] * 9}, "prompt", "9 entries.* 8"),
    ({"prompt": ["a"] * 3, "n": 3}, "n", "9 answers.* 8"),
    ({"prompt": ["a"] * 2, "session": "a"}, "session", "one prompt"),
    ({"logprobs": True}, "logprobs", "true"),
    ({"logprobs": 21}, "logprobs", "from 0 to 20"),
    ({"echo": 1}, "echo", "true or false"),
    ({"max_tokens": 0, "echo": False}, "max_tokens", "echo"),
]


@pytest.mark.parametrize("ask", [chat, complete])
def test_null_means_the_default_in_every_field_that_can_be_refused(ask: Endpoint) -> None:
    fields = {field for body, _, _ in BOTH + CHAT + COMPLETION for field in body} - {"messages", "prompt"}
    assert len(fields) > 25
    assert ask(**dict.fromkeys(fields)) == ask()


@pytest.mark.parametrize(
    ("ask", "body", "param", "words"),
    [(ask, *case) for ask in (chat, complete) for case in BOTH]
    + [(chat, *case) for case in CHAT]
    + [(complete, *case) for case in COMPLETION],
)
def test_what_cannot_be_is_refused_with_the_field_and_the_reason(
    ask: Endpoint, body: dict[str, Any], param: str, words: str
) -> None:
    error = refusal(ask, **body)
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", param)
    assert re.search(words, str(error))
    assert param.split("[")[0].split(".")[0] in error.message
    assert len(error.message) < 300


@pytest.mark.parametrize("body", [None, True, 5, "text", [], [{}], math.nan])
@pytest.mark.parametrize("ask", [chat_ask, completion_ask])
def test_a_request_is_an_object(ask: Endpoint, body: Any) -> None:
    with pytest.raises(ApiError, match=r"the request is .*JSON object"):
        ask(body, LIMITS, {})


@pytest.mark.parametrize("ask", [chat, complete])
def test_another_model_is_not_found(ask: Endpoint) -> None:
    error = refusal(ask, model="gpt-4é" + "x" * 1000)
    assert (error.status, error.kind, error.code) == (404, "not_found_error", "model_not_found")
    assert "'tiny'" in error.message
    assert len(error.message) < 200


def test_errors_as_clients_read_them() -> None:
    error = ApiError(400, "too much", param="n")
    assert str(error) == "too much"
    assert error.body() == {
        "error": {"message": "too much", "type": "invalid_request_error", "param": "n", "code": None}
    }
    assert error.headers() == ApiError(401, "who?").headers() == {"x-should-retry": "false"}
    assert ApiError(429, "busy", retry_after=3).headers() == {"Retry-After": "3"}
    for status in (408, 409, 429, 500, 503):
        assert ApiError(status, "later").headers() == {}
    assert ApiError(408, "too late", final=True).headers() == {"x-should-retry": "false"}


# --- any JSON at all -----------------------------------------------------------------------------------------------

CALM = settings(max_examples=500, deadline=None, database=None, derandomize=True)
TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
HALVES = st.text(st.characters(codec=None, categories=("Cs", "Ll")), max_size=3)
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | HALVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
IDS = st.integers(0, 99)
PARTS = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS}), max_size=3)
MESSAGE = {"role": st.sampled_from(["system", "developer", "user", "assistant"]), "content": TEXTS | PARTS}
GOOD: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny", ""]),
    "n": st.integers(1, 3),
    "max_tokens": st.integers(1, 600),
    "min_tokens": st.just(1),
    "temperature": st.floats(0.1, 2),
    "top_p": st.floats(0.1, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": TEXTS | st.lists(TEXTS, max_size=4),
    "stop_token_ids": st.lists(IDS, max_size=3),
    "logit_bias": st.dictionaries(IDS.map(str), st.floats(-100, 100), max_size=3),
    "stream": st.just(True),
    "echo": st.booleans(),
    "logprobs": st.none(),
    "timeout": st.floats(0.1, 60),
}
ODD = [
    "messages",
    "prompt",
    "best_of",
    "top_k",
    "top_logprobs",
    "stream_options",
    "session",
    "tools",
    "response_format",
]
BODIES = st.builds(
    lambda good, junk: {**good, **junk},
    st.fixed_dictionaries(
        {
            "messages": st.lists(st.fixed_dictionaries(MESSAGE), min_size=1, max_size=4),
            "prompt": TEXTS | st.lists(TEXTS, min_size=1, max_size=3) | st.lists(st.lists(IDS, min_size=1), min_size=1),
        },
        optional=GOOD,
    ),
    st.dictionaries(st.sampled_from([*GOOD, *ODD]), JUNK, max_size=1),
)


@CALM
@given(BODIES | JUNK, st.sampled_from([chat_ask, completion_ask]))
def test_any_json_is_a_bounded_request_or_a_clear_refusal(body: Any, endpoint: Endpoint) -> None:
    ask: Ask | None = None
    error = ApiError(500, "nothing was raised")
    try:
        ask = endpoint(body, LIMITS, {"temperature": 0.5})
    except ApiError as raised:
        error = raised
    if ask is None:
        assert error.status in (400, 404)
        assert len(error.message) < 500
        json.dumps(error.body(), allow_nan=False, ensure_ascii=False).encode()  # can be sent
        return
    params = ask.params
    assert 1 <= len(ask.prompts) * ask.n <= LIMITS.choices
    assert 0 <= params.max_tokens <= 600
    assert params.min_tokens <= params.max_tokens
    assert len(params.stop) <= 4
    assert (params.logprobs or 0) <= 20
    assert math.isfinite(params.temperature)
    json.dumps([ask.prompts, ask.session, params.to_json()], allow_nan=False, ensure_ascii=False).encode()
    for prompt in ask.prompts:
        if ask.kind == "completion" and not isinstance(prompt, str):
            assert all(type(token) is int and 0 <= token < LIMITS.real_vocab for token in prompt)


# --- what is said back ---------------------------------------------------------------------------------------------

SPELLED = [b"<s>", b" Once", b" a", b"\xe2", b"\x82\xac", b"", b" time", b"a"]
HEAD = {"id": "x-1", "created": 7, "model": "tiny", "system_fingerprint": "fp"}


def replies(ask: Ask) -> Replies:
    return Replies(ask, id="x-1", created=7, model="tiny", fingerprint="fp", token_bytes=SPELLED.__getitem__)


def entry(token_id: int, logprob: float = -0.5, top: Sequence[tuple[int, float]] = ()) -> TokenLogprob:
    return TokenLogprob(token_id, logprob, list(top))


def finished(
    index: int = 0, *, prompt: int = 5, completion: int = 2, cached: int = 0, reason: str = "stop"
) -> Finished:
    usage = Usage(prompt, completion, 9, 6.5, 2.5, (6, 7), [(6, 6.5, 7)], 3)
    return Finished(index, reason, usage, cached, seed=40 + index)


def memory(seed: int) -> dict[str, Any]:
    counts = {"seen_tokens": 9, "kept_tokens": 6.5, "evicted_tokens": 2.5, "kept_range": [6, 7], "oldest_kept": 3}
    return {**counts, "seed": seed}


def whole(ask: Ask, *events: Piece | Finished) -> dict[str, Any]:
    reply = replies(ask)
    for event in events:
        reply.add(event)
    return reply.whole()


def streamed(ask: Ask, *events: Piece | Finished) -> list[dict[str, Any]]:
    reply = replies(ask)
    return [*reply.opening(), *(chunk for event in events for chunk in reply.chunk(event)), *reply.closing()]


def test_a_whole_chat() -> None:
    answer = whole(chat(), Piece(0, "Once"), Piece(0, " a"), finished(cached=4))
    message = {"role": "assistant", "content": "Once a", "refusal": None}
    assert answer == {
        **HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": {
            "prompt_tokens": 5,
            "completion_tokens": 2,
            "total_tokens": 7,
            "prompt_tokens_details": {"cached_tokens": 4},
            "minillm": memory(seed=40),
        },
    }


def test_a_streamed_chat() -> None:
    chunks = streamed(chat(stream=True), Piece(0, "Once"), Piece(0, ""), finished(reason="length"))
    said = [{"role": "assistant", "content": ""}, {"content": "Once"}, {}]
    assert chunks == [
        {
            **HEAD,
            "object": "chat.completion.chunk",
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}],
            **more,
        }
        for delta, reason, more in zip(said, [None, None, "length"], [{}, {}, {"minillm": memory(40)}], strict=True)
    ]


def test_a_streamed_completion_with_usage() -> None:
    ask = complete(stream=True, stream_options={"include_usage": True})
    *chunks, last = streamed(ask, Piece(0, "Once"), finished())
    assert chunks == [
        {
            **HEAD,
            "object": "text_completion",
            "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": reason}],
            "usage": None,
            **more,
        }
        for text, reason, more in [("Once", None, {}), ("", "stop", {"minillm": memory(40)})]
    ]
    assert last == {
        **HEAD,
        "object": "text_completion",
        "choices": [],
        "usage": whole(ask, Piece(0, "Once"), finished())["usage"],
    }


def test_a_prompt_counts_once_and_every_answer_counts() -> None:
    ask = complete(prompt=["a", "b"], n=2)
    ends = [finished(i, prompt=5 + i // 2, completion=i + 1, cached=i) for i in range(4)]
    pieces = [Piece(i, f"answer {i}") for i in range(4)]
    answer = whole(ask, *reversed(pieces), *reversed(ends))
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == [(i, f"answer {i}") for i in range(4)]
    usage = answer["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (5 + 6, 1 + 2 + 3 + 4, 21)
    assert usage["prompt_tokens_details"] == {"cached_tokens": 0 + 2}
    assert usage["minillm"] == memory(seed=40)


def test_every_answer_of_a_chat_is_opened_and_closed() -> None:
    chunks = streamed(chat(n=2, stream=True), Piece(1, "b"), Piece(0, "a"), finished(1), finished(0))
    assert [chunk["choices"][0]["index"] for chunk in chunks] == [0, 1, 1, 0, 1, 0]
    assert [chunk["minillm"]["seed"] for chunk in chunks[-2:]] == [41, 40]


TOP = [(2, -0.5), (3, -math.inf)]
CHOSEN = [entry(1, -2.0, TOP), entry(3, -1.0), entry(4, -math.inf)]


def test_log_probabilities_of_a_chat() -> None:
    ask = chat(logprobs=True, top_logprobs=2)
    pieces = [Piece(0, "Once", (CHOSEN[0],)), Piece(0, "€", (CHOSEN[1], CHOSEN[2]))]
    once, part, rest = whole(ask, *pieces, finished())["choices"][0]["logprobs"]["content"]
    assert once == {
        "token": " Once",
        "logprob": -2.0,
        "bytes": list(b" Once"),
        "top_logprobs": [
            {"token": " a", "logprob": -0.5, "bytes": list(b" a")},
            {"token": "bytes:\\xe2", "logprob": -9999.0, "bytes": [0xE2]},
        ],
    }
    assert part == {"token": "bytes:\\xe2", "logprob": -1.0, "bytes": [0xE2], "top_logprobs": []}
    assert (rest["token"], rest["logprob"]) == ("bytes:\\x82\\xac", -9999.0)
    chunks = streamed(ask, *pieces, Piece(0, "!"), finished())
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert told == [None, {"content": [once], "refusal": None}, {"content": [part, rest], "refusal": None}, None, None]
    nothing = whole(ask, finished())["choices"][0]["logprobs"]
    assert nothing == {"content": [], "refusal": None}


def test_log_probabilities_of_an_echoed_completion() -> None:
    """As lm-eval reads them; the first token has none, and offsets run on from the prompt to the answer."""
    ask = complete(prompt=[0, 1, 2], echo=True, logprobs=2)
    prompt = Piece(0, "Once a", (None, entry(1), entry(2)), prompt=True, token_ids=(0, 1, 2))
    answer = [Piece(0, "€", (entry(3), entry(4))), Piece(0, " time", (entry(6, -1.0, [(2, -0.5), (6, -1.0)]),))]
    (choice,) = whole(ask, prompt, *answer, finished())["choices"]
    assert choice["text"] == "Once a€ time"
    assert choice["logprobs"] == {
        "tokens": ["<s>", " Once", " a", "bytes:\\xe2", "bytes:\\x82\\xac", " time"],
        "token_logprobs": [None, -0.5, -0.5, -0.5, -0.5, -1.0],
        "top_logprobs": [
            None,
            {" Once": -0.5},
            {" a": -0.5},
            {"bytes:\\xe2": -0.5},
            {"bytes:\\x82\\xac": -0.5},
            {" a": -0.5, " time": -1.0},
        ],
        "text_offset": [0, 0, 4, 6, 6, 7],
    }
    pieces = [chunk["choices"][0]["logprobs"] for chunk in streamed(ask, prompt, *answer, finished())]
    assert pieces.pop() is None
    joined = {column: [value for piece in pieces for value in piece[column]] for column in pieces[0]}
    assert joined == choice["logprobs"]


def test_of_tokens_with_equal_strings_the_best_is_told() -> None:
    twice = [b"a", b"a"]
    ask = complete(logprobs=2)
    reply = Replies(ask, id="x", created=7, model="tiny", fingerprint="fp", token_bytes=twice.__getitem__)
    (chunk,) = reply.chunk(Piece(0, "a", (entry(1, -1.0, [(0, -0.5), (1, -1.0)]),)))
    assert chunk["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -0.5}]


@pytest.mark.parametrize(
    ("spelled", "string"),
    [
        (b"", ""),
        ("€".encode(), "€"),
        (b"a\xff", "bytes:\\x61\\xff"),
    ],
)
def test_token_strings(spelled: bytes, string: str) -> None:
    assert token_string(spelled) == string


@pytest.mark.parametrize(
    ("pieces", "offsets"),
    [
        ([("aéb", [b"a", b"\xc3", b"\xa9", b"b"])], [0, 1, 1, 2]),
        ([("a b", [b" a", b" b"])], [0, 1]),  # SentencePiece drops the first word's space
        ([(" a b", [b" a", b" b"])], [0, 2]),
        ([("", [b"<s>"]), ("ab", [b" a", b"b"])], [0, 0, 1]),  # not shown, but a token all the same
        ([("ab", [b"a", b"b<e", b"nd>"])], [0, 1, 2]),  # cut off by a stop string
        ([("ab", [b"a", b"b<e"]), ("<", []), ("ey", [b"y"])], [0, 1, 4]),  # held back, as it might have been one
        ([("\ufffda", [b"\xff", b"a"])], [0, 1]),
        ([("as it is", []), (" said", [b" said"])], [8]),
    ],
)
def test_text_offsets(pieces: list[tuple[str, list[bytes]]], offsets: list[int]) -> None:
    text = TextOffsets()
    assert [offset for piece in pieces for offset in text.push(*piece)] == offsets


@CALM
@given(st.text(st.characters(categories=("L", "N", "P")), max_size=12), st.data())
def test_offsets_are_where_tokens_begin_however_text_and_bytes_are_cut(text: str, data: st.DataObject) -> None:
    whole = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=6)) | {0, len(whole)})
    begins = [len(whole[:a].decode(errors="ignore")) for a in cuts[:-1]]
    tokens = [whole[a:b] for a, b in pairwise(cuts)]
    ends = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=4)) | {0, len(text)})
    offsets, pieces = TextOffsets(), list(pairwise(ends))
    told = [
        offsets.push(text[a:b], [token for token, begin in zip(tokens, begins, strict=True) if a <= begin < b])
        for a, b in pieces
    ]
    assert [offset for piece in told for offset in piece] == [begin for begin in begins if begin < len(text)]


# --- as the client sees it -----------------------------------------------------------------------------------------


def parts(text: str, logprobs: bool) -> Iterator[Piece]:
    for letter in text:
        yield Piece(0, letter, (entry(7, -0.25, [(7, -0.25)]),) if logprobs else ())


@pytest.mark.parametrize("logprobs", [False, True])
def test_openais_own_types_accept_what_is_said(logprobs: bool) -> None:
    types = pytest.importorskip("openai.types", reason="openai is a test dependency")
    chat_types = pytest.importorskip("openai.types.chat")
    asked = chat(stream=True, stream_options={"include_usage": True}, logprobs=logprobs)
    events: list[Piece | Finished] = [*parts("aaa", logprobs), finished()]
    read = chat_types.ChatCompletion.model_validate(whole(asked, *events))
    assert read.choices[0].message.content == "aaa"
    assert (read.choices[0].logprobs is not None) == logprobs
    chunks = [chat_types.ChatCompletionChunk.model_validate(chunk) for chunk in streamed(asked, *events)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "aaa"
    assert chunks[-1].usage.total_tokens == read.usage.total_tokens == 7
    completion = complete(logprobs=1 if logprobs else None)
    assert types.Completion.model_validate(whole(completion, *events)).choices[0].text == "aaa"
