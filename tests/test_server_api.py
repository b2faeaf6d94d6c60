"""The server as its clients see it: openai, lm-eval and curl, unmodified, against a real one in a process of its own.

Servers are shared by all tests of this file: the demo model as a user starts it, with a small budget and one row,
and with a key; and a tiny model with a chat template, whose sessions outlive it.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from minillm import LLM
from minillm.cli.main import main
from minillm.conversation import Conversation
from minillm.server.connection import within

from .conftest import ROOT
from .serving import Served, serving
from .test_harness import ANSWER, CHOICE, CHOICES, ROLLING, STORY, write_task
from .tiny_checkpoint import write_checkpoint

openai = pytest.importorskip("openai", reason="openai is not installed: pip install 'minillm[test]'")

Client = Any  # openai.OpenAI, which is only there where the package is
DEMO = "minillm-demo"
ONCE = "Once upon a time"
TALE = "Once upon a time there was a little girl. "
ENDLESS: dict[str, Any] = {"max_tokens": 1_000_000, "ignore_eos": True}
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 11}


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    """The demo model, everything kept: 512 slots in each of 4 rows."""
    with serving("--rows", 4, "--queue", 4) as served:
        yield served


@pytest.fixture(scope="module")
def narrow() -> Iterator[Served]:
    """The demo model with a small budget, one row, and room for one to wait: what is asked for can be endless."""
    with serving("--rows", 1, "--queue", 1, "--budget", 128, "--chunk", 64) as served:
        yield served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, in float32."""
    return write_checkpoint(tmp_path_factory.mktemp("models") / "tiny", template=True)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where sessions are saved."""
    return tmp_path_factory.mktemp("kept") / "sessions"


@pytest.fixture(scope="module")
def tiny(folder: Path, kept: Path) -> Iterator[Served]:
    """The tiny model with a small budget, two rows, and a folder for sessions."""
    options = ("--model", folder, "--name", "tiny", "--budget", 64, "--chunk", 32, "--rows", 2, "--sessions", kept)
    with serving(*options) as served:
        yield served


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose key is in a file, and that pages of one other site may ask."""
    file = tmp_path_factory.mktemp("keys") / "key"
    file.write_text("open sesame\n")
    with serving("--api-key-file", file, "--allow-origin", "https://page.example") as served:
        yield served


@pytest.fixture(scope="module")
def library(folder: Path) -> LLM:
    """The same model as `tiny` has, in this process."""
    return LLM.load(str(folder), budget=64, chunk=32)


def client_of(served: Served, **options: Any) -> Client:
    return openai.OpenAI(base_url=f"{served.url}/v1", **{"api_key": "any", "max_retries": 0, **options})


@pytest.fixture(scope="module")
def client(demo: Served) -> Iterator[Client]:
    with client_of(demo) as found:
        yield found


@pytest.fixture(scope="module")
def chat(tiny: Served) -> Iterator[Callable[..., Any]]:
    """Ask the tiny model, whose answers are drawn and hardly ever end by themselves."""
    with client_of(tiny) as found:

        def ask(*messages: str | dict[str, Any], **options: Any) -> Any:
            told = [{"role": "user", "content": one} if isinstance(one, str) else one for one in messages]
            fields = {"model": "tiny", "max_tokens": 12, **DRAWN, **options}
            return found.chat.completions.create(messages=told, **fields)

        yield ask


def complete(client: Client, prompt: Any = ONCE, **options: Any) -> Any:
    """Greedy: without a temperature this model draws, as its generation_config.json has it."""
    fields = {"model": DEMO, "prompt": prompt, "max_tokens": 40, "temperature": 0, **options}
    return client.completions.create(**fields)


def counted(served: Served, path: str, status: int | str) -> float:
    """Requests so far, by path and status."""
    _, text, _ = served.request("/metrics")
    found = re.search(rf'^minillm_requests_total{{path="{path}",status="{status}"}} (\S+)$', text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def rows_busy(served: Served) -> float:
    return served.metric("minillm_rows_busy")


def post(served: Served, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """Send a request and do not wait for what comes: whoever has the socket may leave."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


@contextmanager
def occupied(served: Served, **fields: Any) -> Iterator[None]:
    """A row is drawing an endless answer."""
    until(lambda: rows_busy(served) == 0)
    drawn = served.metric("minillm_completion_tokens_total")
    with post(served, {"prompt": "Once", "stream": True, **ENDLESS, **fields}):
        until(lambda: served.metric("minillm_completion_tokens_total") > drawn)
        yield
    until(lambda: rows_busy(served) == 0)


# --- the openai package: answers -----------------------------------------------------------------------------------


def test_models(client: Client) -> None:
    [model] = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (DEMO, "model", "minillm")
    assert abs(model.created - time.time()) < 3600
    assert client.models.retrieve(DEMO) == model
    assert model.model_extra["max_model_len"] == model.model_extra["minillm"]["slots"] == 512


def test_a_completion(client: Client) -> None:
    answer = complete(client, max_tokens=20)
    [choice] = answer.choices
    assert answer.object == "text_completion"
    assert answer.model == DEMO
    assert answer.id.startswith("cmpl-")
    assert re.fullmatch("fp_[0-9a-f]{12}", answer.system_fingerprint)
    assert choice.text.startswith(", there was a little girl")
    assert (choice.finish_reason, choice.logprobs) == ("length", None)
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 20, 25)
    memory = usage.model_extra["minillm"]
    assert (memory["seen_tokens"], memory["kept_tokens"], memory["evicted_tokens"]) == (24, 24, 0)
    assert complete(client, max_tokens=None).usage.completion_tokens == 16, "OpenAI's default"


def test_a_chat(chat: Callable[..., Any]) -> None:
    answer = chat({"role": "system", "content": "Sit."}, "the dog", max_tokens=50)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    [choice] = answer.choices
    assert (choice.message.role, choice.message.refusal) == ("assistant", None)
    assert (choice.finish_reason, answer.usage.completion_tokens) == ("length", 50)
    memory = answer.usage.model_extra["minillm"]
    assert memory["seen_tokens"] == answer.usage.total_tokens - 1 == memory["kept_tokens"] + memory["evicted_tokens"]
    assert memory["evicted_tokens"] > 0
    assert memory["seed"] == DRAWN["seed"]


def test_how_messages_may_be_written(chat: Callable[..., Any]) -> None:
    def said(*messages: Any) -> list[float]:
        return [token.logprob for token in chat(*messages, logprobs=True).choices[0].logprobs.content]

    parts = [{"type": "text", "text": "the dog"}, {"type": "text", "text": "sat"}]
    assert said({"role": "user", "content": parts}) == said("the dog\nsat") != said("the dogsat")
    assert said({"role": "developer", "content": "Sit."}, "dog") == said({"role": "system", "content": "Sit."}, "dog")
    assert said({"role": "user", "content": "dog", "name": "Tom"}) == said("dog")
    answered = {"role": "assistant", "content": "the mat", "refusal": None, "tool_calls": None}
    assert said("where", answered, "dog") == said("where", {"role": "assistant", "content": "the mat"}, "dog")


def test_a_chat_without_a_template_goes_on_with_the_text(client: Client) -> None:
    messages = [{"role": "user", "content": ONCE}]
    answer = client.chat.completions.create(model=DEMO, messages=messages, max_tokens=20, temperature=0)
    assert answer.choices[0].message.content == complete(client, max_tokens=20).choices[0].text


ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "drawn": {**DRAWN, "top_p": 0.95, "extra_body": {"top_k": 50, "min_p": 0.01}},
    "choices": {**DRAWN, "n": 3},
    "stopped": {"stop": ["zebra", "."]},
    "logprobs": {"logprobs": 2, **DRAWN, "n": 2},
    "ended": {"logit_bias": {"1": 100}, "logprobs": 0},
    "echoed": {"echo": True, "logprobs": 1},
    "read only": {"echo": True, "max_tokens": 0},
}


@pytest.mark.parametrize("asked", ASKED.values(), ids=list(ASKED))
def test_a_streamed_completion_is_the_whole_one(client: Client, asked: dict[str, Any]) -> None:
    whole = complete(client, **asked)
    chunks = list(complete(client, **asked, stream=True, stream_options={"include_usage": True}))
    assert {(chunk.id, chunk.object, chunk.model) for chunk in chunks} == {(chunks[0].id, "text_completion", DEMO)}
    *told, last = chunks
    assert all(len(chunk.choices) == 1 and chunk.usage is None for chunk in told)
    assert (last.choices, last.usage) == ([], whole.usage) or asked.get("seed") is None
    assert last.usage.total_tokens == whole.usage.total_tokens
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in told if chunk.choices[0].index == choice.index]
        assert "".join(one.text for one in own) == choice.text
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        for column in ("tokens", "token_logprobs", "top_logprobs", "text_offset") if choice.logprobs else ():
            told_of = [entry for one in own if one.logprobs for entry in getattr(one.logprobs, column)]
            assert told_of == getattr(choice.logprobs, column)


@pytest.mark.parametrize("asked", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["a", "e"]}], ids=str)
def test_a_streamed_chat_is_the_whole_one(chat: Callable[..., Any], asked: dict[str, Any]) -> None:
    whole = chat("the dog", max_tokens=30, **asked)
    *chunks, last = chat("the dog", max_tokens=30, stream=True, stream_options={"include_usage": True}, **asked)
    assert (last.choices, last.usage) == ([], whole.usage)
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    for choice in whole.choices:
        first, *own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert (first.delta.role, first.delta.content, first.finish_reason) == ("assistant", "", None)
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own] == [None] * (len(own) - 1) + [choice.finish_reason]
        if asked.get("logprobs"):
            assert [one for each in own if each.logprobs for one in each.logprobs.content] == choice.logprobs.content


def test_without_include_usage_the_finish_tells_of_memory(client: Client) -> None:
    *chunks, last = complete(client, max_tokens=5, stream=True)
    assert all(chunk.usage is None and "minillm" not in chunk.model_extra for chunk in chunks)
    assert (last.choices[0].finish_reason, last.model_extra["minillm"]["seen_tokens"]) == ("length", 9)


def test_the_helpers_of_the_client_understand_the_stream(client: Client) -> None:
    messages = [{"role": "user", "content": ONCE}]
    asked = {"model": DEMO, "messages": messages, "temperature": 0, "stop": ".", "logprobs": True}
    with client.chat.completions.stream(**asked) as stream:
        pieces = [event.delta for event in stream if event.type == "content.delta"]
        final = stream.get_final_completion()
    assert "".join(pieces) == final.choices[0].message.content == complete(client, stop=".").choices[0].text
    assert "".join(token.token for token in final.choices[0].logprobs.content) == "".join(pieces)


def test_seeds_and_choices(client: Client) -> None:
    first = complete(client, n=3, **DRAWN)
    texts = [choice.text for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [choice.text for choice in complete(client, n=3, **DRAWN).choices] == texts
    assert complete(client, **DRAWN).choices[0].text == texts[0]
    assert complete(client, temperature=1.0, seed=12).choices[0].text == texts[1], "choice i draws with seed + i"
    assert first.usage.prompt_tokens == 5
    assert first.usage.completion_tokens == sum(
        complete(client, temperature=1.0, seed=11 + i).usage.completion_tokens for i in range(3)
    )
    fresh = [complete(client, temperature=1.0) for _ in range(2)]
    assert fresh[0].choices[0].text != fresh[1].choices[0].text
    seed = fresh[0].usage.model_extra["minillm"]["seed"]
    assert complete(client, temperature=1.0, seed=seed).choices[0].text == fresh[0].choices[0].text


def test_several_prompts(client: Client, demo: Served) -> None:
    prompts = [ONCE, "The dog"]
    alone = [complete(client, prompt, n=2, **DRAWN).choices for prompt in prompts]
    both = complete(client, prompts, n=2, **DRAWN)
    assert [choice.text for choice in both.choices] == [choice.text for one in alone for choice in one]
    ids = [demo.request("/tokenize", {"prompt": prompt})[1]["tokens"] for prompt in prompts]
    assert both.usage.prompt_tokens == sum(map(len, ids))
    assert [one.text for one in complete(client, ids, n=2, **DRAWN).choices] == [one.text for one in both.choices]
    assert complete(client, ids[0]).choices[0].text == complete(client).choices[0].text


def test_stop_strings_cut_and_never_leak(client: Client) -> None:
    """Inside tokens, across them, at the very beginning; one of several; and what only looks like one."""
    plain = complete(client, max_tokens=40).choices[0].text
    stops = [plain[start : start + length] for start in (0, 1, 3, 8, 17, 30, 47) for length in (1, 2, 5, 13)]
    for stop in stops:
        expected = plain[: plain.index(stop)]
        for asked in (stop, ["zebra", stop, stop + "zebra"]):
            chunks = [chunk.choices[0] for chunk in complete(client, max_tokens=40, stop=asked, stream=True)]
            assert chunks[-1].finish_reason == "stop"
            shown = ""
            for chunk in chunks:
                shown += chunk.text
                assert expected.startswith(shown)
            assert shown == expected
    unmet = complete(client, max_tokens=40, stop=[plain + "x", plain[-3:] + "x"])
    assert (unmet.choices[0].text, unmet.choices[0].finish_reason) == (plain, "length")
    tokens = complete(client, max_tokens=40, stop=plain[8:13], logprobs=0).choices[0].logprobs.tokens
    assert "".join(tokens).startswith(plain[:8])
    assert len("".join(tokens[:-1])) < 8, "of a token no more is told than of its text"


def test_logit_bias_and_ends(client: Client, demo: Served) -> None:
    [dog] = demo.request("/tokenize", {"prompt": " dog", "add_special_tokens": False})[1]["tokens"]
    assert complete(client, max_tokens=3, logit_bias={str(dog): 100}).choices[0].text == " dog dog dog"
    first = complete(client, max_tokens=1, logprobs=0).choices[0].logprobs.tokens
    [comma] = demo.request("/tokenize", {"prompt": ",", "add_special_tokens": False})[1]["tokens"]
    assert (
        first
        == [","]
        != complete(client, max_tokens=1, logprobs=0, logit_bias={comma: -100}).choices[0].logprobs.tokens
    )
    ended = complete(client, logit_bias={"1": 100}).choices[0]
    assert (ended.text, ended.finish_reason) == ("", "stop")
    going = complete(client, logit_bias={"1": 100}, max_tokens=4, extra_body={"ignore_eos": True})
    assert (going.choices[0].finish_reason, going.usage.completion_tokens) == ("length", 4)
    later = complete(client, logit_bias={"1": 100}, extra_body={"min_tokens": 3}).usage.completion_tokens
    assert later == 4, "an end after three other tokens"
    assert complete(client, extra_body={"stop_token_ids": [comma]}).usage.completion_tokens == 1


def test_logprobs_of_a_chat(client: Client) -> None:
    messages = [{"role": "user", "content": ONCE}]
    answer = client.chat.completions.create(
        model=DEMO, messages=messages, max_tokens=15, temperature=0, logprobs=True, top_logprobs=3
    )
    text, tokens = answer.choices[0].message.content, answer.choices[0].logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == text == "".join(one.token for one in tokens)
    for token in tokens:
        scores = [one.logprob for one in token.top_logprobs]
        assert len(scores) == 3
        assert sorted(scores, reverse=True) == scores
        assert (token.token, token.logprob, token.bytes) == (
            token.top_logprobs[0].token,
            scores[0],
            token.top_logprobs[0].bytes,
        )
    plain = client.chat.completions.create(model=DEMO, messages=messages, max_tokens=3, logprobs=True)
    assert [one.top_logprobs for one in plain.choices[0].logprobs.content] == [[], [], []]


def test_logprobs_of_a_completion(client: Client) -> None:
    [choice] = complete(client, max_tokens=15, logprobs=3).choices
    told = choice.logprobs
    assert "".join(told.tokens) == choice.text
    for token, offset, score, top in zip(
        told.tokens, told.text_offset, told.token_logprobs, told.top_logprobs, strict=True
    ):
        assert choice.text.startswith(token, offset)
        assert len(top) == 3
        assert top[token] == score == max(top.values())
    drawn = complete(client, logprobs=1, **DRAWN).choices[0].logprobs
    assert any(len(top) == 2 for top in drawn.top_logprobs), "the drawn token is told beside the likeliest"
    for token, score, top in zip(drawn.tokens, drawn.token_logprobs, drawn.top_logprobs, strict=True):
        assert top[token] == score


def test_echo(client: Client) -> None:
    [choice] = complete(client, echo=True, logprobs=2, max_tokens=3).choices
    told = choice.logprobs
    assert choice.text.startswith(ONCE)
    assert told.tokens[0] == "<s>"
    assert "".join(told.tokens[1:]) == choice.text
    assert (told.token_logprobs[0], told.top_logprobs[0]) == (None, None)
    assert all(len(column) == 8 for column in (told.tokens, told.token_logprobs, told.top_logprobs, told.text_offset))
    read = complete(client, echo=True, logprobs=2, max_tokens=0).choices[0]
    assert (read.text, read.finish_reason) == (ONCE, "length")
    assert read.logprobs.token_logprobs == told.token_logprobs[:5]
    assert complete(client, echo=True, max_tokens=3).choices[0].logprobs is None


def test_every_drawn_token_is_told_also_one_without_text(client: Client) -> None:
    """lm-eval drops the last one and takes the rest for the prompt: an end that is not told would shift them."""
    asked = {"echo": True, "logprobs": 1, "max_tokens": 1}
    usual = complete(client, **asked).choices[0].logprobs
    ended = complete(client, **asked, logit_bias={"1": 100}).choices[0]
    assert (ended.text, ended.finish_reason) == (ONCE, "stop")
    assert ended.logprobs.tokens == [*usual.tokens[:-1], "</s>"]
    assert ended.logprobs.token_logprobs[:-1] == usual.token_logprobs[:-1]
    assert ended.logprobs.text_offset[-1] == len(ONCE)
    drawn = complete(client, logprobs=0, max_tokens=3, logit_bias={"0": 100, "2": 99}).choices[0]
    assert len(drawn.logprobs.tokens) == 3, "tokens that are no text, to the last"


# --- the openai package: mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "kind", "param", "code"),
    [
        ({"temperature": -1}, 400, "BadRequestError", "temperature", None),
        ({"prompt": [5000]}, 400, "BadRequestError", "prompt[0]", None),
        ({"prompt": TALE * 80}, 400, "BadRequestError", "prompt", "context_length_exceeded"),
        ({"prompt": [ONCE] * 9}, 400, "BadRequestError", "prompt", None),
        ({"prompt": ONCE * 100_000}, 413, "APIStatusError", None, "body_too_large"),
        ({"model": "gpt-5"}, 404, "NotFoundError", "model", "model_not_found"),
        ({"model": "../../etc/passwd"}, 404, "NotFoundError", "model", "model_not_found"),
        ({"extra_body": {"session": "gone", "resume": True}}, 404, "NotFoundError", "session", "session_not_found"),
        ({"extra_headers": {"origin": "https://evil.example"}}, 403, "PermissionDeniedError", None, None),
        ({"extra_headers": {"host": "evil.example"}}, 403, "PermissionDeniedError", None, None),
    ],
)
def test_what_is_wrong_for_good_is_said_once(
    demo: Served, fields: dict[str, Any], status: int, kind: str, param: str | None, code: str | None
) -> None:
    """The client would ask three times, were it not told that that is of no use."""
    total = demo.metric("minillm_requests_total")
    with client_of(demo, max_retries=2) as client, pytest.raises(getattr(openai, kind)) as caught:
        complete(client, **fields)
    error = caught.value
    assert type(error).__name__ == kind
    assert (error.status_code, error.param, error.code) == (status, param, code)
    assert error.response.headers["x-should-retry"] == "false"
    assert error.request_id.startswith("req_")
    assert demo.metric("minillm_requests_total") == total + 2, "this request, and the look at the metrics before it"


def test_a_wrong_key(locked: Served) -> None:
    for key in ("wrong", "open", "open sesame!"):
        with (
            client_of(locked, api_key=key, max_retries=2) as client,
            pytest.raises(openai.AuthenticationError) as caught,
        ):
            complete(client)
        assert (caught.value.status_code, caught.value.code) == (401, "invalid_api_key")
    with client_of(locked, api_key="open sesame") as client:
        assert complete(client, max_tokens=2).usage.completion_tokens == 2


def test_other_paths(client: Client, demo: Served) -> None:
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=DEMO, input="a")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    status, error, _ = demo.request("/v1/completions")
    assert (status, error["error"]["type"]) == (405, "invalid_request_error")
    for body in (b"", b"{", b"\xff", b"[" * 100_000, b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", b"[]", b"null"):
        status, error, _ = demo.request("/v1/completions", body)
        assert (status, error["error"]["type"]) == (400, "invalid_request_error")


def test_a_session_that_is_answering_is_busy(tiny: Served, kept: Path) -> None:
    with client_of(tiny, max_retries=1) as client, occupied(tiny, session="busy"):
        total = counted(tiny, "/v1/completions", 409)
        with pytest.raises(openai.ConflictError) as caught:
            complete(client, model="tiny", extra_body={"session": "busy"})
        assert (caught.value.code, caught.value.param) == ("session_busy", "session")
        assert counted(tiny, "/v1/completions", 409) == total + 2, "that may change: the client asks again"
        assert tiny.request("/v1/sessions/busy", method="DELETE")[0] == 409
        assert tiny.request("/v1/sessions/busy")[1]["seen_tokens"] > 0, "it can be looked at all the same"
    assert tiny.request("/v1/sessions/busy", method="DELETE")[0] == 200
    assert not (kept / "busy.session").exists()


def test_a_busy_session_is_refused_at_once_where_no_row_is_free(narrow: Served) -> None:
    with occupied(narrow, session="busy"):
        status, error, headers = narrow.request("/v1/completions", {"prompt": "a", "session": "busy"}, seconds=5)
        assert (status, error["error"]["code"], headers["retry-after"]) == (409, "session_busy", "1")


def test_a_full_queue_is_said_at_once_and_when_to_come_back(narrow: Served) -> None:
    with ThreadPoolExecutor() as pool, client_of(narrow) as client:
        with occupied(narrow), post(narrow, {"prompt": "Once"}):
            until(lambda: narrow.metric("minillm_queue") == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                complete(client, timeout=5)
            assert caught.value.code == "queue_full"
            assert caught.value.response.headers["retry-after"] == "2"
            assert "x-should-retry" not in caught.value.response.headers
            total = counted(narrow, "/v1/completions", 429)
            patient = pool.submit(complete, client.with_options(max_retries=5), max_tokens=4)
            until(lambda: counted(narrow, "/v1/completions", 429) > total)
            left = time.monotonic()
        assert patient.result(60).usage.completion_tokens == 4
        assert counted(narrow, "/v1/completions", 429) == total + 1
        assert time.monotonic() - left > 1, "it came back before it was told to"


def test_deadlines(narrow: Served) -> None:
    """While a prompt is read, while waiting for a row, and in the middle of a stream."""
    asked = {"prompt": TALE * 700, "timeout": 0.2}  # about 7,000 tokens, some seconds
    total = counted(narrow, "/v1/completions", 408)
    with client_of(narrow, max_retries=2) as client:
        with pytest.raises(openai.APIStatusError) as caught:
            complete(client, asked["prompt"], extra_body={"timeout": 0.2})
        assert (caught.value.status_code, caught.value.code) == (408, "timeout")
        assert counted(narrow, "/v1/completions", 408) == total + 1, "another try would take as long"
        with occupied(narrow):
            status, error, headers = narrow.request("/v1/completions", {"prompt": "Once", "timeout": 0.2}, seconds=5)
            assert (status, error["error"]["code"], headers["x-should-retry"]) == (408, "timeout", "false")
        shown = []
        with pytest.raises(openai.APIError, match="time for this request is over") as broken:
            shown += [
                chunk.choices[0].text
                for chunk in complete(
                    client, max_tokens=10**6, stream=True, extra_body={"timeout": 0.5, "ignore_eos": True}
                )
            ]
        assert not isinstance(broken.value, openai.APIStatusError)
        assert (broken.value.code, broken.value.body["type"]) == ("timeout", "invalid_request_error")
    until(lambda: rows_busy(narrow) == 0)


def test_a_client_that_runs_out_of_patience_leaves_nothing_running(narrow: Served) -> None:
    left = narrow.metric("minillm_abandoned_total")
    with client_of(narrow, timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        complete(client, extra_body=ENDLESS)
    until(lambda: rows_busy(narrow) == 0)
    assert narrow.metric("minillm_abandoned_total") == left + 1


def test_every_answer_has_the_name_of_its_request(client: Client, demo: Served) -> None:
    raw = client.completions.with_raw_response.create(model=DEMO, prompt="a", max_tokens=1)
    assert raw.headers["x-request-id"] == raw.parse()._request_id
    assert raw.headers["x-request-id"].removeprefix("req_") == raw.parse().id.removeprefix("cmpl-")
    own = client.completions.with_raw_response.create(
        model=DEMO, prompt="a", max_tokens=1, extra_headers={"x-request-id": "mine.1"}
    )
    assert own.headers["x-request-id"] == "mine.1"
    odd = client.completions.with_raw_response.create(
        model=DEMO, prompt="a", max_tokens=1, extra_headers={"x-request-id": "a b"}
    )
    assert odd.headers["x-request-id"].startswith("req_")
    for path in ("/", "/health", "/metrics", "/nowhere"):
        assert demo.request(path)[2]["x-request-id"].startswith("req_")


# --- conformance ---------------------------------------------------------------------------------------------------

Answer = dict[str, Any]
PLAIN: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": ONCE}], "max_tokens": 40, "temperature": 0},
    "completions": {"prompt": ONCE, "max_tokens": 40, "temperature": 0},
}
PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


def text_of(answer: Answer) -> str:
    choice = answer["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def other_text(answer: Answer, plain: Answer) -> bool:
    return text_of(answer) != text_of(plain)


def same_text(answer: Answer, plain: Answer) -> bool:
    return text_of(answer) == text_of(plain)


def any_text(answer: Answer, plain: Answer) -> bool:  # noqa: ARG001
    return True


def tokens(count: int) -> Callable[[Answer, Answer], bool]:
    return lambda answer, _: answer["usage"]["completion_tokens"] == count


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
BOTH = "chat completions"
SUPPORTED: list[tuple[str, str, Any, Callable[[Answer, Answer], bool]]] = [
    # endpoints, field, value, what can be seen of it in an answer, beside one without it
    (BOTH, "model", DEMO, same_text),
    (BOTH, "max_tokens", 3, tokens(3)),
    ("chat", "max_completion_tokens", 4, tokens(4)),
    (BOTH, "temperature", 1.9, other_text),
    (BOTH, "seed", 7, lambda answer, _: answer["usage"]["minillm"]["seed"] == 7),
    (BOTH, "top_p", 0.5, same_text),  # of a greedy answer; what it does to others is test_sampling's
    (BOTH, "top_k", 3, same_text),
    (BOTH, "min_p", 0.5, same_text),
    (BOTH, "presence_penalty", 2, other_text),
    (BOTH, "frequency_penalty", 2, other_text),
    (BOTH, "repetition_penalty", 2, other_text),
    (BOTH, "logit_bias", {"260": 100, "261": 99.5}, other_text),
    (BOTH, "stop", " little", lambda answer, _: text_of(answer).endswith("there was a")),
    (BOTH, "stop", [], same_text),
    (BOTH, "stop_token_ids", [13, 1], tokens(1)),  # a comma comes first
    (BOTH, "ignore_eos", True, same_text),
    (BOTH, "min_tokens", 2, same_text),
    (BOTH, "n", 3, lambda answer, _: len(answer["choices"]) == 3),
    (BOTH, "stream", False, same_text),
    (BOTH, "timeout", 60, same_text),
    (BOTH, "session", "table", lambda answer, _: answer["usage"]["minillm"]["seen_tokens"] > 0),
    ("completions", "best_of", 1, same_text),
    ("completions", "suffix", "", same_text),
    ("completions", "echo", True, lambda answer, plain: text_of(answer) == ONCE + text_of(plain)),
    ("completions", "logprobs", 5, lambda answer, _: len(answer["choices"][0]["logprobs"]["top_logprobs"][0]) == 5),
    ("chat", "logprobs", True, lambda answer, _: len(answer["choices"][0]["logprobs"]["content"]) == 40),
    ("chat", "response_format", {"type": "text"}, same_text),
    ("chat", "modalities", ["text"], same_text),
    ("chat", "tools", [], same_text),
    ("chat", "tool_choice", "none", same_text),
]
IGNORED: list[tuple[str, str, Any]] = [
    *((BOTH, name, value) for name, value in {"user": "me", "metadata": {"a": "b"}, "no_such_field": [[]]}.items()),
    ("chat", "store", True),
    ("chat", "service_tier", "auto"),
    ("chat", "parallel_tool_calls", True),
    ("chat", "reasoning_effort", "low"),
    ("chat", "verbosity", "low"),
    ("chat", "prediction", {"type": "content", "content": "a"}),
    ("chat", "safety_identifier", "a"),
    ("chat", "prompt_cache_key", "a"),
    ("chat", "web_search_options", {}),
]
REFUSED: list[tuple[str, str, Any]] = [
    ("chat", "response_format", {"type": "json_object"}),
    ("chat", "response_format", {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}),
    ("chat", "modalities", ["text", "audio"]),
    ("chat", "tools", [TOOL]),
    ("chat", "tool_choice", "required"),
    ("chat", "functions", [{"name": "f"}]),
    ("chat", "function_call", {"name": "f"}),
    ("chat", "top_logprobs", 2),  # without logprobs
    ("chat", "logprobs", 5),
    ("completions", "logprobs", True),
    ("completions", "suffix", "the end"),
    ("completions", "best_of", 3),
    (BOTH, "n", 9),
    (BOTH, "n", 0),
    (BOTH, "max_tokens", -1),
    (BOTH, "max_tokens", "12"),
    (BOTH, "temperature", -0.1),
    (BOTH, "temperature", "hot"),
    (BOTH, "top_p", 0),
    (BOTH, "seed", 0.5),
    (BOTH, "stop", [*"abcdefghijklmnopq"]),
    (BOTH, "logit_bias", {"5000": 1}),
    (BOTH, "presence_penalty", 3),
    (BOTH, "stream", "yes"),
    (BOTH, "stream_options", {"include_usage": True}),  # without stream
    (BOTH, "session", "../x"),
    (BOTH, "resume", True),  # without session
    (BOTH, "timeout", 0),
]
Row = tuple[str, str, Any, str, Callable[[Answer, Answer], bool] | None]
TABLE: list[Row] = [
    *((end, name, value, "supported", seen) for ends, name, value, seen in SUPPORTED for end in ends.split()),
    *((end, name, None, "default", any_text) for end in PLAIN for name in ("max_tokens", "temperature")),
    *(
        (end, name, None, "default", same_text)
        for end in PLAIN
        for name in sorted({name for ends, name, _, _ in SUPPORTED if end in ends} - {"max_tokens", "temperature"})
    ),
    *((end, name, value, "ignored", same_text) for ends, name, value in IGNORED for end in ends.split()),
    *((end, name, value, "refused", None) for ends, name, value in REFUSED for end in ends.split()),
]


@pytest.fixture(scope="module")
def plain(demo: Served) -> dict[str, Answer]:
    """What each endpoint says to nothing but a prompt."""
    return {end: demo.request(path, PLAIN[end])[1] for end, path in PATHS.items()}


@pytest.mark.parametrize(
    ("end", "name", "value", "verdict", "seen"), TABLE, ids=[f"{end}-{name}-{word}" for end, name, _, word, _ in TABLE]
)
def test_conformance(
    demo: Served,
    plain: dict[str, Answer],
    end: str,
    name: str,
    value: Any,
    verdict: str,
    seen: Callable[[Answer, Answer], bool] | None,
) -> None:
    """OpenAI's fields and ours: supported, also as null; ignored; or refused with the field's name, never silently."""
    assert (verdict == "refused") == (seen is None)
    status, answer, headers = demo.request(PATHS[end], {**PLAIN[end], name: value})
    if seen is None:
        assert (status, answer["error"]["param"]) == (400, name)
        assert headers["x-should-retry"] == "false"
    else:
        assert status == 200, answer
        assert seen(answer, plain[end])


def test_nulls_from_the_client_are_defaults(client: Client) -> None:
    nothing = dict.fromkeys(("n", "stop", "seed", "logit_bias", "stream_options", "top_p", "user"))
    assert complete(client, **nothing).choices[0].text == complete(client).choices[0].text
    answer = client.chat.completions.create(
        model=DEMO,
        messages=[{"role": "user", "content": ONCE}],
        temperature=0,
        max_tokens=None,
        tools=None,
        stream=None,
        **nothing,
    )
    assert answer.choices[0].message.content.startswith(", there was")


# --- what is computed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
        {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 6, "presence_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {"70": 5}},
        {"temperature": 1.0, "seed": 7, "stop": ["a", "the"], "min_tokens": 3},
        {"temperature": 1.0, "seed": 8, "logprobs": 2},
    ],
    ids=str,
)
def test_answers_are_those_of_the_library(tiny: Served, library: LLM, sampling: dict[str, Any]) -> None:
    """Also of a prompt that is longer than the budget, and read in several chunks."""
    known = {**sampling, "logit_bias": {70: 5.0}} if "logit_bias" in sampling else sampling
    known = {**known, "stop": tuple(known["stop"])} if "stop" in known else known
    for prompt in ("the dog", "the dog sat on the mat " * 20):
        expected = library.generate(prompt, raw=True, **{"temperature": 0.0, "max_tokens": 30, **known})
        answer = tiny.complete(prompt, **{"max_tokens": 30, **sampling})
        assert text_of(answer) == expected.text
        assert answer["choices"][0]["finish_reason"] == expected.finish_reason
        memory, usage = answer["usage"]["minillm"], expected.usage
        assert answer["usage"]["prompt_tokens"] == usage.prompt_tokens
        assert answer["usage"]["completion_tokens"] == usage.completion_tokens
        assert (memory["seen_tokens"], memory["kept_tokens"]) == (usage.seen_tokens, usage.kept_tokens)
        if "logprobs" in sampling:
            scores = [entry.logprob for entry in expected.logprobs or ()]
            assert answer["choices"][0]["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-4)


def test_no_answer_depends_on_who_else_asks(demo: Served) -> None:
    """To the last bit: log-probabilities alone, and of four at the same time, greedy and drawn, short and long."""
    prompts = (ONCE, "The dog", TALE * 20, STORY)
    asked: list[dict[str, Any]] = [
        {"prompt": prompt, "max_tokens": 25 + 5 * number, "logprobs": 2, **more}
        for number, prompt in enumerate(prompts)
        for more in ({"temperature": 0}, {"temperature": 1.0, "seed": number, "repetition_penalty": 1.1})
    ]
    alone = [demo.complete(**one)["choices"] for one in asked]
    with ThreadPoolExecutor(4) as pool:
        for order in (asked, asked[::-1]):
            together = list(pool.map(lambda one: demo.complete(**one)["choices"], order))
            assert together[:: 1 if order is asked else -1] == alone


def test_characters_are_never_broken(tiny: Served) -> None:
    """Bytes drawn at random, of which few make a character: shown as they come, all at once, and decoded by Python."""
    ids = tiny.request("/tokenize", {"prompt": "é€😀", "add_special_tokens": False})[1]["tokens"]
    assert len(ids) == len("é€😀".encode()), "a byte each"
    broken = whole = 0
    for seed in range(12):
        asked = {"max_tokens": 40, "logprobs": 0, "temperature": 1.5, "seed": seed}
        asked["logit_bias"] = dict.fromkeys(map(str, ids), 60)
        bytes_drawn, shown = b"", []
        connection = post(tiny, {"prompt": "the", "stream": True, **asked})
        with connection, connection.makefile("rb") as lines:
            for line in lines:
                if line.startswith(b"data: {"):
                    shown.append(json.loads(line[6:])["choices"][0])
                if b"[DONE]" in line:
                    break
        text = text_of(tiny.complete("the", **asked))
        assert "".join(one["text"] for one in shown) == text
        for one in shown:
            for token in one["logprobs"]["tokens"] if one["logprobs"] else ():
                escaped = token.startswith("bytes:")
                bytes_drawn += bytes.fromhex(token[6:].replace("\\x", "")) if escaped else token.encode()
        assert bytes_drawn.decode(errors="replace") == text
        assert len(shown) > 10, "it came in pieces"
        broken, whole = broken + text.count("\ufffd"), whole + sum(text.count(one) for one in "é€😀")
    assert broken > 0
    assert whole > 0


@pytest.mark.parametrize(
    "drawn", [{"temperature": 0}, {"temperature": 1.0, "seed": 2, "repetition_penalty": 1.2}], ids=["greedy", "drawn"]
)
def test_a_shared_beginning_is_restored_to_the_last_bit(
    demo: Served, narrow: Served, tiny: Served, drawn: dict[str, Any]
) -> None:
    """The third prompt that begins alike is not read from its beginning, also where that was evicted long ago."""
    for served, beginning, chunk in ((demo, TALE * 40, 256), (narrow, TALE * 50, 64), (tiny, "the dog sat " * 40, 32)):
        beginning = f"{served.port} {len(drawn)} {beginning}"  # as nothing before it began
        length = len(served.request("/tokenize", {"prompt": beginning})[1]["tokens"])
        asked = {"max_tokens": 12, "logprobs": 2, **drawn}
        found = [
            served.complete(beginning + end, **asked) for end in ("A dog", "The cat", "One day she", "One day she")
        ]
        cached = [one["usage"]["prompt_tokens_details"]["cached_tokens"] for one in found]
        assert cached[:2] == [0, 0]
        assert length - chunk <= cached[2] == cached[3] <= length
        assert cached[2] % chunk == 0
        assert found[2]["choices"] == found[3]["choices"]
        cold = served.complete(beginning + "One day she", echo=True, **asked)  # log-probabilities of all of it
        assert cold["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert cold["usage"]["prompt_tokens"] == found[2]["usage"]["prompt_tokens"]
        assert cold["usage"]["minillm"] == {**found[2]["usage"]["minillm"], "seed": cold["usage"]["minillm"]["seed"]}
        told, warm = cold["choices"][0]["logprobs"], found[2]["choices"][0]["logprobs"]
        for column in ("tokens", "token_logprobs", "top_logprobs"):
            assert told[column][-len(warm[column]) :] == warm[column]


# --- sessions ------------------------------------------------------------------------------------------------------

TURNS = ["the dog sat on the mat", "a little girl sat on the dog and on the cat and on the mat " * 3, "where", "why"]


def turns_in_process(library: LLM, system: str | None) -> list[str]:
    """Every other turn is drawn, and the third ends at once, as the others hardly do."""
    talk = Conversation(library, system=system, raw=system is None)
    rules: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 5}]
    rules += [{"temperature": 0.0, "logit_bias": {1: 100.0}}, rules[1]]
    return [talk.send(text, max_tokens=20, **rule).finish().text for text, rule in zip(TURNS, rules, strict=True)]


def turn(served: Served, name: str, number: int, system: str | None, **options: Any) -> Answer:
    """One turn: in a chat, of which only the first has a system message; or as text that goes on."""
    body: dict[str, Any] = {"session": name, "max_tokens": 20, "resume": number > 0, **options}
    body |= {"temperature": 0.9, "seed": 5} if number % 2 else {"logit_bias": {"1": 100}} if number == 2 else {}
    if system is None:
        return served.complete(TURNS[number], **body)
    opening = [{"role": "system", "content": system}] if number == 0 else []
    body["messages"] = [*opening, {"role": "user", "content": TURNS[number]}]
    key = options.pop("key", None)
    status, answer, _ = served.request("/v1/chat/completions", body, key=key)
    assert status == 200, answer
    found: Answer = answer
    return found


@pytest.mark.parametrize("system", ["Sit down.", None], ids=["template", "text"])
def test_a_session_is_a_conversation(tiny: Served, library: LLM, system: str | None) -> None:
    """Four turns, longer than the budget; what is told of it on the way is what the library tells."""
    name = f"talk-{system is None}"
    answers = [turn(tiny, name, number, system) for number in range(4)]
    assert [text_of(answer) for answer in answers] == turns_in_process(library, system)
    seen = [answer["usage"]["minillm"]["seen_tokens"] for answer in answers]
    assert seen == sorted(set(seen))
    assert answers[-1]["usage"]["minillm"]["evicted_tokens"] > 0
    status, told, _ = tiny.request(f"/v1/sessions/{name}")
    assert (status, told["id"], told["resident"], told["slots"]) == (200, name, True, 64)
    assert told["seen_tokens"] == seen[-1] == told["kept_tokens"] + told["evicted_tokens"]
    assert len(told["remembered"]) <= 256
    assert all(0 <= share <= 1.000001 for share in told["remembered"])
    assert 0 in told["remembered"]
    status, error, _ = tiny.request(
        "/v1/chat/completions",
        {"session": name, "messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]},
    )
    assert system is None or (status == 400 and "send only what is new" in error["error"]["message"])


def test_sessions_outlive_the_row_they_were_in(tiny: Served, kept: Path, library: LLM) -> None:
    """Three of them, and other requests, take turns in two rows."""
    expected, names = turns_in_process(library, "Sit down."), ("one", "two", "three")
    for number in range(4):
        for name in names:
            assert text_of(turn(tiny, name, number, "Sit down.")) == expected[number]
        tiny.complete("the cat", n=2, max_tokens=2)  # takes both rows
        assert all(tiny.request(f"/v1/sessions/{name}")[1] == {"id": name, "resident": False} for name in names)
        assert all((kept / f"{name}.session").is_file() for name in names)
    assert tiny.request("/v1/sessions/one", method="DELETE")[1] == {"id": "one", "deleted": True}
    assert not (kept / "one.session").exists()
    for method in ("GET", "DELETE"):
        status, error, _ = tiny.request("/v1/sessions/one", method=method)
        assert (status, error["error"]["code"]) == (404, "session_not_found")
    again = turn(tiny, "one", 0, "Sit down.")
    assert text_of(again) == expected[0], "the name is free again"


def test_log_probabilities_and_echo_in_a_session(tiny: Served) -> None:
    """The token that was drawn last comes before the prompt, and predicts its first one."""
    asked = {"session": "echo", "echo": True, "logprobs": 1, "max_tokens": 3}
    for text in ("the dog", " sat on", " the mat"):
        answer = tiny.complete(text, **asked)
        told = answer["choices"][0]["logprobs"]
        assert answer["choices"][0]["text"].startswith(text)
        ids = tiny.request("/tokenize", {"prompt": text, "add_special_tokens": text == "the dog"})[1]["tokens"]
        assert len(told["tokens"]) == len(told["token_logprobs"]) == len(ids) + 3
        assert (told["token_logprobs"][0] is None) == (text == "the dog")


def test_a_session_that_could_not_begin_is_none(demo: Served) -> None:
    for prompt in ([], [5000], TALE * 80):
        assert demo.request("/v1/completions", {"prompt": prompt, "session": "new"})[0] == 400
        assert demo.request("/v1/sessions/new")[0] == 404


def test_what_no_longer_fits_is_refused_and_the_session_stays(demo: Served) -> None:
    """All slots of this cache are kept: 512."""
    first = demo.complete(TALE * 30, session="full", max_tokens=3)["usage"]["minillm"]["seen_tokens"]
    status, error, headers = demo.request("/v1/completions", {"prompt": TALE * 30, "session": "full"})
    assert (status, error["error"]["code"], error["error"]["param"]) == (400, "context_length_exceeded", "prompt")
    assert headers["x-should-retry"] == "false"
    assert demo.complete(" One", session="full", max_tokens=3)["usage"]["minillm"]["seen_tokens"] == first + 4
    longest = demo.complete(" One", session="full", max_tokens=1000, ignore_eos=True)
    assert longest["choices"][0]["finish_reason"] == "length"
    assert longest["usage"]["minillm"]["seen_tokens"] == 512


def test_without_a_folder_a_session_ends_when_its_row_is_needed(narrow: Served) -> None:
    first = narrow.complete(ONCE, session="short", max_tokens=5, temperature=0)
    second = narrow.complete(" and", session="short", max_tokens=5, resume=True)
    assert second["usage"]["minillm"]["seen_tokens"] > first["usage"]["minillm"]["seen_tokens"]
    narrow.complete("The dog", max_tokens=2)
    narrow.wait_for("session short is gone: its row was needed, and nothing is saved")
    status, error, headers = narrow.request("/v1/completions", {"prompt": " and", "session": "short", "resume": True})
    assert (status, error["error"]["code"], headers["x-should-retry"]) == (404, "session_not_found", "false")
    anew = narrow.complete(ONCE, session="short", max_tokens=5, temperature=0)
    assert text_of(anew) == text_of(first), "without `resume` it begins again"
    assert anew["usage"]["minillm"]["seen_tokens"] == first["usage"]["minillm"]["seen_tokens"]


def test_a_session_goes_on_after_its_reader_left(tiny: Served) -> None:
    """It has seen what was read and drawn until then, and nothing is broken."""
    with occupied(tiny, session="cut"):
        pass
    before = tiny.request("/v1/sessions/cut")[1]["seen_tokens"]
    answer = tiny.complete(" and", session="cut", max_tokens=5, resume=True)
    after = answer["usage"]["minillm"]["seen_tokens"]
    assert before + 5 <= after <= before + 10
    assert answer["usage"]["completion_tokens"] == 5
    prompt, read = "the dog sat on the mat " * 1000, tiny.metric("minillm_prompt_tokens_total")
    with post(tiny, {"prompt": prompt, "session": "cut"}):
        until(lambda: tiny.metric("minillm_prompt_tokens_total") > read)
    until(lambda: rows_busy(tiny) == 0)
    assert after < tiny.request("/v1/sessions/cut")[1]["seen_tokens"] < after + 6000
    assert tiny.complete(" and", session="cut", max_tokens=5, resume=True)["usage"]["completion_tokens"] == 5


def test_names_of_sessions_lead_nowhere_else(tiny: Served, kept: Path) -> None:
    outside = kept.parent / "precious.session"
    outside.write_text("mine")
    for name in ("../precious", "..", ".hidden", "a/b", "", "x" * 65, "a\0b", "ä"):
        status, error, _ = tiny.request("/v1/completions", {"prompt": "the", "session": name})
        assert (status, error["error"]["param"]) == (400, "session")
    for path in ("..%2Fprecious", "%2e%2e%2fprecious", "..", "%2e%2e", "a%00b", "x" * 300, "%ff", "%0a"):
        for method in ("GET", "DELETE"):
            assert tiny.request(f"/v1/sessions/{path}", method=method)[0] == 404
    assert outside.read_text() == "mine"
    assert {file.name for file in kept.parent.iterdir()} == {"sessions", "precious.session"}


def test_a_server_that_starts_again_knows_its_sessions(
    tiny: Served, folder: Path, kept: Path, library: LLM, tmp_path: Path
) -> None:
    """Copied while the first one runs, as a backup is; with a key from the environment, which `tiny` needs none of."""
    expected = turns_in_process(library, "Sit down.")
    for name in ("old", "first", "second"):
        assert text_of(turn(tiny, name, 0, "Sit down.")) == expected[0]
    tiny.complete("the cat", n=2, max_tokens=2)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("old", "first", "second"):
        shutil.copy2(kept / f"{name}.session", copy)
    (copy / "damaged.session").write_bytes((kept / "first.session").read_bytes()[:-100])
    long_ago = time.time() - 2 * 3600
    os.utime(copy / "old.session", (long_ago, long_ago))
    options = ("--model", folder, "--name", "tiny", "--budget", 64, "--chunk", 32, "--rows", 2, "--sessions", copy)
    with serving(*options, "--session-hours", 1, "--max-sessions", 4, env={"MINILLM_API_KEY": "k3y"}) as served:
        assert not (copy / "old.session").exists(), "idle for longer than an hour"
        assert served.request("/v1/sessions/first")[0] == 401
        for name in ("old", "damaged"):
            body = {"messages": [{"role": "user", "content": "a"}], "session": name, "resume": True}
            status, error, _ = served.request("/v1/chat/completions", body, key="k3y")
            assert (status, error["error"]["code"]) == (404, "session_not_found")
        for name in ("first", "second"):
            answer = turn(served, name, 1, "Sit down.", key="k3y")
            assert text_of(answer) == expected[1]
        for number in range(4):
            body = {"prompt": "the dog", "session": f"new-{number}", "max_tokens": 2}
            assert served.request("/v1/completions", body, key="k3y")[0] == 200
        until(lambda: len(list(copy.glob("*.session"))) <= 4)
        assert served.request("/v1/sessions/first", key="k3y")[0] == 404, "more than --max-sessions"
        assert served.request("/v1/sessions/new-3", key="k3y")[0] == 200
    assert {file.stem for file in copy.iterdir()} == {"damaged.session", *(f"new-{number}" for number in range(4))}
    assert kept.stat().st_mode & 0o077 == 0, "what was said in them is nobody else's business"


# --- curl ----------------------------------------------------------------------------------------------------------


@contextmanager
def curl(served: Served, body: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """`curl -N`, told to end when this is left."""
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["curl", "-sS", "-N", "--noproxy", "*", f"{served.url}/v1/completions", "-d", "@-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(body))
        process.stdin.close()
        try:
            yield process
        finally:
            process.terminate()


def test_curl_shows_every_piece_as_it_comes(narrow: Served) -> None:
    with curl(narrow, {"prompt": ONCE, "stream": True, **ENDLESS}) as process:
        assert process.stdout is not None
        for _ in range(20):
            line = process.stdout.readline()
            assert json.loads(line.removeprefix("data: "))["object"] == "text_completion"
            assert process.stdout.readline() == "\n"
        assert rows_busy(narrow) == 1
        assert process.poll() is None
    until(lambda: rows_busy(narrow) == 0)


def test_curl_sees_that_a_long_prompt_is_being_read(narrow: Served) -> None:
    prompt = TALE * 5000
    length = len(narrow.request("/tokenize", {"prompt": prompt})[1]["tokens"])
    read = narrow.metric("minillm_prompt_tokens_total")
    until(lambda: rows_busy(narrow) == 0)
    with curl(narrow, {"prompt": prompt, "stream": True, "max_tokens": 1}) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(4)]
    until(lambda: rows_busy(narrow) == 0)
    assert narrow.metric("minillm_prompt_tokens_total") - read < length, "nobody was left to read it for"
    counts = [re.fullmatch(r": reading (\d+)/(\d+)\n", line) for line in said[::2]]
    assert said[1::2] == ["\n", "\n"]
    assert [int(count[2]) for count in counts if count] == [length, length]
    first, second = (int(count[1]) for count in counts if count)
    assert 0 < first < second < length


def test_curl_gets_the_whole_stream(demo: Served) -> None:
    asked = {"max_tokens": 8, "temperature": 0}
    with curl(demo, {"prompt": ONCE, "stream": True, **asked}) as process:
        assert process.stdout is not None
        text = process.stdout.read()
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    shown = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert "".join(shown) == text_of(demo.complete(ONCE, **asked))


# --- clients that leave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_who_leaves_while_an_answer_is_drawn_frees_the_row(narrow: Served, stream: bool, reset: bool) -> None:
    status = 200 if stream else "left"
    left, told = narrow.metric("minillm_abandoned_total"), counted(narrow, "/v1/completions", status)
    drawn = narrow.metric("minillm_completion_tokens_total")
    with post(narrow, {"prompt": "Once", "stream": stream, **ENDLESS}) as connection:
        until(lambda: narrow.metric("minillm_completion_tokens_total") > drawn + 5)
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    until(lambda: rows_busy(narrow) == 0)
    assert narrow.metric("minillm_abandoned_total") == left + 1
    until(lambda: counted(narrow, "/v1/completions", status) == told + 1)
    assert narrow.complete("Once", max_tokens=3)["usage"]["completion_tokens"] == 3


def test_whoever_is_told_to_stop_waiting_stops() -> None:
    """Also if what it waits for comes at that very moment: asyncio.wait_for would forget the one over the other."""

    async def leaving() -> list[bool]:
        queue = asyncio.Queue[int]()
        waiting = asyncio.ensure_future(within(60, queue.get()))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        queue.put_nowait(1)
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait((waiting,))
        with pytest.raises(asyncio.TimeoutError):
            await within(0.01, queue.get())
        queue.put_nowait(2)
        return [waiting.cancelled(), await within(60, queue.get()) == 2]

    assert asyncio.run(leaving()) == [True, True]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_before_the_first_token_frees_the_row(narrow: Served, stream: bool) -> None:
    """In the middle of a prompt of some 15,000 tokens."""
    read = narrow.metric("minillm_prompt_tokens_total")
    with post(narrow, {"prompt": TALE * 1500, "stream": stream}):
        until(lambda: narrow.metric("minillm_prompt_tokens_total") > read)
        assert rows_busy(narrow) == 1
    until(lambda: rows_busy(narrow) == 0)
    assert narrow.metric("minillm_prompt_tokens_total") - read < 14_000


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_who_leaves_the_queue_is_not_waited_for(narrow: Served, stream: bool) -> None:
    with occupied(narrow):
        with post(narrow, {"prompt": "Once", "stream": stream}):
            until(lambda: narrow.metric("minillm_queue") == 1)
        until(lambda: narrow.metric("minillm_queue") == 0)
        assert rows_busy(narrow) == 1


def test_who_leaves_in_the_middle_of_a_request(narrow: Served) -> None:
    head = "POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 500\r\n\r\n{"
    total = counted(narrow, "/v1/completions", "left")
    with socket.create_connection(("127.0.0.1", narrow.port)) as connection:
        connection.sendall(head.encode())
    until(lambda: counted(narrow, "/v1/completions", "left") == total + 1)
    assert narrow.metric("minillm_bodies_bytes") == 0


# --- who may come in -----------------------------------------------------------------------------------------------


def raw(served: Served, request: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and body, for a request that no client would send."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as connection:
        connection.sendall(request.encode("latin-1"))
        with connection.makefile("rb") as answer:
            head, _, body = answer.read().decode().partition("\r\n\r\n")
    first, *lines = head.split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return int(first.split()[1]), headers, body


def get(served: Served, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    lines = {"host": f"127.0.0.1:{served.port}", **headers, "connection": "close"}
    told = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in lines.items())
    return raw(served, f"{method} {path} HTTP/1.1\r\n{told}\r\n")


def test_what_needs_the_key(locked: Served) -> None:
    for path in ("/", "/health", "/health/live", "/health/ready"):
        assert locked.request(path)[0] == 200
    paths = [
        "/metrics",
        "/tokenizer_info",
        "/v1/models",
        f"/v1/models/{DEMO}",
        "/v1/sessions/a",
        "/v1",
        "/nowhere",
        "//",
    ]
    for path in paths:
        status, error, headers = locked.request(path)
        assert (status, error["error"]["code"]) == (401, "invalid_api_key")
        assert headers["x-should-retry"] == "false"
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
        assert locked.request(path, {"prompt": "a"})[0] == 401
    assert locked.request("/v1/sessions/a", method="DELETE")[0] == 401
    for written in ("open sesame", "Basic open sesame", "Bearer", "Bearer open", "Bearer open sesame\xff", "Bearer  "):
        assert get(locked, "/metrics", authorization=written)[0] == 401
    for written in ("Bearer open sesame", "bearer   open sesame"):
        assert get(locked, "/metrics", authorization=written)[0] == 200
    assert "open sesame" not in "".join(locked.said)


def test_who_may_ask_from_a_page(demo: Served, locked: Served) -> None:
    """Its own page; others only where that was allowed; and never by a foreign name, which is how DNS is rebound."""
    own = f"http://127.0.0.1:{demo.port}"
    for headers in (
        {},
        {"origin": own},
        {"host": "localhost"},
        {"host": f"localhost:{demo.port}"},
        {"host": "[::1]:1"},
    ):
        status, told, _ = get(demo, "/v1/models", **headers)
        assert status == 200
        assert not [name for name in told if name.startswith("access-control")]
    for headers in (
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": f"http://evil.example:{demo.port}"},
        {"origin": f"{own}.evil.example"},
        {"host": "evil.example"},
        {"host": f"evil.example:{demo.port}", "origin": f"http://evil.example:{demo.port}"},
        {"host": "127.0.0.1.evil.example"},
        {"host": ""},
    ):
        for path in ("/v1/models", "/"):
            status, told, body = get(demo, path, **headers)
            assert (status, json.loads(body)["error"]["type"]) == (403, "permission_error")
            assert not [name for name in told if name.startswith("access-control")]
    key = {"authorization": "Bearer open sesame"}
    status, told, _ = get(locked, "/v1/models", origin="https://page.example", **key)
    assert (status, told["access-control-allow-origin"]) == (200, "https://page.example")
    assert get(locked, "/v1/models", origin="https://evil.example", **key)[0] == 403
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization,content-type"}
    status, told, _ = get(locked, "/v1/completions", "OPTIONS", origin="https://page.example", **asked)
    assert (status, told["access-control-allow-origin"]) == (200, "https://page.example")
    status, told, _ = get(locked, "/v1/completions", "OPTIONS", origin="https://evil.example", **asked)
    assert status == 400
    assert "access-control-allow-origin" not in told
    assert get(demo, "/v1/completions", "OPTIONS", origin=own, **asked)[0] == 405


def test_no_path_leads_to_a_file(demo: Served) -> None:
    for path in (
        "/../../etc/passwd",
        "/v1/models/../../../etc/passwd",
        "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
        "/v1/models//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/page.html",
        "/v1/models/%00",
    ):
        status, _, body = get(demo, path)
        assert (status, json.loads(body)["error"]["type"]) == (404, "not_found_error")
        assert "root:" not in body


def test_the_page_and_the_headers_of_answers(demo: Served) -> None:
    status, headers, body = get(demo, "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert body.lower().startswith("<!doctype html>")
    for path in ("/", "/v1/models", "/nowhere"):
        told = get(demo, path)[1]
        assert told["x-content-type-options"] == "nosniff"
        assert "server" not in told


def test_an_open_address_needs_a_key() -> None:
    """One line, before anything is loaded."""
    command = [sys.executable, "-m", "minillm", "serve", "--port", "0", "--host"]
    environment = {name: value for name, value in os.environ.items() if name != "MINILLM_API_KEY"}
    done = subprocess.run([*command, "0.0.0.0"], capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 2
    assert done.stderr.startswith("minillm: error: --host 0.0.0.0 lets other machines in: give --api-key-file")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "::"], "lets other machines in"),
        (["--api-key", ""], "is empty"),
        (["--api-key", "schlüssel"], "a header cannot carry"),
        (["--api-key", "a\nb"], "a header cannot carry"),
        (["--api-key", "a", "--api-key-file", "b"], "leave one of them out"),
        (["--api-key-file", "no such file"], "no such file"),
        (["--queue", "-1"], "--queue must be at least 0"),
        (["--port", "70000"], "cannot listen on 127.0.0.1:70000"),
    ],
)
def test_mistakes_at_the_start_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.delenv("MINILLM_API_KEY", raising=False)
    assert main(["serve", "--port", "0", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.startswith("minillm: error: ")
    assert said.count("\n") == 1


# --- lm-eval -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local(demo: Served) -> Iterator[Any]:
    """lm-eval's own client, which finds by itself that the server tokenizes."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'minillm[lab]'")
    pytest.importorskip("tenacity", reason="lm-eval's client needs its extra: pip install 'lm-eval[api]'")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    url = f"{demo.url}/v1/completions"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # how it looks for a tokenizer leaves a connection open
        model = LocalCompletionsAPI(base_url=url, model=DEMO, max_length=256, batch_size=2)
        gc.collect()
    yield model
    model.tokenizer.session.close()


@pytest.fixture(scope="module")
def demo_here() -> LLM:
    return LLM.load()


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, one, number, ("task", number, 1)) for number, one in enumerate(arguments)]  # type: ignore[arg-type]


def judged(llm: LLM, before: list[int], after: list[int]) -> tuple[float, bool]:
    """log p of `after`, and whether each of its tokens is the likeliest, as the library has it."""
    result = llm.generate(before + after, max_tokens=0, prompt_logprobs=1)
    assert result.prompt_logprobs is not None
    told = [entry for entry in result.prompt_logprobs[len(before) :] if entry is not None]
    assert [entry.token_id for entry in told] == after
    return sum(entry.logprob for entry in told), all(entry.top[0][0] == entry.token_id for entry in told)


def test_lm_eval_judges_choices_as_the_library_does(local: Any, demo_here: LLM) -> None:
    assert local.tokenizer_backend == "remote"
    tokenizer = demo_here.checkpoint.tokenizer
    assert (local.tokenizer.bos_token_id, local.eot_token_id) == (tokenizer.bos_id, tokenizer.eos_ids[0])
    own = demo_here.generate(STORY, raw=True, max_tokens=6).text
    pairs = [*((STORY, choice) for choice in (*CHOICES, own)), ("", "Once upon"), (STORY, " end.</s>")]
    found = local.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for pair, (score, greedy) in zip(pairs, found, strict=True):
        before, after = local._encode_pair(*pair) if pair[0] else ([local.prefix_token_id], local.tok_encode(pair[1]))
        expected, likeliest = judged(demo_here, before, after)
        assert score == pytest.approx(expected, abs=1e-3)
        assert greedy == likeliest
    assert len({score for score, _ in found}) == len(pairs)


def test_lm_eval_reads_running_text_and_answers(local: Any, demo_here: LLM) -> None:
    text = STORY + CHOICES[2]
    [rolling] = local.loglikelihood_rolling(requests("loglikelihood_rolling", (text,)), disable_tqdm=True)
    expected, _ = judged(demo_here, [local.prefix_token_id], local.tok_encode(text))
    assert rolling == pytest.approx(expected, abs=1e-3)
    asked = [(prompt, {"until": ["\n\n", "girl"], "max_gen_toks": 12}) for prompt in (ONCE, "The dog")]
    found = local.generate_until(requests("generate_until", *asked), disable_tqdm=True)
    for (prompt, _), answer in zip(asked, found, strict=True):
        ids = local.tok_encode(prompt)
        assert answer == demo_here.generate(ids, temperature=0.0, max_tokens=12, stop=("\n\n", "girl", "</s>")).text


def test_lm_eval_chats(tiny: Served) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'minillm[lab]'")
    pytest.importorskip("tenacity", reason="lm-eval's client needs its extra: pip install 'lm-eval[api]'")
    from lm_eval.models.openai_completions import LocalChatCompletion

    model = LocalChatCompletion(base_url=f"{tiny.url}/v1/chat/completions", model="tiny", tokenizer_backend=None)
    asked = model.apply_chat_template([{"role": "system", "content": "Sit."}, {"role": "user", "content": "the dog"}])
    until = ["\n\n", "Question:", "</s>", "<|im_end|>", "zebra"]
    [found] = model.generate_until(
        requests("generate_until", (asked, {"until": until, "max_gen_toks": 9})), disable_tqdm=True
    )
    body = {"messages": json.loads(asked.prompt), "max_tokens": 9}
    assert found == text_of(tiny.request("/v1/chat/completions", body)[1])


@pytest.mark.slow
@pytest.mark.usefixtures("local")
def test_the_command_of_lm_eval(demo: Served, demo_here: LLM, tmp_path: Path) -> None:
    """As a user runs it: three kinds of task over local files, four requests at a time."""
    rows = [{"question": STORY, "choices": [choice.strip() for choice in CHOICES], "answer": 0}] * 2
    write_task(tmp_path, "local_choice", CHOICE, rows)
    write_task(tmp_path, "local_rolling", ROLLING, [{"text": STORY}, {"text": TALE * 30}])
    write_task(tmp_path, "local_answer", ANSWER, [{"question": "Where is the dog?", "answer": "here"}])
    arguments = f"base_url={demo.url}/v1/completions,model={DEMO},num_concurrent=4,max_length=256"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "local_choice,local_rolling,local_answer", "--include_path", str(tmp_path)]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    [file] = (tmp_path / "out").rglob("samples_local_choice_*.jsonl")
    tokenizer = demo_here.checkpoint.tokenizer
    for line in file.read_text().splitlines():
        for (score, greedy), choice in zip(json.loads(line)["filtered_resps"], CHOICES, strict=True):
            before = tokenizer.encode(STORY, bos=False)
            after = tokenizer.encode(f"{STORY} {choice.strip()}", bos=False)[len(before) :]
            expected, likeliest = judged(demo_here, before, after)
            assert (float(score), greedy == "True") == (pytest.approx(expected, abs=1e-3), likeliest)
    [file] = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]
    assert results["local_rolling"]["byte_perplexity,none"] > 1
    assert "exact_match,none" in results["local_answer"]
