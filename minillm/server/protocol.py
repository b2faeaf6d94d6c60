"""What a request may say: OpenAI's JSON bodies become an `Ask`, or are refused with an `ApiError`.

Everything is checked here, before anything is queued: what comes out is typed, in range, and bounds the work it causes.
null means the default everywhere, fields that nobody knows are ignored, and what is known but not done here is refused:
an option that silently does nothing is worse than an error.  Knows neither engine nor web framework.

Read it from `chat_ask` and `completion_ask` at the end.  In between stand the kinds of value: a `Kind` is a function of
(value, its name) that gives what the value means, or raises the ApiError that names it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from ..chat import Message
from ..errors import SamplingError
from ..results import TokenLogprob, Usage
from ..sampling import SamplingParams

T = TypeVar("T")
Kind = Callable[[Any, str], T]
Prompt = str | tuple[int, ...] | tuple[Message, ...]
Prompts = tuple[Prompt, ...]
Endpoint = Literal["chat", "completion"]

_MOST = 2**63 - 1  # what 64 bits hold: no field takes a larger whole number
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


@dataclass(eq=False)
class ApiError(Exception):
    """A refusal in the form that OpenAI's clients understand."""

    status: int  # HTTP's
    message: str
    kind: str = "invalid_request_error"  # OpenAI's "type"
    param: str | None = None  # the field to blame
    code: str | None = None  # a word for programs
    retry_after: int | None = None  # seconds
    final: bool = False  # whatever the status: another try would end in the same way

    def __str__(self) -> str:
        return self.message

    def body(self) -> dict[str, Any]:
        """The JSON object of the answer, or of the last event of a stream."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """Clients try again by themselves unless told not to, and what a request says does not change by that."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.final or (400 <= self.status < 500 and self.status not in (408, 409, 429)):
            headers["x-should-retry"] = "false"
        return headers


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
    stops: int = 4
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


def _wrong(name: str, value: object, expected: str, *, param: str | None = None) -> ApiError:
    """Name what is wrong; long values are cut, deep ones are not shown, so that no message grows with the request."""
    if isinstance(value, (list, dict)):
        shown = "a list" if isinstance(value, list) else "an object"
    else:
        shown = json.dumps(value[:60] if isinstance(value, str) else value)
    shown = "missing or null" if value is None else shown if len(shown) <= 60 else shown[:57] + "..."
    return ApiError(400, f"{name or 'the request'} is {shown}; it must be {expected}", param=param or name or None)


def _flag(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise _wrong(name, value, "true or false")
    return value


def _number(value: Any, name: str) -> float:
    """Finite, and no bool; the comparison is false for NaN, and exact for whole numbers of any size."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise _wrong(name, value, "a finite number")
    return float(value)


def _whole(low: int = -_MOST - 1, high: int = _MOST) -> Kind[int]:
    """A whole number, also one written as 1.0; no bool."""
    limits = f"from {low} to {high}" if high < _MOST else f"from {low} up" if low >= 0 else "of at most 64 bits"

    def whole(value: Any, name: str) -> int:
        integral = type(value) is int or (isinstance(value, float) and value.is_integer())
        if not integral or not low <= value <= high:
            raise _wrong(name, value, f"a whole number {limits}")
        return int(value)

    return whole


def _text(value: Any, name: str) -> str:
    """Text that UTF-8 can carry: JSON can also write half of a character, such as "\\ud83d"."""
    if not isinstance(value, str):
        raise _wrong(name, value, "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start : error.start + 1]
        raise ApiError(400, f"{name} holds half a character, {half!a}: send whole ones", param=name) from None
    return value


def _measure(value: str | list[Any] | dict[str, Any], name: str, least: int, most: int, units: str) -> None:
    if not least <= len(value) <= most:
        limits = f"{least} to {most}" if most < _MOST else f"at least {least}"
        raise ApiError(400, f"{name} has {len(value)} {units}; give {limits}", param=name)


def _listing(kind: Kind[T], least: int, most: int) -> Kind[tuple[T, ...]]:
    """A list of `least` to `most` entries of one kind."""

    def listing(value: Any, name: str) -> tuple[T, ...]:
        if not isinstance(value, list):
            raise _wrong(name, value, "a list")
        _measure(value, name, least, most, "entries")
        return tuple([kind(entry, f"{name}[{i}]") for i, entry in enumerate(value)])

    return listing


class _Fields:
    """A JSON object, read field by field: null counts as absent.  Itself a kind of value."""

    def __init__(self, value: Any, name: str = "") -> None:
        if not isinstance(value, dict):
            raise _wrong(name, value, "a JSON object")
        self.raw, self._prefix = value, name and f"{name}."

    def get(self, key: str, kind: Kind[T]) -> T | None:
        value = self.raw.get(key)
        return None if value is None else kind(value, self._prefix + key)

    def need(self, key: str, kind: Kind[T]) -> T:
        """A field without a default: null is passed on, to be refused as what it is not."""
        return kind(self.raw.get(key), self._prefix + key)

    def refuse(self, key: str, harmless: list[Any], why: str) -> None:
        value, name = self.raw.get(key), self._prefix + key
        if value is not None and value not in harmless:
            raise ApiError(400, f"{name} is not supported: {why}; leave it out", param=name)


def _message(value: Any, name: str) -> Message:
    fields = _Fields(value, name)
    role = fields.need("role", _text)
    if role not in _ROLES:
        hint = "; tools are not supported" if role in ("tool", "function") else ""
        raise _wrong(f"{name}.role", role, f"one of {', '.join(_ROLES)}{hint}")
    for calls in ("tool_calls", "function_call"):
        fields.refuse(calls, [[]], "the model calls no tools")
    content = fields.get("content", _content) if role == "assistant" else fields.need("content", _content)
    return {"role": _ROLES[role], "content": content or ""}


def _content(value: Any, name: str) -> str:
    """Text, or a list of parts, of which each becomes a line, as in vLLM."""
    if not isinstance(value, (str, list)):
        raise _wrong(name, value, "text or a list of text parts")
    return _text(value, name) if isinstance(value, str) else "\n".join(_listing(_part, 0, _MOST)(value, name))


def _part(value: Any, name: str) -> str:
    fields = _Fields(value, name)
    if (kind := fields.need("type", _text)) != "text":
        raise _wrong(f"{name}.type", kind, '"text": the model reads nothing else')
    return fields.need("text", _text)


def _prompts(limits: Limits) -> Kind[Prompts]:
    """Text, token ids, or a list of either; a list that begins with a number is one prompt of ids."""
    ids = _listing(_whole(0, limits.real_vocab - 1), 1, _MOST)

    def prompt(value: Any, name: str) -> Prompt:
        if not isinstance(value, (str, list)):
            raise _wrong(name, value, "text or a list of token ids")
        return _text(value, name) if isinstance(value, str) else ids(value, name)

    def prompts(value: Any, name: str) -> Prompts:
        if isinstance(value, list) and value and not isinstance(value[0], (int, float)):
            return _listing(prompt, 1, limits.choices)(value, name)
        return (prompt(value, name),)

    return prompts


def _stops(limits: Limits) -> Kind[tuple[str, ...]]:
    """One string or a list of them."""

    def stop(value: Any, name: str) -> str:
        _measure(text := _text(value, name), name, 1, limits.stop_chars, "characters")
        return text

    def stops(value: Any, name: str) -> tuple[str, ...]:
        return (stop(value, name),) if isinstance(value, str) else _listing(stop, 0, limits.stops)(value, name)

    return stops


def _biases(limits: Limits) -> Kind[dict[int, float]]:
    """An object from token ids, which JSON can only write as text, to numbers."""

    def biases(value: Any, name: str) -> dict[int, float]:
        if not isinstance(value, dict):
            raise _wrong(name, value, "an object from token ids to numbers")
        _measure(value, name, 0, limits.biases, "entries")
        found: dict[int, float] = {}
        for key, bias in value.items():
            if not re.fullmatch("[0-9]{1,18}", key) or int(key) >= limits.real_vocab:
                raise _wrong(f"a key of {name}", key, f"a token id from 0 to {limits.real_vocab - 1}", param=name)
            found[int(key)] = _number(bias, f"{name}.{key}")
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
    messages = fields.need("messages", _listing(_message, 1, limits.messages))
    wanted = fields.get("logprobs", _flag)
    top = fields.get("top_logprobs", _whole(0, limits.logprobs))
    if top is not None and not wanted:
        raise ApiError(400, "top_logprobs needs logprobs: set that to true, or leave both out", param="top_logprobs")
    max_tokens = _max_tokens(fields, limits, limits.default_max_tokens, least=1)
    params = _sampling(fields, limits, defaults, max_tokens=max_tokens, logprobs=(top or 0) if wanted else None)
    return _ask("chat", fields, limits, (messages,), params, echo=False)


def completion_ask(body: object, limits: Limits, defaults: Mapping[str, Any]) -> Ask:
    """The body of /v1/completions; everything else as in `chat_ask`."""
    fields = _open(body, limits)
    prompts = fields.need("prompt", _prompts(limits))
    echo = fields.get("echo", _flag) or False
    logprobs = fields.get("logprobs", _whole(0, limits.logprobs))
    max_tokens = _max_tokens(fields, limits, _COMPLETION_TOKENS, least=0)
    if max_tokens == 0 and not echo:
        raise ApiError(400, "max_tokens 0 asks for nothing: set echo to get the prompt back", param="max_tokens")
    echoed = logprobs if echo else None
    params = _sampling(fields, limits, defaults, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=echoed)
    return _ask("completion", fields, limits, prompts, params, echo=echo)


def _open(body: object, limits: Limits) -> _Fields:
    """What comes first for both: is this for us at all, and is it something that we do?"""
    fields = _Fields(body)
    model = fields.get("model", _text)
    if model and model != limits.model:
        message = f"the model {model[:60]!r} is not served here: ask for {limits.model!r}, or name none"
        raise ApiError(404, message, kind="not_found_error", param="model", code="model_not_found")
    for tools, choice in _TOOLS.items():
        if fields.raw.get(choice) != "none":
            fields.refuse(tools, [[]], "the model calls no tools")
    for key, (harmless, why) in _NOT_DONE.items():
        fields.refuse(key, harmless, why)
    return fields


def _max_tokens(fields: _Fields, limits: Limits, default: int, *, least: int) -> int:
    most = _MOST if limits.max_tokens is None else limits.max_tokens
    kind = _whole(least, most)
    for key in ("max_completion_tokens", "max_tokens"):  # the new name wins over the old one
        if (asked := fields.get(key, kind)) is not None:
            return asked
    return min(default, most)


def _sampling(fields: _Fields, limits: Limits, defaults: Mapping[str, Any], **settled: int | None) -> SamplingParams:
    """The fields that OpenAI has, and those that vLLM added; SamplingParams knows their ranges."""
    kinds: dict[str, Kind[Any]] = {
        **dict.fromkeys(("temperature", "top_p", "min_p"), _number),
        **dict.fromkeys(("repetition_penalty", "presence_penalty", "frequency_penalty"), _number),
        **dict.fromkeys(("top_k", "min_tokens", "seed"), _whole()),
        "logit_bias": _biases(limits),
        "stop": _stops(limits),
        "stop_token_ids": _listing(_whole(0, limits.real_vocab - 1), 0, limits.stop_token_ids),
        "ignore_eos": _flag,
    }
    asked = {key: value for key, kind in kinds.items() if (value := fields.get(key, kind)) is not None}
    try:
        return SamplingParams(**{**defaults, **asked, **settled})
    except SamplingError as error:
        name = str(error).partition(" ")[0]  # its messages begin with the field
        raise ApiError(400, str(error), param=name if name in kinds else None) from None


def _ask(kind: Endpoint, fields: _Fields, limits: Limits, prompts: Prompts, params: SamplingParams, echo: bool) -> Ask:
    """What both have in common: how many answers, how they are told, and where they are kept."""
    n = fields.get("n", _whole(1, limits.choices)) or 1
    if (fields.get("best_of", _whole(1)) or n) != n:
        raise ApiError(400, f"best_of must be n, {n}: answers are not compared; leave it out", param="best_of")
    if len(prompts) * n > limits.choices:
        message = f"{len(prompts)} prompts with n = {n} ask for {len(prompts) * n} answers; ask for {limits.choices}"
        raise ApiError(400, f"{message} at most, and send the rest in requests of their own", param="n")
    session = fields.get("session", _text)
    if session is not None and not _SESSION.fullmatch(session):
        raise _wrong("session", session, "1 to 64 letters, digits, dots, dashes or underscores, and no dot in front")
    if session is not None and len(prompts) * n > 1:
        raise ApiError(400, "a session has one prompt and n = 1: it is one sequence", param="session")
    stream = fields.get("stream", _flag) or False
    options = fields.get("stream_options", _Fields)
    if options and not stream:
        raise ApiError(400, "stream_options needs stream: set that to true, or leave both out", param="stream_options")
    timeout = fields.get("timeout", _number)
    if timeout is not None and not 0 < timeout <= limits.timeout:
        raise _wrong("timeout", timeout, f"seconds, more than 0 and at most {limits.timeout:g}")
    include_usage = bool(options and options.get("include_usage", _flag))
    resume = fields.get("resume", _flag) or False
    if resume and session is None:
        raise ApiError(400, "resume needs the session that is to go on: name it, or leave resume out", param="resume")
    return Ask(kind, prompts, params, n, stream, include_usage, echo, session, resume, timeout)
