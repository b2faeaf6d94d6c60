"""From what a request says to the token ids that are fed: chat templates, and the beginning of a text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..chat import Message
from ..errors import ContextFullError, MinillmError, PromptError
from ..llm import LLM
from .fields import ApiError
from .protocol import Ask, Prompt

MOST_LOGPROBS = 1 << 17  # numbers that are kept until an answer ends, some 300 bytes each


def encoded(llm: LLM, ask: Ask, notes: dict[str, Any] | None) -> list[Tensor]:
    """Token ids [n] of every prompt.  notes: of the session that this goes on with; None where nothing was before.

    Takes a while: a template is rendered by a process of its own.  Raises ApiError.
    """
    try:
        prompts = [_tokens(llm, prompt, notes) for prompt in ask.prompts]
        for tokens in prompts:
            llm.plan.require_room(len(tokens) + (0 if notes is None else 1))
    except MinillmError as error:
        raise refusal(error, ask) from None
    _require_few_logprobs(llm, ask, prompts)
    return prompts


def refusal(error: MinillmError, ask: Ask) -> ApiError:
    """That a prompt cannot be read, because of what it is, or for want of room."""
    code = "context_length_exceeded" if isinstance(error, ContextFullError) else None
    return ApiError(400, str(error), param="messages" if ask.kind == "chat" else "prompt", code=code)


def _require_few_logprobs(llm: LLM, ask: Ask, prompts: list[Tensor]) -> None:
    params = ask.params
    if params.logprobs is None:
        return
    drawn = params.max_tokens if llm.plan.evicts else min(params.max_tokens, llm.plan.slots)
    tokens = ask.n * len(prompts) * drawn
    if params.prompt_logprobs is not None:
        tokens += ask.n * sum(len(prompt) for prompt in prompts)
    numbers = tokens * (1 + params.logprobs)
    if numbers > MOST_LOGPROBS:
        raise ApiError(
            400,
            f"{tokens:,} tokens with {1 + params.logprobs} log-probabilities each are {numbers:,} numbers; ask for "
            f"{MOST_LOGPROBS:,} at most: fewer tokens, fewer answers or fewer log-probabilities",
            param="logprobs",
        )


def text_of(llm: LLM, prompt: Prompt) -> str:
    """A prompt as it is echoed."""
    if isinstance(prompt, str):
        return prompt
    return llm.checkpoint.tokenizer.decode([token for token in prompt if isinstance(token, int)], continuation=True)


def continues(llm: LLM, ask: Ask) -> bool:
    """Whether an answer goes on with the text of its prompt, so that a space before its first word is real."""
    return ask.kind == "completion" or llm.checkpoint.template is None


def _tokens(llm: LLM, prompt: Prompt, notes: dict[str, Any] | None) -> Tensor:
    if isinstance(prompt, str):
        return _text(llm, prompt, notes)
    if isinstance(prompt[0], int):
        return llm.ids(prompt)
    messages: Sequence[Message] = prompt
    template = llm.checkpoint.template
    if template is None:  # as `minillm chat` does: the model goes on with the text
        return _text(llm, "\n".join(message["content"] for message in messages), notes)
    if notes is None:
        text = template.render(messages)
    elif len(messages) == 1 and messages[0]["role"] == "user":
        text = template.render_turn(messages[0], system=notes.get("system"))
    else:
        raise PromptError(
            "a session that goes on takes one user message, and keeps the earlier ones itself: send only what is new"
        )
    return torch.tensor(llm.checkpoint.tokenizer.encode(text, bos=False), dtype=torch.int32)  # [n]


def _text(llm: LLM, text: str, notes: dict[str, Any] | None) -> Tensor:
    if notes is None:
        return llm.encode(text, raw=True)
    ids = llm.checkpoint.tokenizer.encode(text, bos=False, continuation=True)
    if not ids:
        raise PromptError("the prompt is empty: give some text")
    return torch.tensor(ids, dtype=torch.int32)  # [n]
