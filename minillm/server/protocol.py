"""What a request may say: OpenAI's JSON bodies become an `Ask`, or are refused with an `ApiError`.

Everything is checked here, before anything is queued: what comes out is typed, in range, and bounds the work it causes.
null means the default everywhere, fields that nobody knows are ignored, and what is known but not done here is refused:
an option that silently does nothing is worse than an error.  Knows neither engine nor web framework.

Read it from `chat_ask` and `completion_ask` at the end.  In between stand the kinds of value that requests have, beside
those that all JSON has (fields.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..chat import Message
from ..errors import SamplingError
from ..results import TokenLogprob, Usage
from ..sampling import SamplingParams
from .fields import MOST, ApiError, Fields, Kind, flag, listing, measure, number, text, whole, wrong

Prompt = str | tuple[int, ...] | tuple[Message, ...]
Prompts = tuple[Prompt, ...]
Endpoint = Literal["chat", "completion"]

_COMPLETION_TOKENS = 16  # OpenAI's default for max_tokens at /v1/completions
_SESSION = re.compile(r"(?!\.)[A-Za-z0-9_.-]{1,64}")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}

# What is known but not done here: field -> (the values that ask for nothing, why anything else is refused).
_NOT_DONE: dict[str, tuple[list[Any], str]] = {
    "response_format": ([{"type": "text"}], "answers are free text; ask for JSON in a message"),
    "modalities": ([[], ["text"]], "answers are text and nothing else"),
    "tool_choice": (["none", "auto"], "there are no tools to choose from"),
    "function_call": (["none", "auto"], "there are no functions to choose from"),
    "suffix": ([""], "text is only ever continued at its end"),
}
_TOOLS = {"tools": "tool_choice", "functions": "function_call"}  # refused as well, unless the choice is "none"


@dataclass(frozen=True)
class Limits:
    """The most that one request may ask for, settled when the server starts."""

    model: str  # the one name that is served
    real_vocab: int  # token ids are 0 .. real_vocab - 1
    choices: int  # answers: prompts x n
    max_tokens: int | None  # the longest answer; None: no limit
    default_max_tokens: int = 512  # of a chat that names none, as far as max_tokens allows
    timeout: float = 3600.0  # seconds that a request may give itself
    messages: int = 10_000
    stops: int = 16  # OpenAI allows 4, and lm-evaluation-harness asks for more
    stop_chars: int = 256  # of one stop string
    stop_token_ids: int = 16
    biases: int = 1024
    logprobs: int = 20


@dataclass(frozen=True)
class Ask:
    """One request, checked: for every prompt, n answers."""

    kind: Endpoint
    prompts: Prompts  # a chat has exactly one, its messages; a completion has texts or token ids
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    echo: bool
    session: str | None  # the name of a cache to go on with
    resume: bool  # whether that has to be there already
    timeout: float | None  # seconds


@dataclass(frozen=True)
class Piece:
    """Some more text of one answer, and the tokens that it shows (none unless log-probabilities were asked for)."""

    index: int  # (number of the prompt) x n + (number of the answer)
    text: str  # may be empty where only tokens are told
    tokens: tuple[TokenLogprob | None, ...] = ()  # None: a prompt's first token, which nothing predicts
    prompt: bool = False  # this is the echoed prompt itself
    token_ids: tuple[int, ...] = ()  # of `tokens`; may be left out where none of them is None


@dataclass(frozen=True)
class Finished:
    """The end of one answer.  cached_tokens: how many of the prompt's were restored instead of read."""

    index: int
    reason: str
    usage: Usage
    cached_tokens: int
    seed: int


# --- kinds of value ------------------------------------------------------------------------------------------------


def _message(value: Any, name: str) -> Message:
    fields = Fields(value, name)
    role = fields.need("role", text)
    if role not in _ROLES:
        hint = "; tools are not supported" if role in ("tool", "function") else ""
        raise wrong(f"{name}.role", role, f"one of {', '.join(_ROLES)}{hint}")
    for calls in ("tool_calls", "function_call"):
        fields.refuse(calls, [[]], "the model calls no tools")
    content = fields.get("content", _content) if role == "assistant" else fields.need("content", _content)
    return {"role": _ROLES[role], "content": content or ""}


def _content(value: Any, name: str) -> str:
    """Text, or a list of parts, of which each becomes a line, as in vLLM."""
    if not isinstance(value, (str, list)):
        raise wrong(name, value, "text or a list of text parts")
    return text(value, name) if isinstance(value, str) else "\n".join(listing(_part, 0, MOST)(value, name))


def _part(value: Any, name: str) -> str:
    fields = Fields(value, name)
    if (kind := fields.need("type", text)) != "text":
        raise wrong(f"{name}.type", kind, '"text": the model reads nothing else')
    return fields.need("text", text)


def _prompts(limits: Limits) -> Kind[Prompts]:
    """Text, token ids, or a list of either; a list that begins with a number is one prompt of ids."""
    ids = listing(whole(0, limits.real_vocab - 1), 1, MOST)

    def prompt(value: Any, name: str) -> Prompt:
        if not isinstance(value, (str, list)):
            raise wrong(name, value, "text or a list of token ids")
        return text(value, name) if isinstance(value, str) else ids(value, name)

    def prompts(value: Any, name: str) -> Prompts:
        if isinstance(value, list) and value and not isinstance(value[0], (int, float)):
            return listing(prompt, 1, limits.choices)(value, name)
        return (prompt(value, name),)

    return prompts


def _stops(limits: Limits) -> Kind[tuple[str, ...]]:
    """One string or a list of them."""

    def stop(value: Any, name: str) -> str:
        measure(found := text(value, name), name, 1, limits.stop_chars, "characters")
        return found

    def stops(value: Any, name: str) -> tuple[str, ...]:
        return (stop(value, name),) if isinstance(value, str) else listing(stop, 0, limits.stops)(value, name)

    return stops


def _biases(limits: Limits) -> Kind[dict[int, float]]:
    """An object from token ids, which JSON can only write as text, to numbers."""

    def biases(value: Any, name: str) -> dict[int, float]:
        if not isinstance(value, dict):
            raise wrong(name, value, "an object from token ids to numbers")
        measure(value, name, 0, limits.biases, "entries")
        found: dict[int, float] = {}
        for key, bias in value.items():
            if not re.fullmatch("[0-9]{1,18}", key) or int(key) >= limits.real_vocab:
                raise wrong(f"a key of {name}", key, f"a token id from 0 to {limits.real_vocab - 1}", param=name)
            found[int(key)] = number(bias, f"{name}.{key}")
        return found

    return biases


# --- requests ------------------------------------------------------------------------------------------------------


def chat_ask(body: object, limits: Limits, defaults: Mapping[str, Any]) -> Ask:
    """The body of /v1/chat/completions, as `json.loads` gave it.

    defaults: the checkpoint's own sampling, by SamplingParams' names; the request wins.  Where neither says anything
    SamplingParams does: greedy, as everywhere in minillm, and not OpenAI's temperature of 1.
    Raises ApiError: 404 for another model, 400 for everything else, with the number, the limit and the remedy.
    """
    fields = _open(body, limits)
    messages = fields.need("messages", listing(_message, 1, limits.messages))
    wanted = fields.get("logprobs", flag)
    top = fields.get("top_logprobs", whole(0, limits.logprobs))
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: set that to true, or leave both out", param="top_logprobs")
    max_tokens = _max_tokens(fields, limits, limits.default_max_tokens, least=1)
    params = _sampling(fields, limits, defaults, max_tokens=max_tokens, logprobs=(top or 0) if wanted else None)
    return _ask("chat", fields, limits, (messages,), params, echo=False)


def completion_ask(body: object, limits: Limits, defaults: Mapping[str, Any]) -> Ask:
    """The body of /v1/completions; everything else as in `chat_ask`."""
    fields = _open(body, limits)
    prompts = fields.need("prompt", _prompts(limits))
    echo = fields.get("echo", flag) or False
    logprobs = fields.get("logprobs", whole(0, limits.logprobs))
    max_tokens = _max_tokens(fields, limits, _COMPLETION_TOKENS, least=0)
    if max_tokens == 0 and not echo:
        raise ApiError(400, "max_tokens 0 asks for nothing: set echo to get the prompt back", param="max_tokens")
    echoed = logprobs if echo else None
    params = _sampling(fields, limits, defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=echoed)
    return _ask("completion", fields, limits, prompts, params, echo=echo)


def _open(body: object, limits: Limits) -> Fields:
    """What comes first for both: is this for us at all, and is it something that we do?"""
    fields = Fields(body)
    model = fields.get("model", text)
    if model and model != limits.model:
        message = f"the model {model[:60]!r} is not served here: ask for {limits.model!r}, or name none"
        raise ApiError(404, message, kind="not_found_error", param="model", code="model_not_found")
    for tools, choice in _TOOLS.items():
        if fields.raw.get(choice) != "none":
            fields.refuse(tools, [[]], "the model calls no tools")
    for key, (harmless, why) in _NOT_DONE.items():
        fields.refuse(key, harmless, why)
    return fields


def _max_tokens(fields: Fields, limits: Limits, default: int, *, least: int) -> int:
    most = MOST if limits.max_tokens is None else limits.max_tokens
    kind = whole(least, most)
    for key in ("max_completion_tokens", "max_tokens"):  # the new name wins over the old one
        if (asked := fields.get(key, kind)) is not None:
            return asked
    return min(default, most)


def _sampling(fields: Fields, limits: Limits, defaults: Mapping[str, Any], **settled: int | None) -> SamplingParams:
    """The fields that OpenAI has, and those that vLLM added; SamplingParams knows their ranges."""
    kinds: dict[str, Kind[Any]] = {
        **dict.fromkeys(("temperature", "top_p", "min_p"), number),
        **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), number),
        **dict.fromkeys(("top_k", "min_tokens", "seed"), whole()),
        "logit_bias": _biases(limits),
        "stop": _stops(limits),
        "stop_token_ids": listing(whole(0, limits.real_vocab - 1), 0, limits.stop_token_ids),
        "ignore_eos": flag,
    }
    asked = {key: value for key, kind in kinds.items() if (value := fields.get(key, kind)) is not None}
    try:
        return SamplingParams(**{**defaults, **asked, **settled})
    except SamplingError as error:
        name = str(error).partition(" ")[0]  # its messages begin with the field
        raise ApiError(400, str(error), param=name if name in kinds else None) from None


def _ask(kind: Endpoint, fields: Fields, limits: Limits, prompts: Prompts, params: SamplingParams, echo: bool) -> Ask:
    """What both have in common: how many answers, how they are told, and where they are kept."""
    n = fields.get("n", whole(1, limits.choices)) or 1
    if (fields.get("best_of", whole(1)) or n) != n:
        raise ApiError(400, f"best_of must be n, {n}: answers are not compared; leave it out", param="best_of")
    if len(prompts) * n > limits.choices:
        message = f"{len(prompts)} prompts with n = {n} ask for {len(prompts) * n} answers; ask for {limits.choices}"
        raise ApiError(400, f"{message} at most, and send the rest in requests of their own", param="n")
    session = fields.get("session", text)
    if session is not None and not _SESSION.fullmatch(session):
        raise wrong("session", session, "1 to 64 letters, digits, dots, dashes or underscores, and no dot in front")
    if session is not None and len(prompts) * n > 1:
        raise ApiError(400, "a session has one prompt and n = 1: it is one sequence", param="session")
    stream = fields.get("stream", flag) or False
    options = fields.get("stream_options", Fields)
    if options and not stream:
        raise ApiError(400, "stream_options needs stream: set that to true, or leave both out", param="stream_options")
    timeout = fields.get("timeout", number)
    if timeout is not None and not 0 < timeout <= limits.timeout:
        raise wrong("timeout", timeout, f"seconds, more than 0 and at most {limits.timeout:g}")
    include_usage = bool(options and options.get("include_usage", flag))
    resume = fields.get("resume", flag) or False
    if resume and session is None:
        raise ApiError(400, "resume needs the session that is to go on: name it, or leave resume out", param="resume")
    return Ask(kind, prompts, params, n, stream, include_usage, echo, session, resume, timeout)
