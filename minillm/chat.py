"""Chat templates: from messages to the text a model was trained to answer.

A template comes with the checkpoint and is a foreign program.  It runs in `sandbox.py`, in a process of its own, with
limits on its size, output, memory and time.  This file must not know how text becomes ids: rendered text already holds
its special tokens, so encode it with bos=False.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from .errors import TemplateError
from .vocabulary import read_json, read_special_tokens

_MAX_TEMPLATE = 64 * 1024  # characters; real ones have up to 20,000
_MAX_OUTPUT = 1024 * 1024  # characters, beside those of the messages
_MAX_MEMORY = 512 * 1024 * 1024  # bytes, beside those of the messages
_ROLES = ("system", "user", "assistant")
_SENTINEL = "\ue000some text\ue001"  # private-use characters: no template and no message writes them

# -I and -S: nothing is imported but what this very process could import, and no site packages are searched again.
_CHILD = "import runpy, sys; sys.path[:] = {path!r}; runpy.run_path({file!r}, run_name='__main__')"


class Message(TypedDict):
    """One turn; role is "system", "user" or "assistant"."""

    role: str
    content: str


class ChatTemplate:
    """One Jinja template and the special tokens it may name. Rendering never runs inside this process."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, seconds: float = 10.0) -> None:
        """`special_tokens` such as {"bos_token": "<s>"}; `seconds` limits one rendering. TemplateError if too long."""
        if len(source) > _MAX_TEMPLATE:
            raise TemplateError(f"the chat template has {len(source)} characters; the limit is {_MAX_TEMPLATE}")
        self._source = source
        self._special_tokens = dict(special_tokens)
        self._seconds = seconds

    @property
    def source(self) -> str:
        """The template itself."""
        return self._source

    @classmethod
    def from_folder(cls, folder: Path) -> ChatTemplate | None:
        """The folder's chat_template.jinja, else tokenizer_config.json's chat_template; None if it has neither.

        Raises TemplateError for a template that cannot be read or chosen, CheckpointError for a broken configuration.
        """
        source: Any = read_json(folder / "tokenizer_config.json").get("chat_template")
        path = folder / "chat_template.jinja"
        if path.is_file():
            try:
                source = path.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise TemplateError(f"{path} is not UTF-8 text: download it again ({error.reason})") from None
        if isinstance(source, list):
            named = {entry.get("name"): entry.get("template") for entry in source if isinstance(entry, dict)}
            source = named.get("default")
            if source is None:
                raise TemplateError(f"{folder} has chat templates {sorted(map(str, named))} but none named 'default'")
        if source is None:
            return None
        if not isinstance(source, str):
            raise TemplateError(f"chat_template in {folder / 'tokenizer_config.json'} is not text")
        return cls(source, {name: token for name, token in read_special_tokens(folder).items() if token is not None})

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The whole conversation as text, special tokens included; encode it with bos=False.

        Raises TemplateError: a role or content that cannot be, what the template itself refuses, or a limit exceeded.
        """
        if not messages:
            raise TemplateError("the conversation is empty: give at least one message")
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in _ROLES:
                raise TemplateError(f"role {role!r} is not supported: use one of {', '.join(_ROLES)}")
            if not isinstance(content, str):
                raise TemplateError(f"the content of a {role} message is not text but {type(content).__name__}")
        plain = [{"role": message["role"], "content": message["content"]} for message in messages]
        variables = {
            **self._special_tokens,
            "messages": plain,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        return self._run(variables, sum(len(message["content"]) for message in plain))

    def render_turn(self, message: Message, *, system: str | None = None) -> str:
        """Only what a new user turn adds to a conversation that is already in the cache; its size is constant.

        It begins behind the previous answer's last word (so with its end-of-turn token) and ends with the prompt for
        the next answer.  `system` is the conversation's system message: some templates repeat it in the last turn.
        """
        earlier: list[Message] = [{"role": "user", "content": "."}, {"role": "assistant", "content": _SENTINEL}]
        if system is not None:
            earlier.insert(0, {"role": "system", "content": system})
        return self._around_sentinel([*earlier, message], "repeat earlier answers, so it cannot be fed turn by turn")[1]

    def render_around(self, earlier: Sequence[Message]) -> tuple[str, str]:
        """What stands before and after the text of a user message that follows `earlier`: for a text of any length."""
        question: Message = {"role": "user", "content": _SENTINEL}
        return self._around_sentinel([*earlier, question], "repeat the question, so no long text can stand in it")

    def _around_sentinel(self, messages: Sequence[Message], needs: str) -> tuple[str, str]:
        text = self.render(messages)
        if text.count(_SENTINEL) != 1:
            raise TemplateError(f"the chat template does not {needs}")
        before, _, after = text.partition(_SENTINEL)
        return before, after

    def _run(self, variables: dict[str, Any], chars: int) -> str:
        request = {
            "template": self._source,
            "variables": variables,
            "max_chars": _MAX_OUTPUT + 2 * chars,
            "max_bytes": _MAX_MEMORY + 64 * chars,
        }
        child = _CHILD.format(path=sys.path, file=str(Path(__file__).with_name("sandbox.py")))
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", "-c", child],
                input=json.dumps(request).encode(),
                capture_output=True,
                timeout=self._seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise TemplateError(f"the chat template did not finish within {self._seconds:g} s") from None
        if done.returncode != 0:
            reason = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or [f"exit {done.returncode}"]
            raise TemplateError(f"the chat template could not be rendered: {reason[0]}")
        reply = json.loads(done.stdout)
        if "error" in reply:
            raise TemplateError("the chat template failed: " + " ".join(reply["error"].split())[:500])
        return str(reply["text"])
