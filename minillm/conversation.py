"""A conversation: a session, and the chat template that says how a message is written.

talk = Conversation(LLM.load("qwen2.5-0.5b", budget=2048), system="Answer briefly.", pin_system=True)
for piece in talk.send("Why is the sky blue?"):
    print(piece, end="")
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .answer import Progress, collect
from .cache import MAX_POSITION
from .errors import PromptError
from .llm import encode_prompt
from .results import Usage
from .sampling import SamplingParams
from .stream import Stream

if TYPE_CHECKING:
    from .llm import LLM


class Conversation:
    """A conversation that lives in an LLM's one bounded cache: only what is new is fed, and memory never grows.

    Without a chat template, or `raw`, the text is fed as it is, and the model goes on with it.
    """

    def __init__(self, llm: LLM, *, system: str | None = None, pin_system: bool = False, raw: bool = False) -> None:
        """pin_system: never evict what stands before the first message."""
        self.template = None if raw else llm.checkpoint.template
        if (system is not None or pin_system) and self.template is None:
            raise PromptError("a system message needs a chat template, and this model has none (or raw turns it off)")
        if pin_system and system is None:
            raise PromptError("there is no system message to pin: give one, or leave pin_system out")
        self.llm, self.system, self.pin_system = llm, system, pin_system
        self.reset()

    def reset(self) -> None:
        """Start again, with the same system message."""
        self.session = self.llm.session()
        self.session.notes = {"system": self.system, "pin_system": self.pin_system}

    def usage(self) -> Usage:
        """What the cache has seen of the conversation, and keeps."""
        return self.session.usage()

    def send(
        self,
        text: str | Iterator[str],
        params: SamplingParams | None = None,
        *,
        pin: bool = False,
        progress: Progress | None = None,
        **sampling: object,
    ) -> Stream:
        """Feed one user message, given whole or in pieces, and stream the answer; arguments as in `LLM.stream`.

        pin: never evict the message.
        """
        session, begins = self.session, self.session.seen == 0
        params, tokens, pins = self.llm._params(params, sampling), self._encode(text), []
        if pin or (begins and self.pin_system):
            tokens = tokens if isinstance(tokens, Tensor) else collect(tokens, MAX_POSITION)  # [n]
            opening = self._opening(tokens) if begins else 0
            pins = [(0, opening)] if begins and self.pin_system else []
            pins += [(opening, len(tokens))] if pin else []
        session.use(params)
        return session.stream(tokens, pins=pins, continuation=self.template is None, progress=progress)

    def go_on(self, params: SamplingParams | None = None, **sampling: object) -> Stream:
        """Continue the last answer where it was cut off."""
        self.session.use(self.llm._params(params, sampling))
        return self.session.stream(None)

    def save(self, path: str | Path) -> None:
        """See Session.save."""
        self.session.save(path)

    def load(self, path: str | Path) -> None:
        """See Session.load; the system message is the saved one."""
        self.session.load(path)
        notes = self.session.notes
        self.system, self.pin_system = notes.get("system"), bool(notes.get("pin_system"))

    def _encode(self, text: str | Iterator[str]) -> Tensor | Iterator[Tensor]:
        """What a message adds to the conversation."""
        if self.session.seen == 0:
            if isinstance(text, str):
                return self.llm.encode(text, raw=self.template is None, system=self.system)
            return encode_prompt(self.llm.checkpoint, text, raw=self.template is None, system=self.system)
        if self.template is None:
            return self.session.encode(text)
        turn = self.template.render_turn({"role": "user", "content": "".join(text)}, system=self.system)
        return torch.tensor(self.llm.checkpoint.tokenizer.encode(turn, bos=False), dtype=torch.int32)  # [n]

    def _opening(self, tokens: Tensor) -> int:
        """How many of the first message's tokens [n] stand before its text: its system message."""
        if self.system is None or self.template is None:
            return 0
        before, _ = self.template.render_around([{"role": "system", "content": self.system}])
        alone = torch.tensor(self.llm.checkpoint.tokenizer.encode(before, bos=False))  # [m]
        length = min(len(alone), len(tokens))
        return int((alone[:length] == tokens[:length]).cumprod(0).sum())  # all but a token that both share
