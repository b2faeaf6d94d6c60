"""What is said back: OpenAI's objects, whole or in chunks, made of the `Piece`s and `Finished` of a request's answers.

Everything that comes out is JSON's own types.  Knows neither engine nor web framework, and of a token only its bytes.
What OpenAI has no word for - what was seen, kept and evicted, and the seed - stands in a field of its own, "minillm".
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence
from typing import Any

from ..results import TokenLogprob
from .protocol import Ask, Finished, Piece

Json = dict[str, Any]

_COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
_IMPOSSIBLE = -9999.0  # how OpenAI writes the log-probability of what cannot be: JSON has no infinity


class Replies:
    """The reply to one request, out of the events of all its answers in the order in which they come.

    As a stream: `opening`, `chunk` for every event, `closing`.  As a whole: `add` every event, then `whole`.
    The pieces of one answer come in order and before its `Finished`; different answers may take turns.
    """

    def __init__(
        self, ask: Ask, *, id: str, created: int, model: str, fingerprint: str, token_bytes: Callable[[int], bytes]
    ) -> None:
        """created: seconds since 1970.  token_bytes(id): what a token stands for, in UTF-8 or a part of it."""
        answers = len(ask.prompts) * ask.n
        self._ask, self._chat, self._token_bytes = ask, ask.kind == "chat", token_bytes
        self._head = {"id": id, "created": created, "model": model, "system_fingerprint": fingerprint}
        self._offsets = [TextOffsets() for _ in range(answers)]
        self._texts: list[list[str]] = [[] for _ in range(answers)]
        self._tokens: list[list[Json]] = [[] for _ in range(answers)]
        self._finished: dict[int, Finished] = {}

    def opening(self) -> list[Json]:
        """Before anything is known: in a chat, who speaks."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk([_choice(i, {"delta": delta})]) for i in range(self._ask.n)] if self._chat else []

    def chunk(self, event: Piece | Finished) -> list[Json]:
        """What there is to send now; nothing for a piece that tells nothing."""
        if isinstance(event, Finished):
            self._finished[event.index] = event
            said: Json = {"delta": {}} if self._chat else {"text": ""}
            return [self._chunk([_choice(event.index, said, reason=event.reason)], minillm=_memory(event))]
        tokens = self._read(event)
        if not event.text and not tokens:
            return []
        said = {"delta": {"content": event.text}} if self._chat else {"text": event.text}
        return [self._chunk([_choice(event.index, said, self._logprobs(tokens) if tokens else None)])]

    def closing(self) -> list[Json]:
        """After the last `Finished`: what it all took, if that was asked for."""
        return [self._chunk([], usage=self._usage())] if self._ask.include_usage else []

    def add(self, event: Piece | Finished) -> None:
        """Note an event for `whole`."""
        if isinstance(event, Finished):
            self._finished[event.index] = event
        else:
            self._texts[event.index].append(event.text)
            self._tokens[event.index] += self._read(event)

    def whole(self) -> Json:
        """The one object, once every answer has finished."""
        choices, asked = [], self._ask.params.logprobs is not None
        for i, (texts, tokens) in enumerate(zip(self._texts, self._tokens, strict=True)):
            text = "".join(texts)
            message = {"role": "assistant", "content": text, "refusal": None}
            said: Json = {"message": message} if self._chat else {"text": text}
            choices.append(_choice(i, said, self._logprobs(tokens) if asked else None, self._finished[i].reason))
        name = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, "usage": self._usage()}

    def _chunk(self, choices: list[Json], **more: Json) -> Json:
        """With include_usage every chunk has the field, and all but the last say null."""
        usage = {"usage": None} if self._ask.include_usage else {}
        name = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._head, "object": name, "choices": choices, **usage, **more}

    def _usage(self) -> Json:
        """A prompt counts once, however many answers it got; "minillm" describes the first answer."""
        firsts = [self._finished[i] for i in range(0, len(self._texts), self._ask.n)]
        prompt = sum(first.usage.prompt_tokens for first in firsts)
        completion = sum(finished.usage.completion_tokens for finished in self._finished.values())
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": sum(first.cached_tokens for first in firsts)},
            "minillm": _memory(firsts[0]),
        }

    def _read(self, piece: Piece) -> list[Json]:
        """What there is to tell of each token of a piece, in the form of the endpoint."""
        if self._chat:
            return [self._chat_token(token) for token in piece.tokens if token is not None]
        ids = piece.token_ids or [token.token_id for token in piece.tokens if token is not None]
        spelled = [self._token_bytes(i) for i in ids]
        offsets = self._offsets[piece.index].push(piece.text, spelled)
        return [self._completion_token(*each) for each in zip(spelled, piece.tokens, offsets, strict=True)]

    def _logprobs(self, tokens: list[Json]) -> Json:
        if self._chat:
            return {"content": tokens, "refusal": None}
        return {column: [token[column] for token in tokens] for column in _COLUMNS}

    def _chat_token(self, token: TokenLogprob) -> Json:
        chosen, *top = [self._likely(*each) for each in ((token.token_id, token.logprob), *token.top)]
        return {**chosen, "top_logprobs": top}

    def _likely(self, token_id: int, logprob: float) -> Json:
        spelled = self._token_bytes(token_id)
        return {"token": token_string(spelled), "logprob": _finite(logprob), "bytes": list(spelled)}

    def _completion_token(self, spelled: bytes, token: TokenLogprob | None, offset: int) -> Json:
        return {
            "tokens": token_string(spelled),
            "token_logprobs": token and _finite(token.logprob),
            "top_logprobs": token and self._by_string(token),
            "text_offset": offset,
        }

    def _by_string(self, token: TokenLogprob) -> dict[str, float]:
        """The most likely tokens, best first, and the drawn one as OpenAI has it; of equal strings the best is told."""
        best: dict[str, float] = {}
        for i, logprob in (*token.top, (token.token_id, token.logprob)):
            best.setdefault(token_string(self._token_bytes(i)), _finite(logprob))
        return best


def token_string(spelled: bytes) -> str:
    """A token's text, or, where it is not whole characters, its bytes as OpenAI writes them: bytes:\\xe2\\x82."""
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class TextOffsets:
    """The character at which each token of a text begins; text and tokens come piece by piece.

    b"a", b"\\xc3", b"\\xa9", b"b" of "aéb" begin at 0, 1, 1, 2: half a character takes no room until it is whole.
    Nor does what is not shown: a token that begins a sequence, what a stop string cut off, the first word's space.
    """

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._length, self._rest = 0, ""  # characters so far; what the last token will show when the text goes on

    def push(self, text: str, tokens: Sequence[bytes]) -> list[int]:
        """The text goes on with `text`; the offsets of the tokens that it shows the beginning of."""
        start, at, offsets = self._length, self._pass(self._rest, text, 0), []
        self._length += len(text)
        for token in tokens:
            offsets.append(start + at)
            at = self._pass(self._utf8.decode(token), text, at)
        return offsets

    def _pass(self, token: str, text: str, at: int) -> int:
        """Where `text` goes on after a token, which may be shown in part, or without its space, or not at all."""
        self._rest = ""
        for shown in (token, token.removeprefix(" ")):
            here = text[at : at + len(shown)]
            if shown.startswith(here):
                self._rest = shown[len(here) :]
                return at + len(here)
        return at


def _choice(index: int, said: Json, logprobs: Json | None = None, reason: str | None = None) -> Json:
    return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}


def _memory(finished: Finished) -> Json:
    """Honest forgetting: how much of the sequence is still there."""
    usage = finished.usage
    return {
        "seen_tokens": usage.seen_tokens,
        "kept_tokens": usage.kept_tokens,
        "evicted_tokens": usage.evicted_tokens,
        "kept_range": list(usage.kept_range),
        "oldest_kept": usage.oldest_kept,
        "seed": finished.seed,
    }


def _finite(logprob: float) -> float:
    return max(logprob, _IMPOSSIBLE)
